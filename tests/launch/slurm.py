"""A cluster of two nodes on this machine: real munged, slurmctld and slurmd, on the loopback interface.

    with Cluster(folder) as cluster:
        cluster.run("sbatch", "job.sbatch")

Each slurmd has a host name and an /etc/hosts of its own, by Linux namespaces, so tasks find each other as on two
machines. Files, processors and memory are shared. It needs root and Debian's slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
NODES = ("node1", "node2")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait={kill_wait}
MailProg=/bin/true
NodeName=node1 NodeHostname=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=node2 NodeHostname=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""
NODE = "mount --bind {folder}/hosts /etc/hosts && hostname {name} && exec slurmd -D -N {name}"


def missing() -> str:
    """Why there can be no cluster here; "": there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid():
        return "the daemons of Slurm need root"
    done = subprocess.run(["unshare", "-u", "-m", "true"], capture_output=True, text=True, check=False)
    return f"no namespaces: {done.stderr.strip()}" if done.returncode else ""


def path() -> str:
    """The search path with the folders of daemons."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Cluster:
    """A cluster that runs between `__enter__` and `__exit__`.

    Args:
        folder: an empty folder for its state and logs.
        kill_wait: seconds between SIGTERM and SIGKILL for processes that are to end.
    """

    def __init__(self, folder: Path, kill_wait: int = 5) -> None:
        self.folder, self.kill_wait = folder, kill_wait
        self.environment = {**os.environ, "PATH": path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons = ExitStack()

    def __enter__(self) -> Cluster:
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", *NODES)))
        text = CONFIGURATION.format(folder=folder, ports=_free_ports(3), kill_wait=self.kill_wait)
        (folder / "slurm.conf").write_text(text)
        with ExitStack() as stack:
            munge = ["socket", "pid-file", "log-file", "seed-file"]
            options = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in munge]
            self._start(stack, "munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *options)
            _wait_for(lambda: (folder / "munge.socket").exists(), "munged", self.said)
            self._start(stack, "slurmctld", "-D", "-c", "-i")
            for name in NODES:
                self._start(stack, "unshare", "-u", "-m", "sh", "-c", NODE.format(folder=folder, name=name))
            idle = ["sinfo", "--noheader", "--Node", "--format=%T"]
            _wait_for(lambda: self._try(*idle).split() == ["idle"] * len(NODES), "nodes", self.said)
            self._daemons = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run("scancel", "--user=root", "--signal=KILL", "--full")
        self.run("scancel", "--user=root")
        self._daemons.close()

    def run(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job, as `scontrol show job` has them."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def said(self) -> str:
        """The ends of the daemons' logs."""
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.txt")])
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def _try(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def _start(self, stack: ExitStack, *command: str) -> None:
        path = self.folder / f"{command[0]}-{len(os.listdir(self.folder))}.txt"
        log = stack.enter_context(path.open("wb"))
        daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

        def stop() -> None:
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

        stack.callback(stop)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def _wait_for(true: Callable[[], bool], what: str, said: Callable[[], str], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what} did not come up in {seconds} s\n{said()}"
        time.sleep(0.1)
