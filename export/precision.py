"""float16 and int8: a smaller file for a large network, held to a tolerance of its own.

Only the weights of the network's layers change; connectors, distributions and the action's
arithmetic stay as they were, and so do the names and types of all inputs and outputs.

* float16: weights are stored in half precision and computed with in float32, so no activation can
  overflow. Half the file; the same speed, as ONNX Runtime widens the weights once, at load.
* int8: matrices between two activations become integer products, with a scale per output and a
  scale per row of the batch. `onnxruntime.quantization.quantize_dynamic` takes one scale for a
  whole batch, so that one caller's large observation changes the actions of the others; here a
  row's answer does not depend on its neighbours.

The tolerances follow from policies with drawn weights, 64 to 1024 units wide, a CNN, PPO, DQN and
SAC. Largest errors of any output: float16 1e-3 to 5e-3 (SAC: 9e-3); int8 3e-2 to 8e-2 (SAC: 0.13,
in the steep log-probability of its squashed Gaussian, so it needs a wider tolerance).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.errors import ConversionError, ParityError
from export.graph import PolicyGraph
from export.parity import check_parity
from export.vectors import Vectors
from serving.parity import TOLERANCE, Run

Precision = Literal["float32", "float16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
TOLERANCES: Mapping[Precision, float] = {"float32": TOLERANCE, "float16": 1e-2, "int8": 1e-1}

_LAYERS = ("Gemm", "MatMul", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN")
# Smaller tensors (biases, normalisations) would save nothing.
_MIN_HALVED = 256
# Smaller matrices gain nothing from integer products, and the narrow last layer decides the action.
_MIN_SIDE = 64
_NOT_NEGATIVE = ("Relu", "Sigmoid")
_ONLY_MOVE = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
# Seven bits: 127 * 127 * 2 fits into the 16 bits in which x86 without VNNI adds two products, so
# the sums are exact on every processor.
_MAX_ACTIVATION = 127
_MIDDLE = 64
_MAX_WEIGHT = 127
# Keeps a row of zeros from a division by zero.
_MIN_SCALE = 1e-30


def convert_precision(source: Path, target: Path, precision: Literal["float16", "int8"]) -> None:
    """Write a float32 ONNX file again with smaller weights.

    Inputs and outputs keep their names and types, the batch stays dynamic, and every operator is
    one of ONNX's own.

    Args:
        source: A file of `write_onnx`.
        target: The file to write.
        precision: See the module.

    Raises:
        ConversionError: There is nothing to convert, or a weight is too large for float16.
    """
    model: Any = onnx.load_model(str(source))  # protobuf's generated classes have no types
    n_converted = _halve(model.graph) if precision == "float16" else _quantize(model.graph)
    if not n_converted:
        needed = (
            f"no weights of {_MIN_HALVED} numbers or more"
            if precision == "float16"
            else f"no matrix of {_MIN_SIDE} x {_MIN_SIDE} or more between two layers "
            "(convolutions, LSTMs and the layer that reads the observation stay float32)"
        )
        raise ConversionError(f"{precision} gains nothing here: {needed}; export float32")
    _drop_unread(model.graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, str(target))


def check_precision(
    name: str,
    run: Run,
    graph: PolicyGraph,
    vectors: Vectors,
    precision: Precision,
    tolerance: float,
) -> dict[str, Any]:
    """The parity gate with the tolerance of a precision; see `check_parity`.

    Raises:
        ParityError: Also says how large the largest error is, and how to state another tolerance.
    """
    try:
        report = check_parity(name, run, graph, vectors, tolerance=tolerance)
    except ParityError as exc:
        widest = check_parity(name, run, graph, vectors, tolerance=math.inf)
        output, difference = max(widest["max_difference"].items(), key=lambda item: item[1])
        raise ParityError(
            f"{precision} is not within its tolerance of {tolerance:g}: the largest error is "
            f"{widest['max_error']:.2g} (largest difference: {difference:.2g} in {output}); state "
            f"another with --tolerance, or export float32: {exc.message}"
        ) from exc
    return {**report, "precision": precision}


def _halve(graph: Any) -> int:
    """Store the layers' weights in float16; how many."""
    weights = {entry.name: entry for entry in graph.initializer}
    chosen = [
        weights[name]
        for name in dict.fromkeys(_layer_weights(graph, weights))
        if weights[name].data_type == TensorProto.FLOAT
        and math.prod(weights[name].dims) >= _MIN_HALVED
    ]
    casts = []
    for entry in chosen:
        name, stored = entry.name, f"{entry.name}/float16"
        with np.errstate(over="ignore"):  # checked in the next line
            half = numpy_helper.to_array(entry).astype(np.float16)
        if not np.isfinite(half).all():
            raise ConversionError(
                f"{name} has a weight beyond float16's {np.finfo(np.float16).max:g}; export float32"
            )
        entry.CopyFrom(numpy_helper.from_array(half, stored))
        casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    _set_nodes(graph, [*casts, *graph.node])
    return len(chosen)


def _layer_weights(graph: Any, weights: Mapping[str, Any]) -> Iterator[str]:
    """The weights that layers read, also through nodes that only rearrange weights."""
    producers = _producers(graph)
    for node in graph.node:
        if node.op_type in _LAYERS:
            for name in node.input[1:]:
                yield from _sources(name, producers, weights) or ()


def _sources(
    name: str, producers: Mapping[str, Any], weights: Mapping[str, Any]
) -> list[str] | None:
    """The weights that a tensor is made of, or None if it depends on an input."""
    if name in weights:
        return [name]
    if name not in producers:
        return None
    found: list[str] = []
    for part in producers[name].input:
        own = _sources(part, producers, weights)
        if own is None:
            return None
        found += own
    return found


