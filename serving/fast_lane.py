"""The fast lane: `compute_action` answered before Serve's own per-request machinery.

Ray Serve's replica applies middlewares, which an environment variable names, around its ASGI
entry. There this one answers `POST /v1/policies/{policy}/compute_action` itself and leaves every
other request to Serve. The handler is the same that the ordinary application uses, so answers are
equal.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from starlette.middleware import Middleware

from serving.errors import (
    BodyTooLargeError,
    MethodNotAllowedError,
    PolicyServingError,
    UnsupportedMediaTypeError,
)
from serving.service import Answer, PolicyServices, problem_answer, unexpected_answer

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

PREFIX = "/v1/policies/"
SUFFIX = "/compute_action"

logger = logging.getLogger("policyserve")


class ComputeActionHandler:
    """The ASGI side of `compute_action`: read the body, answer, write."""

    def __init__(self, services: PolicyServices, *, max_body_bytes: int) -> None:
        self._services = services
        self._max_body_bytes = max_body_bytes
        # Unique among processes by chance and within one by counting; a UUID costs more.
        self._id_prefix = secrets.token_hex(6).encode()
        self._ids = itertools.count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request whose path matches."""
        request_id = service = None
        try:
            content_type = content_length = encoding = None
            for name, value in scope["headers"]:
                if name == b"content-type":
                    content_type = value
                elif name == b"content-length":
                    content_length = value
                elif name == b"x-request-id":
                    request_id = value[:128]
                elif name == b"content-encoding":
                    encoding = value
            if scope["method"] != "POST":
                raise MethodNotAllowedError(f"{scope['method']} is not answered here; use POST")
            service = self._services.require(policy_name(scope["path"]))
            check_media_type(content_type, encoding)
            body = await self._read(receive, content_length)
            if body is None:
                return  # the caller is gone
            answer = await service.answer(body)
        except PolicyServingError as exc:
            answer = problem_answer(exc) if service is None else service.refuse(exc)
        except Exception:  # the outermost edge of a request
            logger.exception("compute_action failed")
            answer = unexpected_answer()
        await self._write(send, answer, request_id, scope["method"])

    async def _read(self, receive: Receive, content_length: bytes | None) -> bytes | None:
        if content_length is not None and int(content_length) > self._max_body_bytes:
            raise self._too_large()
        message = await receive()
        if message["type"] != "http.request":
            return None
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(body) > self._max_body_bytes:
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
            if size > self._max_body_bytes:
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is larger than {self._max_body_bytes} bytes; send fewer observations a "
            "request"
        )

    async def _write(
        self, send: Send, answer: Answer, request_id: bytes | None, method: str
    ) -> None:
        if request_id is None:
            request_id = b"%s-%x" % (self._id_prefix, next(self._ids))
        headers = [
            (b"content-type", answer.content_type),
            (b"content-length", b"%d" % len(answer.body)),
            (b"x-request-id", request_id),
            *answer.headers,
        ]
        if answer.status == 405:
            headers.append((b"allow", b"POST"))
        if answer.status == 413:
            # The rest of the body is still on its way; nobody will read it.
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        body = b"" if method == "HEAD" else answer.body
        await send({"type": "http.response.body", "body": body})


def policy_name(path: str) -> str:
    """The policy in a `compute_action` path."""
    return path[len(PREFIX) : -len(SUFFIX)]


def is_compute_action(path: str) -> bool:
    """Whether a path is that of `compute_action`."""
    if not (path.endswith(SUFFIX) and path.startswith(PREFIX)):
        return False
    name = path[len(PREFIX) : -len(SUFFIX)]
    return bool(name) and "/" not in name


def check_media_type(content_type: bytes | None, encoding: bytes | None) -> None:
    """Refuse what is not plain JSON; a body without a content type is taken for JSON.

    Raises:
        UnsupportedMediaTypeError: Another content type, or a compressed body.
    """
    if encoding is not None and encoding.strip().lower() != b"identity":
        raise UnsupportedMediaTypeError(
            f"found content-encoding {_text(encoding)}, expected an uncompressed body"
        )
    if content_type is None or content_type == b"application/json":
        return
    essence = content_type.split(b";", 1)[0].strip().lower()
    if essence != b"application/json":
        raise UnsupportedMediaTypeError(
            f"found content-type {_text(content_type)}, expected application/json"
        )


def _text(value: bytes) -> str:
    return repr(value.decode("latin-1")[:100])


_handler: ComputeActionHandler | None = None


def install(handler: ComputeActionHandler | None) -> None:
    """Make this process's fast lane answer with `handler` (None: leave all to Serve).

    A middleware is built by Serve, which gives it nothing of ours, so the deployment leaves the
    handler here.
    """
    global _handler
    _handler = handler


class FastLaneMiddleware:
    """The Starlette middleware that Ray Serve puts around a replica's ASGI entry."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer `compute_action`; pass everything else on."""
        if _handler is not None and scope["type"] == "http" and is_compute_action(scope["path"]):
            await _handler(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names; Ray calls it in each replica."""
    return [Middleware(FastLaneMiddleware)]
