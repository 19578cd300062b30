"""Runs of several processes: who takes part, how they are started, and what happens when one of them fails.

    slurm      rank, world size, local rank and rendezvous of a task that `srun` started
    script     writes batch scripts for Slurm
    exits      exit statuses of runs
    peers      what processes know of each other: who has ended, who is late (imports PyTorch)
    traces     records of NCCL's operations

The package itself imports no PyTorch.
"""

from .slurm import count_processes, expand_nodes, join_processes

__all__ = ["count_processes", "expand_nodes", "join_processes"]
