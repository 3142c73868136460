"""An ONNX file as a message that can be read and cut down, with nothing but protobuf.

ONNX Runtime computes every node of a graph, also those that no asked output needs: the critic
and the sampling branch would double the cost of a greedy action. `subgraph` keeps only what the
asked outputs need. The `onnx` package is not used: a server does not need it otherwise, and the
few fields below are all that is read. Fields that are not described here pass through
unchanged (protobuf keeps unknown fields).

Source of the field numbers: onnx.proto3, IR version 10.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from serving.errors import BundleError

_PACKAGE = "policyserve.onnx"
# message -> {field: (number, kind, repeated)}; a kind that is no scalar names a message below.
_FIELDS: dict[str, dict[str, tuple[int, str, bool]]] = {
    "Model": {"graph": (7, "Graph", False)},
    "Graph": {
        "node": (1, "Node", True),
        "initializer": (5, "Named8", True),
        "input": (11, "Named1", True),
        "output": (12, "Named1", True),
        "value_info": (13, "Named1", True),
    },
    "Node": {
        "input": (1, "string", True),
        "output": (2, "string", True),
        "attribute": (5, "Attribute", True),
    },
    "Attribute": {"g": (6, "Graph", False), "graphs": (11, "Graph", True)},
    "Named1": {"name": (1, "string", False)},  # ValueInfoProto
    "Named8": {"name": (8, "string", False)},  # TensorProto
}


@cache
def _model_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="policyserve_onnx.proto", package=_PACKAGE, syntax="proto3"
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    for message_name, fields in _FIELDS.items():
        message = file.message_type.add(name=message_name)
        for field_name, (number, kind, repeated) in fields.items():
            field = message.field.add(
                name=field_name,
                number=number,
                label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL,
                type=kinds.TYPE_STRING if kind == "string" else kinds.TYPE_MESSAGE,
            )
            if kind != "string":
                field.type_name = f".{_PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


def subgraph(model: bytes, outputs: Sequence[str]) -> bytes:
    """The model with only the nodes, weights and inputs that `outputs` need.

    Args:
        model: An ONNX ModelProto.
        outputs: Names of graph outputs.

    Raises:
        BundleError: `model` is no ONNX model, or lacks one of the outputs.
    """
    message = _model_class()()
    try:
        message.ParseFromString(model)
    except DecodeError as exc:
        raise BundleError(f"not an ONNX model: {exc}") from exc
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
        for inner in (attribute.g, *attribute.graphs):
            for inner_node in inner.node:
                yield from _names_read(inner_node)
            yield from (output.name for output in inner.output)


def _keep(entries: Any, predicate: Any) -> None:
    kept = [entry for entry in entries if predicate(entry)]
    if len(kept) < len(entries):
        del entries[:]
        entries.extend(kept)
