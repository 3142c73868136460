"""The bodies of `infer` over HTTP: JSON, and JSON followed by raw tensors (binary tensor data)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from serving.dialects.open_inference.model import Model, Parameters
from serving.dialects.open_inference.tensors import (
    datatype_of,
    dtype_of,
    from_bytes,
    from_json,
    to_bytes,
)
from serving.errors import InvalidRequestError, MalformedRequestError, PolicyServingError

_NOT_OFFERED = "is an extension that is not offered"


class _InputParameters(msgspec.Struct, frozen=True, gc=False):
    binary_data_size: int | None = None
    shared_memory_region: Any = None


class _Input(msgspec.Struct, frozen=True, gc=False):
    name: str
    shape: list[int]
    datatype: str
    parameters: _InputParameters | None = None
    data: msgspec.Raw | UnsetType = UNSET

    @property
    def has_data(self) -> bool:
        """Whether it has data in JSON; null is none."""
        data = self.data
        return not isinstance(data, UnsetType) and not (len(data) == 4 and bytes(data) == b"null")

    @property
    def size(self) -> int | None:
        """How many bytes of raw data it has; None for data in JSON."""
        return None if self.parameters is None else self.parameters.binary_data_size


class _OutputParameters(msgspec.Struct, frozen=True, gc=False):
    binary_data: bool | None = None
    classification: Any = None
    shared_memory_region: Any = None


class _Output(msgspec.Struct, frozen=True, gc=False):
    name: str
    parameters: _OutputParameters | None = None


class _Head(msgspec.Struct, frozen=True, gc=False):
    inputs: list[_Input]
    outputs: list[_Output] | None = None
    id: str | None = None
    parameters: Parameters | None = None


_decoder = msgspec.json.Decoder(_Head)
_encoder = msgspec.json.Encoder()
_DEFAULTS = Parameters()
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True)
class Request:
    """An `infer` request that was read.

    Attributes:
        arrays: The inputs by name.
        outputs: The outputs to answer, in order.
        binary: Those of them to answer as raw bytes.
        id: What the answer has to echo.
        parameters: The request's parameters.
    """

    arrays: Mapping[str, NDArray[Any]]
    outputs: Sequence[str]
    binary: frozenset[str]
    id: str | None
    parameters: Parameters


def decode(model: Model, body: bytes, header_length: bytes | None) -> Request:
    """Read a body.

    Args:
        model: Whose tensors these are.
        body: Without any compression.
        header_length: The value of `Inference-Header-Content-Length`: where the JSON ends and raw
            tensors begin; None: all is JSON; 0: all is one raw tensor.

    Raises:
        MalformedRequestError: Not JSON, or not as long as it says.
        InvalidRequestError: Not this schema, or tensors that the model does not have.
        BatchTooLargeError: More rows than one request may hold.
    """
    if header_length is None:
        return _decode(model, body, memoryview(b""))
    n = _length(header_length, len(body))
    view = memoryview(body)
    return _decode(model, view[:n], view[n:]) if n else _decode_raw(model, view)


def _length(value: bytes, size: int) -> int:
    text = value.strip()
    if not text.isdigit() or len(text) > 20:
        raise MalformedRequestError(
            f"Inference-Header-Content-Length is {value.decode('latin-1')[:40]!r}, expected the "
            "length of the JSON in bytes"
        )
    length = int(text)
    if length > size:
        raise MalformedRequestError(
            f"Inference-Header-Content-Length is {length}, but the body has only {size} bytes"
        )
    return length


def _decode(model: Model, head_bytes: bytes | memoryview, raw: memoryview) -> Request:
    try:
        head = _decoder.decode(head_bytes)
    except _MALFORMED as exc:
        raise _explain(bytes(head_bytes), exc) from exc
    model.check_shapes(head.inputs)
    asked = head.outputs or ()
    for output in asked:
        _refuse_extensions(output)
    outputs = model.chosen_outputs([output.name for output in asked])
    parameters = head.parameters or _DEFAULTS
    return Request(
        arrays=_arrays(head.inputs, raw),
        outputs=outputs,
        binary=_binary_outputs(asked, outputs, parameters.binary_data_output),
        id=head.id,
        parameters=parameters,
    )


def _explain(head: bytes, exc: Exception) -> PolicyServingError:
    """Why a head was not taken: the decoder stops at the first wrong type, JSON or not."""
    try:
        json.loads(head)
    except (ValueError, RecursionError) as malformed:
        hint = ""
        if b"binary_data_size" in head:
            hint = "; raw tensors need the header Inference-Header-Content-Length"
        return MalformedRequestError(f"the body is not JSON: {malformed}{hint}")
    if isinstance(exc, msgspec.ValidationError):
        return InvalidRequestError(f"the body is no inference request: {exc}")
    # Python's parser takes NaN and Infinity, which many clients write.
    return MalformedRequestError("the body is not JSON: NaN and Infinity are not JSON numbers")


def _refuse_extensions(output: _Output) -> None:
    if output.parameters is None:
        return
    for name in ("classification", "shared_memory_region"):
        if getattr(output.parameters, name) is not None:
            raise InvalidRequestError(f"output {output.name[:100]!r}: {name!r} {_NOT_OFFERED}")


def _binary_outputs(
    asked: Sequence[_Output], outputs: Sequence[str], by_default: bool
) -> frozenset[str]:
    if not asked:
        return frozenset(outputs) if by_default else frozenset()
    wanted = (
        (output.name, None if output.parameters is None else output.parameters.binary_data)
        for output in asked
    )
    return frozenset(name for name, binary in wanted if (by_default if binary is None else binary))


def _arrays(inputs: Sequence[_Input], raw: memoryview) -> dict[str, NDArray[Any]]:
    """The inputs' arrays; raw tensors follow each other in the order of the inputs."""
    found = {}
    start = 0
    for each in inputs:
        dtype = dtype_of(each.datatype, each.name)
        if each.parameters is not None and each.parameters.shared_memory_region is not None:
            raise InvalidRequestError(f"input {each.name!r}: 'shared_memory_region' {_NOT_OFFERED}")
        has_data = each.has_data
        size = each.size
        if has_data == (size is not None):
            raise InvalidRequestError(
                f"input {each.name!r} has {'both' if has_data else 'neither'} `data` and "
                "`binary_data_size`, expected one of them"
            )
        if size is None:
            assert not isinstance(each.data, UnsetType)  # or it would have neither
            found[each.name] = from_json(each.data, dtype, each.shape, each.name)
            continue
        if not 0 <= size <= len(raw) - start:
            raise InvalidRequestError(
                f"input {each.name!r}: binary_data_size is {size}, but {len(raw) - start} bytes "
                "are left after the JSON and the tensors before"
            )
        found[each.name] = from_bytes(raw[start : start + size], dtype, each.shape, each.name)
        start += size
    if start != len(raw):
        raise InvalidRequestError(
            f"found {len(raw)} bytes after the JSON, but the inputs' binary_data_size add up to "
            f"{start}"
        )
    return found


