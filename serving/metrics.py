"""The numbers a server reports, in Prometheus' terms. `docs/metrics.md` gives unit and formula.

Replicas on one machine share their counts through files (prometheus_client's multi-process
mode), so that whichever replica is asked answers for all.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil

from serving.environment import METRICS_DIR
from serving.reaper import RUNTIME_DIR_VARIABLE
from serving.statistics import PolicyStatistics

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
_PUBLISH_S = 0.25
_MAX_UNPUBLISHED = 4096
_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class ServerMetrics:
    """The metrics of one process; one instance per process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._sources: list[Callable[[], None]] = []
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
            "From the body read to the answer ready to be written, by outcome (`ok` or `error`).",
            ["policy", "outcome"],
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
        self.queue_duration = Histogram(
            "policyserve_queue_duration_seconds",
            "How long the first request of a batch waited for it to begin.",
            ["policy"],
            buckets=_DURATION_BUCKETS_S,
            registry=self._registry,
        )
        self.last_inference = Gauge(
            "policyserve_last_inference_timestamp_seconds",
            "When the last batch was computed, in seconds since the epoch.",
            ["policy"],
            multiprocess_mode="max",
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

    def add_source(self, publish: Callable[[], None]) -> None:
        """Call `publish` before anything is read here."""
        self._sources.append(publish)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.collected())

    def collected(self) -> CollectorRegistry:
        """All metrics of the replicas of this machine.

        Those of other replicas are up to a quarter of a second old.
        """
        for publish in self._sources:
            publish()
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return self._registry
        _forget_dead_gauges(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return registry

    def statistics(self, policy: str) -> PolicyStatistics:
        """What one policy has done so far, on all replicas of this machine together."""
        found: dict[str, float] = {}
        for family in self.collected().collect():
            for sample in family.samples:
                if sample.labels.get("policy") == policy and "le" not in sample.labels:
                    key = sample.name + sample.labels.get("outcome", "")
                    found[key] = found.get(key, 0.0) + sample.value

        def count(name: str) -> int:
            return round(found.get(f"policyserve_{name}", 0.0))

        def nanoseconds(name: str) -> int:
            return round(found.get(f"policyserve_{name}", 0.0) * 1e9)

        return PolicyStatistics(
            inference_count=count("observations_total"),
            execution_count=count("batch_size_count"),
            success_count=count("request_duration_seconds_countok"),
            success_ns=nanoseconds("request_duration_seconds_sumok"),
            fail_count=count("request_duration_seconds_counterror"),
            fail_ns=nanoseconds("request_duration_seconds_sumerror"),
            queue_count=count("queue_duration_seconds_count"),
            queue_ns=nanoseconds("queue_duration_seconds_sum"),
            compute_infer_count=count("inference_duration_seconds_count"),
            compute_infer_ns=nanoseconds("inference_duration_seconds_sum"),
            last_inference_ms=round(
                found.get("policyserve_last_inference_timestamp_seconds", 0.0) * 1e3
            ),
        )


def _forget_dead_gauges(directory: Path) -> None:
    """Leave a replica that was killed out of the gauges; its counts stay."""
    for path in directory.glob("gauge_live*_*.db"):
        pid = path.stem.rsplit("_", 1)[-1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            multiprocess.mark_process_dead(int(pid))


class PolicyMetrics:
    """One policy's share of the metrics, with its labels already looked up.

    Counted in plain Python first: a step takes microseconds, and each number that is shared with
    other processes takes one to count. What was counted reaches them every `_PUBLISH_S`.
    """

    def __init__(self, metrics: ServerMetrics, policy: str, version: int, policy_id: str) -> None:
        self._requests = metrics.requests
        self._policy = policy
        self._ok = metrics.requests.labels(policy, "ok")
        self._observations = metrics.observations.labels(policy)
        self._durations = _Observed(metrics.request_duration.labels(policy, "ok"))
        self._refusal_durations = _Observed(metrics.request_duration.labels(policy, "error"))
        self._batch_size = _Observed(metrics.batch_size.labels(policy))
        self._inference_duration = _Observed(metrics.inference_duration.labels(policy))
        self._queue_duration = _Observed(metrics.queue_duration.labels(policy))
        self._queue_size = metrics.queue_size.labels(policy)
        self._last_inference = metrics.last_inference.labels(policy)
        metrics.policy_info.labels(policy, str(version), policy_id).set(1)
        metrics.add_source(self.publish)
        self._refused: dict[str, int] = {}
        self._n_ok = 0
        self._n_observations = 0
        self._n_waiting = 0
        self._last_s = 0.0
        self._is_dirty = False

    def answered(self, n_observations: int, duration_s: float) -> None:
        """Count one request that was answered with actions."""
        self._n_ok += 1
        self._n_observations += n_observations
        self._durations.values.append(duration_s)
        self._changed()

    def answered_each(self, durations_s: Sequence[float]) -> None:
        """Count requests that were each answered with one action."""
        self._n_ok += len(durations_s)
        self._n_observations += len(durations_s)
        self._durations.values.extend(durations_s)
        self._changed()

    def refused(self, code: str, duration_s: float) -> None:
        """Count one request that was answered with an error."""
        self._refused[code] = self._refused.get(code, 0) + 1
        self._refusal_durations.values.append(duration_s)
        self._changed()

    def batch_done(self, size: int, duration_s: float, waited_s: float, queue_size: int) -> None:
        """Count one batch, and note how many observations wait for the next."""
        self._batch_size.values.append(size)
        self._inference_duration.values.append(duration_s)
        self._queue_duration.values.append(waited_s)
        self._n_waiting = queue_size
        self._last_s = time.time()
        self._changed()

    def _changed(self) -> None:
        for durations in (self._durations, self._refusal_durations):
            if len(durations.values) >= _MAX_UNPUBLISHED:
                durations.publish()
        if self._is_dirty:
            return
        self._is_dirty = True
        try:
            asyncio.get_running_loop().call_later(_PUBLISH_S, self.publish)
        except RuntimeError:  # no event loop, so nobody counts fast
            self.publish()

    def publish(self) -> None:
        """Give what was counted to whoever asks for metrics, in this process or another."""
        if not self._is_dirty:
            return
        self._is_dirty = False
        self._ok.inc(self._n_ok)
        self._observations.inc(self._n_observations)
        self._n_ok = self._n_observations = 0
        for code, count in self._refused.items():
            self._requests.labels(self._policy, code).inc(count)
        self._refused.clear()
        for observed in (
            self._durations,
            self._refusal_durations,
            self._batch_size,
            self._inference_duration,
            self._queue_duration,
        ):
            observed.publish()
        self._queue_size.set(self._n_waiting)
        self._last_inference.set(self._last_s)


class _Observed:
    """Values of one histogram, kept until they are published together."""

    def __init__(self, histogram: Histogram) -> None:
        self.values: list[float] = []
        # Adding many values at once is not in the library's public interface; a test holds it to
        # what `observe` would have done.
        self._sum = histogram._sum
        self._buckets = histogram._buckets
        self._bounds = np.array(histogram._upper_bounds)

    def publish(self) -> None:
        if not self.values:
            return
        values = np.array(self.values)
        self.values.clear()
        places = np.searchsorted(self._bounds, values)
        for place, count in enumerate(np.bincount(places).tolist()):
            if count:
                self._buckets[place].inc(count)
        self._sum.inc(float(values.sum()))
