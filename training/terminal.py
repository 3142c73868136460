"""The user's terminal and signals while Ray runs in the same process."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO


@contextmanager
def output_to(log_file: Path) -> Iterator[TextIO]:
    """Send whatever this process and Ray's C++ parts print to a file, and yield the real stdout.

    The file descriptors themselves are redirected: Ray's core writes to them directly.

    Args:
        log_file: Appended to.

    Yields:
        A text stream on the stdout that was.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved_stdout, saved_stderr = os.dup(1), os.dup(2)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("policyserve")
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        with os.fdopen(os.dup(saved_stdout), "w", encoding="utf-8", errors="replace") as stdout:
            yield stdout
    finally:
        ours.removeHandler(handler)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved_stdout, 1)
        os.dup2(saved_stderr, 2)
        for descriptor in (saved_stdout, saved_stderr, log):
            os.close(descriptor)


class Interrupts:
    """Notes SIGINT and SIGTERM, so that a run can save first; the second one ends it at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals in this block; the handlers before come back after it."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def is_set(self) -> bool:
        """Whether a signal came."""
        return self.signal_number is not None

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
