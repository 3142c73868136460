"""Reading RLlib's state files (weights, filter statistics) without running what they name.

A pickle is a program: it names Python objects and calls them. Here every name is either one of
the few that dictionaries and NumPy arrays are written with, and then it stands for a function of
this module that only copies bytes into an array, or the file is refused. Neither NumPy's own
reconstruction nor anything else that a file could name is ever called.
"""

from __future__ import annotations

import importlib
import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from export.errors import CheckpointError
from export.safe_arrays import RefusedError, build_array, plain_dtype, shorten

MAX_FILE_BYTES = 4 * 2**30
"""The largest state file that is read: 1e9 float32 weights, far above any RLlib module."""

_IS_ARRAY = b"nd"  # msgpack_numpy's key: True an array, False a scalar; codespell:ignore nd
_MAX_OPCODES = 2_000_000
_MAX_VALUES = 500_000
_MAX_DEPTH = 64

_REFUSED_OPCODES = frozenset(
    {
        # Calls by other ways than REDUCE.
        "INST",
        "OBJ",
        "NEWOBJ",
        "NEWOBJ_EX",
        # Objects that come from outside the file.
        "PERSID",
        "BINPERSID",
        "EXT1",
        "EXT2",
        "EXT4",
        "NEXT_BUFFER",
        "READONLY_BUFFER",
    }
)


def load_state(path: Path) -> Any:
    """Read a state file of an RLlib checkpoint as plain data.

    Args:
        path: A `.pkl` of pickle protocol 0 to 5, or a `.msgpack` as RLlib's `use_msgpack=True`
            writes it (needs the package msgpack; msgpack_numpy, which unpickles, is not used).

    Returns:
        dicts, lists, tuples, strings, bytes, numbers, None, and NumPy arrays and scalars of
        booleans, integers or floats in this machine's byte order.

    Raises:
        CheckpointError: The file is missing, too large, damaged, or holds anything else.
    """
    data = _read(path)
    try:
        value = _unpack_msgpack(data) if path.suffix == ".msgpack" else _unpickle(data)
        return _Plain().convert(value, 0)
    except CheckpointError:
        raise
    except RefusedError as exc:
        raise CheckpointError(
            f"{path} {exc}, which no weights or statistics need, so it was not read: a custom "
            "class made the file, or it was damaged or tampered with. If you trust where it came "
            "from, read it with --trust-checkpoint in place of --safe"
        ) from exc
    except Exception as exc:  # damaged bytes can raise anything
        raise CheckpointError(
            f"{path} is not readable ({type(exc).__name__}: {exc}): damaged or half-written; "
            "copy the checkpoint again, or take another one of the run"
        ) from exc


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would block, a device never end
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise CheckpointError(f"{path} can't be read: {exc}") from exc
    if len(data) > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path} is larger than {MAX_FILE_BYTES / 2**30:.0f} GiB, the limit for a state file"
        )
    return data


# --- pickle ---------------------------------------------------------------------------------


def _unpickle(data: bytes) -> Any:
    _scan(data)
    return _Unpickler(data).load()


def _scan(data: bytes) -> None:
    """Refuse programs that could exhaust the machine before `find_class` is ever asked.

    The unpickler reserves memory for a memo index or a length that a file merely claims;
    `genops` finds the bytes of every length missing or there.
    """
    for n_opcodes, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        if opcode.name in _REFUSED_OPCODES:
            raise RefusedError(f"holds the pickle instruction {opcode.name}")
        if n_opcodes > _MAX_OPCODES:
            raise RefusedError(f"holds more than {_MAX_OPCODES} pickle instructions")
        if opcode.name.endswith("PUT") and cast(int, argument) > n_opcodes:
            raise RefusedError(f"holds a pickle memo index of {argument}")
        if opcode.name == "GLOBAL":  # refused here before anything of the file has run
            _check_name(*str(argument).split(" ", 1))


def _check_name(module: str, name: str) -> None:
    if (module, name) not in _BUILDERS:
        raise RefusedError(f"names the Python object {shorten(f'{module}.{name}')}")


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        # An honest file's bytes are copied twice at most: out of text (protocol 2), into arrays.
        self._copies = _Copies(2 * len(data))

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        _check_name(module_name, global_name)
        return _StandIn(_BUILDERS[module_name, global_name], self._copies)


class _Copies:
    """How many bytes a file may still have copied: it can name the same large bytes for ever."""

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes

    def spend(self, data: Any) -> None:
        """Count a copy of `data`."""
        self._n_bytes -= len(data)
        if self._n_bytes < 0:
            raise RefusedError("copies the same bytes again and again")


