"""`ModelInfer`'s messages: tensors in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from serving.dialects.open_inference import grpc_messages
from serving.dialects.open_inference.model import Model, Parameters
from serving.dialects.open_inference.tensors import (
    datatype_of,
    dtype_of,
    from_bytes,
    to_bytes,
)
from serving.errors import InvalidRequestError

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_NOT_OFFERED = ("classification", "shared_memory_region")


def parameters_of(request: Any) -> Parameters:
    """A request's parameters.

    Raises:
        InvalidRequestError: One of them is of another type, or out of range.
    """
    if not request.parameters:
        return Parameters()
    try:
        return msgspec.convert(_values(request.parameters), Parameters)
    except msgspec.ValidationError as exc:
        raise InvalidRequestError(f"a request parameter is wrong: {exc}") from exc


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is not None:
            found[name] = getattr(value, kind)
    return found


def arrays_of(model: Model, request: Any) -> dict[str, NDArray[Any]]:
    """A request's inputs by name.

    Raises:
        InvalidRequestError: They are not the model's, or their contents don't fit their shapes.
        BatchTooLargeError: More rows than one request may hold.
    """
    model.check_shapes(request.inputs)
    for tensor in request.inputs:
        _refuse_extensions("input", tensor)
    raw = request.raw_input_contents
    if not raw:
        return {tensor.name: _from_contents(tensor) for tensor in request.inputs}
    if len(raw) != len(request.inputs):
        raise InvalidRequestError(
            f"found {len(raw)} raw_input_contents for {len(request.inputs)} inputs, expected one "
            "for each, or none"
        )
    found = {}
    for tensor, data in zip(request.inputs, raw, strict=True):
        if tensor.HasField("contents"):
            raise InvalidRequestError(
                f"input {tensor.name!r} has `contents` beside raw_input_contents, expected one of "
                "them"
            )
        dtype = dtype_of(tensor.datatype, tensor.name)
        found[tensor.name] = from_bytes(data, dtype, list(tensor.shape), tensor.name)
    return found


def _from_contents(tensor: Any) -> NDArray[Any]:
    dtype = dtype_of(tensor.datatype, tensor.name)
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise InvalidRequestError(
            f"input {tensor.name!r}: {tensor.datatype} has no `contents`; send raw_input_contents"
        )
    values = getattr(tensor.contents, field)
    shape = list(tensor.shape)
    if len(values) != math.prod(shape):
        raise InvalidRequestError(
            f"input {tensor.name!r}: found {len(values)} elements in {field}, expected "
            f"{math.prod(shape)} for the shape {shape} of {tensor.datatype}"
        )
    # A field holds 32 bits where the datatype may have fewer.
    wide = np.array(values)
    array: NDArray[Any] = wide.astype(dtype)
    if dtype.kind in "iu" and (array != wide).any():
        raise InvalidRequestError(
            f"input {tensor.name!r}: {field} holds a number that is no {tensor.datatype}"
        )
    return array.reshape(shape)


def outputs_of(model: Model, request: Any) -> tuple[str, ...]:
    """The outputs to answer.

    Raises:
        InvalidRequestError: One is unknown, there twice, or to be answered in a form that is not
            offered.
    """
    for output in request.outputs:
        _refuse_extensions("output", output)
    return model.chosen_outputs([output.name for output in request.outputs])


def _refuse_extensions(what: str, tensor: Any) -> None:
    for name in _NOT_OFFERED if tensor.parameters else ():
        if name in tensor.parameters:
            raise InvalidRequestError(
                f"{what} {tensor.name[:100]!r}: {name!r} is an extension that is not offered"
            )


def infer_answer(model: Model, request_id: str, answers: Mapping[str, NDArray[Any]]) -> Any:
    """A `ModelInferResponse` with raw tensors."""
    outputs: Sequence[dict[str, Any]] = [
        {"name": name, "datatype": datatype_of(array.dtype), "shape": array.shape}
        for name, array in answers.items()
    ]
    return grpc_messages.answer(
        "ModelInfer",
        model_name=model.name,
        model_version=model.version,
        id=request_id,
        outputs=outputs,
        raw_output_contents=[to_bytes(array) for array in answers.values()],
    )
