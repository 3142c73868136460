"""The numbers a server reports, in Prometheus' terms. `docs/metrics.md` gives unit and formula.

Replicas on one machine share their counts through files (prometheus_client's multi-process
mode), so that whichever replica is asked answers for all.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from serving.environment import METRICS_DIR
from serving.reaper import RUNTIME_DIR_VARIABLE

# prometheus_client chooses its mode when it is imported. Its own variable is not set for all of a
# server's processes: Ray's would read it as well and write their metrics between ours.
if RUNTIME_DIR_VARIABLE in os.environ:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = f"{os.environ[RUNTIME_DIR_VARIABLE]}/{METRICS_DIR}"

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

# A step is expected to take from tens of microseconds to tens of milliseconds.
_DURATION_BUCKETS_S = (
    *(50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3),
    *(10e-3, 20e-3, 50e-3, 0.1, 0.5, 1.0, 5.0),
)
_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class ServerMetrics:
    """The metrics of one process; one instance per process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "policyserve_requests",
            "compute_action requests answered, by policy and error code (`ok` without one).",
            ["policy", "code"],
            registry=self._registry,
        )
        self.observations = Counter(
            "policyserve_observations",
            "Observations for which an action was answered.",
            ["policy"],
            registry=self._registry,
        )
        self.request_duration = Histogram(
            "policyserve_request_duration_seconds",
            "From the body read to the answer ready to be written, compute_action requests.",
            ["policy"],
            buckets=_DURATION_BUCKETS_S,
            registry=self._registry,
        )
        self.batch_size = Histogram(
            "policyserve_batch_size",
            "Observations in one batch.",
            ["policy"],
            buckets=_SIZE_BUCKETS,
            registry=self._registry,
        )
        self.inference_duration = Histogram(
            "policyserve_inference_duration_seconds",
            "One batch in the engine.",
            ["policy"],
            buckets=_DURATION_BUCKETS_S,
            registry=self._registry,
        )
        self.queue_size = Gauge(
            "policyserve_queue_size",
            "Observations waiting for a batch.",
            ["policy"],
            multiprocess_mode="livesum",
            registry=self._registry,
        )
        self.policy_info = Gauge(
            "policyserve_policy_info",
            "1 for each policy served.",
            ["policy", "version", "policy_id"],
            multiprocess_mode="livemax",
            registry=self._registry,
        )

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        _forget_dead_gauges(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)


def _forget_dead_gauges(directory: Path) -> None:
    """Leave a replica that was killed out of the gauges; its counts stay."""
    for path in directory.glob("gauge_live*_*.db"):
        pid = path.stem.rsplit("_", 1)[-1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            multiprocess.mark_process_dead(int(pid))


class PolicyMetrics:
    """One policy's share of the metrics, with its labels already looked up."""

    def __init__(self, metrics: ServerMetrics, policy: str, version: int, policy_id: str) -> None:
        self._requests = metrics.requests
        self._policy = policy
        self._ok = metrics.requests.labels(policy, "ok")
        self._observations = metrics.observations.labels(policy)
        self._request_duration = metrics.request_duration.labels(policy)
        self._batch_size = metrics.batch_size.labels(policy)
        self._inference_duration = metrics.inference_duration.labels(policy)
        self._queue_size = metrics.queue_size.labels(policy)
        metrics.policy_info.labels(policy, str(version), policy_id).set(1)

    def answered(self, n_observations: int, duration_s: float) -> None:
        """Count one request that was answered with actions."""
        self._ok.inc()
        self._observations.inc(n_observations)
        self._request_duration.observe(duration_s)

    def refused(self, code: str, duration_s: float) -> None:
        """Count one request that was answered with an error."""
        self._requests.labels(self._policy, code).inc()
        self._request_duration.observe(duration_s)

    def batch_done(self, size: int, duration_s: float, queue_size: int) -> None:
        """Count one batch, and note how many observations wait for the next."""
        self._batch_size.observe(size)
        self._inference_duration.observe(duration_s)
        self._queue_size.set(queue_size)
