"""Open-loop load: requests are due at times that do not depend on the server.

Each latency counts from then: while a server stalls, the requests that pile up wait, and their
waiting is counted. A closed loop would send nothing meanwhile and hide the stall ("coordinated
omission").
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from time import perf_counter

import numpy as np

from loadtests.alarm import Alarm
from loadtests.connections import Connection, Dialler
from loadtests.loop import Loop
from loadtests.plan import Arrivals, LoadPlan
from loadtests.questions import Questions

NOT_SENT = "no connection was free in time"
_MAX_DIALLING = 64
_CHUNK = 4096
# Answers are read between bursts of this many late requests.
_BURST = 128


class OpenLoop(Loop):
    """Requests at given times over as many connections as are needed."""

    def __init__(self, plan: LoadPlan, questions: Questions, dial: Dialler) -> None:
        super().__init__(plan, questions, dial)
        self._idle: list[Connection] = []
        self._waiting: deque[float] = deque()

    async def run(self) -> None:
        """Send everything, and wait for the answers."""
        for _ in range(min(self._plan.users, self._plan.max_connections)):
            self._dial()
        await asyncio.gather(*self._dialling)
        self._arrivals = arrivals(self._plan)
        self._alarm = Alarm(self._loop, self._send_what_is_due)
        self.started = perf_counter()
        self._due = self.started + next(self._arrivals, np.inf)
        self._sent = self._loop.create_future()
        self._look()
        self._send_what_is_due()
        try:
            await self._sent
        finally:
            self._alarm.close()
        self._is_sending = False
        await self._finish()

    def _send_what_is_due(self) -> None:
        lateness = self.recorder.lateness
        now = perf_counter()
        burst = _BURST
        while self._due <= now:
            if not burst:
                self._loop.call_soon(self._send_what_is_due)
                return
            burst -= 1
            lateness.append(now - self._due)
            self._send(self._due)
            self._due = self.started + next(self._arrivals, np.inf)
            now = perf_counter()
        if self._due == np.inf:
            if not self._sent.done():
                self._sent.set_result(None)
            return
        self._alarm.set(self._due, now)

    def _send(self, due: float) -> None:
        idle = self._idle
        while idle:
            connection = idle.pop()
            if not connection.is_closing:
                connection.ask(self._next(), due)
                return
        self._waiting.append(due)
        self._dial_if_needed()

    def _dial_if_needed(self) -> None:
        n = len(self._dialling)
        if n < min(len(self._waiting), _MAX_DIALLING) and (
            n + len(self._connections) < self._plan.max_connections
        ):
            self._dial()

    def _free(self, connection: Connection) -> None:
        if self._waiting:
            connection.ask(self._next(), self._waiting.popleft())
        else:
            self._idle.append(connection)

    def _replace(self) -> None:
        self._dial_if_needed()

    def _retry(self, due: float) -> None:
        self._waiting.appendleft(due)
        self._dial_if_needed()

    def _failed_to_answer(self) -> None:
        self._dial_if_needed()

    def _failed_to_dial(self, reason: str) -> None:
        # Without any connection none of those that wait will find one.
        n = min(1, len(self._waiting)) if self._connections else len(self._waiting)
        now = perf_counter()
        for _ in range(n):
            due = self._waiting.popleft()
            self.recorder.failed(due, now - due, reason)

    def _expire(self, now: float) -> None:
        waiting = self._waiting
        while waiting and now - waiting[0] > self._plan.timeout_s:
            due = waiting.popleft()
            self.recorder.failed(due, now - due, NOT_SENT)
        self._dial_if_needed()

    def _n_waiting(self) -> int:
        return len(self._waiting)


def arrivals(plan: LoadPlan) -> Iterator[float]:
    """When the requests of an open loop are due, in seconds since its start."""
    assert plan.rate is not None
    if plan.arrivals is Arrivals.constant:
        n = int(np.ceil(plan.duration_s * plan.rate - 1e-9))
        yield from (index / plan.rate for index in range(n))
        return
    rng = np.random.default_rng(plan.seed)
    at = 0.0
    while True:
        for gap in rng.exponential(1.0 / plan.rate, _CHUNK).tolist():
            at += gap
            if at >= plan.duration_s:
                return
            yield at