class _StandIn:
    """What a file's name for a Python object stands for: it can be called, and not altered."""

    __slots__ = ("_build", "_copies")

    def __init__(self, build: Callable[..., Any], copies: _Copies) -> None:
        self._build = build
        self._copies = copies

    def __call__(self, *arguments: Any) -> Any:
        return self._build(self._copies, *arguments)

    def __setstate__(self, state: object) -> None:
        # A pickle's BUILD could otherwise set attributes of a function, for every later file.
        raise RefusedError("alters an object that it names")


class _Dtype:
    """Stands for a `numpy.dtype`."""

    def __init__(self, _: _Copies, text: object, *__: object) -> None:
        self.dtype = plain_dtype(text)

    def __setstate__(self, state: Any) -> None:
        # NumPy writes (version, byte order, subarray, names, fields, size, alignment, flags).
        _, byte_order, *structure = state
        if byte_order not in ("<", ">", "=", "|") or any(structure[:3]):
            raise RefusedError(f"holds an array of a structured dtype {shorten(state)}")
        if byte_order != "|":
            self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    """Stands for an array that NumPy's `_reconstruct` makes empty and BUILD fills."""

    def __init__(self, copies: _Copies, *_: object) -> None:
        self._copies = copies
        self.array: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = _frombuffer(self._copies, data, dtype, shape, "F" if is_fortran else "C")


def _frombuffer(
    copies: _Copies, data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None
) -> NDArray[Any]:
    if not isinstance(dtype, _Dtype):
        raise RefusedError(f"holds an array whose dtype is {shorten(dtype)}")
    copies.spend(data)
    return build_array(data, dtype.dtype, shape, order, axis_order)


def _scalar(copies: _Copies, dtype: Any, data: Any) -> Any:
    return _frombuffer(copies, data, dtype, (), "C")[()]


def _ordered_dict(_: _Copies) -> dict[Any, Any]:
    return {}  # the entries follow


def _encode(copies: _Copies, text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedError(f"encodes {type(text).__name__} as {shorten(encoding)}")
    copies.spend(text)
    return text.encode("latin1")


def _empty_bytes(_: _Copies) -> bytes:
    return b""


_BUILDERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    # The same three as NumPy 1 writes them.
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    # How protocols 0 to 2 spell bytes.
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
}


# --- msgpack --------------------------------------------------------------------------------


def _unpack_msgpack(data: bytes) -> Any:
    try:
        msgpack = importlib.import_module("msgpack")
    except ImportError as exc:
        raise CheckpointError(
            "the checkpoint was written with RLlib's use_msgpack=True, and reading it needs the "
            "package msgpack: pip install msgpack"
        ) from exc
    return msgpack.unpackb(
        data, raw=False, strict_map_key=False, object_hook=_decode_msgpack, ext_hook=_refuse_ext
    )


def _decode_msgpack(value: dict[Any, Any]) -> Any:
    # The layout of msgpack_numpy, whose own decoder unpickles arrays of the kind "O".
    if _IS_ARRAY not in value:
        return value
    kind = value.get(b"kind", b"")
    if kind != b"":
        raise RefusedError(f"holds an array of the kind {shorten(kind)}")
    dtype = plain_dtype(value[b"type"])
    array = build_array(value[b"data"], dtype, value.get(b"shape", ()))
    return array if value[_IS_ARRAY] is True else array[()]


def _refuse_ext(code: int, _: bytes) -> Any:
    raise RefusedError(f"holds a msgpack extension of type {code}")


# --- the result -----------------------------------------------------------------------------


class _Plain:
    """Copies what was read, unwrapping arrays, and refuses whatever is not plain data.

    Counted, since a small pickle can share one list so often that a walk over it never ends.
    """

    def __init__(self) -> None:
        self._n_values = 0

    def convert(self, value: Any, depth: int) -> Any:
        """One value, `depth` containers deep."""
        self._n_values += 1
        if depth > _MAX_DEPTH or self._n_values > _MAX_VALUES:
            raise RefusedError(
                f"is nested more than {_MAX_DEPTH} deep or holds more than {_MAX_VALUES} values"
            )
        if isinstance(value, _Array) and value.array is not None:
            return value.array
        if type(value) is dict:
            return {
                self.convert(key, depth + 1): self.convert(item, depth + 1)
                for key, item in value.items()
            }
        if type(value) in (list, tuple):
            return type(value)(self.convert(item, depth + 1) for item in value)
        if value is None or isinstance(
            value, (bool, int, float, str, bytes, bytearray, np.ndarray, np.generic)
        ):
            return value
        raise RefusedError(f"holds {type(value).__name__} where plain data belongs")
