"""A policy server in a process of its own: BUNDLE SETTINGS. Prints its port; ends with its input.

So that what a test does to the server (stop it for a moment, kill it) does not happen to the
load's driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.processes import ROOT


class OwnServer:
    """One that runs; its one policy is called `policy`."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/policies/policy"

    def kill(self) -> None:
        self.process.kill()

    @contextlib.contextmanager
    def stalling(self, stall_s: float, period_s: float) -> Iterator[None]:
        """Stop the whole process for a moment, again and again."""
        is_over = threading.Event()

        def stall() -> None:
            while not is_over.wait(period_s - stall_s):
                self.process.send_signal(signal.SIGSTOP)
                is_over.wait(stall_s)
                self.process.send_signal(signal.SIGCONT)

        thread = threading.Thread(target=stall)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def own_server(bundle: Path, **settings: Any) -> Iterator[OwnServer]:
    """Start one, with settings of `ServingConfig`."""
    command = [sys.executable, "-m", __name__, str(bundle), json.dumps(settings)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        try:
            yield OwnServer(process, int(process.stdout.readline()))
        finally:
            process.kill()


def main() -> None:
    from tests.serving.conftest import serving

    bundle, settings = sys.argv[1:]
    with serving({"policy": Path(bundle)}, **json.loads(settings)) as server:
        print(server.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
