"""Ends a server's processes when the server is gone, however it went.

A process of its own, started beside a server with a pipe between them. When the pipe closes, the
server has stopped, or was killed: what still carries its mark in the environment, or has a file
in its directory open, is ended, and the directory removed. Ray's own agents else outlive a killed
server by a minute.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

RUNTIME_DIR_VARIABLE = "POLICYSERVE_RUNTIME_DIR"
_KEEP = b"keep"
_GRACE_S = 3.0
_WAIT_S = 30.0


@dataclass
class Afterwards:
    """What to do when a server has ended; set `keep_directory` to leave its logs."""

    keep_directory: bool = False


@contextlib.contextmanager
def reaped(runtime_dir: Path) -> Iterator[Afterwards]:
    """Whatever this block starts ends with it, also when this process is killed in it.

    Args:
        runtime_dir: The server's directory, removed at the end; `RUNTIME_DIR_VARIABLE` has to
            name it in the environment of everything that the block starts.
    """
    afterwards = Afterwards()
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.reaper", str(runtime_dir)],
        stdin=subprocess.PIPE,
        # A Ctrl-C reaches a terminal's whole process group, and this has to outlive it.
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        yield afterwards
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(_KEEP if afterwards.keep_directory else b"")
            process.stdin.close()
        process.wait(_WAIT_S)


def end_processes(runtime_dir: Path) -> None:
    """End every process of this user that carries the server's mark: first asked, then killed."""
    left = [process for process in psutil.process_iter() if _is_marked(process, runtime_dir)]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(left, timeout=_GRACE_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=_GRACE_S)


def _is_marked(process: psutil.Process, runtime_dir: Path) -> bool:
    if process.pid in (os.getpid(), os.getppid()):
        return False
    try:
        if process.environ().get(RUNTIME_DIR_VARIABLE) == str(runtime_dir):
            return True
        # Ray's processes write their titles over their environment, but all have a log there.
        return any(file.path.startswith(f"{runtime_dir}/") for file in process.open_files())
    except psutil.Error:
        return False  # another user's, or gone


def main() -> None:
    """Wait for the pipe to close, then clean up: `python -m serving.reaper RUNTIME_DIR`."""
    runtime_dir = Path(sys.argv[1])
    message = sys.stdin.buffer.read()
    end_processes(runtime_dir)
    if message != _KEEP:
        shutil.rmtree(runtime_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
