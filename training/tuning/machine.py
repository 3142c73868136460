"""How many trials fit on this machine at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from training.config import TrainingConfig

_TRIAL_BYTES = 900 * 2**20
"""Memory of a process with RLlib and torch that trains a small network (measured: 500 to 600 MB
resident), and room for its batches."""

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Resources:
    """What there is, or what a trial needs.

    Attributes:
        n_cpus: CPUs.
        n_gpus: GPUs.
        memory_bytes: Memory.
    """

    n_cpus: int
    n_gpus: int
    memory_bytes: int


def trial_resources(config: TrainingConfig) -> Resources:
    """What one trial needs: a CPU for its own process, and one for each that it starts."""
    n_processes = 1 + config.num_env_runners + config.evaluation.num_env_runners
    return Resources(n_processes, config.num_gpus, n_processes * _TRIAL_BYTES)


def machine_resources(*, n_gpus: int = 0) -> Resources:
    """What this process may use: its CPU affinity, its container's limits, the free memory.

    Args:
        n_gpus: CUDA GPUs that torch sees; it takes seconds to ask, so that the caller does where
            it matters.
    """
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        n_cpus = min(n_cpus or 1, max(1, int(quota) // int(period)))
    memory_bytes = psutil.virtual_memory().available
    limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit():
        memory_bytes = min(memory_bytes, max(0, int(limit) - int(used)))
    return Resources(n_cpus or 1, n_gpus, memory_bytes)


def fitting_trials(trial: Resources, machine: Resources) -> int:
    """How many trials fit at a time; at least one, which then shares what there is."""
    counts = [machine.n_cpus // trial.n_cpus, machine.memory_bytes // trial.memory_bytes]
    if trial.n_gpus:
        counts.append(machine.n_gpus // trial.n_gpus)
    return max(1, min(counts))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
