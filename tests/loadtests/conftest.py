"""Policies to load, and a server of them in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loadtests.plan import LoadPlan
from loadtests.recording import OK, Recording
from loadtests.server_facts import ServerSamples
from loadtests.steps import Step
from tests.bundles import LinearPolicy, box_policy, discrete_policy
from tests.serving.conftest import LiveServer, serving
from tests.tiny_policies import TINY_POLICIES

CARTPOLE = {"environment": {"id": "CartPole-v1", "kwargs": {}}}


@pytest.fixture(scope="session")
def cartpole_like() -> LinearPolicy:
    """A linear policy of CartPole's spaces; it balances for some fifty steps."""
    return discrete_policy(n_actions=2)


@pytest.fixture(scope="session")
def loaded_bundles(
    tmp_path_factory: pytest.TempPathFactory, cartpole_like: LinearPolicy
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loaded")
    return {
        "cartpole": cartpole_like.save(root / "cartpole", facts=CARTPOLE),
        "box": box_policy().save(root / "box", facts={"environment": None}),
        **{name: make().save(root / name) for name, make in TINY_POLICIES.items()},
    }


@pytest.fixture(scope="session")
def loaded(loaded_bundles: dict[str, Path]) -> Iterator[LiveServer]:
    with serving(loaded_bundles) as server:
        yield server


def recording_of(
    latency_ms: list[float],
    *,
    due_s: list[float] | None = None,
    outcomes: list[str] | None = None,
    duration_s: float = 10.0,
    lateness_ms: float = 0.1,
    cpu_percent: float = 20.0,
    returns: tuple[float, ...] = (),
) -> Recording:
    """A run as it might have been; all requests right unless `outcomes` says otherwise."""
    n = len(latency_ms)
    named = outcomes or [OK] * n
    names = [OK, "rejected", *sorted(set(named) - {OK, "rejected"})]
    outcome = np.array([names.index(name) for name in named], np.uint16)
    return Recording(
        started=1000.0,
        duration_s=duration_s,
        due_s=np.array(due_s) if due_s else np.linspace(0.0, duration_s, n, endpoint=False),
        latency_ms=np.array(latency_ms, float),
        outcome=outcome,
        group=np.zeros(n, np.uint16),
        n_observations=(outcome == 0).astype(np.uint32),
        lateness_ms=np.full(100, lateness_ms, np.float32),
        returns=np.array(returns),
        lengths=np.array(returns),
        outcomes=names,
        groups=["query"],
        driver={"cpu_percent": cpu_percent, "n_connections": 8, "n_retries": 0},
    )


def step_of(recording: Recording, **plan: object) -> Step:
    samples = ServerSamples(
        at_s=[recording.started + second + 0.5 for second in range(int(recording.duration_s))],
        cpu_percent=[50.0] * int(recording.duration_s),
        rss_mb=[200.0] * int(recording.duration_s),
        machine_cpu_percent=[30.0] * int(recording.duration_s),
        processes={"python": 1},
    )
    return Step(LoadPlan("http://127.0.0.1:1/v1/policies/x", **plan), recording, samples)  # type: ignore[arg-type]
