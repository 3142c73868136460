"""Waiting for another thread: on a condition, and not for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable

# For what hangs, not for what is slow: a busy machine may take its time. Nothing may be asserted
# not to happen within it.
DEADLINE_S = 60.0


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    """Wait for a condition of another thread, at most DEADLINE_S."""
    pause = threading.Event()
    for _ in range(int(DEADLINE_S / 0.002)):
        if is_true():
            return
        pause.wait(0.002)
    raise AssertionError(f"{what} did not happen within {DEADLINE_S:g} s")
