"""One served policy: from a request's body to an answer's, whatever carries them.

    body -> codec -> Batcher (with whoever else waits) -> engine -> codec -> body

Knows neither Ray nor a web framework, so the same object answers in the fast lane, in the
ordinary application, and in a test without a server.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

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
from serving.interface import OutputName, PolicyOutput
from serving.manifest import ACTION_MASK
from serving.metrics import PolicyMetrics, ServerMetrics
from serving.spaces import MultiDiscreteSpace, Space, describe_space
from serving.verification import load_verified_policy

JSON = b"application/json"
PROBLEM_JSON = b"application/problem+json"
_MAY_BE_MINUS_INFINITY = frozenset({"action_logp", "action_dist_inputs", "q_values"})
_LOWEST = np.finfo(np.float32).min


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
        self._mask_starts = _mask_starts(policy.manifest.action_space)
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
        self._metrics.answered(request.n, time.perf_counter() - started)
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
        inputs = request.inputs
        if not request.deterministic:
            noise = self.policy.draw_noise(request.n, request.seed)
            inputs = {**inputs, "noise": noise}
        output = await self.batcher.compute(
            BatchItem(inputs, request.n, not request.deterministic, request.outputs),
            timeout_s=request.timeout_s,
        )
        return self.codec.encode(self._checked(output, request), is_single=request.is_single)

    def _checked(self, output: PolicyOutput, request: ComputeRequest) -> PolicyOutput:
        """One caller's answer, if it may be answered.

        Finite observations can become NaN inside a network, by an overflow or a division by zero.
        JSON would say `null` for it, and the most likely of NaN logits is action 0, allowed or not.

        Raises:
            InferenceError: A number is not finite, or an action is one that the mask forbids.
        """
        for name, values in (("action", output.actions), ("state", output.state)):
            if not _is_finite(values):
                raise _not_finite(name)
        masks = request.inputs.get(ACTION_MASK)
        if masks is not None and not _allows(masks, output.actions, self._mask_starts):
            raise InferenceError(
                "the network answered an action that `action_mask` forbids: its logits are not "
                "finite for this observation, or the policy's graph does not mask"
            )
        return _with_finite_outputs(output, request.outputs) if request.outputs else output

    def _batch_done(self, size: int, duration_s: float) -> None:
        self._metrics.batch_done(size, duration_s, self.batcher.queue_size)

    def describe(self) -> dict[str, Any]:
        """What `GET /v1/policies/{policy}` answers."""
        manifest = self.policy.manifest
        takes = {
            "action_mask": manifest.mask_size > 0,
            "reward": manifest.has_reward,
            "state": bool(manifest.state),
            "stochastic": manifest.noise.size > 0,
        }
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
            "outputs": sorted(self.policy.available_outputs),
            "takes": takes,
            "inputs": [spec.to_json() for spec in manifest.inputs],
            "state": {name: spec.to_json() for name, spec in manifest.state.items()},
            "module_id": manifest.module_id,
            "agents": dict(manifest.agents),
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


def _is_finite(nested: Any) -> bool:
    """Whether all floating-point numbers of a nested batch are finite."""
    if isinstance(nested, np.ndarray):
        return nested.dtype.kind != "f" or bool(np.isfinite(nested).all())
    if nested is None:
        return True
    parts = nested if isinstance(nested, tuple) else nested.values()
    return all(map(_is_finite, parts))


def _not_finite(name: str) -> InferenceError:
    return InferenceError(
        f"the network overflowed or divided by zero: `{name}` is not a finite number"
    )


def _with_finite_outputs(output: PolicyOutput, asked: Collection[OutputName]) -> PolicyOutput:
    """The answer with what was asked for as JSON can carry it.

    A logit or log-probability of -inf, which says "never", becomes the lowest float32.

    Raises:
        InferenceError: Another number is not finite.
    """
    changed = {}
    for name in asked:
        values = getattr(output, name)
        if _is_finite(values):
            continue
        if name in _MAY_BE_MINUS_INFINITY:
            values = np.where(np.isneginf(values), _LOWEST, values)
        if not _is_finite(values):
            raise _not_finite(name)
        changed[name] = values
    return replace(output, **changed) if changed else output


def _mask_starts(space: Space) -> NDArray[np.int64]:
    """Where the actions of each component stand in a mask, (components,)."""
    sizes = space.nvec.ravel() if isinstance(space, MultiDiscreteSpace) else np.zeros(1, np.int64)
    return np.cumsum(sizes) - sizes


def _allows(masks: NDArray[np.bool_], actions: NDArray[Any], starts: NDArray[np.int64]) -> bool:
    """Whether every action, (B, ...) from 0, is allowed by its row of (B, M)."""
    places = actions.reshape(len(masks), -1) + starts
    if places.min() < 0 or places.max() >= masks.shape[1]:
        return False
    # Saves 2 of 6 microseconds over `take_along_axis`, for one row.
    return bool(masks[np.arange(len(masks))[:, None], places].all())


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
