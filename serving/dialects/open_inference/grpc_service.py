"""The gRPC service on two carriers: Ray Serve's gRPC ingress, and a server of our own.

Requests stay bytes until `GrpcDialect` reads them, so Serve can hand them from its proxy to a
replica as they are. An error is a status code and one line, set on the call's context: for one that
is raised Serve would log a traceback, whoever's mistake it is.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import grpc.aio

from serving.dialects.open_inference import grpc_messages
from serving.dialects.open_inference.errors import grpc_code, text_of
from serving.dialects.open_inference.grpc_dialect import GrpcDialect
from serving.errors import PolicyServingError, ServingConfigError
from serving.service import PolicyServices

# What `gRPCOptions.grpc_servicer_functions` of Ray Serve is to name.
SERVICER_FUNCTION = (
    "serving.dialects.open_inference.grpc_service:add_GRPCInferenceServiceServicer_to_server"
)

_Call = Callable[[bytes, Any], Coroutine[Any, Any, Any]]
_ServeCall = Callable[..., Coroutine[Any, Any, Any]]


def add_GRPCInferenceServiceServicer_to_server(  # noqa: N802 - the name that generated code has
    servicer: Any, server: Any
) -> None:
    """Register every method of the service; requests and answers stay bytes.

    Args:
        servicer: Has a method of each name.
        server: A gRPC server, or Serve's, which puts methods of its own in their place.
    """
    handlers: dict[str, Any] = {
        name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name))
        for name in grpc_messages.METHODS
    }
    handler = grpc.method_handlers_generic_handler(grpc_messages.SERVICE, handlers)
    server.add_generic_rpc_handlers((handler,))


def _refuse(context: Any, error: PolicyServingError) -> None:
    context.set_code(getattr(grpc.StatusCode, grpc_code(error)))
    context.set_details(text_of(error))


def _serve_method(name: str) -> _ServeCall:
    """A method as Ray Serve calls it: by its name, with the bytes and its own context."""

    async def method(self: GrpcInference, request: bytes, grpc_context: Any) -> Any:
        try:
            return await self.grpc_dialect.call(name, request)
        except PolicyServingError as exc:
            _refuse(grpc_context, exc)
            return grpc_messages.answer(name)

    method.__name__ = name
    method.__doc__ = f"Answer {name}."
    return method


class GrpcInference:
    """Mixin of a Serve deployment class: the service's methods.

    Serve does not tell a deployment a call's deadline; a request has the parameter `timeout`.

    Attributes:
        grpc_dialect: What answers; the deployment's constructor sets it.
    """

    grpc_dialect: GrpcDialect

    ServerLive = _serve_method("ServerLive")
    ServerReady = _serve_method("ServerReady")
    ServerMetadata = _serve_method("ServerMetadata")
    ModelReady = _serve_method("ModelReady")
    ModelMetadata = _serve_method("ModelMetadata")
    ModelConfig = _serve_method("ModelConfig")
    ModelStatistics = _serve_method("ModelStatistics")
    ModelInfer = _serve_method("ModelInfer")
    RepositoryIndex = _serve_method("RepositoryIndex")
    RepositoryModelLoad = _serve_method("RepositoryModelLoad")
    RepositoryModelUnload = _serve_method("RepositoryModelUnload")


class _Servicer:
    """The service's methods as `grpc.aio` calls them."""

    def __init__(self, dialect: GrpcDialect) -> None:
        for name in grpc_messages.METHODS:
            setattr(self, name, self._method(dialect, name))

    @staticmethod
    def _method(dialect: GrpcDialect, name: str) -> _Call:
        async def method(request: bytes, context: Any) -> bytes:
            try:
                message = await dialect.call(name, request, context.time_remaining())
            except PolicyServingError as exc:
                _refuse(context, exc)
                return b""
            answer: bytes = message.SerializeToString()
            return answer

        return method


class GrpcServer:
    """A gRPC server that listens.

    Attributes:
        port: Where.
    """

    def __init__(self, server: grpc.aio.Server, port: int) -> None:
        self._server = server
        self.port = port

    async def stop(self, grace_s: float = 5.0) -> None:
        """Refuse new calls, and end when those that run are answered, or after `grace_s`."""
        await self._server.stop(grace_s)


async def start_grpc_server(
    services: PolicyServices,
    host: str,
    port: int,
    *,
    max_message_bytes: int,
    reuse_port: bool = False,
    version: str = "0",
) -> GrpcServer:
    """Listen for the protocol's gRPC calls on this event loop.

    Args:
        services: What is served.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        max_message_bytes: Largest request, after decompression.
        reuse_port: Share the port with other processes that do the same (`SO_REUSEPORT`).
        version: The product's version.

    Raises:
        ServingConfigError: The address cannot be listened on.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", int(reuse_port)),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
        ]
    )
    servicer = _Servicer(GrpcDialect(services, version=version))
    add_GRPCInferenceServiceServicer_to_server(servicer, server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as exc:
        raise ServingConfigError(f"cannot listen on {address} for gRPC: {exc}") from exc
    await server.start()
    return GrpcServer(server, bound)
