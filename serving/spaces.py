"""Gymnasium spaces as plain data: to and from JSON, and the arrays that a batch of them is.

A space is a tree whose leaves are Box, Discrete, MultiDiscrete or MultiBinary. Each leaf is one
array of the graph, named by the root and the JSON pointer (RFC 6901) to it: `observation`, or
`observation/camera/0`. A batch is nested as Gymnasium nests it: an array (B, *shape) at a leaf, a
dict at a Dict, a tuple at a Tuple.

Nothing here needs Gymnasium installed; `space_from_gymnasium` reads one that the caller holds.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serving.errors import ManifestError

# A larger leaf is a mistake or an attack: 2 GiB of uint8.
_MAX_ELEMENTS = 2**31


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


@dataclass(frozen=True, eq=False)
class MultiDiscreteSpace:
    """Several integers at once, component i in `start[i] .. start[i] + nvec[i] - 1`.

    Attributes:
        nvec: How many values each component has, int64, of any rank.
        start: The smallest of them, int64, the same shape.
        dtype: The NumPy dtype name of an element.
    """

    nvec: NDArray[np.int64]
    start: NDArray[np.int64]
    dtype: str = "int64"

    def to_json(self) -> dict[str, Any]:
        """JSON: `type`, `nvec`, `start`, `dtype`."""
        return {
            "type": "MultiDiscrete",
            "nvec": self.nvec.tolist(),
            "start": self.start.tolist(),
            "dtype": self.dtype,
        }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `nvec`."""
        return self.nvec.shape


@dataclass(frozen=True)
class MultiBinarySpace:
    """Zeros and ones of one shape."""

    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON: `type`, `shape`."""
        return {"type": "MultiBinary", "shape": list(self.shape)}

    @property
    def dtype(self) -> str:
        """Gymnasium's dtype of MultiBinary."""
        return "int8"


@dataclass(frozen=True)
class DictSpace:
    """Spaces by key; the keys are sorted, as Gymnasium and RLlib flatten them."""

    spaces: Mapping[str, Space]

    def to_json(self) -> dict[str, Any]:
        """JSON: `type`, `spaces` by key."""
        return {"type": "Dict", "spaces": {key: each.to_json() for key, each in self.items()}}

    def items(self) -> list[tuple[str, Space]]:
        """Key and space, in the order of the keys."""
        return sorted(self.spaces.items())


