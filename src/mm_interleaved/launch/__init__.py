"""Runs of several processes: who takes part, how they are started, and what happens when one of them fails.

    slurm      rank, world size, local rank and rendezvous of a task that `srun` started
    script     writes batch scripts for Slurm
    exits      exit statuses of runs

It imports no PyTorch.
"""

from .slurm import count_processes, expand_nodes, join_processes

__all__ = ["count_processes", "expand_nodes", "join_processes"]
