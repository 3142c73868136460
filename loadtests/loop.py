"""What the driver's open and closed loop share: connections, time-outs, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from time import perf_counter

from loadtests.connections import Connection, Dialler
from loadtests.plan import LoadPlan
from loadtests.questions import Questions
from loadtests.recording import Recorder

# An idle connection that is closed as a request arrives is a race of keep-alive, not an error, if
# it was idle for longer than this; the request goes out once more.
_IDLE_S = 1.0
_LOOK_S = 0.1


class Loop:
    """What both loops share: connections, time-outs, and the end."""

    def __init__(self, plan: LoadPlan, questions: Questions, dial: Dialler) -> None:
        self.questions = questions
        self.recorder = Recorder()
        self.n_retries = 0
        self.most_connections = 0
        self._plan = plan
        self._dialler = dial
        self._next = itertools.cycle(range(len(questions))).__next__
        self._connections: set[Connection] = set()
        self._dialling: set[asyncio.Task[None]] = set()
        self._is_sending = True
        self._is_over = False
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self.started = self.ended = 0.0
        self._group = self.recorder.group("query")
        self._answered_at = 0.0

    def answered(self, connection: Connection, problem: str | None) -> None:
        """One request is over; the connection is free."""
        now = connection.since
        latency = now - connection.due
        self._answered_at = now
        if problem is None:
            self.recorder.ok(connection.due, latency, n_observations=self.questions.n_observations)
        else:
            self.recorder.failed(connection.due, latency, problem)
        if connection.is_closing:
            self._drop(connection)
            connection.close()
            self._replace()
        else:
            self._free(connection)
        if not self._is_sending:
            self._look_whether_done()

    def lost(self, connection: Connection, reason: str) -> None:
        """A connection is gone, perhaps with a request."""
        self._drop(connection)
        if self._is_over:
            return
        if connection.is_busy:
            connection.is_busy = False
            if connection.sent - connection.since > _IDLE_S:
                self.n_retries += 1
                self._retry(connection.due)
            else:
                self.recorder.failed(connection.due, perf_counter() - connection.due, reason)
                self._failed_to_answer()
        elif perf_counter() - connection.since < _IDLE_S:
            self._failed_to_dial(reason)  # closed as soon as it was opened
        self._look_whether_done()

    def opened(self, connection: Connection) -> None:
        """A connection is there."""
        self._connections.add(connection)
        self._free(connection)

    def _dial(self) -> None:
        task = self._loop.create_task(self._dial_one())
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)

    async def _dial_one(self) -> None:
        try:
            connection = await self._dialler.dial(self)
        except (OSError, asyncio.TimeoutError) as exc:
            if not self._is_over:
                reason = (exc.strerror if isinstance(exc, OSError) else None) or "timed out"
                self._failed_to_dial(f"could not connect: {reason}")
                self._look_whether_done()
            return
        if not connection.is_closing:
            self._connections.add(connection)
            self.most_connections = max(self.most_connections, len(self._connections))

    def _drop(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def _look(self) -> None:
        """Give up what has waited too long."""
        now = perf_counter()
        for connection in list(self._connections):
            if connection.is_busy and now - connection.sent > self._plan.timeout_s:
                self._give_up(connection, now)
            elif not connection.is_ready and now - connection.since > self._plan.timeout_s:
                self._drop(connection)
                connection.close()
                self._failed_to_dial("the server did not greet in time")
        self._expire(now)
        self._look_whether_done()
        if not self._finished.done():
            self._loop.call_later(_LOOK_S, self._look)

    def _give_up(self, connection: Connection, now: float) -> None:
        connection.is_busy = False
        why = f"no answer within {self._plan.timeout_s:g} s"
        self.recorder.failed(connection.due, now - connection.due, why)
        self._drop(connection)
        connection.close()
        self._replace()

    def _look_whether_done(self) -> None:
        if self._is_sending or self._finished.done() or self._n_waiting():
            return
        if not any(connection.is_busy for connection in self._connections):
            self._finished.set_result(None)

    async def _finish(self) -> None:
        """Wait until everything sent is answered or given up; close everything."""
        self._look_whether_done()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._finished, 2.0 * self._plan.timeout_s + 5.0)
        self._is_over = True
        self.ended = max(self._answered_at, self.started + self._plan.duration_s)
        for task in self._dialling:
            task.cancel()
        for connection in list(self._connections):
            connection.close()
        await asyncio.sleep(0)

    def _free(self, connection: Connection) -> None:
        raise NotImplementedError

    def _replace(self) -> None:
        """A connection was closed that had been in use."""

    def _retry(self, due: float) -> None:
        """Send a request again whose connection was idle for long and is gone."""
        raise NotImplementedError

    def _failed_to_answer(self) -> None:
        """A request was lost with its connection."""

    def _failed_to_dial(self, reason: str) -> None:
        raise NotImplementedError

    def _expire(self, now: float) -> None:
        """Give up what waits in the driver."""

    def _n_waiting(self) -> int:
        """Requests that wait in the driver."""
        return 0
