"""Rows of any space on the wire: one msgspec type per space, and the arrays that rows become.

A row is one observation, or one state: nested lists, numbers, objects for Dict, arrays for Tuple.
The type checks shape, keys and ranges while the body is parsed, in C; afterwards each leaf of the
space is one call of NumPy for all rows.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from serving.errors import BatchTooLargeError, CallerError, InvalidRequestError, PolicyServingError
from serving.manifest import StateSpec
from serving.spaces import (
    BoxSpace,
    DictSpace,
    DiscreteSpace,
    LeafSpace,
    MultiDiscreteSpace,
    Space,
    TupleSpace,
    escape,
    graph_dtype,
)

BIT: Any = Annotated[int, Meta(ge=0, le=1)] | bool
_INT64 = np.iinfo(np.int64)
# Names that msgspec gives no field.
_UNNAMEABLE = re.compile(r'[\\"\x00-\x1f]')
_SHORT = 64
_INDEX = re.compile(r"\[(\d+|\.\.\.)\]")


_Collect: TypeAlias = Callable[[Sequence[Any], dict[str, NDArray[Any]]], bool]


def not_exactly_one(*, has_both: bool) -> CallerError:
    """Why a request with both `observation` and `observations`, or neither, is not taken."""
    return InvalidRequestError(
        f"found {'both' if has_both else 'neither'} of `observation` (for one action) and "
        "`observations` (for many), expected exactly one",
        pointer="",
    )


def wrong_count(n: int, most: int) -> CallerError:
    """Why a request of so many observations is not taken."""
    if n == 0:
        return InvalidRequestError(
            "`observations` is empty, expected at least one", pointer="/observations"
        )
    return BatchTooLargeError(
        f"found {n} observations, at most {most} are taken in one request; send several",
        pointer="/observations",
    )


class RowCodec:
    """Parsed rows of one space to arrays, and places in them to JSON pointers."""

    def __init__(self, space: Space, names: Iterable[str], title: str) -> None:
        """Make the type.

        Args:
            space: What a row is.
            names: The arrays' names, in the order of the space's leaves.
            title: What the type is called in an API description.
        """
        self._space = space
        self._is_typed = _is_nameable(space)
        # A key that msgspec cannot name leaves all of the checking to the closer look.
        self.row_type: Any = _row_type(space, title, itertools.count()) if self._is_typed else Any
        self._collect = _collector(space, iter(names))

    def arrays(self, rows: Sequence[Any]) -> dict[str, NDArray[Any]] | None:
        """The leaves of n rows that the type took, each (n, *shape) in the graph's dtype.

        Returns:
            None where a number is not finite in that dtype, or where the type could say nothing:
            whoever asks then has to look more closely.
        """
        if not self._is_typed:
            return None
        found: dict[str, NDArray[Any]] = {}
        return found if self._collect(rows, found) else None

    def pointer(self, path: str) -> str:
        """A JSON pointer (RFC 6901) from msgspec's path inside a row, such as `.arm[0][...]`."""
        keys = _keys(path, self._space)
        return "".join(f"/{escape(key)}" for key in keys or [])


def _row_type(space: Space, title: str, numbers: Iterator[int]) -> Any:
    if isinstance(space, DictSpace):
        fields = [
            (f"f{k}", _row_type(child, title, numbers))
            for k, (_, child) in enumerate(space.items())
        ]
        return msgspec.defstruct(
            f"{title}{next(numbers)}",
            fields,
            rename={f"f{k}": key for k, (key, _) in enumerate(space.items())},
            forbid_unknown_fields=True,
            gc=False,
        )
    if isinstance(space, TupleSpace):
        return _fixed(_row_type(child, title, numbers) for child in space.spaces)
    return leaf_type(space)


def _collector(space: Space, names: Iterator[str]) -> _Collect:
    if isinstance(space, DictSpace):
        getters = [operator.attrgetter(f"f{k}") for k in range(len(space.spaces))]
        return _collect_parts(getters, [_collector(child, names) for _, child in space.items()])
    if isinstance(space, TupleSpace):
        items = [operator.itemgetter(k) for k in range(len(space.spaces))]
        return _collect_parts(items, [_collector(child, names) for child in space.spaces])
    return _collect_leaf(next(names), graph_dtype(space), space.shape)


def _collect_leaf(name: str, dtype: str, shape: tuple[int, ...]) -> _Collect:
    kind = np.dtype(dtype)
    is_float = np.issubdtype(kind, np.floating)
    is_short = is_float and len(shape) == 1 and 0 < shape[0] <= _SHORT
    # What does not fit becomes infinite in the array.
    limit = float(np.finfo(kind).max) if is_float else 0.0

    def collect(rows: Sequence[Any], found: dict[str, NDArray[Any]]) -> bool:
        if is_short and len(rows) == 1:
            # A single step: two passes of Python's own over a few numbers take a fifth of the time
            # of NumPy's way.
            (row,) = rows
            if not (-limit <= min(row) and max(row) <= limit):
                return False
            found[name] = np.array(rows, dtype=kind)
            return True
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                batch = np.array(rows, dtype=kind)
                # One sum instead of a test of every number: NaN and infinity survive addition. A
                # sum of huge finite numbers may overflow too; a closer look then finds no fault.
                is_fine = not is_float or math.isfinite(batch.sum())
        except OverflowError:
            return False
        found[name] = batch
        return is_fine

    return collect


