"""What a bundle's manifest says of a policy; `docs/bundle.md` describes the fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.spaces import DiscreteSpace, LeafSpace, MultiDiscreteSpace, Space

# The input that forbids actions.
ACTION_MASK = "action_mask"


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle: its SHA-256 in hex and its size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class InputSpec:
    """One input of the graph.

    Attributes:
        name: Its name.
        role: `observation`, `state`, `reward`, `action_mask` or `noise`.
        dtype: Its NumPy dtype name.
        shape: The shape of one row, without the batch axis.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON: `name`, `role`, `dtype`, `shape` with -1 for the batch."""
        return {
            "name": self.name,
            "role": self.role,
            "dtype": self.dtype,
            "shape": [-1, *self.shape],
        }


@dataclass(frozen=True)
class NoiseSegment:
    """A run of columns of the noise: `gumbel` (standard Gumbel) or `normal` (standard normal)."""

    distribution: str
    size: int

    def to_json(self) -> dict[str, Any]:
        """JSON: `distribution`, `size`."""
        return {"distribution": self.distribution, "size": self.size}

    def draw(self, generator: np.random.Generator, n: int) -> NDArray[np.float32]:
        """Draw (n, size) float32."""
        if self.distribution == "gumbel":
            return generator.gumbel(size=(n, self.size)).astype(np.float32)
        return generator.standard_normal((n, self.size), dtype=np.float32)


@dataclass(frozen=True)
class NoiseSpec:
    """What the graph's `noise` input, (B, size) float32, is drawn from.

    Attributes:
        segments: Its columns from left to right; none for a policy without a distribution.
    """

    segments: tuple[NoiseSegment, ...]

    @property
    def size(self) -> int:
        """The width of all segments together."""
        return sum(segment.size for segment in self.segments)

    def draw(self, generator: np.random.Generator, n: int) -> NDArray[np.float32]:
        """Draw (n, size) float32, one segment after the other."""
        if not self.segments:
            return np.zeros((n, 0), dtype=np.float32)
        parts = [segment.draw(generator, n) for segment in self.segments]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


@dataclass(frozen=True, eq=False)
class StateSpec:
    """One array that a policy remembers from step to step.

    Attributes:
        dtype: Its NumPy dtype name.
        shape: The shape of one row.
        initial: `shape`, what it is at an episode's start; read-only.
    """

    dtype: str
    shape: tuple[int, ...]
    initial: NDArray[Any]

    def to_json(self) -> dict[str, Any]:
        """JSON; `initial` is one number where all are equal, else a nested list."""
        values = self.initial
        is_one = values.size > 0 and bool(np.all(values == values.flat[0]))
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "initial": values.flat[0].item() if is_one else values.tolist(),
        }


@dataclass(frozen=True)
class PolicyManifest:
    """What a policy expects and returns, where it came from, and how it was proved.

    Attributes:
        policy_id: First 12 hex digits of the SHA-256 of `policy.onnx`.
        algorithm: The RLlib algorithm that trained it.
        module_id: The RLModule's name in the checkpoint.
        agents: Agent to module, for a policy of a multi-agent checkpoint; else empty.
        observation_space: What an observation looks like, raw, as the environment gives it.
        action_space: What an action looks like, as the environment takes it.
        distribution: `categorical`, `multi_categorical`, `diag_gaussian`, `squashed_gaussian`,
            `multi` (of a Dict or Tuple), or `none`.
        noise: The noise that sampling takes.
        inputs: The graph's inputs.
        state: What the policy remembers, by name; empty for a policy without memory.
        outputs: The graph's outputs, by name.
        tolerance: How far an answer may lie from RLlib's, relative to 1 + |RLlib's|; for
            a bounded Box action at least to half its range.
        n_golden_rows: Rows (episodes, where there is memory) of golden vectors.
        n_golden_steps: Steps of each golden episode; 1 without memory.
        files: The bundle's other files.
        environment: `{"id", "kwargs"}` of the training environment, or None.
        raw: The whole manifest as written.
    """

    policy_id: str
    algorithm: str
    module_id: str
    agents: Mapping[str, str]
    observation_space: Space
    action_space: Space
    distribution: str
    noise: NoiseSpec
    inputs: tuple[InputSpec, ...]
    state: Mapping[str, StateSpec]
    outputs: tuple[str, ...]
    tolerance: float
    n_golden_rows: int
    n_golden_steps: int
    files: Mapping[str, FileEntry]
    environment: Mapping[str, Any] | None
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def has_value(self) -> bool:
        """Whether the policy has a critic to ask for `value`."""
        return "value" in self.outputs

    @property
    def has_reward(self) -> bool:
        """Whether the policy reads the reward of the step before."""
        return any(spec.role == "reward" for spec in self.inputs)

    @property
    def mask_size(self) -> int:
        """M of the action mask, 0 where the policy takes none."""
        return sum(spec.shape[0] for spec in self.inputs if spec.role == "action_mask")


def greedy_outputs(names: Sequence[str]) -> tuple[str, ...]:
    """Of a graph's outputs those that a greedy step needs: the action and the state after it."""
    return tuple(name for name in names if name.split("/")[0] in ("action", "next_state"))


def step_outputs(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Of a graph's outputs those that a batch needs: of greedy steps, of sampled ones, of both."""
    greedy = greedy_outputs(names)
    sampled = tuple(
        name
        for name in names
        if name.startswith(("sampled_action/", "sampled_next_state/"))
        or name == "sampled_action"
        or (name.startswith("next_state/") and f"sampled_{name}" not in names)
    )
    if not any(name.startswith("sampled_") for name in sampled):
        return [greedy]  # no distribution to sample from
    both = tuple(name for name in names if name in greedy or name in sampled)
    return [greedy, sampled, both]


def score_size(leaf: LeafSpace) -> int:
    """How many scores (so also: how much noise) a leaf of an action space has.

    One per action for Discrete and per action of each component for MultiDiscrete; one per
    component for the others, whose noise is normal.
    """
    if isinstance(leaf, DiscreteSpace):
        return leaf.n
    if isinstance(leaf, MultiDiscreteSpace):
        return int(leaf.nvec.sum())
    return math.prod(leaf.shape)
