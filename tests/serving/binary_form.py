"""Requests in the binary form, made with NumPy and the `msgpack` package alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import msgpack
import numpy as np
from gymnasium import spaces


def wire_dtype(space: gym.Space[Any]) -> str:
    """The little-endian dtype of a leaf, as docs/protocols.md says it."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return "<i8"
    if isinstance(space, spaces.MultiBinary):
        return "<i1"
    assert space.dtype is not None
    dtype = np.dtype(space.dtype)
    return "<f4" if dtype == np.float16 else dtype.newbyteorder("<").str


def columns(space: gym.Space[Any], rows: Sequence[Any]) -> Any:
    """Rows of a space as bins of columns; one row is a batch of one."""
    if isinstance(space, spaces.Dict):
        return {
            key: columns(child, [row[key] for row in rows]) for key, child in space.spaces.items()
        }
    if isinstance(space, spaces.Tuple):
        return [
            columns(child, [row[index] for row in rows]) for index, child in enumerate(space.spaces)
        ]
    return np.array(rows, dtype=wire_dtype(space)).tobytes()


def pack(value: Any) -> bytes:
    """Msgpack by the reference implementation."""
    packed: bytes = msgpack.packb(value)
    return packed


def unpack(data: bytes) -> Any:
    """A value of exactly these bytes."""
    return msgpack.unpackb(data)


def floats(*values: float) -> bytes:
    """Numbers as float32."""
    return np.array(values, "<f4").tobytes()
