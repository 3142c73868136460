"""The protocol over HTTP without a web framework: what was asked to an `Answer`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec

from serving.dialects.open_inference import rest_messages
from serving.dialects.open_inference.compression import (
    accepted_encoding,
    compressed,
    decompressed,
)
from serving.dialects.open_inference.descriptions import (
    REST_EXTENSIONS,
    SERVER_NAME,
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
)
from serving.dialects.open_inference.errors import NotOfferedError, http_status, text_of
from serving.dialects.open_inference.model import Model, find_model
from serving.errors import (
    InvalidRequestError,
    MalformedRequestError,
    PolicyServingError,
    UnavailableError,
)
from serving.service import Answer, PolicyService, PolicyServices

# No charset: clients compare it letter by letter.
JSON = b"application/json"
_BINARY = b"application/octet-stream"

logger = logging.getLogger("policyserve")

Headers = Iterable[tuple[bytes, bytes]]


async def infer(
    services: PolicyServices,
    name: str,
    version: str | None,
    headers: Headers,
    body: bytes,
    *,
    max_body_bytes: int,
) -> Answer:
    """Answer one `infer` request; every failure becomes an answer, and is counted.

    Args:
        services: What is served.
        name: The model.
        version: The version in the path, or None.
        headers: The request's, names in lower case.
        body: The request's.
        max_body_bytes: Largest body after decompression.
    """
    started = time.perf_counter()
    service = None
    try:
        service, model = find_model(services, name, version)
        found = dict(headers)
        content = await decompressed(body, found.get(b"content-encoding"), max_bytes=max_body_bytes)
        length = found.get(b"inference-header-content-length")
        request = rest_messages.decode(model, content, length)
        asked = model.request(request.arrays, request.outputs, request.parameters)
    except PolicyServingError as exc:
        if service is not None:
            service.refuse(exc, time.perf_counter() - started)
        return error_answer(exc, service)
    try:
        output = await service.compute(asked)
    except PolicyServingError as exc:
        return error_answer(exc, service)
    answers = model.answer(output, request.outputs)
    encoded, head_length = rest_messages.encode(model, request, answers)
    answer = _answer(encoded, head_length)
    encoding = accepted_encoding(found.get(b"accept-encoding"), len(encoded))
    if encoding is None:
        return answer
    more = (*answer.headers, (b"content-encoding", encoding))
    return replace(answer, body=await compressed(encoded, encoding), headers=more)


def _answer(body: bytes, head_length: int | None) -> Answer:
    if head_length is None:
        return Answer(200, JSON, body)
    length = (b"inference-header-content-length", b"%d" % head_length)
    return Answer(200, _BINARY, body, (length,))


def error_answer(error: PolicyServingError, service: PolicyService | None = None) -> Answer:
    """`{"error": "..."}`, with `Retry-After` where a retry can help."""
    status = http_status(error)
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if status == 503:
        retry_after_s = 1 if service is None else service.retry_after_s
        headers = ((b"retry-after", b"%d" % retry_after_s),)
    return Answer(status, JSON, msgspec.json.encode({"error": text_of(error)}), headers)


def _json(content: Any, status: int = 200) -> Answer:
    return Answer(status, JSON, msgspec.json.encode(content))


def live() -> Answer:
    """Whether the process runs."""
    return _json({"live": True})


def ready(services: PolicyServices) -> Answer:
    """Whether every policy is loaded, verified, and serving."""
    is_ready = _is_ready(services)
    return _json({"ready": is_ready}, 200 if is_ready else 503)


def _is_ready(services: PolicyServices) -> bool:
    try:
        services.require_ready()
    except UnavailableError:
        return False
    return True


def server_metadata(version: str) -> Answer:
    """The server's name, version and extensions."""
    return _json({"name": SERVER_NAME, "version": version, "extensions": REST_EXTENSIONS})


def models(services: PolicyServices) -> Answer:
    """The models' names, as KServe lists them."""
    return _json({"models": [service.name for service in services]})


def model_ready(services: PolicyServices, name: str, version: str | None) -> Answer:
    """Whether one model serves."""
    find_model(services, name, version)
    is_ready = _is_ready(services)
    return _json({"name": name, "ready": is_ready}, 200 if is_ready else 503)


def describe(services: PolicyServices, name: str, version: str | None) -> Answer:
    """One model's metadata."""
    return _json(model_metadata(_model(services, name, version)))


def configuration(services: PolicyServices, name: str, version: str | None) -> Answer:
    """One model's configuration."""
    return _json(model_config(_model(services, name, version)))


def _model(services: PolicyServices, name: str, version: str | None) -> Model:
    return find_model(services, name, version)[1]


def statistics(services: PolicyServices, name: str | None, version: str | None) -> Answer:
    """What one model, or every one, has done so far in this process."""
    found = services if name is None else [find_model(services, name, version)[0]]
    return _json({"model_stats": [model_statistics(service) for service in found]})


class _IndexRequest(msgspec.Struct):
    ready: bool = False


def index(services: PolicyServices, body: bytes) -> Answer:
    """The repository's models; `{"ready": true}` leaves out those that do not serve.

    Raises:
        MalformedRequestError: The body is there and is no JSON.
        InvalidRequestError: It is not of that form.
    """
    try:
        request = msgspec.json.decode(body or b"{}", type=_IndexRequest)
    except msgspec.ValidationError as exc:
        raise InvalidRequestError(f"the body is no repository index request: {exc}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MalformedRequestError(f"the body is not JSON: {exc}") from exc
    is_ready = _is_ready(services)
    listed = repository_index(services, is_ready=is_ready)
    return _json([] if request.ready and not is_ready else listed)


def refuse_change(action: str, name: str) -> NotOfferedError:
    """Why a model is not loaded or unloaded."""
    return NotOfferedError(
        f"cannot {action} {name[:100]!r}: the served policies are fixed when the server starts"
    )
