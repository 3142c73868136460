"""A served policy over one WebSocket, for asyncio: many steps on their way at once.

    async with AsyncStreamClient("http://127.0.0.1:8000/v1/policies/cartpole") as policy:
        actions = await asyncio.gather(*map(policy.compute_action, observations))

Loads no Ray, no torch and no onnxruntime.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from serving import calls
from serving.calls import Dialect, T
from serving.client import AsyncPolicyClient
from serving.dialects.binary_client import BinaryClientCodec
from serving.endpoint import Endpoint
from serving.errors import (
    BodyTooLargeError,
    ConnectionFailedError,
    DeadlineExceededError,
    PolicyServingError,
    UnexpectedAnswerError,
)
from serving.stream_wire import StreamWire, read_answer, replaced


class _AsyncConnection(asyncio.Protocol):
    """A stream with many requests on their way; answers come in the order of the requests."""

    def __init__(self, endpoint: Endpoint, read: Callable[[bytes], Any]) -> None:
        """Store.

        Args:
            endpoint: Where it leads.
            read: What the bytes of a frame hold, or None.
        """
        loop = asyncio.get_running_loop()
        self.greeting: asyncio.Future[Mapping[str, Any]] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.has_answered = False
        self.last_read = time.monotonic()
        self._loop = loop
        self._endpoint = endpoint
        self._read = read
        self._wire = StreamWire(endpoint)
        self._transport: asyncio.Transport | None = None
        self._asked: deque[tuple[asyncio.Future[Mapping[str, Any]], int]] = deque()
        self._unsent: list[bytes] = []
        # Whether there is room for more requests: the server reads what was sent.
        self.may_write = asyncio.Event()
        self.may_write.set()

    @property
    def is_over(self) -> bool:
        """Whether it takes no more requests."""
        return self._wire.error is not None or self.closed.done()

    def ask(self, body: bytes) -> asyncio.Future[Mapping[str, Any]]:
        """Send a request; the future gets its answer or its error."""
        future: asyncio.Future[Mapping[str, Any]] = self._loop.create_future()
        if self.is_over:
            future.set_exception(self._wire.error or self._endpoint.no_answer("it was closed"))
            return future
        self._asked.append((future, len(body)))
        if not self._unsent:
            # All that is asked in one turn of the loop leaves in one piece.
            self._loop.call_soon(self._flush)
        self._unsent.append(self._wire.frame(body))
        return future

    def _flush(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        self._write(data)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for a stream."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._wire.request())

    def data_received(self, data: bytes) -> None:
        """Give the answers to who waits for them."""
        self.last_read = time.monotonic()
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        for message in self._wire.feed(data):
            self._take(message)
        if self._wire.has_replies:
            self._write(self._wire.to_send())
        if self._wire.error is not None:
            self._fail(self._wire.error)
            self.abort()

    def _take(self, message: bytes) -> None:
        future = self.greeting
        if future.done():
            if not self._asked:
                self._fail(UnexpectedAnswerError(f"{self._endpoint.origin} answered nothing asked"))
                self.abort()
                return
            future, _ = self._asked.popleft()
            self.has_answered = True
        if future.done():
            return  # nobody waits any more
        try:
            future.set_result(read_answer(self._endpoint, self._read(message)))
        except PolicyServingError as exc:
            future.set_exception(exc)

    def _fail(self, error: PolicyServingError) -> None:
        """Tell everybody who waits that there will be no answer."""
        if not self.greeting.done():
            self.greeting.set_exception(error)
        asked, self._asked = self._asked, deque()
        largest = max((size for _, size in asked), default=0)
        for future, size in asked:
            if future.done():
                continue
            if isinstance(error, BodyTooLargeError) and size < largest:
                future.set_exception(self._endpoint.no_answer("another message was too large"))
            else:
                future.set_exception(error)

    def eof_received(self) -> None:
        """The server has ended it."""
        self._feed(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing will come any more."""
        self._wire.feed(b"")
        error = self._wire.error or self._endpoint.no_answer(exc or "it closed the connection")
        self._fail(error)
        self.may_write.set()
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        """The server does not read fast enough."""
        self.may_write.clear()

    def resume_writing(self) -> None:
        """It does again."""
        self.may_write.set()

    def abort(self) -> None:
        """Close at once; who waits gets an error."""
        if self._transport is not None:
            with contextlib.suppress(OSError):
                self._transport.close()

    async def close(self) -> None:
        """Say farewell and close."""
        if self._transport is not None and not self._transport.is_closing():
            self._flush()
            self._transport.write(self._wire.close_frame())
            self._transport.close()
            await self.closed


