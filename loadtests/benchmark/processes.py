"""A server as a process tree: started clean, watched, and ended with everything it started."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from loadtests.errors import LoadTestError

_TOKEN = "POLICYSERVE_BENCH"
_STOP_S = 30.0
# What ends by itself after its server gets this long before it is killed.
_LINGER_S = 5.0
_QUIET_PERCENT = 10.0
_QUIET_SAMPLE_S = 0.5
# What a user's shell has, without this product's or this virtual environment's own switches.
_KEPT = ("PATH", "LANG", "LC_ALL", "TERM", "USER", "TZ")


class ServerProcess:
    """A started server and all its processes."""

    def __init__(self, command: Sequence[str], home: Path, log: Path) -> None:
        """Start it, in a session of its own and with a home of its own.

        Args:
            command: Program and arguments.
            home: Where it may keep caches and tokens.
            log: Where its output goes.
        """
        self._log = log
        token = secrets.token_hex(8)
        self._mark = f"{_TOKEN}={token}".encode()
        environment = clean_environment(home) | {_TOKEN: token}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise if it has ended.

        Raises:
            LoadTestError: With the last line it wrote.
        """
        code = self._process.poll()
        if code is not None:
            raise LoadTestError(f"the server ended with exit {code}: {self.last_line()}")

    def wait(self, timeout_s: float) -> None:
        """Wait for its end, at most so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def last_line(self) -> str:
        """The last line of its output."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it printed nothing"

    def members(self) -> list[psutil.Process]:
        """Every living process that belongs to it.

        By session, by descent and by a mark in the environment: servers leave the first two by
        forking into the background, and some overwrite the last.
        """
        mine = set()
        with contextlib.suppress(psutil.Error):
            mine = {child.pid for child in psutil.Process(self._process.pid).children(True)}
        found = []
        for process in psutil.process_iter():
            is_mine = process.pid in mine or process.pid == self._process.pid
            if (is_mine or self._owns(process.pid)) and not _is_dead(process):
                found.append(process)
        return found

    def _owns(self, pid: int) -> bool:
        try:
            if os.getsid(pid) == self._process.pid:
                return True
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    def stop(self) -> None:
        """End all of it: asked first, then killed."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        deadline = time.monotonic() + _LINGER_S
        while self.members() and time.monotonic() < deadline:
            psutil.wait_procs(self.members(), timeout=0.2)
        while left := self.members():
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=5.0)
        self._process.wait()


@contextlib.contextmanager
def running(command: Sequence[str], home: Path, log: Path) -> Iterator[ServerProcess]:
    """A server for one turn; all of it is gone at the end."""
    server = ServerProcess(command, home, log)
    try:
        yield server
    finally:
        server.stop()


def clean_environment(home: Path) -> dict[str, str]:
    """What a user's shell has, with another home."""
    kept = {key: os.environ[key] for key in _KEPT if key in os.environ}
    return {"PATH": os.defpath, "LANG": "C.UTF-8"} | kept | {"HOME": str(home)}


def _is_dead(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True


def memory_mib(processes: Sequence[psutil.Process]) -> float:
    """Memory of processes together, MiB; pages that they share are counted once."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 2**20


def replica_mib(processes: Sequence[psutil.Process]) -> float | None:
    """Resident memory of the largest of Ray Serve's replicas, MiB; None where there is none."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if any(part.startswith("ray::ServeReplica") for part in process.cmdline()):
                found.append(process.memory_info().rss / 2**20)
    return max(found, default=None)


def wait_until_quiet(deadline_s: float) -> bool:
    """Wait until the machine does nothing else; whether it came to that in time."""
    deadline = time.monotonic() + deadline_s
    while psutil.cpu_percent(interval=_QUIET_SAMPLE_S) > _QUIET_PERCENT:
        if time.monotonic() > deadline:
            return False
    return True


def free_ports(n: int) -> list[int]:
    """TCP ports of the loopback address that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(n)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