def _collect_parts(
    getters: Sequence[Callable[[Any], Any]], collectors: Sequence[_Collect]
) -> _Collect:
    parts = list(zip(getters, collectors, strict=True))

    def collect(rows: Sequence[Any], found: dict[str, NDArray[Any]]) -> bool:
        return all(collect([get(row) for row in rows], found) for get, collect in parts)

    return collect


def leaf_type(space: LeafSpace) -> Any:
    """The msgspec type of one element of a leaf space: its exact shape, and integers in range.

    A Box's bounds are the environment's promise, not a rule; its dtype's range is a rule.
    """
    if isinstance(space, DiscreteSpace):
        return _integer(space.start, space.start + space.n - 1)
    if isinstance(space, MultiDiscreteSpace):
        start = np.asarray(space.start)
        return _ranges(start, start + np.asarray(space.nvec) - 1)
    kind: Any = BIT
    if isinstance(space, BoxSpace) and space.is_float:
        kind = float
    elif isinstance(space, BoxSpace) and space.dtype != "bool":
        limits = np.iinfo(space.dtype)
        kind = _integer(int(limits.min), int(limits.max))
    return _nested(kind, space.shape)


def _nested(kind: Any, shape: Sequence[int]) -> Any:
    for size in reversed(shape):
        kind = Annotated[list[kind], Meta(min_length=size, max_length=size)]
    return kind


def _integer(low: int, high: int) -> Any:
    # msgspec's bounds are of 64 bits; beyond them NumPy itself refuses.
    return Annotated[int, Meta(ge=low, le=high) if high <= _INT64.max else Meta(ge=low)]


def _ranges(low: NDArray[Any], high: NDArray[Any]) -> Any:
    if low.ndim == 0:
        return _integer(int(low), int(high))
    return _fixed(_ranges(*pair) for pair in zip(low, high, strict=True))


def _fixed(kinds: Iterable[Any]) -> Any:
    return tuple.__class_getitem__(tuple(kinds))


def mask_type(size: int) -> Any:
    """The msgspec type of one action mask."""
    return _nested(BIT, (size,))


def _is_nameable(space: Space) -> bool:
    """Whether every Dict's keys can be fields of a msgspec type."""
    if isinstance(space, DictSpace):
        keys_fit = not any(map(_UNNAMEABLE.search, space.spaces))
        return keys_fit and all(map(_is_nameable, space.spaces.values()))
    return not isinstance(space, TupleSpace) or all(map(_is_nameable, space.spaces))


def _keys(path: str, space: Space) -> list[str] | None:
    """The keys of a path; the space says where a key ends, for it may hold dots and brackets.

    msgspec writes `[...]` where it does not count the index.
    """
    if not path:
        return []
    if isinstance(space, DictSpace):
        for key, child in space.items():
            if path.startswith(f".{key}"):
                tail = _keys(path[len(key) + 1 :], child)
                if tail is not None:
                    return [key, *tail]
        return None
    match = _INDEX.match(path)
    if match is None:
        return None
    child = space.spaces[int(match[1])] if isinstance(space, TupleSpace) else space
    tail = _keys(path[match.end() :], child)
    return None if tail is None else ["-" if match[1] == "..." else match[1], *tail]


def state_space(state: Mapping[str, StateSpec]) -> DictSpace:
    """A policy's state as a space, so that its rows are read as observations are."""

    def box(spec: StateSpec) -> BoxSpace:
        bound = np.broadcast_to(np.inf, spec.shape)
        return BoxSpace(spec.shape, spec.dtype, -bound, bound)

    return DictSpace({name: box(spec) for name, spec in state.items()})


_MESSAGE = re.compile(r"^(?P<what>.*) - at `(?P<path>\$.*)`$", re.DOTALL)


def what_and_where(exc: msgspec.ValidationError) -> tuple[str, str]:
    """The words of msgspec, and its path: `$.observations[...][2]`."""
    match = _MESSAGE.match(str(exc))
    return (match["what"], match["path"]) if match else (str(exc), "$")


def place(name: str, rest: str, rows: RowCodec, is_many: bool) -> str:
    """The JSON pointer (RFC 6901) of a path inside the field `name`."""
    row = re.match(r"\[(\d+)\]", rest) if is_many else None
    if row is None:
        return f"/{name}{rows.pointer(rest)}"
    return f"/{name}/{row[1]}{rows.pointer(rest[row.end() :])}"


_ROW_0 = re.compile(r"^/(observation|action_mask|state|reward)s?(/0)?(?=/|$)")


def placed(error: PolicyServingError, is_single: bool) -> PolicyServingError:
    """The error with its place in the body: checks name places in a batch of rows."""
    if is_single and "pointer" in error.details:
        error.details["pointer"] = _ROW_0.sub(r"/\1", error.details["pointer"])
    return error
