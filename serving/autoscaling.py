"""How busy a replica is, and how many replicas that takes.

Serve counts requests in flight, and `compute_action` does not pass where it counts. What a replica
has to give is its core's time, so that is the signal.
"""

from __future__ import annotations

import math
import time
from typing import Any

UTILIZATION = "policyserve_utilization"


class Load:
    """The share of one core that this process has used since it was last asked."""

    def __init__(self) -> None:
        self._wall_s = time.perf_counter()
        self._cpu_s = time.process_time()

    def utilization(self) -> float:
        """CPU seconds per second; about 1 is all that one event loop can use."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        passed_s, used_s = wall_s - self._wall_s, cpu_s - self._cpu_s
        self._wall_s, self._cpu_s = wall_s, cpu_s
        return used_s / passed_s if passed_s > 0 else 0.0


class UtilizationPolicy:
    """As many replicas as keep each at the target; Serve's policy class of `--max-replicas`."""

    def __init__(self, target: float) -> None:
        """Store.

        Args:
            target: The utilization to keep, (0, 1].
        """
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas that Serve should have.

        Args:
            context: Ray's `AutoscalingContext`.

        Returns:
            The number, and the policy's own memory, which it does not need.
        """
        found = (context.aggregated_metrics or {}).get(UTILIZATION) or {}
        if not found:
            return context.target_num_replicas, {}
        return replicas_for(
            sum(found.values()),
            self._target,
            fewest=context.capacity_adjusted_min_replicas,
            most=context.capacity_adjusted_max_replicas,
        ), {}


def replicas_for(total: float, target: float, *, fewest: int, most: int) -> int:
    """The replicas among which `total` cores of work leave each at `target` at most."""
    return min(most, max(fewest, math.ceil(total / target - 1e-9)))
