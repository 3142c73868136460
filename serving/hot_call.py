"""One request of the fast lane, and its answer as the bytes of HTTP."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serving.batching import Pending
from serving.service import Answer

if TYPE_CHECKING:
    from serving.hot_protocol import HotProtocol


class HotCall:
    """One request on a connection, and its answer when it is there; a `serving.plain.Caller`."""

    __slots__ = (
        "arrived",
        "body",
        "content_type",
        "is_gone",
        "pending",
        "protocol",
        "request_id",
        "response",
    )

    def __init__(
        self, protocol: HotProtocol, body: bytes, content_type: bytes, request_id: bytes | None
    ) -> None:
        self.protocol = protocol
        self.body = body
        self.content_type = content_type
        self.request_id = request_id
        self.arrived = time.perf_counter()
        self.is_gone = False
        self.response: bytes | None = None
        self.pending: Pending | None = None

    def age_s(self) -> float:
        """Seconds since the request was read."""
        return time.perf_counter() - self.arrived

    def succeed(self, body: bytes) -> None:
        """Answer with 200."""
        protocol = self.protocol
        routes = protocol.routes
        self.response = b"%b%b\r\ncontent-length: %d\r\n\r\n%b" % (
            routes.ok_head(self.content_type, protocol.server_state.default_headers),
            self.request_id or next(routes.request_ids),
            len(body),
            body,
        )
        protocol.answered(self)

    def reply(self, answer: Answer) -> None:
        """Answer with any status, if it is not answered."""
        if self.response is not None:
            return
        protocol = self.protocol
        headers = [
            *protocol.server_state.default_headers,
            (b"content-type", answer.content_type),
            (b"x-request-id", self.request_id or next(protocol.routes.request_ids)),
            (b"content-length", b"%d" % len(answer.body)),
            *answer.headers,
        ]
        lines = [b"%b: %b\r\n" % header for header in headers]
        self.response = b"".join([STATUS_LINE[answer.status], *lines, b"\r\n", answer.body])
        protocol.answered(self)

    def leave(self) -> None:
        """The caller is gone: compute nothing more for it."""
        self.is_gone = True
        if self.pending is not None:
            self.pending.cancel()
