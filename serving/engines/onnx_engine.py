"""ONNX Runtime: the default engine."""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from serving.engines.graph import Graph
from serving.engines.onnx_model import check_safety, graph_inputs, subgraph, without_mask
from serving.errors import BundleError, ServingConfigError
from serving.manifest import ACTION_MASK, PolicyManifest, step_outputs
from serving.spaces import leaves

_CUDA = "CUDAExecutionProvider"
_PROVIDERS: Mapping[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [
        (
            _CUDA,
            {
                # The default rounds factors to ten bits: too coarse for the golden vectors.
                "use_tf32": "0",
                # The default tries every algorithm at each new batch size, seconds a time.
                "cudnn_conv_algo_search": "HEURISTIC",
                # Several sessions share the GPU; none of them takes twice what it needs.
                "arena_extend_strategy": "kSameAsRequested",
            },
        )
    ],
}
# y = x + x, one float32, opset 17; a whole model, so that trying CUDA needs no `onnx` package.
_PROBE = bytes.fromhex(
    "080812003a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080112040a020801620f0a0179"
    "120a0a08080112040a02080142040a001011"
)
# Where ONNX Runtime only logs what went wrong, to standard error and past Python.
_SILENT, _WARNING = 4, 2


@dataclass(frozen=True)
class _Part:
    """A session that computes some of the graph's outputs and nothing beside them.

    Attributes:
        outputs: What it computes.
        session: ONNX Runtime's.
        inputs: What it reads.
        call: The session's `run`: names, inputs by name, options.
    """

    outputs: frozenset[str]
    session: onnxruntime.InferenceSession
    inputs: tuple[str, ...]
    call: Callable[..., Sequence[NDArray[Any]]]

    def run(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """Compute some of the outputs.

        On a GPU too: a binding made for one call copies the same arrays and takes longer to make.
        """
        feeds = {name: inputs[name] for name in self.inputs}
        return dict(zip(names, self.call(names, feeds, None), strict=True))

    def prepare(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Callable[[], list[NDArray[Any]]]:
        """The bare session with these inputs bound, on its device already where that is a GPU."""
        arrays = {name: np.ascontiguousarray(inputs[name]) for name in self.inputs}
        binding = self.session.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name in names:
            binding.bind_output(name, "cpu")

        def call() -> list[NDArray[Any]]:
            self.session.run_with_iobinding(binding)
            found: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
            return found

        return call


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
        _return_memory()

    def run(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Compute the named outputs; see `serving.engines.graph.Graph`."""
        return self._part(names).run(names, inputs)

    def prepare(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Callable[[], object]:
        """The bare session on bound arrays; see `serving.engines.graph.Graph`."""
        return self._part(names).prepare(names, inputs)

    def _part(self, names: Sequence[str]) -> _Part:
        part = self._parts.choose(names)
        assert part is not None, names  # `GraphPolicy` asks for the manifest's outputs only
        return part

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

    def prepare(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Callable[[], object]:
        """The bare session on bound arrays."""
        part = self._parts.choose(names)
        return (part or self._graph).prepare(names, inputs)


def _cut(model: bytes, choices: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], bytes]:
    """A model for each choice of outputs."""
    return {outputs: subgraph(model, outputs) for outputs in choices}


def _load(models: Mapping[tuple[str, ...], bytes], path: Path, device: str) -> tuple[_Part, ...]:
    found = []
    for outputs, model in models.items():
        session = _session(model, path, device)
        inputs = tuple(entry.name for entry in session.get_inputs())
        found.append(_Part(frozenset(outputs), session, inputs, _runner(session)))
    return tuple(found)


def _runner(session: onnxruntime.InferenceSession) -> Callable[..., Sequence[NDArray[Any]]]:
    """The session's `run` without the checks around it: what comes here conforms.

    They take a fifth of a small network's time. `_sess` is no public name; where it is not there,
    the public method is as good.
    """
    inner = getattr(session, "_sess", None)
    found: Callable[..., Sequence[NDArray[Any]]] = getattr(inner, "run", session.run)
    return found


@cache
def cuda_failure() -> str | None:
    """Why ONNX Runtime cannot use CUDA here, or None; it is tried, and remembered.

    That the provider is listed says only how ONNX Runtime was built: without CUDA's libraries it
    logs an error, and the session runs on the CPU.
    """
    if _CUDA not in onnxruntime.get_available_providers():
        listed = ", ".join(onnxruntime.get_available_providers())
        return f"this installation has only {listed}; install onnxruntime-gpu"
    with _silence() as printed:
        # Finds the libraries that pip installed, since 1.21; it prints what it misses.
        getattr(onnxruntime, "preload_dlls", lambda: None)()
        try:
            session = _open(_PROBE, "cuda")
            (found,) = session.run(None, {"x": np.ones(1, np.float32)})
        except Exception as exc:  # ONNX Runtime's own exceptions share no public base
            return " ".join(str(exc).split())
    if _CUDA in session.get_providers():
        return None if found == 2.0 else f"1 + 1 came to {found[0]:g} on it"
    reason = next(iter(printed.getvalue().splitlines()), "no GPU, or no driver for it")
    return f"{_CUDA} does not start: {reason}"


@contextlib.contextmanager
def _silence() -> Iterator[io.StringIO]:
    """Keep ONNX Runtime's own reports off the terminal; what it prints through Python is given."""
    printed = io.StringIO()
    onnxruntime.set_default_logger_severity(_SILENT)
    try:
        with contextlib.redirect_stdout(printed):
            yield printed
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)


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


def _return_memory() -> None:
    """Give back what loading took and freed: more than the file's size for each session."""
    # glibc's own; elsewhere the allocator decides.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _session(model: bytes, path: Path, device: str) -> onnxruntime.InferenceSession:
    if device == "cuda" and (failure := cuda_failure()) is not None:
        raise ServingConfigError(
            f"device 'cuda' was asked for and ONNX Runtime cannot use a GPU here: {failure}; "
            "otherwise use --device cpu"
        )
    try:
        session = _open(model, device)
    except Exception as exc:  # ONNX Runtime's own exceptions share no public base
        if device == "cpu":
            raise BundleError(f"ONNX Runtime cannot load {path}: {exc}") from exc
        # A bundle that loads on the CPU may be too much for this GPU.
        raise ServingConfigError(f"ONNX Runtime cannot load {path} on {device}: {exc}") from exc
    return session


def _open(model: bytes, device: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # One thread: a small network loses more to waking threads than it wins, and replicas, not
    # threads, use the other cores. It also makes a row's answer independent of its batch.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Without the fallback: it would print to standard output and go on, on the CPU.
    return onnxruntime.InferenceSession(
        model, options, providers=_PROVIDERS[device], enable_fallback=0
    )
