"""What an observation must look like: checked once, where it enters, and named by its place.

Places are JSON pointers into the request, the row first: `/observations/3/position/1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import CallerError, InvalidObservationError
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


def conform_observations(
    values: Any, space: Space, *, pointer: str = "/observations"
) -> dict[str, NDArray[Any]]:
    """Check a batch of observations and bring it to what the graph takes.

    Values outside a float Box's bounds pass, as they do in RLlib: a bound is the environment's
    promise, not a rule of the policy. An integer that its space does not have is refused: there
    is no row of the network for it.

    Args:
        values: A nested batch (an array, or anything NumPy reads as one, at each leaf; a dict at
            a Dict; a tuple at a Tuple), or a list of observations.
        space: The policy's observation space.
        pointer: Where the batch stands in the request, as a JSON pointer.

    Returns:
        The graph's observation inputs by name, (B, *shape), C-contiguous, in their dtypes.

    Raises:
        InvalidObservationError: Not numbers, another structure or shape, NaN or infinite, an
            integer out of range.
    """
    if not isinstance(space, DictSpace | TupleSpace):
        return {"observation": conform_leaf(values, space, pointer=pointer)}
    is_list = isinstance(values, list) or (
        isinstance(values, tuple) and isinstance(space, DictSpace)
    )
    if is_list and not values:
        raise InvalidObservationError("found no observations, expected some", pointer=pointer)
    found: dict[str, NDArray[Any]] = {}
    _conform(values, space, is_list, pointer, "", found)
    lengths = {name: len(array) for name, array in found.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidObservationError(
            f"found arrays of unequal lengths, expected one row per observation in each: {lengths}",
            pointer=pointer,
        )
    return found


def _conform(
    values: Any, space: Space, is_list: bool, pointer: str, path: str, found: dict[str, Any]
) -> None:
    """Descend into a node; `values` is a list of B of its values, or its nested batch."""
    if not isinstance(space, DictSpace | TupleSpace):
        leaf = conform_leaf(values, space, pointer=pointer, path=path)
        found[f"observation{path}"] = leaf
        return
    if is_list:
        for index, row in enumerate(values):
            _check_structure(row, space, f"{pointer}/{index}{path}")
    else:
        _check_structure(values, space, f"{pointer}{path}")
    for index, (name, each) in enumerate(space.items()):
        key: Any = name if isinstance(space, DictSpace) else index
        child = [row[key] for row in values] if is_list else values[key]
        _conform(child, each, is_list, pointer, f"{path}/{escape(name)}", found)


def _check_structure(value: Any, space: DictSpace | TupleSpace, place: str) -> None:
    expected = f"expected {describe_space(space)}"
    if isinstance(space, TupleSpace):
        if not isinstance(value, tuple | list | np.ndarray):
            raise InvalidObservationError(f"found {_kind(value)}, {expected}", pointer=place)
        if len(value) != len(space.spaces):
            raise InvalidObservationError(f"found {len(value)} entries, {expected}", pointer=place)
        return
    if not isinstance(value, Mapping):
        raise InvalidObservationError(f"found {_kind(value)}, {expected}", pointer=place)
    if value.keys() != space.spaces.keys():
        missing = [key for key in space.spaces if key not in value]
        if missing:
            raise InvalidObservationError(f"found no {missing[0]!r}, {expected}", pointer=place)
        unknown = str(next(key for key in value if key not in space.spaces))
        raise InvalidObservationError(
            f"found the key {unknown!r}, {expected}", pointer=f"{place}/{escape(unknown)}"
        )


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def conform_leaf(
    values: Any,
    leaf: LeafSpace,
    *,
    pointer: str,
    path: str = "",
    error: type[CallerError] = InvalidObservationError,
) -> NDArray[Any]:
    """Check the batch of one leaf.

    Args:
        values: Anything NumPy reads as an array of numbers, (B, *leaf.shape).
        leaf: Its space.
        pointer: Where the rows stand in the request.
        path: Where the leaf stands in a row, as a JSON pointer.
        error: What to raise.

    Returns:
        (B, *leaf.shape) in the graph's dtype, C-contiguous; the same array where it fits.
    """
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError):
        raise _misfit(values, leaf, pointer, path, error) from None
    if array.dtype.kind not in _kinds(leaf) or array.shape[1:] != leaf.shape or not array.ndim:
        raise _misfit(values, leaf, pointer, path, error)
    dtype = np.dtype(graph_dtype(leaf))
    if dtype.kind == "f":
        batch = _as_floats(array, dtype)
        if np.isfinite(batch).all():
            return batch
        bad = ~np.isfinite(batch)
    else:
        bad = _out_of_range(array, leaf, dtype)
        if not bad.any():
            return np.ascontiguousarray(array, dtype=dtype)
    row, *index = np.argwhere(bad)[0].tolist()
    raise error(
        f"found {array[(row, *index)].item()!r}, expected {_expected(leaf, dtype, tuple(index))}",
        pointer="/".join([f"{pointer}/{row}{path}", *map(str, index)]),
    )


def _kinds(leaf: LeafSpace) -> str:
    """The kinds of NumPy dtypes that a leaf takes: true and false only where it has two values."""
    return "fiub" if leaf.dtype == "bool" or isinstance(leaf, MultiBinarySpace) else "fiu"


def _as_floats(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=dtype)


def _out_of_range(array: NDArray[Any], leaf: LeafSpace, dtype: np.dtype[Any]) -> NDArray[np.bool_]:
    if isinstance(leaf, BoxSpace) and array.dtype == dtype:
        return _NOTHING
    low, high = _range(leaf, dtype)
    if array.dtype.kind == "f":
        # Below high + 1, as the largest int64 itself is no float64.
        is_inside = (array >= low) & (array < high + 1.0) & (array == np.floor(array))
    else:
        is_inside = (array >= low) & (array <= high)
    return np.asarray(~is_inside)


_NOTHING = np.zeros(0, dtype=np.bool_)


def _range(leaf: LeafSpace, dtype: np.dtype[Any]) -> tuple[Any, Any]:
    if isinstance(leaf, DiscreteSpace):
        return leaf.start, leaf.start + leaf.n - 1
    if isinstance(leaf, MultiDiscreteSpace):
        return leaf.start, leaf.start + leaf.nvec - 1
    if isinstance(leaf, MultiBinarySpace) or dtype.kind == "b":
        return 0, 1
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def _expected(leaf: LeafSpace, dtype: np.dtype[Any], index: tuple[int, ...]) -> str:
    if dtype.kind == "f":
        return f"a number that is finite as {dtype}"
    if dtype.kind == "b":
        return "0, 1, true or false"
    low, high = (np.asarray(bound) for bound in _range(leaf, dtype))
    if low.ndim:
        low, high = low[index], high[index]
    return f"an integer {int(low)}..{int(high)} ({describe_space(leaf)})"


def _misfit(
    values: Any, leaf: LeafSpace, pointer: str, path: str, error: type[CallerError]
) -> CallerError:
    """Why `values` is no array of such rows, with the first row that is none."""
    place, found = f"{pointer}{path}", _reason(values, leaf, n_axes=1)
    if isinstance(values, list | tuple):
        reasons = ((row, _reason(each, leaf, n_axes=0)) for row, each in enumerate(values))
        for row, reason in reasons:
            if reason:
                place, found = f"{pointer}/{row}{path}", reason
                break
    return error(f"found {found}, expected {describe_space(leaf)}", pointer=place)


def _reason(values: Any, leaf: LeafSpace, *, n_axes: int) -> str:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError):
        return "rows of unequal lengths"
    if array.shape[n_axes:] != leaf.shape or array.ndim != len(leaf.shape) + n_axes:
        return f"the shape {array.shape[n_axes:] if array.ndim >= n_axes else ()}"
    return "" if array.dtype.kind in _kinds(leaf) else f"{array.dtype} values"
