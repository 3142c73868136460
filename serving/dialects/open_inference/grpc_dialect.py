"""The protocol's gRPC methods without a gRPC server: a request's bytes to an answer's message."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from google.protobuf.json_format import ParseDict

from serving.dialects.open_inference import grpc_messages
from serving.dialects.open_inference.descriptions import (
    GRPC_EXTENSIONS,
    SERVER_NAME,
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
)
from serving.dialects.open_inference.grpc_tensors import (
    arrays_of,
    infer_answer,
    outputs_of,
    parameters_of,
)
from serving.dialects.open_inference.model import Model, find_model
from serving.dialects.open_inference.rest import refuse_change
from serving.errors import PolicyServingError, UnavailableError, unexpected_error
from serving.service import PolicyServices

logger = logging.getLogger("policyserve")

_Handler: TypeAlias = Callable[[Any, float | None], Awaitable[Any]]


class GrpcDialect:
    """Answers every method of the service, whatever carries it."""

    def __init__(self, services: PolicyServices, *, version: str = "0") -> None:
        """Store.

        Args:
            services: What is served.
            version: The product's version.
        """
        self._services = services
        self._version = version
        self._handlers: dict[str, _Handler] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "ModelInfer": self._model_infer,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._repository_load,
            "RepositoryModelUnload": self._repository_unload,
        }

    async def call(self, method: str, data: bytes, timeout_s: float | None = None) -> Any:
        """Answer one call.

        Args:
            method: Its name, one of `grpc_messages.METHODS`.
            data: The serialised request.
            timeout_s: How long the caller waits; None: as long as it takes.

        Returns:
            The answer's message.

        Raises:
            PolicyServingError: Any; a failed inference has been counted.
        """
        request = grpc_messages.parse(method, data)
        try:
            return await self._handlers[method](request, timeout_s)
        except PolicyServingError:
            raise
        except Exception as exc:  # the outermost edge of a request
            logger.exception("%s failed", method)
            raise unexpected_error() from exc

    async def _model_infer(self, request: Any, timeout_s: float | None) -> Any:
        started = time.perf_counter()
        service, model = find_model(self._services, request.model_name, request.model_version)
        try:
            arrays = arrays_of(model, request)
            outputs = outputs_of(model, request)
            asked = model.request(arrays, outputs, parameters_of(request), timeout_s)
        except PolicyServingError as exc:
            service.refuse(exc, time.perf_counter() - started)
            raise
        output = await service.compute(asked)
        return infer_answer(model, request.id, model.answer(output, outputs))

    def _is_ready(self) -> bool:
        try:
            self._services.require_ready()
        except UnavailableError:
            return False
        return True

    def _model(self, request: Any) -> Model:
        return find_model(self._services, request.name, request.version)[1]

    async def _server_live(self, _: Any, __: float | None) -> Any:
        return grpc_messages.answer("ServerLive", live=True)

    async def _server_ready(self, _: Any, __: float | None) -> Any:
        return grpc_messages.answer("ServerReady", ready=self._is_ready())

    async def _server_metadata(self, _: Any, __: float | None) -> Any:
        return grpc_messages.answer(
            "ServerMetadata", name=SERVER_NAME, version=self._version, extensions=GRPC_EXTENSIONS
        )

    async def _model_ready(self, request: Any, _: float | None) -> Any:
        self._model(request)
        return grpc_messages.answer("ModelReady", ready=self._is_ready())

    async def _model_metadata(self, request: Any, _: float | None) -> Any:
        metadata = model_metadata(self._model(request))
        del metadata["properties"]  # REST alone has them
        return grpc_messages.answer("ModelMetadata", **metadata)

    async def _model_config(self, request: Any, _: float | None) -> Any:
        config = {"config": model_config(self._model(request))}
        return ParseDict(config, grpc_messages.answer("ModelConfig"))

    async def _model_statistics(self, request: Any, _: float | None) -> Any:
        found = (
            [find_model(self._services, request.name, request.version)[0]]
            if request.name
            else self._services
        )
        statistics = [model_statistics(service) for service in found]
        return grpc_messages.answer("ModelStatistics", model_stats=statistics)

    async def _repository_index(self, request: Any, _: float | None) -> Any:
        is_ready = self._is_ready()
        listed = repository_index(self._services, is_ready=is_ready)
        models = [] if request.ready and not is_ready else listed
        return grpc_messages.answer("RepositoryIndex", models=models)

    async def _repository_load(self, request: Any, _: float | None) -> Any:
        raise refuse_change("load", request.model_name)

    async def _repository_unload(self, request: Any, _: float | None) -> Any:
        raise refuse_change("unload", request.model_name)
