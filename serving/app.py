"""The ordinary web application of a replica: everything but the fast lane, and that as well.

Where Serve's middlewares cannot be used, `compute_action` arrives here and is answered by the
same handler.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.routing import Route

from serving.compute_action import PREFIX, SUFFIX, ComputeActionHandler
from serving.dialects.native_schema import answer_schema, request_schema
from serving.dialects.open_inference.handler import OpenInferenceHandler
from serving.dialects.open_inference.openapi import add_paths
from serving.dialects.open_inference.route import OpenInferenceRoute
from serving.errors import MethodNotAllowedError, NotFoundError, PolicyServingError
from serving.metrics import CONTENT_TYPE
from serving.schemas import (
    Health,
    PolicyDescription,
    PolicyList,
    Problem,
    example_observation,
)
from serving.service import (
    Answer,
    PolicyService,
    PolicyServices,
    problem_answer,
    unexpected_answer,
)
from serving.stream import StreamRegistry, StreamSettings
from serving.stream_endpoint import stream_routes

logger = logging.getLogger("policyserve")

_PROBLEM_CONTENT = {
    "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
}
_BINARY = {
    "type": "string",
    "format": "binary",
    "description": "The same members as msgpack, arrays as raw bytes; see docs/protocols.md.",
}
_COMPUTE_PROBLEMS = {
    400: "The body is not what its content type says.",
    404: "No such policy, or version of it.",
    413: "The body or the batch is too large.",
    415: "Neither JSON nor msgpack, or compressed.",
    422: "An observation outside the space, or a request outside the schema.",
    500: "The engine failed.",
    503: "The queue is full or the server not ready; see Retry-After.",
    504: "`timeout_ms` passed.",
}


def build_app(
    services: PolicyServices,
    handler: ComputeActionHandler,
    *,
    version: str = "0",
    streams: StreamRegistry | None = None,
) -> FastAPI:
    """The application of a process that serves `services`.

    Args:
        services: What is served.
        handler: The one `compute_action` handler of the process.
        version: The product's version, for the API description.
        streams: Those of the process, to be drained with it; None: of this application alone.
    """
    # The interactive docs come from the installed package: a server may have no internet.
    app = FastAPIOffline(title="policyserve", version=version, redoc_url=None)
    _add_errors(app)
    _add_probes(app, services)
    _add_policies(app, services)
    app.router.routes.append(Route(f"{PREFIX}{{policy}}{SUFFIX}", endpoint=handler))
    open_inference = OpenInferenceHandler(
        services, max_body_bytes=handler.max_body_bytes, version=version
    )
    app.router.routes.append(OpenInferenceRoute(open_inference))
    if streams is None:
        streams = StreamRegistry(services, StreamSettings(handler.max_body_bytes))
    app.router.routes.extend(stream_routes(streams))
    app.openapi = lambda: _openapi(app, services)  # type: ignore[method-assign]
    return app


def _response(answer: Answer) -> Response:
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    return Response(
        answer.body, answer.status, headers=headers, media_type=answer.content_type.decode()
    )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(PolicyServingError)
    async def on_known(_: Request, exc: PolicyServingError) -> Response:
        return _response(problem_answer(exc))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, exc: HTTPException) -> Response:
        if exc.status_code == 405:
            response = _response(
                problem_answer(
                    MethodNotAllowedError(f"{request.method} is not answered at {request.url.path}")
                )
            )
            response.headers.update(exc.headers or {})
            return response
        return _response(
            problem_answer(
                NotFoundError(f"nothing is at {request.url.path}; /docs lists the endpoints")
            )
        )

    @app.exception_handler(Exception)
    async def on_unexpected(request: Request, exc: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=exc)
        return _response(unexpected_answer())


def _add_probes(app: FastAPI, services: PolicyServices) -> None:
    @app.get("/healthz", tags=["operation"])
    async def healthz() -> Health:
        """Whether the process runs."""
        return Health(status="ok")

    @app.get(
        "/readyz",
        tags=["operation"],
        responses={503: {"description": "Not ready.", "content": _PROBLEM_CONTENT}},
    )
    async def readyz() -> Health:
        """Whether every policy is loaded, verified against its golden vectors, and serving."""
        services.require_ready()
        return Health(status="ready")

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics of all replicas on this machine; docs/metrics.md explains each."""
        return Response(services.metrics.exposition(), media_type=CONTENT_TYPE)


def _add_policies(app: FastAPI, services: PolicyServices) -> None:
    @app.get("/v1/policies", tags=["policies"])
    async def list_policies() -> PolicyList:
        """What is served."""
        return PolicyList(
            policies=[PolicyDescription(**service.describe()) for service in services]
        )

    @app.get(
        "/v1/policies/{policy}",
        tags=["policies"],
        responses={404: {"description": "No such policy.", "content": _PROBLEM_CONTENT}},
    )
    async def describe_policy(policy: str) -> PolicyDescription:
        """What a policy expects and returns, where it came from, and how it was proved."""
        return PolicyDescription(**services.require(policy).describe())


def _openapi(app: FastAPI, services: PolicyServices) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        # FastAPI documents validation errors of its own, which no endpoint here answers.
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        schemas["Problem"] = Problem.model_json_schema()
        for service in services:
            schema["paths"][f"{PREFIX}{service.name}{SUFFIX}"] = {"post": _operation(service)}
        add_paths(schema, services)
        app.openapi_schema = schema
    return app.openapi_schema


def _operation(service: PolicyService) -> dict[str, Any]:
    """`compute_action` of one policy, with the schema of its own spaces."""
    manifest = service.policy.manifest
    body = request_schema(service.codec, manifest)
    described = service.describe()
    example = example_observation(described["observation_space"])
    return {
        "tags": ["actions"],
        "operationId": f"compute_action_{service.name}",
        "summary": f"One action or many from {service.name}: {described['summary']}",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": body, "example": {"observation": example}},
                "application/msgpack": {"schema": _BINARY},
            },
        },
        "responses": {
            "200": {
                "description": "`action` for `observation`, `actions` for `observations`.",
                "content": {
                    "application/json": {"schema": answer_schema(manifest)},
                    "application/msgpack": {"schema": _BINARY},
                },
            },
            **{
                str(status): {"description": text, "content": _PROBLEM_CONTENT}
                for status, text in _COMPUTE_PROBLEMS.items()
            },
        },
    }
