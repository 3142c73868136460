"""One graph, three writers: ONNX, torch.export's .pt2, and TorchScript."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch

from export.errors import ConversionError
from export.graph import PolicyGraph

# The exporter's native opset in torch 2.13, read by ONNX Runtime since 1.17.
OPSET = 20
# Three rows: a batch of one or two is what exporters like to treat as a constant.
_EXAMPLE_ROWS = 3


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress chatter off the user's terminal; errors are raised anyway."""
    chatty = ("torch", "onnxscript", "onnx_ir")
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in chatty]
    loggers = [logging.getLogger(name) for name in {*chatty, *names}]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def export_program(graph: PolicyGraph) -> torch.export.ExportedProgram:
    """The graph as a program without Python, with a dynamic batch: what every writer starts from.

    torch.export refuses code that depends on data or on the batch size, which a trace would
    get silently wrong.

    Raises:
        ConversionError: Names what in the network cannot be exported.
    """
    example = graph.example(_EXAMPLE_ROWS)
    batch = torch.export.Dim("batch", min=1)
    shapes = (tuple({0: batch} for _ in example),)
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(graph, example, dynamic_shapes=shapes)
    except Exception as exc:  # tracing raises whatever the network raises
        raise ConversionError(_explain(exc)) from exc
    return program


def _explain(exc: Exception) -> str:
    text = str(exc).strip()
    first = text.splitlines()[0] if text else repr(exc)
    if "onstraint" in text or "specialized" in text:
        return (
            "the network's code fixes the batch size, so it would act wrongly on any other (for "
            f"example `repeat(len(x), 1)` or a reshape to a number; use `expand_as`, -1): {first}"
        )
    if (
        "data-dependent" in text
        or "data dependent" in text
        or type(exc).__name__
        in (
            "GuardOnDataDependentSymNode",
            "UserError",
        )
    ):
        return (
            "the network's Python depends on data (an `if` or a number taken from a tensor), which "
            f"no exported graph can hold; use torch.where: {first}"
        )
    return (
        f"torch.export cannot convert this network: {type(exc).__name__}: {first} (Python that "
        "depends on data, NumPy inside forward, or an operator that torch.export lacks)"
    )


def write_onnx(program: torch.export.ExportedProgram, graph: PolicyGraph, path: Path) -> None:
    """Write one ONNX file with a dynamic batch on every input and output.

    Raises:
        ConversionError: An operator has no ONNX form, or the exporter fixed the batch size.
    """
    try:
        with _quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[spec.name for spec in graph.inputs],
                output_names=list(graph.output_names),
                external_data=False,
            )
            if converted is None:
                raise ConversionError("torch.onnx.export returned nothing")
            model: Any = converted.model_proto  # protobuf's generated classes have no types
    except ConversionError:
        raise
    except Exception as exc:  # the exporter raises whatever its passes raise
        reason = str(exc).strip().splitlines()
        raise ConversionError(
            f"torch.onnx.export cannot convert this network: {reason[0] if reason else exc!r} (an "
            "operator without an ONNX form)"
        ) from exc
    _strip_traces(model)
    onnx.checker.check_model(model)
    onnx.save_model(model, str(path))
    _check_batch(model)


def _strip_traces(model: Any) -> None:
    """Drop the exporter's notes: they name source files of this machine and are half the size."""
    model.doc_string = ""
    del model.metadata_props[:]
    for graph in (model.graph, *model.functions):
        graph.doc_string = ""
        del graph.metadata_props[:]
        for entry in (*graph.node, *graph.value_info):
            entry.doc_string = ""
            del entry.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]


def _check_batch(model: Any) -> None:
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if not first.dim_param:
            # Some modules make the exporter settle on one batch size without a word.
            raise ConversionError(
                f"the exporter fixed the batch size of {value.name!r} to {first.dim_value}; the "
                "network's code depends on the batch size (for example `repeat(len(x), 1)`; use "
                "`expand_as`)"
            )


def write_pt2(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write the program as torch.export's archive, the successor of TorchScript.

    Raises:
        ConversionError: torch cannot save it.
    """
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
                node.meta.pop(key, None)
    try:
        with _quiet():
            torch.export.save(program, str(path))
    except Exception as exc:  # torch raises whatever its serialisation raises
        raise ConversionError(f"torch.export.save cannot write this network: {exc}") from exc


def write_torchscript(graph: PolicyGraph, path: Path) -> None:
    """Write the graph as TorchScript, by tracing.

    Called after `export_program` only: a trace of code that depends on data is silently wrong,
    and torch.export refuses such code. Parity at several batch sizes is checked afterwards.

    Raises:
        ConversionError: Tracing failed.
    """
    try:
        with _quiet(), torch.no_grad():
            traced = torch.jit.trace(graph, graph.example(_EXAMPLE_ROWS), check_trace=False)
            torch.jit.freeze(traced.eval()).save(str(path))
    except Exception as exc:  # tracing raises whatever the network raises
        raise ConversionError(f"torch.jit.trace cannot convert this network: {exc}") from exc
