"""Gymnasium spaces as plain data: to and from JSON, and what an observation must look like.

Nothing here needs Gymnasium installed; `space_from_gymnasium` reads one that the caller holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serving.errors import InvalidObservationError, ManifestError


@dataclass(frozen=True, eq=False)
class BoxSpace:
    """A box in R^n (or of integers).

    Attributes:
        shape: The shape of one element.
        dtype: Its NumPy dtype name.
        low: Lower bounds, `shape`, float64; -inf where there is none.
        high: Upper bounds, `shape`, float64; inf where there is none.
    """

    shape: tuple[int, ...]
    dtype: str
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def to_json(self) -> dict[str, Any]:
        """JSON; `null` stands for no bound, one number for a bound that all components share."""
        return {
            "type": "Box",
            "shape": list(self.shape),
            "dtype": self.dtype,
            "low": _bounds_to_json(self.low),
            "high": _bounds_to_json(self.high),
        }

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return np.issubdtype(np.dtype(self.dtype), np.floating)


@dataclass(frozen=True)
class DiscreteSpace:
    """The integers `start .. start + n - 1`."""

    n: int
    start: int = 0

    def to_json(self) -> dict[str, Any]:
        """JSON: `type`, `n`, `start`."""
        return {"type": "Discrete", "n": self.n, "start": self.start}

    @property
    def shape(self) -> tuple[int, ...]:
        """A scalar."""
        return ()

    @property
    def dtype(self) -> str:
        """Gymnasium's dtype of Discrete."""
        return "int64"


Space: TypeAlias = BoxSpace | DiscreteSpace


def _bounds_to_json(bounds: NDArray[np.float64]) -> Any:
    if bounds.size and np.all(bounds == bounds.flat[0]):
        value = float(bounds.flat[0])
        return value if math.isfinite(value) else None

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        return value if math.isfinite(value) else None

    return convert(bounds.tolist())


def _bounds_from_json(value: Any, shape: tuple[int, ...], missing: float) -> NDArray[np.float64]:
    def convert(item: Any) -> Any:
        if isinstance(item, list):
            return [convert(child) for child in item]
        return missing if item is None else float(item)

    bounds = np.asarray(convert(value), dtype=np.float64)
    return np.array(np.broadcast_to(bounds, shape))


def space_from_json(value: Mapping[str, Any]) -> Space:
    """The space that `to_json` described.

    Raises:
        ManifestError: The type is unknown or a field is missing or of the wrong kind.
    """
    try:
        kind = value["type"]
        if kind == "Box":
            shape = tuple(int(size) for size in value["shape"])
            return BoxSpace(
                shape=shape,
                dtype=np.dtype(value["dtype"]).name,
                low=_bounds_from_json(value["low"], shape, -math.inf),
                high=_bounds_from_json(value["high"], shape, math.inf),
            )
        if kind == "Discrete":
            return DiscreteSpace(n=int(value["n"]), start=int(value.get("start", 0)))
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise ManifestError(f"a space in the manifest is not readable: {value!r}: {exc}") from exc
    raise ManifestError(f"unknown space type {kind!r}; this version reads Box and Discrete")


def space_from_gymnasium(space: Any) -> Space:
    """The plain form of a Gymnasium Box or Discrete space.

    Raises:
        TypeError: The space is of another kind.
    """
    kind = type(space).__name__
    if kind == "Box":
        return BoxSpace(
            shape=tuple(space.shape),
            dtype=np.dtype(space.dtype).name,
            low=np.where(space.bounded_below, space.low.astype(np.float64), -np.inf),
            high=np.where(space.bounded_above, space.high.astype(np.float64), np.inf),
        )
    if kind == "Discrete":
        return DiscreteSpace(n=int(space.n), start=int(space.start))
    raise TypeError(f"{space} is neither Box nor Discrete")


def describe_space(space: Space) -> str:
    """One short line for people, such as `Box(4,) float32` or `Discrete(2)`."""
    if isinstance(space, DiscreteSpace):
        return (
            f"Discrete({space.n})"
            if space.start == 0
            else f"Discrete({space.n}, start={space.start})"
        )
    return f"Box{space.shape} {space.dtype}"


def conform_observations(
    values: Any, space: BoxSpace, *, pointer: str = "/observations"
) -> NDArray[np.float32]:
    """Check a batch of observations and bring it to what the graph takes.

    Values outside the space's bounds pass, as they do in RLlib: a bound is the environment's
    promise, not a rule of the policy.

    Args:
        values: Anything NumPy reads as an array of numbers, (B, *space.shape).
        space: The policy's observation space.
        pointer: Where the batch stands in the request, as a JSON pointer.

    Returns:
        (B, *space.shape) float32, C-contiguous, all finite.

    Raises:
        InvalidObservationError: Not numbers, another shape, NaN or infinite as float32.
    """
    try:
        array = np.asarray(values)
    except ValueError as exc:
        raise InvalidObservationError(
            f"observations of unequal shapes; expected {describe_space(space)} each",
            pointer=pointer,
        ) from exc
    if array.dtype.kind not in "fiu":
        raise InvalidObservationError(
            f"found {array.dtype} values, expected numbers ({describe_space(space)})",
            pointer=pointer,
        )
    if array.shape[1:] != space.shape or array.ndim != len(space.shape) + 1:
        raise InvalidObservationError(
            f"found observations of shape {array.shape[1:]}, expected {space.shape}",
            pointer=pointer,
        )
    with np.errstate(over="ignore"):
        batch = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(batch).all():
        where = np.argwhere(~np.isfinite(batch))[0]
        raise InvalidObservationError(
            f"found {float(array[tuple(where)])!r}, expected a number that is finite as float32",
            pointer="/".join([pointer, *map(str, where.tolist())]),
        )
    return batch
