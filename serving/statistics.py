"""What one served policy has done so far, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PolicyStatistics:
    """Counts and total durations since the policy was loaded.

    Attributes:
        inference_count: Observations that were answered with an action.
        execution_count: Batches that the engine ran.
        success_count: Requests that were answered with actions.
        success_ns: Their durations, from arrival to answer, in nanoseconds.
        fail_count: Requests that were answered with an error.
        fail_ns: Their durations, in nanoseconds.
        queue_count: Batches whose waiting was measured.
        queue_ns: How long the first request of each of them waited, in nanoseconds.
        compute_infer_count: Batches that the engine ran, and whose duration was measured.
        compute_infer_ns: Their durations in the engine, in nanoseconds.
        last_inference_ms: When the last answer was computed, in milliseconds since the epoch; 0
            before the first.
    """

    inference_count: int = 0
    execution_count: int = 0
    success_count: int = 0
    success_ns: int = 0
    fail_count: int = 0
    fail_ns: int = 0
    queue_count: int = 0
    queue_ns: int = 0
    compute_infer_count: int = 0
    compute_infer_ns: int = 0
    last_inference_ms: int = 0
