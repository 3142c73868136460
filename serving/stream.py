"""A stream: one connection of an environment's loop, a msgpack frame per step.

    carrier ─▶ StreamSession.receive ─▶ PlainLane, or PolicyService.submit ─▶ in order ─▶ send

Knows nothing of WebSockets: `serving.stream_protocol` and `serving.stream_endpoint` carry it.
docs/protocols.md says what clients see.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from serving.batching import Pending, Result
from serving.dialects.binary import BinaryCodec, Id, encode_error, frame_id
from serving.errors import (
    InvalidRequestError,
    PolicyNotReadyError,
    PolicyServingError,
    unexpected_error,
)
from serving.service import Answer, PolicyService, PolicyServices

SUBPROTOCOL = "policyserve.v1"
PREFIX = "/v1/policies/"
SUFFIX = "/stream"
# WebSocket close codes (RFC 6455, 7.4.1) and what is said with them.
GOING_AWAY = 1001
SHUTTING_DOWN = "server is shutting down"
MESSAGE_TOO_BIG = 1009
NO_ANSWER_TO_PINGS = 1011

logger = logging.getLogger("policyserve")


@dataclass(frozen=True)
class StreamSettings:
    """How streams behave.

    Attributes:
        max_message_bytes: Of the largest message; beyond it the connection is closed with 1009.
        max_unanswered: Frames of one connection without an answer; beyond it, it is not read.
        ping_interval_s: A connection on which nothing came for so long is pinged.
        dead_after_s: One on which nothing came for so long is closed.
        close_timeout_s: How long a client may take to answer a farewell.
    """

    max_message_bytes: int = 16 * 1024 * 1024
    max_unanswered: int = 128
    ping_interval_s: float = 20.0
    dead_after_s: float = 60.0
    close_timeout_s: float = 5.0


class Connection(Protocol):
    """An open stream, whatever carries it."""

    def drain(self) -> None:
        """Answer what has been received, then close."""
        ...

    def abort(self) -> None:
        """Close now."""
        ...


class StreamRegistry:
    """The open streams of one process.

    Attributes:
        services: The policies that can be streamed from.
        settings: Of every stream.
    """

    def __init__(self, services: PolicyServices, settings: StreamSettings) -> None:
        self.services = services
        self.settings = settings
        self._connections: set[Connection] = set()
        self._is_draining = False
        self._emptied: asyncio.Event | None = None

    def __len__(self) -> int:
        """How many are open."""
        return len(self._connections)

    def require(self, path: str) -> PolicyService:
        """The policy of a stream's path.

        Raises:
            UnknownPolicyError: There is none of that name.
            PolicyNotReadyError: The server is shutting down.
        """
        if self._is_draining:
            raise PolicyNotReadyError(SHUTTING_DOWN)
        self.services.require_ready()
        return self.services.require(path[len(PREFIX) : -len(SUFFIX)])

    def add(self, connection: Connection) -> None:
        """A stream has opened."""
        self._connections.add(connection)

    def discard(self, connection: Connection) -> None:
        """A stream has gone."""
        self._connections.discard(connection)
        if self._emptied is not None and not self._connections:
            self._emptied.set()

    async def drain(self, grace_s: float = 5.0) -> None:
        """Answer what has been received, say farewell, and return when all have gone.

        Args:
            grace_s: After so many seconds those that are left are cut off.
        """
        self._is_draining = True
        for connection in list(self._connections):
            connection.drain()
        if not self._connections:
            return
        self._emptied = asyncio.Event()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._emptied.wait(), grace_s)
        for connection in list(self._connections):
            connection.abort()


class _Call:
    """One frame, and its answer when it is there; a `serving.plain.Caller`."""

    __slots__ = ("answer", "arrived", "body", "is_gone", "pending", "session")

    def __init__(self, session: StreamSession, body: bytes) -> None:
        self.session = session
        self.body = body
        self.arrived = time.perf_counter()
        self.is_gone = False
        self.answer: bytes | None = None
        self.pending: Pending | None = None

    def age_s(self) -> float:
        """Seconds since the frame was read."""
        return time.perf_counter() - self.arrived

    def succeed(self, body: bytes) -> None:
        """Answer with a frame."""
        if self.answer is None:
            self.answer = body
            self.body = b""  # it may have to wait for those before it
            self.session.answered(self)

    def reply(self, answer: Answer) -> None:
        """Answer with what HTTP would have been answered."""
        if answer.status == 200:
            self.succeed(answer.body)
        else:
            self.succeed(msgspec.msgpack.encode({"error": msgspec.json.decode(answer.body)}))

    def leave(self) -> None:
        """The client is gone: compute nothing more for it."""
        self.is_gone = True
        if self.pending is not None:
            self.pending.cancel()


class StreamSession:
    """What one client asks of one policy, frame by frame, answered in order."""

    def __init__(
        self,
        service: PolicyService,
        settings: StreamSettings,
        *,
        send: Callable[[bytes], None],
        has_room: Callable[[], None],
    ) -> None:
        """Store.

        Args:
            service: The policy.
            settings: How many frames may wait.
            send: Takes an answer's frame.
            has_room: Called when a session that was full takes frames again, and when one that is
                draining has answered everything.
        """
        self._service = service
        self._codec: BinaryCodec = service.binary
        self._lane = service.dialects[BinaryCodec.content_type].lane
        self._send = send
        self._has_room = has_room
        self._most = settings.max_unanswered
        self._calls: deque[_Call] = deque()
        self._is_draining = False
        # Whether no further frames should be given to it, for now.
        self.is_full = False

    @property
    def n_unanswered(self) -> int:
        """Frames without an answer."""
        return len(self._calls)

    def greeting(self) -> bytes:
        """The first frame: what a client has to know to ask and to understand."""
        described = self._service.describe()
        names = ("policy", "version", "policy_id", "inputs", "answers")
        greeting = {name: described[name] for name in names}
        greeting["max_observations_per_request"] = self._service.max_observations_per_request
        return msgspec.msgpack.encode(greeting)

    def receive(self, data: bytes) -> None:
        """Answer a frame, now or later, but after those before it."""
        call = self._call(data)
        try:
            row = self._lane.plain(data)
            if row is not None:
                self._lane.add(row, call)
            else:
                self._ask(call)
        except Exception:  # the outermost edge of a frame
            logger.exception("a frame of a stream failed")
            call.succeed(encode_error(unexpected_error(), None))

    def receive_text(self) -> None:
        """Refuse a text frame."""
        call = self._call(b"")
        error = InvalidRequestError(
            "found a text frame, expected a binary frame with a msgpack map"
        )
        self._refuse(call, error, None)

    def drain(self) -> None:
        """Tell by `has_room` when everything is answered."""
        self._is_draining = True

    def leave(self) -> None:
        """The client is gone: what has not begun is never computed."""
        for call in self._calls:
            call.leave()
        self._calls.clear()

    def _call(self, data: bytes) -> _Call:
        call = _Call(self, data)
        self._calls.append(call)
        if len(self._calls) >= self._most:
            self.is_full = True
        return call

    def _ask(self, call: _Call) -> None:
        try:
            identifier, request = self._codec.decode_frame(call.body)
        except PolicyServingError as exc:
            self._refuse(call, exc, frame_id(call.body))
            return

        def done(result: Result) -> None:
            call.succeed(self._encoded(result, identifier, request.is_single))

        call.pending = self._service.submit(request, done, is_gone=lambda: call.is_gone)

    def _encoded(self, result: Result, identifier: Id | None, is_single: bool) -> bytes:
        if isinstance(result, PolicyServingError):
            return encode_error(result, identifier)
        try:
            return self._codec.encode_frame(result, is_single=is_single, identifier=identifier)
        except Exception:  # the client gets an answer, not a hang
            logger.exception("an answer could not be encoded")
            return encode_error(unexpected_error(), identifier)

    def _refuse(self, call: _Call, error: PolicyServingError, identifier: Id | None) -> None:
        self._service.refuse(error, call.age_s())  # counts it
        call.succeed(encode_error(error, identifier))

    def answered(self, call: _Call) -> None:
        """Send what can be sent: answers go out in the order of their frames."""
        calls = self._calls
        if not calls or calls[0] is not call:
            return
        while calls and (answer := calls[0].answer) is not None:
            calls.popleft()
            self._send(answer)
        if self.is_full and len(calls) <= self._most // 4:
            self.is_full = False
            self._has_room()
        elif self._is_draining and not calls:
            self._has_room()
