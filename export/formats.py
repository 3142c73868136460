"""One graph, several writers: ONNX, and TorchScript where asked for."""

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
from export.graph import INPUT_NAMES, PolicyGraph

# The exporter's native opset in torch 2.13, read by ONNX Runtime since 1.17.
OPSET = 20


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress chatter off the user's terminal; errors are raised anyway."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def write_onnx(
    graph: PolicyGraph, path: Path, observation_shape: tuple[int, ...]
) -> list[dict[str, object]]:
    """Write the graph as one ONNX file with a dynamic batch on every input and output.

    Returns:
        The graph's inputs as `{"name", "dtype", "shape"}`, -1 for the batch.

    Raises:
        ConversionError: The exporter failed, or fixed the batch size.
    """
    example = _example(graph, observation_shape)
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            program = torch.onnx.export(
                graph,
                example,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(INPUT_NAMES),
                output_names=list(graph.output_names),
                dynamic_shapes=({0: batch}, {0: batch}),
                external_data=False,
            )
            if program is None:
                raise ConversionError("torch.onnx.export returned nothing")
            model: Any = program.model_proto  # protobuf's generated classes have no types
    except ConversionError:
        raise
    except Exception as exc:  # the exporter raises whatever its passes raise
        reason = str(exc).strip().splitlines()
        raise ConversionError(
            f"torch.onnx.export cannot convert this network: {reason[0] if reason else exc!r} "
            "(Python that depends on data, or an operator without an ONNX form)"
        ) from exc
    _strip_traces(model)
    onnx.checker.check_model(model)
    onnx.save_model(model, str(path))
    return _check_batch(model)


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


def _check_batch(model: Any) -> list[dict[str, object]]:
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if not first.dim_param:
            # Some modules make the exporter settle on one batch size without a word.
            raise ConversionError(
                f"the exporter fixed the batch size of {value.name!r} to {first.dim_value}; the "
                "network's code depends on the batch size (for example `repeat(len(x), 1)`; use "
                "`expand_as`)"
            )
    return [
        {
            "name": value.name,
            "dtype": "float32",
            "shape": [-1, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])],
        }
        for value in model.graph.input
    ]


def write_torchscript(graph: PolicyGraph, path: Path, observation_shape: tuple[int, ...]) -> None:
    """Write the graph as TorchScript, by tracing.

    Called after `write_onnx` only: a trace of code that depends on data is silently wrong, and
    the ONNX exporter refuses such code. Parity at several batch sizes is checked afterwards.

    Raises:
        ConversionError: Tracing failed.
    """
    example = _example(graph, observation_shape)
    try:
        with _quiet(), torch.no_grad():
            traced = torch.jit.trace(graph, example, check_trace=False)
            torch.jit.freeze(traced.eval()).save(str(path))
    except Exception as exc:  # tracing raises whatever the network raises
        raise ConversionError(f"torch.jit.trace cannot convert this network: {exc}") from exc


def _example(
    graph: PolicyGraph, observation_shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    # Three rows: a batch of one or two is what exporters like to treat as a constant.
    return torch.zeros(3, *observation_shape), torch.zeros(3, graph.distribution.noise_size)
