"""The protocol's paths under `/v2` as one ASGI application."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from serving.dialects.open_inference import rest
from serving.errors import (
    BodyTooLargeError,
    MethodNotAllowedError,
    NotFoundError,
    PolicyServingError,
    unexpected_error,
)
from serving.service import Answer, PolicyServices

logger = logging.getLogger("policyserve")

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

PREFIX = "/v2"
# How long an answer may take before its caller is watched.
_PATIENCE_S = 0.01


@dataclass(frozen=True)
class _Call:
    """One request that was read.

    Attributes:
        handler: Who was asked.
        model: The model in the path; empty where the path has none.
        version: The version in the path.
        headers: Names in lower case.
        body: As it came.
    """

    handler: OpenInferenceHandler
    model: str
    version: str | None
    headers: list[tuple[bytes, bytes]]
    body: bytes


_Endpoint: TypeAlias = Callable[[_Call], Awaitable[Answer]]


class OpenInferenceHandler:
    """The ASGI side: read the body, answer, write."""

    def __init__(
        self, services: PolicyServices, *, max_body_bytes: int, version: str = "0"
    ) -> None:
        """Store.

        Args:
            services: What is served.
            max_body_bytes: Largest body, before and after decompression.
            version: The product's version.
        """
        self.services = services
        self.max_body_bytes = max_body_bytes
        self.version = version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request under `/v2`."""
        try:
            answer = await self._answer(scope, receive)
        except PolicyServingError as exc:
            answer = rest.error_answer(exc)
        except Exception:  # the outermost edge of a request
            logger.exception("%s %s failed", scope["method"], scope["path"])
            answer = rest.error_answer(unexpected_error())
        if answer is not None:
            await _write(send, answer, has_body=scope["method"] != "HEAD")

    async def _answer(self, scope: Scope, receive: Receive) -> Answer | None:
        # The protocol's own description ends some of its paths with a slash.
        path = scope["path"].removesuffix("/")
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        found = [(match, route) for route in _ROUTES if (match := route[0].fullmatch(path))]
        if not found:
            raise NotFoundError(f"nothing is at {path[:200]}; /docs lists the endpoints")
        match, (_, allowed, endpoint) = found[0]
        if method != allowed:
            refusal = MethodNotAllowedError(f"{method[:20]} is not answered at {path}")
            allow = b"GET, HEAD" if allowed == "GET" else allowed.encode()
            answer = rest.error_answer(refusal)
            return Answer(answer.status, answer.content_type, answer.body, ((b"allow", allow),))
        body = await self._read(scope["headers"], receive)
        if body is None:
            return None  # the caller is gone
        groups = match.groupdict()
        call = _Call(self, groups.get("model") or "", groups.get("version"), scope["headers"], body)
        return await _unless_gone(endpoint(call), receive)

    async def _read(self, headers: list[tuple[bytes, bytes]], receive: Receive) -> bytes | None:
        length = next((value for name, value in headers if name == b"content-length"), None)
        if length is not None and int(length) > self.max_body_bytes:
            raise self._too_large()
        parts, size, is_more = [], 0, True
        while is_more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                raise self._too_large()
            is_more = message.get("more_body", False)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is larger than {self.max_body_bytes} bytes; send fewer rows a request"
        )


async def _unless_gone(answering: Awaitable[Answer], receive: Receive) -> Answer | None:
    """The answer; None if the caller hangs up first, whose place in the queue is then free.

    Few answers take long enough for anybody to look.
    """
    task = asyncio.current_task()
    assert task is not None  # a coroutine of a server's
    watcher: asyncio.Task[None] | None = None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    def begin() -> None:
        nonlocal watcher
        watcher = asyncio.ensure_future(watch())

    timer = asyncio.get_running_loop().call_later(_PATIENCE_S, begin)
    try:
        return await answering
    except asyncio.CancelledError:
        if is_gone:
            return None
        raise
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()


async def _write(send: Send, answer: Answer, *, has_body: bool) -> None:
    headers = [
        (b"content-type", answer.content_type),
        (b"content-length", b"%d" % len(answer.body)),
        *answer.headers,
    ]
    if answer.status == 413:
        # The rest of the body is still on its way; nobody will read it.
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body if has_body else b""})


async def _infer(call: _Call) -> Answer:
    return await rest.infer(
        call.handler.services,
        call.model,
        call.version,
        call.headers,
        call.body,
        max_body_bytes=call.handler.max_body_bytes,
    )


async def _server_metadata(call: _Call) -> Answer:
    return rest.server_metadata(call.handler.version)


async def _live(_: _Call) -> Answer:
    return rest.live()


async def _ready(call: _Call) -> Answer:
    return rest.ready(call.handler.services)


async def _models(call: _Call) -> Answer:
    return rest.models(call.handler.services)


async def _all_statistics(call: _Call) -> Answer:
    return rest.statistics(call.handler.services, None, None)


async def _describe(call: _Call) -> Answer:
    return rest.describe(call.handler.services, call.model, call.version)


async def _model_ready(call: _Call) -> Answer:
    return rest.model_ready(call.handler.services, call.model, call.version)


async def _configuration(call: _Call) -> Answer:
    return rest.configuration(call.handler.services, call.model, call.version)


async def _statistics(call: _Call) -> Answer:
    return rest.statistics(call.handler.services, call.model, call.version)


async def _index(call: _Call) -> Answer:
    return rest.index(call.handler.services, call.body)


async def _load(call: _Call) -> Answer:
    raise rest.refuse_change("load", call.model)


async def _unload(call: _Call) -> Answer:
    raise rest.refuse_change("unload", call.model)


_MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
_IN_REPOSITORY = r"/v2/repository/models/(?P<model>[^/]+)"
# The first that matches answers: `infer` is what is asked often, and `/v2/models/stats` is
# everybody's statistics, not a model's metadata.
_ROUTES: tuple[tuple[re.Pattern[str], str, _Endpoint], ...] = tuple(
    (re.compile(pattern), method, endpoint)
    for pattern, method, endpoint in (
        (f"{_MODEL}/infer", "POST", _infer),
        (PREFIX, "GET", _server_metadata),
        (f"{PREFIX}/health/live", "GET", _live),
        (f"{PREFIX}/health/ready", "GET", _ready),
        (f"{PREFIX}/models", "GET", _models),
        (f"{PREFIX}/models/stats", "GET", _all_statistics),
        (_MODEL, "GET", _describe),
        (f"{_MODEL}/ready", "GET", _model_ready),
        (f"{_MODEL}/config", "GET", _configuration),
        (f"{_MODEL}/stats", "GET", _statistics),
        (f"{PREFIX}/repository/index", "POST", _index),
        (f"{_IN_REPOSITORY}/load", "POST", _load),
        (f"{_IN_REPOSITORY}/unload", "POST", _unload),
    )
)


def is_open_inference(path: str) -> bool:
    """Whether a path is one of this protocol's."""
    return path.startswith(PREFIX) and path[len(PREFIX) :][:1] in ("", "/")
