"""Answers as raw bytes: what each array is, and the msgpack map that holds them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from serving.dialects.columns import wire_dtype
from serving.interface import OUTPUT_NAMES, PolicyOutput
from serving.manifest import PolicyManifest
from serving.spaces import escape, leaves

# The first byte of a map of no entries; one of up to 15 adds their number.
_FIXMAP = 0x80


@dataclass(frozen=True)
class AnswerSpec:
    """One array of an answer.

    Attributes:
        name: `action` (`action/<pointer>` for a leaf), an output's name, or `state/<name>`.
        dtype: Its NumPy dtype name.
        shape: Of one row; None for a width that only the network knows.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON: `name`, `dtype`, `shape`."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


def answer_specs(manifest: PolicyManifest) -> list[AnswerSpec]:
    """What a policy's answers may hold, as bytes."""
    found = [
        AnswerSpec(name, leaf.dtype, leaf.shape)
        for name, leaf in leaves(manifest.action_space, "action").items()
    ]
    for name in OUTPUT_NAMES:
        if name in manifest.outputs:
            shape = (None,) if name in ("action_dist_inputs", "q_values") else ()
            found.append(AnswerSpec(name, "float32", shape))
    found += [
        AnswerSpec(f"state/{name}", spec.dtype, spec.shape) for name, spec in manifest.state.items()
    ]
    return found


class AnswerEncoder:
    """`PolicyOutput` to msgpack, for one policy."""

    def __init__(self, manifest: PolicyManifest, identity: Mapping[str, Any]) -> None:
        """Prepare.

        Args:
            manifest: The policy's.
            identity: What every answer ends with.
        """
        self._encoder = msgspec.msgpack.Encoder()
        self._dtypes = {spec.name: wire_dtype(spec.dtype) for spec in answer_specs(manifest)}
        self._is_plain = not manifest.state and "action" in self._dtypes
        self._n_identity = len(identity)
        self._tail = self._encoder.encode(dict(identity))[1:]

    def encode(self, output: PolicyOutput, *, is_single: bool) -> bytes:
        """The answer to one request."""
        answer: dict[str, Any] = {
            "action" if is_single else "actions": self._bins(output.actions, "action")
        }
        for name, values in output.outputs().items():
            answer[name] = self._bin(values, name)
        if output.state is not None:
            answer["state"] = self._bins(dict(output.state), "state")
        return self._with_identity(answer)

    def encode_each(self, output: PolicyOutput) -> list[bytes]:
        """The answers of callers who asked for one action each and for nothing beside it."""
        if not self._is_plain:
            return [self.encode(rows, is_single=True) for rows in output.rows()]
        data = self._bin(output.actions, "action")
        n_bytes = len(data) // len(output.actions)
        if not n_bytes:
            return [self.encode(output.cut(slice(0, 1)), is_single=True)] * len(output.actions)
        head = bytes([_FIXMAP + 1 + self._n_identity]) + b"\xa6action" + _bin_head(n_bytes)
        tail = self._tail
        return [
            b"%b%b%b" % (head, data[start : start + n_bytes], tail)
            for start in range(0, len(data), n_bytes)
        ]

    def _with_identity(self, answer: dict[str, Any]) -> bytes:
        body = self._encoder.encode(answer)
        return b"%c%b%b" % (body[0] + self._n_identity, body[1:], self._tail)

    def _bins(self, nested: Any, name: str) -> Any:
        if isinstance(nested, dict):
            return {
                key: self._bins(each, f"{name}/{key if name == 'state' else escape(key)}")
                for key, each in nested.items()
            }
        if isinstance(nested, tuple):
            return [self._bins(each, f"{name}/{index}") for index, each in enumerate(nested)]
        return self._bin(nested, name)

    def _bin(self, values: NDArray[Any], name: str) -> bytes:
        return np.asarray(values, self._dtypes[name]).tobytes()


def with_id(answer: bytes, identifier: int | str) -> bytes:
    """An answer with the id of its request."""
    pair = msgspec.msgpack.encode({"id": identifier})[1:]
    return b"%c%b%b" % (answer[0] + 1, answer[1:], pair)


def _bin_head(n_bytes: int) -> bytes:
    if n_bytes < 2**8:
        return struct.pack(">BB", 0xC4, n_bytes)
    if n_bytes < 2**16:
        return struct.pack(">BH", 0xC5, n_bytes)
    return struct.pack(">BI", 0xC6, n_bytes)