class AsyncStreamClient:
    """A served policy for asyncio: many steps on their way over one connection."""

    def __init__(
        self,
        url: str,
        *,
        policy: str | None = None,
        timeout_s: float = 10.0,
        max_retries: int = 3,
        backoff_s: float = 0.05,
        max_in_flight: int = 256,
    ) -> None:
        """See `StreamClient`; `max_in_flight` bounds the steps that wait for an answer."""
        self._endpoint = Endpoint(url, policy, max_retries, backoff_s)
        self._http = AsyncPolicyClient(
            url, policy=policy, timeout_s=timeout_s, max_retries=max_retries, backoff_s=backoff_s
        )
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(max_in_flight)
        self._learning = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._dialect: BinaryClientCodec | None = None
        self._policy_id: Any = None
        self._connection: _AsyncConnection | None = None

    async def describe(self) -> dict[str, Any]:
        """See `PolicyClient.describe`."""
        return await self._http.describe()

    compute_action = calls.awaiting(calls.compute_action)
    step = calls.awaiting(calls.step)
    compute_actions = calls.awaiting(calls.compute_actions)

    async def dialect(self) -> Dialect:
        """See `StreamClient.dialect`."""
        if self._dialect is None:
            async with self._learning:
                if self._dialect is None:
                    return await self._learn()
        return self._dialect

    async def _learn(self) -> BinaryClientCodec:
        described = await self.describe()
        self._dialect = BinaryClientCodec(described)
        self._policy_id = described.get("policy_id")
        self._endpoint.policy = self._endpoint.policy or str(described.get("policy"))
        return self._dialect

    async def exchange(self, body: bytes, /) -> Mapping[str, Any]:
        """See `StreamClient.exchange`."""
        attempt = 0
        was_lost = False
        written_by = self._dialect
        while True:
            connection = None
            try:
                async with self._slots:
                    connection = await self._connected()
                    if self._dialect is not written_by:
                        raise replaced(self._endpoint)
                    return await self._answer(connection, body)
            except PolicyServingError as exc:
                if (
                    isinstance(exc, ConnectionFailedError)
                    and connection is not None
                    and connection.has_answered
                    and not was_lost
                ):
                    was_lost = True  # see `StreamClient._lost`
                    continue
                pause_s = self._endpoint.pause_s(attempt, exc)
                if pause_s is None:
                    raise
            attempt += 1
            await asyncio.sleep(pause_s)

    async def _answer(self, connection: _AsyncConnection, body: bytes) -> Mapping[str, Any]:
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        future = connection.ask(body)
        timer = loop.call_later(self._timeout_s, self._expire, future)
        try:
            return await future
        except DeadlineExceededError:
            if connection.last_read < started:
                connection.abort()  # nothing came at all: it is dead, not slow
            raise
        finally:
            timer.cancel()

    def _expire(self, future: asyncio.Future[Mapping[str, Any]]) -> None:
        if not future.done():
            future.set_exception(self._endpoint.timed_out(self._timeout_s))

    async def _connected(self) -> _AsyncConnection:
        """The connection, opened where there is none that can be used."""
        if self._connection is None or self._connection.is_over:
            async with self._opening:
                if self._connection is None or self._connection.is_over:
                    self._connection = await self._open()
        connection = self._connection
        if not connection.may_write.is_set():
            await self._in_time(connection.may_write.wait())
        return connection

    async def _open(self) -> _AsyncConnection:
        dialect = await self.dialect()
        endpoint = self._endpoint
        connection = _AsyncConnection(endpoint, dialect.read)
        context = ssl.create_default_context() if endpoint.scheme == "https" else None
        try:
            await self._in_time(
                asyncio.get_running_loop().create_connection(
                    lambda: connection, endpoint.host, endpoint.port, ssl=context
                )
            )
            greeting = await self._in_time(connection.greeting)
        except (OSError, UnicodeError) as exc:
            raise endpoint.no_answer(exc) from exc
        except BaseException:
            connection.abort()
            raise
        if greeting.get("policy_id") != self._policy_id:
            await self._learn_again()
        return connection

    async def _learn_again(self) -> None:
        """Another policy greets: its spaces may be others."""
        before = self._dialect
        found = await self._learn()
        if before is not None and before.layout == found.layout:
            self._dialect = before

    async def _in_time(self, awaitable: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(awaitable, self._timeout_s)
        except (TimeoutError, asyncio.TimeoutError) as exc:
            raise self._endpoint.timed_out(self._timeout_s) from exc

    async def aclose(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            await self._connection.close()
        await self._http.aclose()

    async def __aenter__(self) -> AsyncStreamClient:
        """The client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.aclose()
