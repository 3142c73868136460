"""The Ray Serve application; the one place that imports `ray.serve`'s deployments.

One deployment serves every policy, so that small policies share a process and a replica is a
whole server.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.schema import LoggingConfig

from serving import fast_lane
from serving.app import build_app
from serving.config import PolicySource, ServingConfig
from serving.engines.graph import DeviceName
from serving.fast_lane import ComputeActionHandler
from serving.service import load_services

APPLICATION = "policyserve"
# Serve counts the ordinary path's requests against this; `compute_action` has its own bound
# (`max_queue_size`).
_MAX_ONGOING_REQUESTS = 1024
# Answers take milliseconds: what has not drained by then never will.
_GRACEFUL_SHUTDOWN_TIMEOUT_S = 5.0


class PolicyServer:
    """A replica: all policies, one event loop."""

    def __init__(
        self, sources: Sequence[dict[str, Any]], config: dict[str, Any], device: DeviceName
    ) -> None:
        """Load and verify every policy; a failure keeps the replica from ever becoming ready."""
        settings = ServingConfig(**config)
        self._services = load_services(
            [PolicySource(**source) for source in sources], settings, device
        )
        self._handler = ComputeActionHandler(self._services, max_body_bytes=settings.max_body_bytes)
        fast_lane.install(self._handler)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve asks for after the constructor (`serve.ingress()` without an app)."""
        return build_app(self._services, self._handler, version=version("policyserve"))

    async def __del__(self) -> None:
        """Answer what waits before the replica goes."""
        services = getattr(self, "_services", None)
        if services is not None:
            await services.close()


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
        num_replicas=config.replicas,
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
