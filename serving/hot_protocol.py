"""The fast lane: `compute_action` answered in uvicorn's protocol class, below ASGI.

    socket ─▶ HotProtocol.data_received ─▶ a head seen before? ─▶ body ─▶ PlainLane ─▶ one batch
                        │ no                                       │ not plain
                        ▼                                          ▼
              uvicorn's parser ─▶ ours? ──yes──────────────▶ PolicyService.post
                                    │ no
                                    ▼
                           uvicorn's own way ─▶ ASGI application (which answers the same)

A request costs a few microseconds here; through ASGI and a web framework it costs hundreds. Taken
here: POST to a served policy, of a known media type, with a length within the limit, on a
connection that stays open. Everything else is left to uvicorn and the application.

This leans on uvicorn's internals: `serving.uvicorn_fit` says whether they are as they were when
this was written.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving.compute_action import dialect_of
from serving.errors import UnsupportedMediaTypeError
from serving.hot_call import HotCall
from serving.hot_routes import HotRoutes, Target
from serving.service import unexpected_answer

logger = logging.getLogger("policyserve")

# Unanswered requests on one connection before it is not read any more, and when it is again.
_MOST_UNANSWERED = 128
_FEW_UNANSWERED = 32
_LONGEST_HEAD = 1024
_LONGEST_ID = 128
# What changes how a body is framed, or who answers.
_NOT_HOT = (b"transfer-encoding", b"expect", b"upgrade")
_MID_BLANK = b"\r\n\r\n"
_Headers = list[tuple[bytes, bytes]]


class _Before:
    """Stands for the calls before an ordinary request, so that uvicorn queues it behind them."""

    response_complete = False

    def __init__(self) -> None:
        self.message_event = asyncio.Event()


class _Flow(FlowControl):
    """Reads a connection only as far as its requests are answered and its answers read.

    uvicorn reads on with every answer, however many requests wait already: a caller that sends
    without end would fill the memory.
    """

    def __init__(self, protocol: HotProtocol) -> None:
        super().__init__(protocol.transport)
        self._protocol = protocol

    def resume_reading(self) -> None:
        if self.read_paused and self._protocol.may_read():
            super().resume_reading()
            self._protocol.reads_on()


class HotProtocol(HttpToolsProtocol):
    """A connection. `bound` makes the class that uvicorn is given."""

    routes: HotRoutes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._calls: deque[HotCall] = deque()
        self._running: RequestResponseCycle | None = None  # the ordinary request that is answered
        self._is_between = True  # no part of a request has been read
        self._is_closing = False
        self._is_over = False  # whatever else arrives is nobody's
        self._refusal: str | None = None  # what ends the connection after the answers
        self._raw_head: bytes | None = None
        self._declined = b""  # the head of a request for another protocol, without that wish
        # The request that is being parsed, if it is ours.
        self._target: Target | None = None
        self._request_id: bytes | None = None
        self._parts: list[bytes] = []
        self._last_read = self._began = time.monotonic()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody connects."""
        super().connection_made(transport)
        self.flow = _Flow(self)
        self.routes.connections.add(self)

    # --- reading ---

    def data_received(self, data: bytes) -> None:
        """Take whole requests with known heads at once; give the parser the rest."""
        self._last_read = time.monotonic()
        if self._is_over:
            return
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        if self._is_between and not self._is_ordinary_busy():
            data = self._take_known(data)
            if not data:
                return
            end = data.find(_MID_BLANK, 0, _LONGEST_HEAD)
            self._raw_head = data[:end] if end >= 0 else None
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade as exc:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            elif self._declined:
                self._start_over(data[exc.args[0] :])

    def _start_over(self, rest: bytes) -> None:
        """Answer a request that asks for a protocol we don't speak as if it had not asked.

        A server may go on in HTTP/1.1 (RFC 9110, 7.8). The parser would take the body for the other
        protocol's bytes, so a new one is given the request without the question.

        Args:
            rest: What was read behind the request's head.
        """
        head, self._declined = self._declined, b""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._raw_head = None
        self._is_between = True
        self._parse(head + rest)

    def _take_known(self, data: bytes) -> bytes:
        """Answer the whole requests at the start whose heads are known; return what is left."""
        heads = self.routes.heads
        begin = 0
        while True:
            end = data.find(_MID_BLANK, begin, begin + _LONGEST_HEAD)
            target = heads.get(data[begin:end]) if end >= 0 else None
            if target is None:
                break
            start = end + len(_MID_BLANK)
            stop = start + target.length
            if len(data) < stop:
                break
            self._call(target, data[start:stop], None)
            begin = stop
        return data[begin:]

    def _is_ordinary_busy(self) -> bool:
        """Whether uvicorn has a request of this connection that is not answered."""
        return self._running is not None or bool(self.pipeline)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._is_between = False
        self._began = time.monotonic()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Take a request that is ours, and leave every other to uvicorn."""
        if self.parser.should_upgrade() and not self._should_upgrade():
            self._declined = self._without_upgrade()
            if self._declined:
                return
        self._target = None if self._is_ordinary_busy() else self._match()
        if self._target is not None:
            self._parts = []
            return
        self._raw_head = None
        if self._calls:
            # uvicorn then queues the request; `_continue` starts it after the last call.
            self.cycle = _Before()  # type: ignore[assignment]
        super().on_headers_complete()
        if self.parser.should_upgrade() and not self._should_upgrade():
            # CONNECT: what follows is not HTTP.
            self.cycle.keep_alive = False
            self._is_over = True

    def _without_upgrade(self) -> bytes:
        """The head that was read, but for its wish for another protocol; empty if it has none."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        is_asked = False
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(
                    option
                    for option in map(bytes.strip, value.split(b","))
                    if option.lower() not in (b"upgrade", b"http2-settings")
                )
            is_asked = is_asked or name == b"upgrade"
            if name not in (b"upgrade", b"http2-settings") and (value or name != b"connection"):
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""]) if is_asked else b""

    def _match(self) -> Target | None:
        service = self.routes.by_path.get(self.url)
        parser = self.parser
        if service is None or parser.get_method() != b"POST" or self._is_closing:
            return None
        if parser.get_http_version() != "1.1" or not parser.should_keep_alive():
            return None
        headers = dict(self.headers)  # of several alike the last one, as in the application
        length = headers.get(b"content-length")
        if length is None or not headers.keys().isdisjoint(_NOT_HOT):
            return None
        if int(length) > self.routes.max_body_bytes:
            return None
        self._request_id = headers.get(b"x-request-id", b"")[:_LONGEST_ID] or None
        if b"x-request-id" in headers:
            self._raw_head = None  # every such head differs
        media_type, encoding = headers.get(b"content-type"), headers.get(b"content-encoding")
        try:
            return Target(service, dialect_of(service, media_type, encoding), int(length))
        except UnsupportedMediaTypeError:
            return None  # the application says why

    def on_body(self, body: bytes) -> None:
        """Keep a part of a body."""
        if self._target is None:
            super().on_body(body)
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        """Answer a request that has arrived."""
        if self._declined:
            return
        target, raw_head = self._target, self._raw_head
        self._is_between = True
        self._target = self._raw_head = None
        if target is None:
            super().on_message_complete()
            return
        if raw_head is not None and self._is_whole(raw_head):
            self.routes.remember(raw_head, target)
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._call(target, body, self._request_id)

    def _is_whole(self, raw_head: bytes) -> bool:
        """Whether these bytes are the head that the parser took, and nothing before or after."""
        return raw_head.startswith(b"POST ") and (
            raw_head.count(b"\n") == raw_head.count(b"\r\n") == len(self.headers)
        )

    def _call(self, target: Target, body: bytes, request_id: bytes | None) -> None:
        dialect = target.dialect
        call = HotCall(self, body, dialect.content_type, request_id)
        self._calls.append(call)
        if len(self._calls) == _MOST_UNANSWERED:
            self.flow.pause_reading()
        lane = dialect.lane
        try:
            row = lane.plain(body)
            if row is not None:
                lane.add(row, call)
            else:
                call.pending = target.service.post(body, dialect.codec, call.reply)
        except Exception:  # the outermost edge of a request
            logger.exception("compute_action failed")
            call.reply(unexpected_answer())

    # --- writing ---

    def answered(self, call: HotCall) -> None:
        """Write what can be written: answers go out in the order of their requests."""
        calls = self._calls
        if call.is_gone or not calls or calls[0] is not call or self.transport.is_closing():
            return
        if len(calls) == 1:
            calls.popleft()
            assert call.response is not None
            self.transport.write(call.response)
        else:
            ready = []
            while calls and calls[0].response is not None:
                ready.append(calls.popleft().response or b"")
            self.transport.write(b"".join(ready))
        if self.flow.read_paused or self.pipeline or self._is_closing:
            self._continue()

    def _continue(self) -> None:
        """After answers: read on, start what waits behind them, or close."""
        if self._calls:
            self.flow.resume_reading()
        elif self.pipeline:
            cycle, app = self.pipeline.pop()
            if self._is_closing:
                cycle.keep_alive = False
            self._start_asgi_task(cycle, app)
        elif self._refusal is not None:
            super().send_400_response(self._refusal)
        elif self._is_closing:
            self.transport.close()
        else:
            self.flow.resume_reading()

    def reads_on(self) -> None:
        """Give the rest of a request its full time: meanwhile it could not arrive."""
        self._began = time.monotonic()

    def may_read(self) -> bool:
        """Whether another request may be read now."""
        return not (
            self.flow.write_paused
            or self._is_over
            or self.pipeline
            or len(self._calls) > _FEW_UNANSWERED
        )

    def on_response_complete(self) -> None:
        """An ordinary request is answered."""
        self._running = None
        super().on_response_complete()
        if self._refusal is not None and not (
            self._is_ordinary_busy() or self.transport.is_closing()
        ):
            super().send_400_response(self._refusal)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, after the answers to what came before it."""
        self._is_over = True
        if self.pipeline and self.pipeline[0][0].more_body:
            self.pipeline.popleft()  # the request that broke off
        running = self._running
        if self._calls or self.pipeline or (running is not None and not running.more_body):
            self._refusal = msg
            self.flow.pause_reading()
        else:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        """A caller that does not read is not read from."""
        super().pause_writing()
        self.flow.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self.flow.resume_reading()

    # --- ending ---

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller is gone."""
        self.routes.connections.discard(self)
        for call in self._calls:
            call.leave()
        self._calls.clear()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Answer what has arrived, then close; uvicorn calls this when the server stops."""
        self._is_closing = True
        self._is_over = self._is_over or self._is_between
        for cycle, _ in self.pipeline:
            cycle.keep_alive = False
        if not self._calls:  # else the last answer closes
            super().shutdown()

    def close_if_stale(self, now: float) -> None:
        """Close a connection that is idle, or whose request does not arrive.

        Args:
            now: Of `time.monotonic`.
        """
        idle_s = now - self._last_read
        is_receiving = not self._is_between
        if self.transport.is_closing():
            if idle_s > 2 * self.routes.keep_alive_s:
                self.transport.abort()  # nobody reads the last answers
        elif self.flow.write_paused:
            if idle_s > self.routes.keep_alive_s:
                self.transport.close()
        elif self._calls or self.pipeline or (self._running is not None and not is_receiving):
            self._last_read = now
        elif is_receiving:
            if not self.flow.read_paused and now - self._began > self.routes.receive_timeout_s:
                self._refuse_slow()
        elif idle_s > self.routes.keep_alive_s:
            self.transport.close()

    def _refuse_slow(self) -> None:
        self.transport.write(_TOO_SLOW)
        self.transport.close()

    def handle_websocket_upgrade(self) -> None:
        """Hand a stream's connection to its own protocol, and any other to uvicorn's."""
        if self._calls or self._is_ordinary_busy():
            # Their answers would come in the middle of the stream.
            self.send_400_response("Unanswered requests before an upgrade.")
            return
        stream = self.routes.open_stream(self.url)
        if stream is None:
            super().handle_websocket_upgrade()
            return
        self.connections.discard(self)
        self.routes.connections.discard(self)
        head = [b"GET %b HTTP/1.1\r\n" % self.url]
        head += [b"%b: %b\r\n" % header for header in self.headers]
        stream.connection_made(self.transport)
        self.transport.set_protocol(stream)
        stream.data_received(b"".join([*head, b"\r\n"]))


_SLOW_BODY = (
    b'{"type":"about:blank","title":"Malformed request","status":408,'
    b'"code":"malformed_request","detail":"the request did not arrive in time"}'
)
_TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/problem+json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_SLOW_BODY), _SLOW_BODY)
)


def bound(routes: HotRoutes) -> type[HotProtocol]:
    """The protocol class of one server, for `uvicorn.Config(http=...)`."""
    return type("BoundHotProtocol", (HotProtocol,), {"routes": routes})


async def sweep(routes: HotRoutes, *, interval_s: float = 1.0) -> None:
    """Close idle and stalled connections until cancelled.

    One task for all of them: a timer for each would cost more than the request.

    Args:
        routes: Whose connections.
        interval_s: Seconds between two looks.
    """
    while True:
        await asyncio.sleep(interval_s)
        now = time.monotonic()
        for connection in list(routes.connections):
            connection.close_if_stale(now)
