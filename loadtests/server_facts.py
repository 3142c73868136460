"""What the server's processes and the machine do while the load runs.

The server is known by the port that it listens on, where that is on this machine; whatever
belongs to it (replicas, HAProxy, Ray's own processes) is counted with it.
"""

from __future__ import annotations

import contextlib
import math
import platform
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_LOOK_AROUND_S = 5.0
_VERSIONS = ("policyserve", "ray", "onnxruntime", "uvicorn", "uvloop", "locust", "numpy")


@dataclass
class ServerSamples:
    """CPU and memory over time; NaN while no process of the server was found.

    Attributes:
        at_s: When each sample was taken, in seconds of `time.perf_counter()`.
        cpu_percent: Of one core, all processes of the server together.
        rss_mb: Their resident memory (shared pages are counted in each), in 10**6 bytes.
        machine_cpu_percent: Of all cores, everything that runs there.
        processes: How many were found, by name.
    """

    at_s: list[float] = field(default_factory=list)
    cpu_percent: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    machine_cpu_percent: list[float] = field(default_factory=list)
    processes: dict[str, int] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        """Whether the server's processes were found."""
        return bool(self.processes)


class ServerWatch:
    """Takes samples in a thread, as a context manager; `samples` has them."""

    def __init__(self, host: str, port: int, *, interval_s: float) -> None:
        self.samples = ServerSamples()
        self._host = host
        self._port = port
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._cpu_s: dict[int, float] = {}

    def __enter__(self) -> ServerWatch:
        """Start."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        psutil.cpu_percent()
        heads = server_heads(self._host, self._port)
        family = server_processes(heads)
        looked = then = time.perf_counter()
        self._sample(family, 0.0)
        while not self._stop.wait(self._interval_s):
            now = time.perf_counter()
            if now - looked > _LOOK_AROUND_S:
                family, looked = server_processes(heads), now
            self._sample(family, now - then)
            then = now

    def _sample(self, family: Sequence[psutil.Process], elapsed_s: float) -> None:
        """Add a sample of the time since the last; the first only sets the clocks."""
        used_s, rss, names = 0.0, 0, dict[str, int]()
        for process in family:
            with contextlib.suppress(psutil.Error), process.oneshot():
                times = process.cpu_times()
                cpu_s = times.user + times.system
                used_s += cpu_s - self._cpu_s.get(process.pid, cpu_s)
                self._cpu_s[process.pid] = cpu_s
                rss += process.memory_info().rss
                name = _name(process)
                names[name] = names.get(name, 0) + 1
        machine = psutil.cpu_percent()
        if not elapsed_s:
            return
        samples = self.samples
        samples.at_s.append(time.perf_counter())
        samples.machine_cpu_percent.append(machine)
        samples.cpu_percent.append(100.0 * used_s / elapsed_s if names else math.nan)
        samples.rss_mb.append(rss / 1e6 if names else math.nan)
        samples.processes = names or samples.processes


def _name(process: psutil.Process) -> str:
    """A process's name without what numbers it."""
    title = process.cmdline()[:1]
    if title and title[0].startswith("ray::"):
        return title[0].split("(")[0].split(":replica")[0].strip()
    return process.name()


def server_heads(host: str, port: int) -> list[psutil.Process]:
    """The first process of each server that listens on a port; none on another machine.

    Looks into every process, which takes tens of milliseconds: for before the load.
    """
    if not _is_here(host):
        return []
    try:
        listening = {
            entry.pid
            for entry in psutil.net_connections("tcp")
            if entry.status == psutil.CONN_LISTEN and entry.laddr[1:] == (port,) and entry.pid
        }
    except psutil.Error:
        return []
    found: dict[int, psutil.Process] = {}
    for pid in listening:
        with contextlib.suppress(psutil.Error):
            head = _head(psutil.Process(pid))
            found[head.pid] = head
    return list(found.values())


def server_processes(heads: Sequence[psutil.Process]) -> list[psutil.Process]:
    """All processes of a server."""
    found: list[psutil.Process] = []
    for head in heads:
        with contextlib.suppress(psutil.Error):
            found += _family(head)
    return found


def _family(head: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started; not this one, and not the driver that this one started."""
    own = psutil.Process()
    if head == own:
        return [own]
    family = [head, *head.children(recursive=True)]
    if own not in family:
        return family
    ours = {own, *own.children(recursive=True)}
    return [process for process in family if process not in ours]


def _head(process: psutil.Process) -> psutil.Process:
    """The first process of the server that this one belongs to."""
    for parent in process.parents():
        if not _is_of_server(parent):
            break
        process = parent
    return process


def _is_of_server(process: psutil.Process) -> bool:
    """Whether a process only exists to serve: Ray's own, and `policyserve serve`."""
    with contextlib.suppress(psutil.Error):
        line = process.cmdline()
        name = Path(line[0]).name if line else ""
        if name == "raylet" or name.startswith("ray::"):
            return True
        return "serve" in line and any(Path(part).stem == "policyserve" for part in line)
    return False


def _is_here(host: str) -> bool:
    """Whether a name is of this machine."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {
        address.address.split("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
    }
    return any(address in own or str(address).startswith("127.") for address in found)


def machine_facts() -> dict[str, Any]:
    """Where the driver ran."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": {name: found for name in _VERSIONS if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
