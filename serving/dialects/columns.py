"""Columns of any space on the wire: raw bytes at each leaf, a batch's rows one after the other.

The binary twin of `serving.dialects.rows`: little-endian, C order, no padding, in the dtype and
shape of the graph's input.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.conforming import conform_leaf
from serving.dialects.rows import placed
from serving.errors import (
    CallerError,
    InvalidObservationError,
    InvalidRequestError,
    PolicyServingError,
)
from serving.spaces import (
    BoxSpace,
    DictSpace,
    DiscreteSpace,
    LeafSpace,
    MultiBinarySpace,
    MultiDiscreteSpace,
    Space,
    TupleSpace,
    describe_space,
    escape,
    graph_dtype,
)

# So many numbers are added faster in Python: NumPy's error state alone takes a microsecond.
_FEW = 32
_KINDS = {type(None): "nil", dict: "a map", list: "an array", str: "a str", bytes: "a bin"}


@dataclass(frozen=True)
class Column:
    """One leaf of a space as bytes.

    Attributes:
        name: The graph's input.
        path: Where it stands in a row, as a JSON pointer.
        space: Its space.
        dtype: Of the bytes; bool as uint8, so that a byte other than 0 and 1 is seen.
        n_bytes: Of one row.
        is_bool: Whether the graph takes bool.
        is_sound: Whether an array of rows holds nothing that the space forbids.
    """

    name: str
    path: str
    space: LeafSpace
    dtype: np.dtype[Any]
    n_bytes: int
    is_bool: bool
    is_sound: Callable[[NDArray[Any]], bool]

    def array(self, data: bytes, n: int) -> NDArray[Any]:
        """Rows as an array on their bytes, (n, *shape), read-only."""
        return np.frombuffer(data, self.dtype).reshape(n, *self.space.shape)

    @property
    def row(self) -> str:
        """What one row is, for people: `4 float32 = 16 bytes`."""
        size = math.prod(self.space.shape)
        return f"{size} {graph_dtype(self.space)} = {self.n_bytes} bytes"


class ColumnCodec:
    """The bytes of one space to arrays, and whether they conform."""

    def __init__(
        self,
        space: Space,
        names: Iterable[str],
        error: type[CallerError] = InvalidObservationError,
    ) -> None:
        """Look at the space.

        Args:
            space: What a row is.
            names: The arrays' names, in the order of the space's leaves.
            error: What is raised where something does not conform.
        """
        self._space = space
        self._error = error
        self.columns: tuple[Column, ...] = tuple(
            _column(name, path, leaf)
            for name, (path, leaf) in zip(names, _leaves(space, ""), strict=True)
        )
        self._find = _finder(space)

    @property
    def is_flat(self) -> bool:
        """Whether a row is one bin."""
        return not isinstance(self._space, DictSpace | TupleSpace)

    def find(self, value: Any, place: str) -> list[bytes]:
        """The bins of a decoded value, in the order of the columns.

        Args:
            value: What msgpack held: a bin, or maps and arrays of them.
            place: Where it stands in the request, as a JSON pointer.

        Raises:
            CallerError: Another structure.
        """
        found: list[bytes] = []
        misfit = self._find(value, found)
        if misfit is None:
            return found
        path, message = misfit
        raise self._error(message, pointer=f"{place}{path}")

    def quick_find(self, value: Any) -> list[bytes] | None:
        """The bins of one row, or None where the structure or a length is another."""
        found: list[bytes] = []
        if self._find(value, found) is not None:
            return None
        for data, column in zip(found, self.columns, strict=True):
            if len(data) != column.n_bytes:
                return None
        return found

    def count(self, parts: Sequence[bytes], place: str) -> int:
        """How many rows the bins hold; all have to agree.

        Raises:
            CallerError: A length that is no number of rows, unequal numbers, or none at all.
        """
        counts: dict[str, int] = {}
        for data, column in zip(parts, self.columns, strict=True):
            size = column.n_bytes
            if len(data) % size if size else data:
                raise self._error(
                    f"found {len(data)} bytes, expected {column.row} a row",
                    pointer=f"{place}{column.path}",
                )
            if size:
                counts[column.name] = len(data) // size
        if not counts:
            raise InvalidRequestError(
                "a row of this space has no bytes, so the number of rows cannot be told; send "
                "`observation`",
                pointer=place,
            )
        if len(set(counts.values())) > 1:
            raise self._error(
                f"found bins of unequal lengths, expected as many rows in each: {counts}",
                pointer=place,
            )
        return next(iter(counts.values()))

    def check_lengths(self, parts: Sequence[bytes], n: int, place: str) -> None:
        """Refuse bins that do not hold n rows each.

        Raises:
            CallerError: Another length.
        """
        for data, column in zip(parts, self.columns, strict=True):
            if len(data) != n * column.n_bytes:
                rows = "" if n == 1 else f" a row, {n * column.n_bytes} for {n} rows"
                raise self._error(
                    f"found {len(data)} bytes, expected {column.row}{rows} "
                    f"({describe_space(column.space)})",
                    pointer=f"{place}{column.path}",
                )

    def quick_arrays(self, parts: Sequence[bytes], n: int) -> dict[str, NDArray[Any]] | None:
        """The arrays of bins of the right lengths, or None where a value does not conform."""
        found = {}
        for data, column in zip(parts, self.columns, strict=True):
            array = column.array(data, n)
            if not column.is_sound(array):
                return None
            found[column.name] = array.view(np.bool_) if column.is_bool else array
        return found

    def arrays(
        self, parts: Sequence[bytes], n: int, place: str, *, is_single: bool
    ) -> dict[str, NDArray[Any]]:
        """The same, where a value that does not conform is named.

        Args:
            parts: The bins.
            n: Rows.
            place: Where a batch of such rows stands in a request; a row's number follows it.
            is_single: Whether the place is one row, without a number.

        Raises:
            CallerError: A number that is not finite, an integer that the space does not have, a
                bool that is neither 0 nor 1.
        """
        found = self.quick_arrays(parts, n)
        if found is not None:
            return found
        with placing(is_single):
            return {
                column.name: conform_leaf(
                    column.array(data, n),
                    column.space,
                    pointer=place,
                    path=column.path,
                    error=self._error,
                )
                for data, column in zip(parts, self.columns, strict=True)
            }


@contextlib.contextmanager
def placing(is_single: bool) -> Iterator[None]:
    """Let checks of a batch of rows name the places of one row, where one was sent."""
    try:
        yield
    except PolicyServingError as exc:
        raise placed(exc, is_single) from None


def wire_dtype(name: str) -> np.dtype[Any]:
    """A dtype as it is on the wire: little-endian."""
    return np.dtype(name).newbyteorder("<")


def _leaves(space: Space, path: str) -> Iterable[tuple[str, LeafSpace]]:
    if isinstance(space, DictSpace | TupleSpace):
        for key, child in space.items():
            yield from _leaves(child, f"{path}/{escape(key)}")
    else:
        yield path, space


def _column(name: str, path: str, leaf: LeafSpace) -> Column:
    own = graph_dtype(leaf)
    dtype = wire_dtype("uint8" if own == "bool" else own)
    n_bytes = math.prod(leaf.shape) * dtype.itemsize
    return Column(name, path, leaf, dtype, n_bytes, own == "bool", _soundness(leaf, own))


def _soundness(leaf: LeafSpace, dtype: str) -> Callable[[NDArray[Any]], bool]:
    if np.dtype(dtype).kind == "f":
        return _is_finite
    low: Any
    high: Any
    if isinstance(leaf, DiscreteSpace):
        low, high = leaf.start, leaf.start + leaf.n - 1
    elif isinstance(leaf, MultiDiscreteSpace):
        low, high = leaf.start, leaf.start + leaf.nvec - 1
    elif isinstance(leaf, MultiBinarySpace) or dtype == "bool":
        low, high = 0, 1
    else:
        return lambda _: True  # every bit pattern is an integer of a Box
    return lambda array: bool(((array >= low) & (array <= high)).all())


def _is_finite(array: NDArray[Any]) -> bool:
    # One number instead of a test of every number: NaN and infinity survive adding and squaring.
    # Huge finite numbers may overflow too; a closer look then finds no fault.
    numbers = array.ravel()
    if numbers.size <= _FEW:
        return math.isfinite(sum(numbers.tolist()))
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(numbers.dot(numbers))


_Misfit = tuple[str, str] | None
_Finder = Callable[[Any, list[bytes]], _Misfit]


def _finder(space: Space) -> _Finder:
    """What appends a value's bins, in the order of the leaves, and says where it is another."""
    if isinstance(space, DictSpace):
        return _find_in_map(space)
    if isinstance(space, TupleSpace):
        return _find_in_array(space)

    def find(value: Any, found: list[bytes]) -> _Misfit:
        if type(value) is bytes:
            found.append(value)
            return None
        return "", f"found {_kind(value)}, expected a bin: the raw bytes of {describe_space(space)}"

    return find