def _decode_raw(model: Model, body: memoryview) -> Request:
    """A body that is the model's one input; its length says how many rows."""
    required = [spec for spec in model.inputs.values() if not spec.is_optional]
    if len(required) != 1:
        raise InvalidRequestError(
            f"a raw binary request must be for a model of one input; {model.name} needs "
            f"{len(required)}: {', '.join(spec.name for spec in required)}"
        )
    spec = required[0]
    dtype = dtype_of(spec.datatype, spec.name)
    row_size = math.prod(spec.shape[1:]) * dtype.itemsize
    if not row_size or not len(body) or len(body) % row_size:
        raise InvalidRequestError(
            f"found {len(body)} bytes, expected rows of {spec.datatype} {list(spec.shape[1:])}, "
            f"which are {row_size} bytes each"
        )
    tensor = _Input(spec.name, [len(body) // row_size, *spec.shape[1:]], spec.datatype)
    model.check_shapes([tensor])
    outputs = model.chosen_outputs(())
    return Request(
        arrays={spec.name: from_bytes(body, dtype, tensor.shape, spec.name)},
        outputs=outputs,
        binary=frozenset(outputs),
        id=None,
        parameters=_DEFAULTS,
    )


def encode(
    model: Model, request: Request, answers: Mapping[str, NDArray[Any]]
) -> tuple[bytes, int | None]:
    """An answer's body.

    Floating-point numbers in JSON are written so that they read back as the same.

    Returns:
        The body, and the length of its JSON where raw tensors follow it, else None.
    """
    outputs: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for name, array in answers.items():
        output: dict[str, Any] = {
            "name": name,
            "datatype": datatype_of(array.dtype),
            "shape": array.shape,
        }
        if name in request.binary:
            raw.append(to_bytes(array))
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    answer = {"model_name": model.name, "model_version": model.version, "outputs": outputs}
    if request.id is not None:
        answer["id"] = request.id
    head = _encoder.encode(answer)
    return (b"".join([head, *raw]), len(head)) if raw else (head, None)
