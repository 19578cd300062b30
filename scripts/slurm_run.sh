#!/bin/sh
# Submits a run to Slurm with the arguments of the original's script of this name.
# usage: scripts/slurm_run.sh GPUS GPUS_PER_NODE JOB QUOTA PARTITION SCRIPT CONFIG [KEY=VALUE ...]
#
#   GPUS            all of the job; a multiple of GPUS_PER_NODE, or fewer than that
#   QUOTA           its quality of service; the option of sbatch for it is qos, or what QUOTA_OPTION says; "-": none
#   SCRIPT          train.py, evaluate.py or inference.py, with any path before it; the command follows from it
#   CONFIG          a YAML file of this project (configs/); the input file for inference.py
#
# OPTIONS has further options of `mmi launch slurm`, DRY_RUN=1 writes the script without submitting it.
set -eu
if [ $# -lt 7 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
gpus=$1 per_node=$2 job=$3 quota=$4 partition=$5 script=$6
shift 6

case $gpus$per_node in
    *[!0-9]*) echo "error: GPUS and GPUS_PER_NODE must be numbers, not '$gpus' and '$per_node'" >&2; exit 2 ;;
esac
if [ "$gpus" -lt "$per_node" ]; then per_node=$gpus; fi
if [ "$per_node" -eq 0 ] || [ $((gpus % per_node)) -ne 0 ]; then
    echo "error: $gpus GPUS are no multiple of $per_node GPUS_PER_NODE" >&2
    exit 2
fi
case ${script##*/} in
    train.py) command=train ;;
    evaluate.py) command=evaluate ;;
    inference.py) command=generate ;;
    *) echo "error: no command stands for '$script'; known: train.py, evaluate.py, inference.py" >&2; exit 2 ;;
esac

set -- --command "$command" "$@"
if [ "$quota" != - ]; then set -- --option "${QUOTA_OPTION:-qos}=$quota" "$@"; fi
if [ -z "${DRY_RUN:-}" ]; then set -- --submit "$@"; fi
# shellcheck disable=SC2086  # OPTIONS are several words
exec "${PYTHON:-python}" -m mm_interleaved.cli launch slurm --nodes $((gpus / per_node)) --gpus-per-node "$per_node" \
    --job-name "$job" --partition "$partition" ${OPTIONS:-} "$@"
