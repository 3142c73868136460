"""Tensors of the Open Inference Protocol: datatypes, raw bytes, and numbers in JSON.

Raw bytes are little-endian, row-major, without padding. Shapes here are already checked against
the model's, so nothing is allocated for a shape that a caller made up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from serving.errors import InvalidRequestError

# The protocol's names of the datatypes whose elements have a fixed width. BYTES has none, and no
# policy takes text.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
_ELEMENT_TYPES: dict[str, Any] = {"b": bool | int, "f": float, "i": int, "u": int}
_WHITESPACE = b" \t\r\n"


def datatype_of(dtype: Any) -> str:
    """The protocol's name of a NumPy dtype of numbers, such as `FP32`."""
    return _NAMES[np.dtype(dtype)]


def dtype_of(datatype: str, name: str) -> np.dtype[Any]:
    """The NumPy dtype of a datatype.

    Raises:
        InvalidRequestError: The tensor `name` is of none that a policy can take.
    """
    dtype = NUMPY_DTYPES.get(datatype)
    if dtype is None:
        raise InvalidRequestError(
            f"input {name!r}: found the datatype {datatype[:40]!r}, expected one of "
            f"{', '.join(NUMPY_DTYPES)}"
        )
    return dtype


def from_bytes(
    raw: memoryview | bytes, dtype: np.dtype[Any], shape: Sequence[int], name: str
) -> NDArray[Any]:
    """The tensor that raw bytes are.

    Returns:
        An array of `shape` in native byte order; read-only, a view on `raw` where it is aligned.

    Raises:
        InvalidRequestError: Too few or too many bytes, or a BOOL that is neither 0 nor 1.
    """
    expected = math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        raise InvalidRequestError(
            f"input {name!r}: found {len(raw)} bytes, expected {expected} for the shape "
            f"{list(shape)} of {datatype_of(dtype)}"
        )
    if dtype.kind == "b":
        bits = np.frombuffer(raw, np.uint8)
        if bits.size and bits.max() > 1:
            raise InvalidRequestError(
                f"input {name!r}: found the byte {int(bits.max())}, expected 0 or 1 for BOOL"
            )
    array: NDArray[Any] = np.frombuffer(raw, dtype).reshape(shape)
    if not array.flags.aligned:
        array = array.copy()
    return array.astype(dtype.newbyteorder("="), copy=False)


def from_json(
    raw: msgspec.Raw, dtype: np.dtype[Any], shape: Sequence[int], name: str
) -> NDArray[Any]:
    """The tensor that a JSON `data` field is: all elements in one list, or nested as the shape.

    Raises:
        InvalidRequestError: Another number of elements, another nesting, elements of another
            type, or FP16, which the protocol carries as raw bytes only.
    """
    if dtype == NUMPY_DTYPES["FP16"]:
        raise InvalidRequestError(
            f"input {name!r}: FP16 is not read from JSON; send it as binary data, or as FP32"
        )
    is_nested = len(shape) > 1 and _is_nested(raw)
    decoder = _decoder(_ELEMENT_TYPES[dtype.kind], len(shape) if is_nested else 1)
    try:
        values = decoder.decode(raw)
        array = _array(values, dtype)
    except msgspec.ValidationError as exc:
        what, _, where = str(exc).partition(" - at `$")
        raise InvalidRequestError(
            f"input {name!r}: {what} in `data`{' at ' + where[:-1] if where else ''}; expected "
            f"{datatype_of(dtype)} elements, flat or nested as {list(shape)}"
        ) from exc
    except (ValueError, OverflowError, TypeError) as exc:
        raise InvalidRequestError(
            f"input {name!r}: `data` is no array of {datatype_of(dtype)}: {exc}"
        ) from exc
    found = array.shape if is_nested else (array.size,)
    expected = tuple(shape) if is_nested else (math.prod(shape),)
    if found != expected:
        raise InvalidRequestError(
            f"input {name!r}: found `data` of the shape {list(found)}, expected "
            f"{math.prod(shape)} elements, flat or nested as {list(shape)}"
        )
    return array.reshape(shape)


def _array(values: list[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind != "b":
        with np.errstate(over="ignore"):  # infinity is refused with its place, later
            return np.array(values, dtype)
    # `dtype=bool` would take every number for true.
    array = np.array(values) if values else np.zeros(0, np.bool_)
    if array.dtype.kind not in "bi" or array.min(initial=0) < 0 or array.max(initial=0) > 1:
        raise ValueError("expected true, false, 0 or 1")
    return array.astype(np.bool_)


def _is_nested(raw: msgspec.Raw) -> bool:
    """Whether the first thing inside the outer list is a list."""
    head = bytes(memoryview(raw)[:64]).lstrip(_WHITESPACE)
    if head[:1] != b"[":
        return False
    inside = head[1:].lstrip(_WHITESPACE)
    if not inside:
        inside = bytes(raw).lstrip(_WHITESPACE)[1:].lstrip(_WHITESPACE)
    return inside[:1] == b"["


@functools.cache
def _decoder(element: Any, depth: int) -> msgspec.json.Decoder[Any]:
    kind = element
    for _ in range(depth):
        kind = list.__class_getitem__(kind)
    return msgspec.json.Decoder(kind)


def to_bytes(array: NDArray[Any]) -> bytes:
    """The raw bytes of a tensor."""
    little = array.dtype.newbyteorder("<")
    return np.ascontiguousarray(array, little).tobytes()
