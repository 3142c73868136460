"""What a caller asks of a policy, in whatever dialect: parsed, checked, ready for a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from serving.interface import OutputName


@dataclass(frozen=True)
class ComputeRequest:
    """A request that conforms.

    Attributes:
        inputs: The graph's inputs that the caller gave, by name, each (n, ...): observations
            always, state, reward and action mask if they came; no noise.
        n: How many observations.
        is_single: Whether it came as `observation`, and the answer is `action`.
        deterministic: Most likely action, or a sample.
        seed: Makes a sample repeatable.
        timeout_s: The caller's deadline, from arrival.
        outputs: What to answer beside the actions.
        version: The version that the caller insists on.
    """

    inputs: Mapping[str, NDArray[Any]]
    n: int
    is_single: bool
    deterministic: bool
    seed: int | None
    timeout_s: float | None
    outputs: frozenset[OutputName]
    version: int | None
