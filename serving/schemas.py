"""The HTTP answers as models: what `/openapi.json` documents and the client reads."""

from __future__ import annotations

from typing import Any, Literal

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
    engine: EngineDescription
    provenance: dict[str, Any] | None
    parity: dict[str, Any] | None


class PolicyList(BaseModel):
    """All served policies."""

    policies: list[PolicyDescription]