def _find_in_map(space: DictSpace) -> _Finder:
    children = [(key, f"/{escape(key)}", _finder(child)) for key, child in space.items()]
    keys = {key for key, _, _ in children}

    def find(value: Any, found: list[bytes]) -> _Misfit:
        if type(value) is not dict:
            return "", f"found {_kind(value)}, expected a map: {describe_space(space)}"
        if value.keys() != keys:
            return _other_key(value, space)
        for key, path, child in children:
            misfit = child(value[key], found)
            if misfit is not None:
                return f"{path}{misfit[0]}", misfit[1]
        return None

    return find


def _other_key(value: dict[Any, Any], space: DictSpace) -> tuple[str, str]:
    expected = f"expected {describe_space(space)}"
    missing = [key for key, _ in space.items() if key not in value]
    if missing:
        return "", f"found no {missing[0]!r}, {expected}"
    unknown = next(key for key in value if key not in space.spaces)
    shown = str(unknown)[:100]
    return f"/{escape(shown)}", f"found the key {shown!r}, {expected}"


def _find_in_array(space: TupleSpace) -> _Finder:
    children = [(f"/{index}", _finder(child)) for index, child in enumerate(space.spaces)]

    def find(value: Any, found: list[bytes]) -> _Misfit:
        if type(value) is not list or len(value) != len(children):
            entries = f" of {len(value)}" if type(value) is list else ""
            return "", f"found {_kind(value)}{entries}, expected an array: {describe_space(space)}"
        for each, (path, child) in zip(value, children, strict=True):
            misfit = child(each, found)
            if misfit is not None:
                return f"{path}{misfit[0]}", misfit[1]
        return None

    return find


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def box(shape: Sequence[int], dtype: str) -> BoxSpace:
    """A space of any array of that shape and dtype."""
    bound = np.broadcast_to(np.inf, tuple(shape))
    return BoxSpace(tuple(shape), dtype, -bound, bound)
