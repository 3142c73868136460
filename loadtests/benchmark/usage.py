"""Who used the processors during a measurement: the driver, the server, or somebody else."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Shares:
    """CPU time by the time that passed, in cores.

    Attributes:
        driver: Of the driver.
        server: Of the server's busiest process.
        other: Of everything that is neither the driver nor the server, and what the machine's
            host gave to others.
    """

    driver: float
    server: float
    other: float


@dataclass(frozen=True)
class _Usage:
    """CPU seconds so far.

    User time alone says who is "other": the kernel's time for the loopback is nobody's.
    """

    at: float
    server: Mapping[int, float]
    server_user: float
    driver: float
    driver_user: float
    machine_user: float


def measure_usage(members: Sequence[psutil.Process]) -> _Usage:
    """Look at the clocks.

    Args:
        members: The server's processes.
    """
    server, server_user = {}, 0.0
    for process in members:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            server[process.pid] = times.user + times.system
            server_user += times.user
    # Drivers are this process's children, and ended before this is asked again.
    driver = resource.getrusage(resource.RUSAGE_CHILDREN)
    machine = psutil.cpu_times()
    machine_user = machine.user + getattr(machine, "nice", 0.0) + getattr(machine, "steal", 0.0)
    driver_s = driver.ru_utime + driver.ru_stime
    return _Usage(time.monotonic(), server, server_user, driver_s, driver.ru_utime, machine_user)


def shares(before: _Usage, after: _Usage) -> Shares:
    """What was used between two looks."""
    passed = after.at - before.at
    used = [value - before.server.get(pid, 0.0) for pid, value in after.server.items()]
    ours = after.server_user - before.server_user + after.driver_user - before.driver_user
    return Shares(
        driver=(after.driver - before.driver) / passed,
        server=max(used, default=0.0) / passed,
        other=max(0.0, after.machine_user - before.machine_user - ours) / passed,
    )
