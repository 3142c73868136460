"""The product's commands as processes, as a user starts them; nothing outlives a test."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.preloaded import ROOT, Preloaded

READY_S = 120.0
STOP_S = 60.0


def command(arguments: Sequence[str | Path]) -> list[str]:
    return [sys.executable, "-m", "policyserve", *map(str, arguments)]


# Those that import RLlib, which takes most of the time of a short run.
_PRELOADED_VERBS = ("train", "export", "evaluate")
_preloaded = Preloaded()
atexit.register(_preloaded.stop)


def policyserve(
    *arguments: str | Path,
    timeout_s: float = 240.0,
    env: Mapping[str, str] | None = None,
    in_new_interpreter: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Args:
        arguments: What follows `policyserve`.
        timeout_s: After this it is killed.
        env: Environment variables beside this process's own.
        in_new_interpreter: Start Python anew, as a user does, also where the command would be
            forked from `tests.preloaded`: for tests that look at what an import says or does.
    """
    if arguments[0] not in _PRELOADED_VERBS or {"-h", "--help"} & set(map(str, arguments)):
        in_new_interpreter = True
    return python(
        *("-m", "policyserve", *arguments),
        timeout_s=timeout_s,
        env=env,
        in_new_interpreter=in_new_interpreter,
    )


def python(
    *arguments: str | Path,
    timeout_s: float = 240.0,
    env: Mapping[str, str] | None = None,
    in_new_interpreter: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ...` or `python -c CODE ...`, which import RLlib, to its end."""
    words = list(map(str, arguments))
    environment = {**os.environ, **(env or {})}
    if not in_new_interpreter:
        return _preloaded.run(words, cwd=ROOT, env=environment, timeout_s=timeout_s)
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=ROOT,
        env=environment,
    )


def succeed(*arguments: str | Path, **options: Any) -> str:
    """Run a command that has to end with 0; its standard output."""
    done = policyserve(*arguments, **options)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def refuse(*arguments: str | Path, exit_code: int, **options: Any) -> str:
    """Run a command that has to be refused with one line on standard error; the line."""
    done = policyserve(*arguments, **options)
    assert done.returncode == exit_code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, f"expected one line:\n{done.stderr}"
    assert lines[0].startswith("policyserve: error: ")
    return lines[0]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Wait for a condition with a deadline."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        pause.wait(0.05)


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie only waits for its parent to notice."""
    running = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    return running


@dataclass
class Server:
    """A running `policyserve serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def family(self) -> list[psutil.Process]:
        """Every process that it started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[psutil.Process]:
        """Its Serve replicas."""
        return [child for child in self.family() if _title(child).startswith("ray::ServeReplica")]

    def stop(self, number: int = signal.SIGINT) -> int:
        """End it with a signal; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@contextlib.contextmanager
def serving(
    *arguments: str | Path, log: Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server for the block; all its processes are gone after it, also when the block fails."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command(["serve", *arguments]),
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
        )
    family: list[psutil.Process] = []
    try:
        match: list[str] = []

        def is_ready() -> bool:
            assert process.poll() is None, f"exit {process.returncode}: {log.read_text()}"
            match[:] = re.findall(r"^ready (http://\S+)$", log.read_text(), flags=re.MULTILINE)
            return bool(match)

        wait_until(is_ready, "the server is ready", READY_S)
        server = Server(process, match[0], log)
        family = server.family()
        yield server
    finally:
        if process.poll() is None:
            family += psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        if process.poll() is None:
            process.kill()
            process.wait()
        _, alive = psutil.wait_procs(family, timeout=10)
        for leftover in alive:
            with contextlib.suppress(psutil.Error):
                leftover.kill()