@dataclass(frozen=True)
class _Rows:
    """An activation as integers.

    Attributes:
        values: (…, n) uint8.
        scale: (…, 1) float32.
        zero_point: The integer that stands for 0.
    """

    values: str
    scale: str
    zero_point: int


class _Int8Layers:
    """Rewrites a graph's large matrix products as products of integers."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._weights = {entry.name: entry for entry in graph.initializer}
        self._producers = _producers(graph)
        self._nodes: list[Any] = []
        self._activations: set[str] = set()  # what depends on a layer
        self._rows: dict[str, _Rows] = {}

    def rewrite(self) -> int:
        """How many products were rewritten."""
        n_rewritten = 0
        for node in list(self._graph.node):
            is_after_layer = any(name in self._activations for name in node.input)
            # Components of an observation have no common scale, so the first layer stays.
            if is_after_layer and self._is_large_product(node):
                self._add_product(node)
                n_rewritten += 1
            else:
                self._nodes.append(node)
            if is_after_layer or node.op_type in _LAYERS:
                self._activations.update(node.output)
        _set_nodes(self._graph, self._nodes)
        return n_rewritten

    def _is_large_product(self, node: Any) -> bool:
        if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in self._weights:
            return False
        attributes = _attributes(node)
        is_plain = not attributes.get("transA") and all(
            attributes.get(name, 1.0) == 1.0 for name in ("alpha", "beta")
        )
        weight = self._weights[node.input[1]]
        is_matrix = weight.data_type == TensorProto.FLOAT and len(weight.dims) == 2
        return is_plain and is_matrix and min(weight.dims) >= _MIN_SIDE

    def _add_product(self, node: Any) -> None:
        name, output = node.input[1], node.output[0]
        weight = numpy_helper.to_array(self._weights[name])
        if _attributes(node).get("transB"):
            weight = weight.T
        scale = np.maximum(np.abs(weight).max(axis=0) / _MAX_WEIGHT, _MIN_SCALE)
        rows = self._integer_rows(node.input[0])
        product = [rows.values, self._constant(f"{output}/weight", np.rint(weight / scale), "int8")]
        if rows.zero_point:
            product.append(self._constant(f"{output}/zero", np.array(rows.zero_point), "uint8"))
        total = self._add("MatMulInteger", product, f"{output}/integers")
        wide = self._add("Cast", [total], f"{output}/wide", to=TensorProto.FLOAT)
        scaled = self._add("Mul", [wide, rows.scale], f"{output}/rows")
        columns = self._constant(f"{output}/scale", scale, "float32")
        if len(node.input) == 2:
            self._add("Mul", [scaled, columns], output)
            return
        scaled = self._add("Mul", [scaled, columns], f"{output}/columns")
        self._add("Add", [scaled, node.input[2]], output)

    def _integer_rows(self, name: str) -> _Rows:
        """Divide each row by its largest absolute value and round."""
        if name not in self._rows:
            is_signed = not self._is_never_negative(name)
            zero_point = _MIDDLE if is_signed else 0
            steps = _MAX_ACTIVATION - zero_point
            size = self._add("Abs", [name], f"{name}/abs") if is_signed else name
            last_axis = self._constant(f"{name}/axis", np.array([-1]), "int64")
            largest = self._add("ReduceMax", [size, last_axis], f"{name}/largest", keepdims=1)
            step = self._constant(f"{name}/steps", np.array(1.0 / steps), "float32")
            floor = self._constant(f"{name}/floor", np.array(_MIN_SCALE), "float32")
            raw_scale = self._add("Mul", [largest, step], f"{name}/raw_scale")
            scale = self._add("Max", [raw_scale, floor], f"{name}/scale")
            scaled = self._add("Div", [name, scale], f"{name}/scaled")
            rounded = self._add("Round", [scaled], f"{name}/rounded")
            if is_signed:
                middle = self._constant(f"{name}/middle", np.array(zero_point), "float32")
                rounded = self._add("Add", [rounded, middle], f"{name}/shifted")
            values = self._add("Cast", [rounded], f"{name}/integers", to=TensorProto.UINT8)
            self._rows[name] = _Rows(values, scale, zero_point)
        return self._rows[name]

    def _is_never_negative(self, name: str) -> bool:
        producer = self._producers.get(name)
        while producer is not None and producer.op_type in _ONLY_MOVE:
            producer = self._producers.get(producer.input[0])
        return producer is not None and producer.op_type in _NOT_NEGATIVE

    def _add(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def _constant(self, name: str, values: NDArray[Any], dtype: str) -> str:
        entry = numpy_helper.from_array(np.ascontiguousarray(values.astype(dtype)), name)
        self._graph.initializer.append(entry)
        return name


def _quantize(graph: Any) -> int:
    return _Int8Layers(graph).rewrite()


def _producers(graph: Any) -> dict[str, Any]:
    return {name: node for node in graph.node for name in node.output}


def _attributes(node: Any) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _set_nodes(graph: Any, nodes: Sequence[Any]) -> None:
    # Copied first: clearing the field would empty the messages in it.
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _drop_unread(graph: Any) -> None:
    """Drop weights that nothing reads any more, and what is noted about them."""
    unread = {entry.name for entry in graph.initializer} - set(_names_read(graph))
    for entries in (graph.initializer, graph.value_info):
        kept = [entry for entry in entries if entry.name not in unread]
        del entries[:]
        entries.extend(kept)


def _names_read(graph: Any) -> Iterator[str]:
    yield from (entry.name for entry in graph.output)
    for node in graph.node:
        yield from node.input
        for value in _attributes(node).values():
            # The body of a branch or loop may read names of the graph around it.
            inner = value if isinstance(value, list) else [value]
            for each in inner:
                if isinstance(each, onnx.GraphProto):
                    yield from _names_read(each)
