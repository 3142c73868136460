"""An ONNX file as a message that can be read, judged and cut down, with nothing but protobuf.

ONNX Runtime computes every node of a graph, also those that no asked output needs: the critic
and the sampling branch would double the cost of a greedy action. `subgraph` keeps only what the
asked outputs need. `check_safety` refuses what a policy never needs and an attacker might: data
in other files, operators from libraries. The `onnx` package is not used: a server does not need
it otherwise, and the few fields below are all that is read. Fields that are not described here
pass through unchanged (protobuf keeps unknown fields).

Source of the field and type numbers: onnx.proto, IR version 10.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from serving.errors import BundleError

_PACKAGE = "policyserve.onnx"
# message -> {field: (number, kind, repeated)}; a kind that is no scalar names a message below.
_FIELDS: dict[str, dict[str, tuple[int, str, bool]]] = {
    "Model": {
        "graph": (7, "Graph", False),
        "opset_import": (8, "OperatorSet", True),
        "training_info": (20, "Empty", True),
        "functions": (25, "Function", True),
    },
    "Graph": {
        "node": (1, "Node", True),
        "initializer": (5, "Tensor", True),
        "sparse_initializer": (15, "SparseTensor", True),
        "input": (11, "Value", True),
        "output": (12, "Value", True),
        "value_info": (13, "Value", True),
    },
    "Node": {
        "input": (1, "string", True),
        "output": (2, "string", True),
        "op_type": (4, "string", False),
        "domain": (7, "string", False),
        "attribute": (5, "Attribute", True),
    },
    "Attribute": {
        "t": (5, "Tensor", False),
        "g": (6, "Graph", False),
        "tensors": (10, "Tensor", True),
        "graphs": (11, "Graph", True),
        "sparse_tensor": (22, "SparseTensor", False),
        "sparse_tensors": (23, "SparseTensor", True),
    },
    "Function": {
        "name": (1, "string", False),
        "domain": (10, "string", False),
        "node": (7, "Node", True),
        "opset_import": (9, "OperatorSet", True),
        "attribute_proto": (11, "Attribute", True),
    },
    "OperatorSet": {"domain": (1, "string", False)},
    "Tensor": {
        "name": (8, "string", False),
        "external_data": (13, "Empty", True),
        "data_location": (14, "int32", False),
    },
    "SparseTensor": {"values": (1, "Tensor", False), "indices": (2, "Tensor", False)},
    "Value": {"name": (1, "string", False), "type": (2, "Type", False)},
    "Type": {"tensor_type": (1, "TensorType", False)},
    "TensorType": {"elem_type": (1, "int32", False), "shape": (2, "Shape", False)},
    "Shape": {"dim": (1, "Dimension", True)},
    "Dimension": {"dim_value": (1, "int64", False)},
    "Empty": {},
}
_SCALARS = {
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
}
_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
}
_STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Signature:
    """What a graph says of one of its inputs.

    Attributes:
        dtype: NumPy's name of the element type, or the number of one that is none.
        shape: Its axes; None for one of any length.
    """

    dtype: str
    shape: tuple[int | None, ...]


@cache
def _model_class() -> Any:
    # proto2, as a field that is absent has to stay absent.
    file = descriptor_pb2.FileDescriptorProto(
        name="policyserve_onnx.proto", package=_PACKAGE, syntax="proto2"
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    for message_name, fields in _FIELDS.items():
        message = file.message_type.add(name=message_name)
        for field_name, (number, kind, repeated) in fields.items():
            field = message.field.add(
                name=field_name,
                number=number,
                label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL,
                type=_SCALARS.get(kind, kinds.TYPE_MESSAGE),
            )
            if kind not in _SCALARS:
                field.type_name = f".{_PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


def _parse(model: bytes) -> Any:
    message = _model_class()()
    try:
        message.ParseFromString(model)
    except DecodeError as exc:
        raise BundleError(f"not an ONNX model: {exc}") from exc
    return message


def graph_inputs(model: bytes) -> dict[str, Signature]:
    """The inputs that a model declares, by name, used or not.

    Raises:
        BundleError: `model` is no ONNX model.
    """
    found = {}
    for value in _parse(model).graph.input:
        tensor = value.type.tensor_type
        found[value.name] = Signature(
            dtype=_DTYPES.get(tensor.elem_type, str(tensor.elem_type)),
            shape=tuple(
                dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim
            ),
        )
    return found


def check_safety(model: bytes) -> None:
    """Refuse a model that reads other files or needs other libraries.

    Raises:
        BundleError: `model` is no ONNX model, keeps data outside itself, uses operators beyond
            ONNX's own, or carries a training graph.
    """
    message = _parse(model)
    if message.training_info:
        raise BundleError("the ONNX model has training_info, which a policy does not need")
    _check_opsets(message.opset_import)
    _check_graph(message.graph)
    for function in message.functions:
        _check_domain(function.domain, f"the function {function.name!r}")
        _check_opsets(function.opset_import)
        _check_nodes(function.node)
        for attribute in function.attribute_proto:
            _check_attribute(attribute)


def _check_opsets(opsets: Any) -> None:
    for opset in opsets:
        _check_domain(opset.domain, "opset_import")


def _check_domain(domain: str, what: str) -> None:
    if domain not in _STANDARD_DOMAINS:
        raise BundleError(
            f"the ONNX model needs the operator domain {domain!r} ({what}); only ONNX's own is "
            "accepted"
        )


def _check_graph(graph: Any) -> None:
    for tensor in graph.initializer:
        _check_tensor(tensor)
    for sparse in graph.sparse_initializer:
        _check_sparse(sparse)
    _check_nodes(graph.node)


def _check_nodes(nodes: Any) -> None:
    for node in nodes:
        _check_domain(node.domain, f"a node {node.op_type}")
        for attribute in node.attribute:
            _check_attribute(attribute)


def _check_attribute(attribute: Any) -> None:
    for tensor in (attribute.t, *attribute.tensors):
        _check_tensor(tensor)
    for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
        _check_sparse(sparse)
    if attribute.HasField("g"):
        _check_graph(attribute.g)
    for graph in attribute.graphs:
        _check_graph(graph)


def _check_sparse(sparse: Any) -> None:
    _check_tensor(sparse.values)
    _check_tensor(sparse.indices)


def _check_tensor(tensor: Any) -> None:
    if tensor.data_location or tensor.external_data:
        raise BundleError(
            f"the ONNX model keeps the data of {tensor.name!r} in another file; export it with its "
            "weights inside"
        )


def subgraph(model: bytes, outputs: Sequence[str]) -> bytes:
    """The model with only the nodes, weights and inputs that `outputs` need.

    Args:
        model: An ONNX ModelProto.
        outputs: Names of graph outputs.

    Raises:
        BundleError: `model` is no ONNX model, or lacks one of the outputs.
    """
    message = _parse(model)
    graph = message.graph
    found = {output.name for output in graph.output}
    if not found >= set(outputs):
        raise BundleError(f"the ONNX graph has the outputs {sorted(found)}, not {list(outputs)}")
    needed = _needed_names(graph, outputs)
    _keep(graph.node, lambda node: any(name in needed for name in node.output))
    for entries in (graph.initializer, graph.input, graph.value_info):
        _keep(entries, lambda entry: entry.name in needed)
    _keep(graph.output, lambda output: output.name in outputs)
    return bytes(message.SerializeToString())


def without_mask(model: bytes, mask: str) -> bytes | None:
    """The model for callers who forbid nothing: there, `Where(mask, x, y)` is x.

    A feed and a node less, which is a fifth of a small network's time.

    Args:
        model: An ONNX ModelProto.
        mask: The name of a bool input of the shape of every x that it chooses from.

    Returns:
        The model without that input, or None where the mask does anything else.

    Raises:
        BundleError: `model` is no ONNX model.
    """
    message = _parse(model)
    graph = message.graph
    chosen: dict[str, str] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = chosen.get(name, name)
        if node.op_type == "Where" and node.input[0] == mask:
            chosen[node.output[0]] = node.input[1]
    _keep(graph.node, lambda node: not any(name in chosen for name in node.output))
    read = {output.name for output in graph.output}
    read.update(name for node in graph.node for name in _names_read(node))
    if not chosen or mask in read or read & chosen.keys():
        return None
    _keep(graph.input, lambda entry: entry.name != mask)
    _keep(graph.value_info, lambda entry: entry.name not in chosen)
    return bytes(message.SerializeToString())


def _needed_names(graph: Any, outputs: Sequence[str]) -> set[str]:
    # ONNX lists nodes in topological order, so one backward pass sees every consumer first.
    needed = set(outputs)
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            needed.update(_names_read(node))
    return needed


def _names_read(node: Any) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        # A branch or loop body may read names of the graph around it.
        inner_graphs = [attribute.g] if attribute.HasField("g") else []
        for inner in (*inner_graphs, *attribute.graphs):
            for inner_node in inner.node:
                yield from _names_read(inner_node)
            yield from (output.name for output in inner.output)


def _keep(entries: Any, predicate: Any) -> None:
    kept = [entry for entry in entries if predicate(entry)]
    if len(kept) < len(entries):
        del entries[:]
        entries.extend(kept)
