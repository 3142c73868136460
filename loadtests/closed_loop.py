"""Closed-loop load: users that each ask again when they have their answer."""

from __future__ import annotations

import asyncio
from time import perf_counter

from loadtests.alarm import Alarm
from loadtests.connections import Connection
from loadtests.loop import Loop

_PROBE_S = 0.005
_REDIAL_S = 0.05


class ClosedLoop(Loop):
    """Users that each ask again when they have their answer."""

    async def run(self) -> None:
        """Ask until the time is over, and wait for the last answers."""
        self._is_held = True  # until all are there
        self._held: list[Connection] = []
        for _ in range(self._plan.users):
            self._dial()
        while self._dialling:
            await asyncio.gather(*self._dialling)
        self.started = perf_counter()
        self._until = self.started + self._plan.duration_s
        self._probe_at = self.started + _PROBE_S
        self._alarm = Alarm(self._loop, self._probe)
        self._probe()
        self._look()
        self._is_held = False
        for connection in self._held:
            self._free(connection)
        try:
            await asyncio.sleep(self._plan.duration_s)
        finally:
            self._alarm.close()
        self._is_sending = False
        await self._finish()

    def _probe(self) -> None:
        """Measure how late this process comes to what is due, apart from any request."""
        now = perf_counter()
        if now >= self._probe_at:
            self.recorder.lateness.append(now - self._probe_at)
            self._probe_at = now + _PROBE_S
        self._alarm.set(self._probe_at, now)

    def _free(self, connection: Connection) -> None:
        if self._is_held:
            self._held.append(connection)
            return
        now = perf_counter()
        if now < self._until:
            connection.ask(self._next(), now)

    def _replace(self) -> None:
        if self._is_sending:
            self._dial()

    def _retry(self, due: float) -> None:
        self.recorder.failed(due, perf_counter() - due, "the server closed the connection")
        self._replace()

    def _failed_to_answer(self) -> None:
        self._loop.call_later(_REDIAL_S, self._replace)

    def _failed_to_dial(self, reason: str) -> None:
        if self._is_sending:
            self.recorder.failed(perf_counter(), 0.0, reason)
            self._loop.call_later(_REDIAL_S, self._replace)
