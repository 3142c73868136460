"""Wake an event loop at given times, to microseconds.

An event loop's own timers count whole milliseconds (that is what epoll and libuv take), more than
a fast server needs for its answer. Linux' timerfd is a file that becomes readable at a time.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable

_CLOCK_MONOTONIC = 1  # what time.perf_counter reads on Linux
_TFD_NONBLOCK_CLOEXEC = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
_TFD_TIMER_ABSTIME = 1


class _TimerSpec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Alarm:
    """Calls back once at each time that it is set to; in use inside one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._spec = _TimerSpec()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int | None = None
        self._handle: asyncio.TimerHandle | None = None
        if hasattr(self._libc, "timerfd_create"):
            fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC)
            if fd >= 0:
                self._fd = fd
                loop.add_reader(fd, self._ring)

    @property
    def is_exact(self) -> bool:
        """False where the system has no timerfd: the alarm is late by up to a millisecond."""
        return self._fd is not None

    def set(self, at: float, now: float) -> None:
        """Ring at a time of `time.perf_counter()`, or at once if that has passed."""
        if self._fd is None:
            self._handle = self._loop.call_later(max(0.0, at - now), self._callback)
            return
        whole = int(at)
        self._spec.value_s = whole
        self._spec.value_ns = int((at - whole) * 1e9)
        self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None)

    def _ring(self) -> None:
        assert self._fd is not None
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # set anew meanwhile
            return
        self._callback()

    def close(self) -> None:
        """Ring no more."""
        if self._handle is not None:
            self._handle.cancel()
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None
