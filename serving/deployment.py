"""The Ray Serve application; the one place that imports `ray.serve`'s deployments.

One deployment serves every policy, so that small policies share a process and a replica is a
whole server.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from serving.app import build_app
from serving.autoscaling import UTILIZATION, Load, UtilizationPolicy
from serving.compute_action import ComputeActionHandler
from serving.config import PolicySource, ServingConfig
from serving.dialects.open_inference.grpc_dialect import GrpcDialect
from serving.dialects.open_inference.grpc_service import (
    GrpcInference,
    GrpcServer,
    start_grpc_server,
)
from serving.engines.graph import DeviceName
from serving.hot_protocol import sweep
from serving.hot_routes import HotRoutes
from serving.public_server import PublicServer, install_in_serve
from serving.service import load_services
from serving.stream import StreamRegistry, StreamSettings
from serving.stream_protocol import stream_opener

APPLICATION = "policyserve"
# Serve counts the ordinary path's requests against this; `compute_action` has its own bound
# (`max_queue_size`).
_MAX_ONGOING_REQUESTS = 1024
# Answers take milliseconds: what has not drained by then never will.
_GRACEFUL_SHUTDOWN_TIMEOUT_S = 5.0


class PolicyServer(GrpcInference):
    """A replica: all policies, one event loop.

    Serve calls the methods of `GrpcInference` for its gRPC ingress.
    """

    # Serve awaits it on the replica's event loop.
    async def __init__(  # type: ignore[misc]
        self, sources: Sequence[dict[str, Any]], config: dict[str, Any], device: DeviceName
    ) -> None:
        """Load and verify every policy; a failure keeps the replica from ever becoming ready."""
        settings = ServingConfig(**config)
        self._services = load_services(
            [PolicySource(**source) for source in sources], settings, device
        )
        product_version = version("policyserve")
        self.grpc_dialect = GrpcDialect(self._services, version=product_version)
        handler = ComputeActionHandler(self._services, max_body_bytes=settings.max_body_bytes)
        self._streams = StreamRegistry(self._services, StreamSettings(settings.max_body_bytes))
        self._app = build_app(
            self._services, handler, version=product_version, streams=self._streams
        )
        routes = HotRoutes(
            self._services,
            max_body_bytes=settings.max_body_bytes,
            keep_alive_s=settings.keep_alive_s,
            receive_timeout_s=settings.receive_timeout_s,
            open_stream=stream_opener(self._streams),
        )
        self._load = Load()
        self._sweeper = asyncio.create_task(sweep(routes))
        self._public: PublicServer | None = None
        self._grpc: GrpcServer | None = None
        if settings.ingress != "direct":
            install_in_serve(routes)
            return
        self._public = PublicServer(self._app, routes, settings.host, settings.port)
        await self._public.start()
        if settings.grpc:
            self._grpc = await start_grpc_server(
                self._services,
                settings.host,
                settings.grpc_port or 0,
                max_message_bytes=settings.max_body_bytes,
                reuse_port=True,
                version=product_version,
            )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve asks for after the constructor (`serve.ingress()` without an app)."""
        return self._app

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The load signal; Serve asks for it where `max_replicas` is set."""
        return {UTILIZATION: self._load.utilization()}

    async def __del__(self) -> None:
        """Answer what waits before the replica goes."""
        if "_sweeper" not in self.__dict__:
            return  # the constructor failed
        await self._streams.drain()
        if self._public is not None:
            await self._public.stop()
        if self._grpc is not None:
            await self._grpc.stop()
        self._sweeper.cancel()
        await self._services.close()


def _replicas(config: ServingConfig) -> dict[str, Any]:
    if config.max_replicas is None:
        return {"num_replicas": config.replicas}
    policy = AutoscalingPolicy(
        policy_function=UtilizationPolicy, policy_kwargs={"target": config.target_utilization}
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=config.max_replicas,
            metrics_interval_s=1.0,
            look_back_period_s=5.0,
            upscale_delay_s=5.0,
            downscale_delay_s=60.0,
            policy=policy,
        )
    }


def build_serve_app(
    sources: Sequence[PolicySource],
    config: ServingConfig,
    device: DeviceName,
    environment: dict[str, str],
) -> serve.Application:
    """The application for `serve.run`.

    Args:
        sources: The policies.
        config: The server's settings.
        device: Where inference runs, already decided.
        environment: Environment variables that the replica needs and that its node may lack.
    """
    gpus = config.gpus_per_replica
    missing = {key: value for key, value in environment.items() if os.environ.get(key) != value}
    deployment: Any = serve.deployment(
        serve.ingress()(PolicyServer),
        name="PolicyServer",
        **_replicas(config),
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=_GRACEFUL_SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": (1.0 if device == "cuda" else 0.0) if gpus is None else gpus,
            # A worker with its own environment starts more slowly, so only where it is needed.
            **({"runtime_env": {"env_vars": missing}} if missing else {}),
        },
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
    )
    application: serve.Application = deployment.bind(
        [source.model_dump(mode="json") for source in sources],
        config.model_dump(mode="json"),
        device,
    )
    return application
