"""How many replicas a load takes."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from serving.autoscaling import UTILIZATION, Load, UtilizationPolicy, replicas_for


@pytest.mark.parametrize(
    ("total", "expected"),
    [(0.0, 1), (0.6, 1), (0.7, 1), (0.71, 2), (1.4, 2), (2.0, 3), (9.0, 4)],
)
def test_replicas_keep_each_at_the_target_within_the_bounds(total: float, expected: int):
    # By hand: ceil(total / 0.7), at least 1 and at most 4.
    assert replicas_for(total, 0.7, fewest=1, most=4) == expected


def context(metrics: Any) -> Any:
    return SimpleNamespace(
        aggregated_metrics=metrics,
        target_num_replicas=3,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
    )


def test_the_policy_adds_up_what_replicas_report():
    policy = UtilizationPolicy(target=0.5)
    assert policy(context({UTILIZATION: {"a": 0.9, "b": 0.7}})) == (4, {})


@pytest.mark.parametrize("metrics", [None, {}, {UTILIZATION: {}}])
def test_without_a_report_the_number_stays(metrics: Any):
    assert UtilizationPolicy(target=0.5)(context(metrics)) == (3, {})


def test_a_busy_process_reports_more_than_an_idle_one():
    load = Load()
    deadline = time.perf_counter() + 0.05
    while time.perf_counter() < deadline:
        pass
    busy = load.utilization()
    time.sleep(0.05)  # idleness itself is what is measured
    assert 0.0 <= load.utilization() < busy