@dataclass(frozen=True)
class TupleSpace:
    """Spaces by position."""

    spaces: tuple[Space, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON: `type`, `spaces` in order."""
        return {"type": "Tuple", "spaces": [each.to_json() for each in self.spaces]}

    def items(self) -> list[tuple[str, Space]]:
        """Position (as it stands in a JSON pointer) and space."""
        return [(str(index), each) for index, each in enumerate(self.spaces)]


LeafSpace: TypeAlias = BoxSpace | DiscreteSpace | MultiDiscreteSpace | MultiBinarySpace
Space: TypeAlias = LeafSpace | DictSpace | TupleSpace


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

    # A view, not a copy: one bound of a large image stays one number.
    return np.broadcast_to(np.asarray(convert(value), dtype=np.float64), shape)


def space_from_json(value: Mapping[str, Any]) -> Space:
    """The space that `to_json` described.

    Raises:
        ManifestError: The type is unknown or a field is missing or of the wrong kind.
    """
    try:
        return _READERS[value["type"]](value)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as exc:
        raise ManifestError(
            f"a space in the manifest is not readable: {reprlib.repr(value)}: {exc!r}; "
            f"this version reads {', '.join(_READERS)}"
        ) from exc


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(int(size) for size in value)
    if min(shape, default=0) < 0 or math.prod(shape) > _MAX_ELEMENTS:
        raise ValueError(f"shape {shape} is not possible")
    return shape


def _read_box(value: Mapping[str, Any]) -> BoxSpace:
    shape = _shape(value["shape"])
    dtype = np.dtype(value["dtype"])
    if dtype.kind not in "fiub":
        raise ValueError(f"dtype {dtype} is no number's")
    return BoxSpace(
        shape=shape,
        dtype=dtype.name,
        low=_bounds_from_json(value["low"], shape, -math.inf),
        high=_bounds_from_json(value["high"], shape, math.inf),
    )


def _read_discrete(value: Mapping[str, Any]) -> DiscreteSpace:
    space = DiscreteSpace(n=int(value["n"]), start=int(value["start"]))
    if not 1 <= space.n <= _MAX_ELEMENTS or abs(space.start) > 2**62:
        raise ValueError(f"{describe_space(space)} is not possible")
    return space


def _read_multi_discrete(value: Mapping[str, Any]) -> MultiDiscreteSpace:
    nvec = np.array(value["nvec"], dtype=np.int64)
    start = np.array(value["start"], dtype=np.int64)
    if not nvec.size or nvec.min() < 1 or nvec.max() > _MAX_ELEMENTS or start.shape != nvec.shape:
        raise ValueError("nvec has to hold positive numbers, and start as many")
    return MultiDiscreteSpace(nvec=nvec, start=start, dtype=np.dtype(value["dtype"]).name)


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Space]] = {
    "Box": _read_box,
    "Discrete": _read_discrete,
    "MultiDiscrete": _read_multi_discrete,
    "MultiBinary": lambda value: MultiBinarySpace(_shape(value["shape"])),
    "Dict": lambda value: DictSpace(
        {str(key): space_from_json(each) for key, each in value["spaces"].items()}
    ),
    "Tuple": lambda value: TupleSpace(tuple(space_from_json(each) for each in value["spaces"])),
}


def space_from_gymnasium(space: Any) -> Space:
    """The plain form of a Gymnasium space.

    Raises:
        TypeError: The space, or one inside it, is of a kind that RLlib does not take (Text,
            Graph, ...), or a Dict has keys that are no text.
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
    if kind == "MultiDiscrete":
        return MultiDiscreteSpace(
            nvec=np.array(space.nvec, dtype=np.int64),
            start=np.array(space.start, dtype=np.int64),
            dtype=np.dtype(space.dtype).name,
        )
    if kind == "MultiBinary":
        return MultiBinarySpace(tuple(space.shape))
    if kind == "Dict" and all(isinstance(key, str) for key in space.spaces):
        return DictSpace({key: space_from_gymnasium(each) for key, each in space.spaces.items()})
    if kind == "Tuple":
        return TupleSpace(tuple(space_from_gymnasium(each) for each in space.spaces))
    raise TypeError(f"{space} is none of {', '.join(_READERS)} (a Dict with text as keys)")


def describe_space(space: Space) -> str:
    """One short line for people, such as `Box(4,) float32` or `Dict(speed: Discrete(2))`."""
    if isinstance(space, DictSpace):
        return f"Dict({', '.join(f'{key}: {describe_space(each)}' for key, each in space.items())})"
    if isinstance(space, TupleSpace):
        return f"Tuple({', '.join(describe_space(each) for each in space.spaces)})"
    if isinstance(space, DiscreteSpace):
        start = "" if space.start == 0 else f", start={space.start}"
        return f"Discrete({space.n}{start})"
    if isinstance(space, MultiDiscreteSpace):
        start = f", start={space.start.tolist()}" if space.start.any() else ""
        return f"MultiDiscrete({space.nvec.tolist()}{start})"
    if isinstance(space, MultiBinarySpace):
        return f"MultiBinary({space.shape[0] if len(space.shape) == 1 else space.shape})"
    return f"Box{space.shape} {space.dtype}"


def leaves(space: Space, root: str) -> dict[str, LeafSpace]:
    """The leaves by array name, Dict keys sorted, Tuple entries in order."""
    return dict(_walk(space, root))


def _walk(space: Space, name: str) -> Iterator[tuple[str, LeafSpace]]:
    if isinstance(space, DictSpace | TupleSpace):
        for key, each in space.items():
            yield from _walk(each, f"{name}/{escape(key)}")
    else:
        yield name, space


def escape(key: str) -> str:
    """A key as it stands in a JSON pointer (RFC 6901): `~` as `~0`, `/` as `~1`."""
    return key.replace("~", "~0").replace("/", "~1")


def graph_dtype(leaf: LeafSpace) -> str:
    """The NumPy dtype name in which the graph takes an observation leaf.

    float64 stays, other floating-point numbers are float32, integers keep their own type.
    """
    if isinstance(leaf, BoxSpace):
        return "float32" if leaf.dtype == "float16" else leaf.dtype
    return "int8" if isinstance(leaf, MultiBinarySpace) else "int64"


def flatten(space: Space, root: str, nested: Any) -> dict[str, Any]:
    """A nested batch, which has to fit the space, as arrays by name."""
    if isinstance(space, DictSpace | TupleSpace):
        found: dict[str, Any] = {}
        for index, (key, each) in enumerate(space.items()):
            child = nested[key if isinstance(space, DictSpace) else index]
            found |= flatten(each, f"{root}/{escape(key)}", child)
        return found
    return {root: nested}


def unflatten(space: Space, root: str, arrays: Mapping[str, Any]) -> Any:
    """Arrays by name as a nested batch; names of others are passed over."""
    if isinstance(space, DictSpace | TupleSpace):
        children = {
            key: unflatten(each, f"{root}/{escape(key)}", arrays) for key, each in space.items()
        }
        return children if isinstance(space, DictSpace) else tuple(children.values())
    return arrays[root]


def take(nested: Any, index: Any) -> Any:
    """Rows of a nested batch: one row for an index, a smaller batch for a slice."""
    if isinstance(nested, dict):
        return {key: take(each, index) for key, each in nested.items()}
    if isinstance(nested, tuple):
        return tuple(take(each, index) for each in nested)
    return nested[index]


def batch_size(nested: Any) -> int:
    """B of a nested batch."""
    while isinstance(nested, dict | tuple):
        nested = next(iter(nested.values() if isinstance(nested, dict) else nested))
    return len(nested)


def rows(space: Space, nested: Any) -> list[Any]:
    """The elements of a nested batch one by one, each in the environment's form."""
    first = next(iter(flatten(space, "", nested).values()))
    return [take(nested, index) for index in range(len(first))]
