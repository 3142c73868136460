"""One served policy: from a request's body to an answer's, whatever carries them.

    body -> codec -> Batcher (with whoever else waits) -> engine -> codec -> body

Knows neither Ray nor a web framework, so the same object answers in the fast lane, in the
ordinary application, and in a test without a server.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from serving.batching import Batcher, BatchItem
from serving.config import PolicySource, ServingConfig
from serving.dialects.native import ComputeRequest, NativeCodec
from serving.engines.graph import DeviceName, GraphPolicy
from serving.errors import (
    InferenceError,
    PolicyNotReadyError,
    PolicyServingError,
    UnknownPolicyError,
    problem,
)
from serving.metrics import PolicyMetrics, ServerMetrics
from serving.spaces import describe_space
from serving.verification import load_verified_policy

JSON = b"application/json"
PROBLEM_JSON = b"application/problem+json"


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, before any framework: status, content type, body, further headers."""

    status: int
    content_type: bytes
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = field(default=())


class PolicyService:
    """A policy with its codec, its batcher and its metrics."""

    def __init__(
        self,
        source: PolicySource,
        policy: GraphPolicy,
        config: ServingConfig,
        metrics: ServerMetrics,
    ) -> None:
        self.name = source.name
        self.version = source.version
        self.policy = policy
        self._retry_after_s = config.retry_after_s
        self.codec = NativeCodec(
            source.name,
            source.version,
            policy.manifest,
            max_observations_per_request=config.max_observations_per_request,
        )
        self._metrics = PolicyMetrics(
            metrics, source.name, source.version, policy.manifest.policy_id
        )
        self.batcher = Batcher(
            policy,
            max_batch_size=config.max_batch_size,
            max_queue_size=config.max_queue_size,
            on_batch=self._batch_done,
        )
        self.batch_durations_s = self.batcher.calibrate()

    async def answer(self, body: bytes | bytearray) -> Answer:
        """Answer one `compute_action` body; every failure becomes a problem+json answer."""
        started = time.perf_counter()
        try:
            request = self.codec.decode(body)
            encoded = await self._compute(request)
        except PolicyServingError as exc:
            return self.refuse(exc, time.perf_counter() - started)
        self._metrics.answered(len(request.observations), time.perf_counter() - started)
        return Answer(200, JSON, encoded)

    def refuse(self, error: PolicyServingError, duration_s: float = 0.0) -> Answer:
        """Count a request that gets no action, and answer it."""
        self._metrics.refused(error.code, duration_s)
        return problem_answer(error, retry_after_s=self._retry_after_s)

    async def _compute(self, request: ComputeRequest) -> bytes:
        if request.version is not None and request.version != self.version:
            raise UnknownPolicyError(
                f"version {request.version} of {self.name!r} is not served here; version "
                f"{self.version} is",
                pointer="/version",
            )
        # Before batching: what one caller may not ask must not fail the others of its batch.
        self.policy.check_outputs(request.outputs)
        n = len(request.observations)
        noise = None if request.deterministic else self.policy.draw_noise(n, request.seed)
        output = await self.batcher.compute(
            BatchItem(request.observations, noise, request.outputs), timeout_s=request.timeout_s
        )
        if output.actions.dtype.kind == "f" and not np.isfinite(output.actions).all():
            # Finite numbers can overflow inside a network; JSON would say `null`.
            raise InferenceError("the network overflowed: the action is not a finite number")
        return self.codec.encode(output, is_single=request.is_single)

    def _batch_done(self, size: int, duration_s: float) -> None:
        self._metrics.batch_done(size, duration_s, self.batcher.queue_size)

    def describe(self) -> dict[str, Any]:
        """What `GET /v1/policies/{policy}` answers."""
        manifest = self.policy.manifest
        outputs = ["action_logp", "action_dist_inputs"] + ["value"] * manifest.has_value
        return {
            "policy": self.name,
            "version": self.version,
            "policy_id": manifest.policy_id,
            "algorithm": manifest.algorithm,
            "environment": manifest.environment,
            "observation_space": manifest.observation_space.to_json(),
            "action_space": manifest.action_space.to_json(),
            "summary": (
                f"{describe_space(manifest.observation_space)} -> "
                f"{describe_space(manifest.action_space)}"
            ),
            "action_distribution": manifest.distribution,
            "outputs": sorted(outputs),
            "engine": {
                "name": self.policy.graph.name,
                "device": self.policy.graph.device,
                "runs": "event loop" if self.batcher.runs_inline else "worker thread",
                "batch_duration_us": {
                    str(size): round(duration * 1e6, 1)
                    for size, duration in self.batch_durations_s.items()
                },
            },
            "provenance": manifest.raw.get("provenance"),
            "parity": manifest.raw.get("parity"),
        }


class PolicyServices:
    """All policies of one process, by name."""

    def __init__(self, services: Iterable[PolicyService], metrics: ServerMetrics) -> None:
        self.metrics = metrics
        self._is_closing = False
        self._by_name: Mapping[str, PolicyService] = {service.name: service for service in services}

    def __iter__(self) -> Any:
        """The services, in the order of their names."""
        return iter(sorted(self._by_name.values(), key=lambda service: service.name))

    def get(self, name: str) -> PolicyService | None:
        """The policy of that name, or None."""
        return self._by_name.get(name)

    def require(self, name: str) -> PolicyService:
        """The policy of that name.

        Raises:
            UnknownPolicyError: With the names there are.
        """
        service = self._by_name.get(name)
        if service is None:
            raise UnknownPolicyError(
                f"no policy {name!r} is served here; there is {', '.join(sorted(self._by_name))}"
            )
        return service

    def require_ready(self) -> None:
        """Raise unless requests are served.

        Raises:
            PolicyNotReadyError: The server is shutting down.
        """
        if self._is_closing:
            raise PolicyNotReadyError("the server is shutting down")

    async def close(self) -> None:
        """Answer what waits, refuse what comes."""
        self._is_closing = True
        for service in self._by_name.values():
            await service.batcher.close()


def load_services(
    sources: Iterable[PolicySource], config: ServingConfig, device: DeviceName
) -> PolicyServices:
    """Load, verify and time every policy.

    Raises:
        BundleError: A bundle is damaged or does not reproduce its golden vectors here.
    """
    metrics = ServerMetrics()
    services = [
        PolicyService(
            source,
            load_verified_policy(source.path, engine=config.engine, device=device),
            config,
            metrics,
        )
        for source in sources
    ]
    return PolicyServices(services, metrics)


def problem_answer(error: PolicyServingError, *, retry_after_s: int = 1) -> Answer:
    """An error as an RFC 9457 answer, with `Retry-After` where a retry can help."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if error.http_status == 503:
        headers = ((b"retry-after", str(retry_after_s).encode()),)
    body = msgspec.json.encode(problem(error))
    return Answer(error.http_status or 500, PROBLEM_JSON, body, headers)


def unexpected_answer() -> Answer:
    """What a caller gets for a mistake of ours: no traceback; the log has it."""
    return problem_answer(InferenceError("the server failed; its log has the reason"))
