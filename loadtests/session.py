"""A load test from its plan to what it leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.errors import LoadTestError, LoadTestUsageError
from loadtests.plan import Kind, LoadPlan, Protocol
from loadtests.questions import draw
from loadtests.report import write_report
from loadtests.steps import Step, run_step
from loadtests.summary import summarise
from loadtests.verdicts import Limits, broken_limits
from serving.client import PolicyClient
from serving.environments import NamedEnvironment, described_environment
from serving.errors import PolicyServingError
from serving.rollout import check_spaces
from serving.stream_client import StreamClient

_FILES = ("summary.json", "report.html", "windows.csv")


def run_loadtest(
    plans: Sequence[LoadPlan],
    output: Path,
    *,
    limits: Limits | None = None,
    on_step: Callable[[LoadPlan], None] = lambda _: None,
) -> dict[str, Any]:
    """Load a server with each plan in turn and write the report.

    Args:
        plans: The steps, at least one; of one policy.
        output: A directory for the report; made if it is not there.
        limits: What the report says whether it was kept.
        on_step: Called before each step.

    Returns:
        The content of `summary.json`; docs/metrics.md explains each figure.

    Raises:
        LoadTestUsageError: The plans cannot be, or there is nowhere to write.
        LoadTestError: The driver failed.
        PolicyServingError: There is no such policy, or it refuses what it is asked.
    """
    for plan in plans:
        plan.check()
    policy_url, described = _look_at(plans[0])
    _prepare(output)
    steps: list[Step] = []
    for plan in plans:
        on_step(plan)
        steps.append(run_step(dataclasses.replace(plan, url=policy_url)))
    summary = summarise(steps, described)
    write_report(output, steps, summary, broken_limits(summary, limits or Limits()))
    return summary


def _look_at(plan: LoadPlan) -> tuple[str, dict[str, Any]]:
    """Find out before the load, not in it, what cannot work.

    Returns:
        The policy's whole URL and its description.
    """
    with PolicyClient(
        plan.url, encoding=plan.protocol.encoding, timeout_s=plan.timeout_s
    ) as client:
        described = client.describe()
        if plan.kind is not Kind.queries:
            _check_environment(plan.env, described)
        observation = draw(described["observation_space"], np.random.default_rng(plan.seed))
        client.compute_action(observation)
        policy_url = client.policy_url
    if plan.protocol is Protocol.ws:
        try:
            with StreamClient(policy_url, timeout_s=plan.timeout_s) as stream:
                stream.compute_action(observation)
        except PolicyServingError as exc:
            raise LoadTestError(f"no stream at {policy_url}/stream: {exc.message}") from exc
    return policy_url, described


def _check_environment(env: str | None, described: Mapping[str, Any]) -> None:
    named = NamedEnvironment(env, {}) if env else described_environment(described)
    if named is None:
        raise LoadTestUsageError("the policy names no environment: give --env, or --kind queries")
    made = named.make()
    try:
        check_spaces(named.id, made, described)
    finally:
        made.close()


def _prepare(output: Path) -> None:
    """Make the directory and forget an earlier report there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            (output / name).unlink(missing_ok=True)
        probe = output / ".policyserve-probe"
        probe.touch()
        probe.unlink()
    except OSError as exc:
        raise LoadTestUsageError(f"cannot write to {output}: {exc.strerror or exc}") from exc
