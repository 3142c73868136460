"""`POST /v1/policies/{policy}/compute_action` as an ASGI endpoint: the ordinary path.

Answers whatever HTTP can carry: bodies in chunks, other methods, closing connections. The hot
protocol (`serving.hot_protocol`) takes the plain cases before they come here, and answers the
same.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator, MutableMapping
from typing import Any, TypeAlias

from serving.errors import (
    BodyTooLargeError,
    MethodNotAllowedError,
    PolicyServingError,
    UnsupportedMediaTypeError,
)
from serving.service import (
    Answer,
    Dialect,
    PolicyService,
    PolicyServices,
    problem_answer,
    unexpected_answer,
)

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

PREFIX = "/v1/policies/"
SUFFIX = "/compute_action"

logger = logging.getLogger("policyserve")


class ComputeActionHandler:
    """The ASGI side of `compute_action`: read the body, answer, write."""

    def __init__(self, services: PolicyServices, *, max_body_bytes: int) -> None:
        self._services = services
        self.max_body_bytes = max_body_bytes
        self.request_ids = request_ids()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request whose path matches."""
        service = None
        closes = False
        found = dict(scope["headers"])  # of several alike the last one
        request_id = found.get(b"x-request-id", b"")[:128]
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowedError(f"{scope['method']} is not answered here; use POST")
            service = self._services.require(policy_name(scope["path"]))
            codec = dialect_of(
                service, found.get(b"content-type"), found.get(b"content-encoding")
            ).codec
            body = await self._read(receive, found.get(b"content-length"))
            if body is None:
                return  # the caller is gone
            given = await _unless_gone(service.answer(body, codec), receive)
            if given is None:
                return
            answer = given
        except PolicyServingError as exc:
            # The rest of such a body is still on its way; nobody will read it.
            closes = isinstance(exc, BodyTooLargeError)
            answer = problem_answer(exc) if service is None else service.refuse(exc)
        except Exception:  # the outermost edge of a request
            logger.exception("compute_action failed")
            answer = unexpected_answer()
        headers = _headers(answer, request_id or next(self.request_ids), closes=closes)
        body = b"" if scope["method"] == "HEAD" else answer.body
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _read(self, receive: Receive, content_length: bytes | None) -> bytes | None:
        if content_length is not None and int(content_length) > self.max_body_bytes:
            raise self._too_large()
        message = await receive()
        if message["type"] != "http.request":
            return None
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(body) > self.max_body_bytes:
                raise self._too_large()
            return body
        parts = [body]
        size = len(body)
        while message.get("more_body", False):
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is larger than {self.max_body_bytes} bytes; send fewer observations a "
            "request"
        )


async def _unless_gone(answering: Coroutine[Any, Any, Answer], receive: Receive) -> Answer | None:
    """The answer, or None where the caller leaves before: what has not begun never runs."""
    answer = asyncio.ensure_future(answering)
    leaving = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        leaving.cancel()


def _headers(answer: Answer, request_id: bytes, *, closes: bool) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"content-type", answer.content_type),
        (b"content-length", b"%d" % len(answer.body)),
        (b"x-request-id", request_id),
        *answer.headers,
    ]
    if answer.status == 405:
        headers.append((b"allow", b"POST"))
    if closes:
        headers.append((b"connection", b"close"))
    return headers


def policy_name(path: str) -> str:
    """The policy in a `compute_action` path."""
    return path[len(PREFIX) : -len(SUFFIX)]


def request_ids() -> Iterator[bytes]:
    """Ids for requests that come without one.

    Unique among processes by chance and within one by counting; a UUID costs more.
    """
    prefix = secrets.token_hex(6).encode()
    return (b"%b-%x" % (prefix, number) for number in itertools.count())


def dialect_of(
    service: PolicyService, content_type: bytes | None, encoding: bytes | None
) -> Dialect:
    """The dialect of a body; a body without a content type is taken for JSON.

    Raises:
        UnsupportedMediaTypeError: Another content type, or a compressed body.
    """
    if encoding is not None and encoding.strip().lower() != b"identity":
        raise UnsupportedMediaTypeError(
            f"found content-encoding {_text(encoding)}, expected an uncompressed body"
        )
    media_type = content_type
    if content_type is not None:
        media_type = content_type.split(b";", 1)[0].strip().lower()
    dialect = service.dialects.get(media_type)
    if dialect is None:
        known = [name.decode() for name in service.dialects if name is not None]
        raise UnsupportedMediaTypeError(
            f"found content-type {_text(media_type or b'')}, expected {' or '.join(known[:2])}"
        )
    return dialect


def _text(value: bytes) -> str:
    return repr(value.decode("latin-1")[:100])
