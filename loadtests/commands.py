"""The product's own commands as child processes that never outlive this one's interest in them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# A training or a server saves and cleans up after a SIGTERM; what takes longer hangs.
_STOP_S = 60.0


def installed(name: str) -> list[str]:
    """How to start a console script of this installation.

    Not `python -m`, which puts the current directory first on the module path: a user's own
    `http.py` there would be imported instead of Python's.
    """
    script = Path(sys.executable).with_name(name)
    return [str(script)] if script.is_file() else [sys.executable, "-m", name]


def run(command: Sequence[str], *, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; when this process is interrupted, so is the command.

    Args:
        command: Program and arguments.
        capture: Return its output (both streams together) instead of letting it through.
    """
    stream = subprocess.PIPE if capture else None
    merged = subprocess.STDOUT if capture else None
    with subprocess.Popen(command, stdout=stream, stderr=merged, text=True) as process:
        try:
            output, _ = process.communicate()
        finally:
            stop(process)
    return subprocess.CompletedProcess(command, process.returncode, output or "")


def stop(process: subprocess.Popen[str]) -> None:
    """End a child that may still run: asked first, then killed."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
    if process.poll() is None:
        process.kill()
        process.wait()
