"""ONNX Runtime: the default engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from serving.engines.graph import Graph
from serving.engines.onnx_model import check_safety, graph_inputs, subgraph, without_mask
from serving.errors import BundleError, ServingConfigError
from serving.manifest import ACTION_MASK, PolicyManifest, step_outputs
from serving.spaces import leaves

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class _Part:
    """A session that computes some of the graph's outputs and nothing beside them."""

    outputs: frozenset[str]
    session: onnxruntime.InferenceSession
    inputs: tuple[str, ...]

    def run(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """Compute some of the outputs."""
        feeds = {name: inputs[name] for name in self.inputs}
        return dict(zip(names, self.session.run(names, feeds), strict=True))


class _Parts:
    """Sessions from the smallest to the last, which has the most outputs."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.last = parts[-1]
        self._parts = parts
        self._chosen: dict[tuple[str, ...], _Part | None] = {}

    def choose(self, names: Sequence[str]) -> _Part | None:
        """The first part that has all of these outputs, if one has."""
        key = tuple(names)
        try:
            return self._chosen[key]
        except KeyError:
            found = [part for part in self._parts if part.outputs.issuperset(key)]
            return self._chosen.setdefault(key, found[0] if found else None)


class OnnxGraph:
    """`policy.onnx` in ONNX Runtime; satisfies `serving.engines.graph.Graph`.

    Several sessions of the one file, as ONNX Runtime computes every node of a graph: what greedy
    steps need, what sampled ones need, both, and the whole (log-probabilities, the critic).

    Attributes:
        unmasked: The same policy for batches without an action mask, which it does not read.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, output_names: Sequence[str], *, device: str = "cpu") -> None:
        """Load the file.

        Args:
            path: The ONNX file.
            output_names: Its outputs.
            device: `cpu` or `cuda`.

        Raises:
            BundleError: It is no ONNX model, not a safe one, or lacks an output.
            ServingConfigError: The device is not there.
        """
        self.device = device
        self._path = path
        model = path.read_bytes()
        steps = step_outputs(output_names)
        try:
            check_safety(model)
            self._declared = graph_inputs(model)
            own = _cut(model, [*steps, tuple(output_names)])
            free = without_mask(model, ACTION_MASK)
            unmasked = {} if free is None else _cut(free, steps)
        except BundleError as exc:
            raise BundleError(f"{path}: {exc.message}") from exc
        self._parts = _Parts(_load(own, path, device))
        self.unmasked: Graph = self
        if unmasked:
            self.unmasked = _UnmaskedGraph(self, _Parts(_load(unmasked, path, device)))

    def run(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Compute the named outputs; see `serving.engines.graph.Graph`."""
        part = self._parts.choose(names)
        assert part is not None, names  # `GraphPolicy` asks for the manifest's outputs only
        return part.run(names, inputs)

    def check_signature(self, manifest: PolicyManifest) -> None:
        """Compare the graph's inputs and outputs with what the manifest says of them.

        Raises:
            BundleError: A name, an element type or a shape differs.
        """
        expected = {spec.name: spec for spec in manifest.inputs}
        if self._declared.keys() != expected.keys():
            raise BundleError(
                f"{self._path} has the inputs {sorted(self._declared)}, and the manifest says "
                f"{sorted(expected)}"
            )
        for name, found in self._declared.items():
            spec = expected[name]
            shape = (None, *spec.shape)
            if found.dtype != spec.dtype or not _fits(found.shape, shape):
                raise BundleError(
                    f"{self._path}: the input {name} is {found.dtype} {found.shape}, and the "
                    f"manifest says {spec.dtype} {shape} (None: any length)"
                )
        shapes = _output_shapes(manifest)
        for entry in self._parts.last.session.get_outputs():
            found_shape = tuple(size if isinstance(size, int) else None for size in entry.shape)
            if not _fits(found_shape, shapes[entry.name]):
                raise BundleError(
                    f"{self._path}: the output {entry.name} has the shape {found_shape}, and the "
                    f"manifest says {shapes[entry.name]} (None: any length)"
                )


class _UnmaskedGraph:
    """A graph in which all actions are allowed."""

    name = OnnxGraph.name

    def __init__(self, graph: OnnxGraph, parts: _Parts) -> None:
        self.device = graph.device
        self._graph = graph
        self._parts = parts

    def run(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Compute the named outputs; `inputs` holds a mask all the same, for the whole graph."""
        part = self._parts.choose(names)
        return self._graph.run(names, inputs) if part is None else part.run(names, inputs)


def _cut(model: bytes, choices: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], bytes]:
    """A model for each choice of outputs."""
    return {outputs: subgraph(model, outputs) for outputs in choices}


def _load(models: Mapping[tuple[str, ...], bytes], path: Path, device: str) -> tuple[_Part, ...]:
    found = []
    for outputs, model in models.items():
        session = _session(model, path, device)
        inputs = tuple(entry.name for entry in session.get_inputs())
        found.append(_Part(frozenset(outputs), session, inputs))
    return tuple(found)


def has_cuda() -> bool:
    """Whether this installation of ONNX Runtime can use CUDA."""
    return _PROVIDERS["cuda"] in onnxruntime.get_available_providers()


def _fits(found: tuple[int | None, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether two shapes can be the same, and `found` fixes no batch size."""
    if len(found) != len(expected) or found[0] is not None:
        return False
    return all(
        None in (here, there) or here == there for here, there in zip(found, expected, strict=True)
    )


def _output_shapes(manifest: PolicyManifest) -> dict[str, tuple[int | None, ...]]:
    """The outputs' shapes as far as the manifest knows them."""
    shapes: dict[str, tuple[int | None, ...]] = dict.fromkeys(manifest.outputs, (None,))
    shapes |= {"action_dist_inputs": (None, None), "q_values": (None, None)}
    for name, leaf in leaves(manifest.action_space, "action").items():
        shapes[name] = shapes[f"sampled_{name}"] = (None, *leaf.shape)
    for name, spec in manifest.state.items():
        shapes[f"next_state/{name}"] = (None, *spec.shape)
        shapes[f"sampled_next_state/{name}"] = (None, *spec.shape)
    return shapes


def _session(model: bytes, path: Path, device: str) -> onnxruntime.InferenceSession:
    provider = _PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise ServingConfigError(
            f"device {device!r} needs ONNX Runtime's {provider}, and this installation has only "
            f"{', '.join(onnxruntime.get_available_providers())}; install onnxruntime-gpu or use "
            "--device cpu"
        )
    options = onnxruntime.SessionOptions()
    # One thread: a small network loses more to waking threads than it wins, and replicas, not
    # threads, use the other cores.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=[provider])
    except Exception as exc:  # ONNX Runtime's own exceptions share no public base
        raise BundleError(f"ONNX Runtime cannot load {path}: {exc}") from exc
