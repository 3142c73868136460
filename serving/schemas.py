"""The HTTP answers as models: what `/openapi.json` documents and the client reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class Problem(BaseModel):
    """An error (RFC 9457), served as `application/problem+json`."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["about:blank"])
    title: str
    status: int
    code: str = Field(description="A stable name of the error; docs/errors.md lists them.")
    detail: str = Field(description="What was found, what was expected, what to do.")
    pointer: str | None = Field(
        default=None, description="Where in the body: a JSON pointer (RFC 6901)."
    )


class Health(BaseModel):
    """Whether the process runs, or can serve."""

    status: Literal["ok", "ready"]


class EngineDescription(BaseModel):
    """Where and how inference runs."""

    name: str
    device: str
    runs: Literal["event loop", "worker thread"]
    batch_duration_us: dict[str, float] = Field(
        description="Median duration of one batch by its size, timed at load, in microseconds."
    )


class Takes(BaseModel):
    """What a request to this policy may hold beside observations."""

    action_mask: bool
    reward: bool = Field(description="The reward of the step before.")
    state: bool = Field(description="Whether the policy has a memory.")
    stochastic: bool = Field(description="Whether `deterministic` may be false.")


class GraphInput(BaseModel):
    """One input of the policy's graph."""

    name: str
    role: Literal["observation", "state", "reward", "action_mask", "noise"]
    dtype: str
    shape: list[int] = Field(description="-1 is the batch.")


class AnswerArray(BaseModel):
    """One array of an answer, as it stands in msgpack."""

    name: str
    dtype: str
    shape: list[int | None] = Field(description="Of one row; null: any width.")


class StateDescription(BaseModel):
    """One array that a policy remembers."""

    dtype: str
    shape: list[int]
    initial: Any = Field(description="At an episode's start: one number for all, or nested lists.")


class PolicyDescription(BaseModel):
    """One served policy: what it expects and returns, and where it came from."""

    policy: str
    version: int
    policy_id: str = Field(description="First 12 hex digits of the graph's SHA-256.")
    algorithm: str
    environment: dict[str, Any] | None
    observation_space: dict[str, Any]
    action_space: dict[str, Any]
    summary: str
    action_distribution: str
    outputs: list[str] = Field(description="What `outputs` may ask for.")
    takes: Takes
    inputs: list[GraphInput] = Field(description="The graph's inputs.")
    answers: list[AnswerArray] = Field(description="What a binary answer may hold.")
    state: dict[str, StateDescription] = Field(
        description="What the policy remembers: send the last answer's `state` with the next "
        "observation of the same episode. Empty for a policy without memory."
    )
    module_id: str = Field(description="The RLModule's name in the checkpoint.")
    agents: dict[str, str] = Field(description="Agent to module, in a multi-agent checkpoint.")
    engine: EngineDescription
    provenance: dict[str, Any] | None
    parity: dict[str, Any] | None


class PolicyList(BaseModel):
    """All served policies."""

    policies: list[PolicyDescription]


def example_observation(
    space: Mapping[str, Any], generator: np.random.Generator | None = None
) -> Any:
    """One observation of a described space, as JSON takes it.

    Args:
        space: A policy's `observation_space` as its description states it.
        generator: Draws one: small normal numbers for Box, uniform ones for the others. None:
            zeros, or the nearest that the space has.
    """
    kind = space["type"]
    if kind == "Dict":
        return {
            key: example_observation(child, generator)
            for key, child in sorted(space["spaces"].items())
        }
    if kind == "Tuple":
        return [example_observation(child, generator) for child in space["spaces"]]
    if kind == "Box":
        return _example_box(space, generator)
    sizes = np.asarray(
        space["n"] if kind == "Discrete" else space.get("nvec", np.full(space.get("shape", ()), 2))
    )
    start = np.asarray(space.get("start", 0))
    return (start + (generator.integers(sizes) if generator else 0 * sizes)).tolist()


def _example_box(space: Mapping[str, Any], generator: np.random.Generator | None) -> Any:
    shape, dtype = space["shape"], np.dtype(space["dtype"])
    if generator is None:
        return np.zeros(shape, dtype).tolist()
    if dtype.kind == "f":
        return generator.normal(scale=0.1, size=shape).astype(dtype).tolist()
    highest = 1 if dtype.kind == "b" else min(255, np.iinfo(dtype).max)
    return generator.integers(0, highest + 1, size=shape).astype(dtype).tolist()
