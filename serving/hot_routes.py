"""What the connections of one server share: its policies, and the heads of requests seen before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.compute_action import PREFIX, SUFFIX, request_ids
from serving.service import Dialect, PolicyService, PolicyServices

if TYPE_CHECKING:
    from serving.hot_protocol import HotProtocol

_MOST_HEADS = 1024
_Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Target:
    """Where requests with a certain head go, and how long their body is."""

    service: PolicyService
    dialect: Dialect
    length: int


@dataclass
class HotRoutes:
    """What the connections of one server share.

    Attributes:
        services: The policies.
        max_body_bytes: A longer body is left to the application, which refuses it.
        keep_alive_s: How long a connection may be idle.
        receive_timeout_s: How long a request may take to arrive.
        open_stream: Makes the protocol that takes a connection over to WebSocket; None for a
            request that is none of ours.
    """

    services: PolicyServices
    max_body_bytes: int
    keep_alive_s: float = 75.0
    receive_timeout_s: float = 30.0
    open_stream: Callable[[bytes], asyncio.Protocol | None] = lambda _: None
    request_ids: Iterator[bytes] = field(default_factory=request_ids)
    # Heads that uvicorn's parser took, byte for byte, and what they mean.
    heads: dict[bytes, Target] = field(default_factory=dict)
    by_path: dict[bytes, PolicyService] = field(default_factory=dict)
    connections: set[HotProtocol] = field(default_factory=set)
    _headers: Any = None
    _written: dict[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_path = {
            f"{PREFIX}{service.name}{SUFFIX}".encode(): service for service in self.services
        }

    def remember(self, head: bytes, target: Target) -> None:
        """Take requests with the same head without parsing it again."""
        if len(self.heads) >= _MOST_HEADS:
            self.heads.clear()
        self.heads[head] = target

    def ok_head(self, content_type: bytes, headers: _Headers) -> bytes:
        """A 200's head up to the request id, with the server's own headers (`date`)."""
        if headers is not self._headers:
            self._headers = headers  # uvicorn makes a new list every second
            self._written = {}
        written = self._written.get(content_type)
        if written is None:
            own = b"".join(b"%b: %b\r\n" % header for header in headers)
            written = b"HTTP/1.1 200 OK\r\n%bcontent-type: %b\r\nx-request-id: " % (
                own,
                content_type,
            )
            self._written[content_type] = written
        return written
