"""Arrays of plain numbers from untrusted bytes: never a pickle, never more memory than is there."""

from __future__ import annotations

import base64
import io
import math
import re
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.errors import CheckpointError

MAX_ARRAY_BYTES = 64 * 2**20
"""The largest array of a filter's statistics, unpacked: a 1080p RGB image in float64 has 50 MB."""

_PLAIN_DTYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248])")
_MAX_SHOWN = 80


class RefusedError(Exception):
    """The bytes hold something other than plain data; the text says what, after "it ..."."""


def plain_dtype(text: object) -> np.dtype[Any]:
    """The dtype that a file names, if it is one of booleans, integers or floats.

    Raises:
        RefusedError: It is another: of objects above all, whose elements are pickles.
    """
    if not isinstance(text, str) or not _PLAIN_DTYPE.fullmatch(text):
        raise RefusedError(f"holds an array or number of dtype {shorten(text)}")
    return np.dtype(text)


def build_array(
    data: Any, dtype: np.dtype[Any], shape: Any, order: Any = "C", axis_order: Any = None
) -> NDArray[Any]:
    """Copy bytes into a new array in this machine's byte order and C layout.

    Args:
        data: The elements' bytes.
        dtype: What they are, by `plain_dtype`.
        shape: The shape that the file claims.
        order: "C", "F", or "K" with `axis_order`, as NumPy 2.3 writes a permuted layout.
        axis_order: For "K": the axes' order after the bytes took `shape` in C order.

    Raises:
        RefusedError: The content is not bytes.
        ValueError: The shape and the number of bytes disagree.
    """
    if not isinstance(data, (bytes, bytearray)):
        raise RefusedError(f"holds an array whose content is {type(data).__name__}, not bytes")
    sizes = tuple(int(size) for size in shape)
    if min(sizes, default=0) < 0 or math.prod(sizes) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {sizes} and {dtype} with {len(data)} bytes")
    array: NDArray[Any] = np.frombuffer(data, dtype)
    if order == "K" and axis_order is not None:
        array = array.reshape(sizes).transpose(axis_order)
    else:
        array = array.reshape(sizes, order="F" if order == "F" else "C")
    return np.array(array, dtype.newbyteorder("="), order="C")


def decode_array(text: Any) -> NDArray[Any]:
    """Decode an array as RLlib's filters hold it: base64 of zlib of an `.npy` file.

    RLlib's own decoder allows pickles inside; this one takes plain numbers alone.

    Args:
        text: The ASCII text.

    Returns:
        The array, writable, in C order.

    Raises:
        CheckpointError: It is not such a text, is larger than `MAX_ARRAY_BYTES` unpacked, or
            holds Python objects.
    """
    try:
        if not isinstance(text, str):
            raise RefusedError(f"is {type(text).__name__}, not text")
        return _parse_npy(_decompress(base64.b64decode(text, validate=True)))
    except Exception as exc:  # damaged bytes can raise anything
        raise CheckpointError(
            f"an array of a filter's statistics is not readable (it {exc}); expected the base64 "
            "text of a compressed .npy array of numbers: the checkpoint is damaged or tampered with"
        ) from exc


def encode_array(array: NDArray[Any]) -> str:
    """Write an array as RLlib's filters hold it, the inverse of `decode_array`."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(zlib.compress(file.getvalue())).decode("ascii")


def shorten(value: object) -> str:
    """A value's text for an error message, cut where it is long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _decompress(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    content = stream.decompress(data, MAX_ARRAY_BYTES)
    if not stream.eof:
        raise ValueError(f"is cut short, or over {MAX_ARRAY_BYTES // 2**20} MiB unpacked")
    return content


def _parse_npy(content: bytes) -> NDArray[Any]:
    # Not `np.load`: that also opens zip archives, and reserves the size that a header claims.
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"has .npy version {version}, not 1.0 or 2.0")
    return build_array(file.read(), plain_dtype(dtype.str), shape, "F" if is_fortran else "C")
