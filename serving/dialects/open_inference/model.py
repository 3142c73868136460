"""A served policy as a model of the Open Inference Protocol: named tensors in, named tensors out.

    tensors ─▶ Model.request ─▶ ComputeRequest ─▶ PolicyService ─▶ PolicyOutput ─▶ Model.answer

REST and gRPC both come through here, so they check and answer alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from serving.conforming import conform_leaf
from serving.dialects.open_inference.tensors import datatype_of
from serving.errors import (
    BatchTooLargeError,
    CallerError,
    InvalidRequestError,
    UnknownPolicyError,
)
from serving.interface import OUTPUT_NAMES, OutputName, PolicyOutput
from serving.manifest import InputSpec, PolicyManifest
from serving.policy_inputs import PolicyInputs
from serving.request import ComputeRequest
from serving.service import PolicyService, PolicyServices
from serving.spaces import LeafSpace, flatten, leaves

_MAX_SEED = 2**63 - 1
_MAX_TIMEOUT_US = 3_600_000_000
_PLATFORMS = {
    "onnxruntime": "onnx_onnxv1",
    "torchscript": "pytorch_torchscript",
    "pt2": "pytorch_pt2",
}


class Parameters(msgspec.Struct, frozen=True, gc=False):
    """What a request may say beside its tensors; parameters of other names are passed over."""

    deterministic: bool = True
    seed: Annotated[int, Meta(ge=0, le=_MAX_SEED)] | None = None
    timeout: Annotated[int, Meta(ge=0, le=_MAX_TIMEOUT_US)] | None = None
    # Taken as Triton takes it for a model without priority levels: every request has the default.
    priority: Annotated[int, Meta(ge=0)] | None = None
    binary_data_output: bool = False
    sequence_id: int | str | None = None
    sequence_start: bool = False
    sequence_end: bool = False

    @property
    def timeout_s(self) -> float | None:
        """The caller's deadline from arrival; 0 microseconds stand for none."""
        return self.timeout / 1e6 if self.timeout else None


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: Its name.
        datatype: The protocol's name of its elements.
        shape: Its shape with -1 for the batch, and for a width that is not known before.
        is_optional: Whether a request may leave it out.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    is_optional: bool = False


class InputTensor(Protocol):
    """A tensor as a caller described it, not read yet."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def shape(self) -> Sequence[int]:
        """The shape that the caller stated."""
        ...


class Model:
    """A policy's tensors, and the way to and from `ComputeRequest`."""

    def __init__(self, service: PolicyService) -> None:
        manifest = service.policy.manifest
        # Not the service itself, which is the key that this is kept under.
        self.name = service.name
        self.version = str(service.version)
        graph = service.policy.graph.name
        self.platform = _PLATFORMS.get(graph, graph)
        self.max_batch_size = service.max_observations_per_request
        self.inputs = {
            spec.name: _input_spec(spec) for spec in manifest.inputs if spec.role != "noise"
        }
        self._observations = leaves(manifest.observation_space, "observation")
        self._action_space = manifest.action_space
        self._available = service.policy.available_outputs
        self.outputs = {spec.name: spec for spec in _output_specs(manifest, self._available)}
        self._state_names = tuple(manifest.state)
        self._beside = PolicyInputs(manifest)

    def check_shapes(self, tensors: Sequence[InputTensor]) -> int:
        """The batch size that all inputs agree on; nothing was read or allocated before.

        Raises:
            InvalidRequestError: An input is unknown, missing, there twice, or of another shape.
            BatchTooLargeError: More rows than one request may hold.
        """
        seen: dict[str, int] = {}
        for tensor in tensors:
            if tensor.name in seen:
                raise InvalidRequestError(f"input {tensor.name!r} is there twice, expected once")
            seen[tensor.name] = self._check_shape(tensor)
        missing = [
            name for name, spec in self.inputs.items() if not spec.is_optional and name not in seen
        ]
        if missing:
            raise InvalidRequestError(f"input {missing[0]!r} is missing; {self._expected_inputs()}")
        if len(set(seen.values())) > 1:
            raise InvalidRequestError(f"the inputs' batch sizes differ: {seen}; expected one")
        return next(iter(seen.values()))

    def _check_shape(self, tensor: InputTensor) -> int:
        name, found = tensor.name, list(tensor.shape)
        spec = self.inputs.get(name)
        if spec is None:
            raise InvalidRequestError(
                f"input {name[:100]!r} is none of this model's; {self._expected_inputs()}"
            )
        if len(found) != len(spec.shape) or tuple(found[1:]) != spec.shape[1:] or found[0] < 1:
            raise InvalidRequestError(
                f"input {name!r}: found the shape {_shortened(found)}, expected "
                f"{list(spec.shape)} where -1 is the batch size, at least 1"
            )
        if found[0] > self.max_batch_size:
            raise BatchTooLargeError(
                f"input {name!r}: found {found[0]} rows, at most {self.max_batch_size} are taken "
                "in one request; send several"
            )
        return int(found[0])

    def _expected_inputs(self) -> str:
        parts = (
            f"{spec.name} ({spec.datatype} {list(spec.shape)}"
            f"{', optional' if spec.is_optional else ''})"
            for spec in self.inputs.values()
        )
        return f"{self.name} takes {', '.join(parts)}"

    def chosen_outputs(self, asked: Sequence[str]) -> tuple[str, ...]:
        """The outputs to answer, in the order that they were asked for; all where none was.

        Raises:
            InvalidRequestError: One is unknown, or asked for twice.
        """
        if not asked:
            return tuple(self.outputs)
        for index, name in enumerate(asked):
            if name not in self.outputs:
                raise InvalidRequestError(
                    f"output {name[:100]!r} is none of this model's; {self.name} has "
                    f"{', '.join(self.outputs)}"
                )
            if name in asked[:index]:
                raise InvalidRequestError(f"output {name!r} is asked for twice, expected once")
        return tuple(asked)

    def request(
        self,
        arrays: Mapping[str, NDArray[Any]],
        outputs: Sequence[str],
        parameters: Parameters,
        timeout_s: float | None = None,
    ) -> ComputeRequest:
        """What a request asks of the policy, checked as the JSON dialect checks it.

        Args:
            arrays: The inputs by name, of shapes that `check_shapes` accepted.
            outputs: What `chosen_outputs` answered.
            parameters: The request's.
            timeout_s: A deadline of the connection's, beside the request's own.

        Raises:
            InvalidRequestError: State, reward or mask does not fit, or it is part of a sequence.
            InvalidObservationError: A number is not finite, or outside its space.
        """
        if parameters.sequence_id or parameters.sequence_start or parameters.sequence_end:
            raise InvalidRequestError(
                "the sequence extension is not offered; send the `next_state/...` outputs back as "
                "the `state/...` inputs"
            )
        inputs = {
            name: _conformed(name, arrays[name], leaf) for name, leaf in self._observations.items()
        }
        n = len(next(iter(inputs.values())))
        inputs |= self._conform_beside(arrays, n)
        deadlines = [each for each in (parameters.timeout_s, timeout_s) if each is not None]
        return ComputeRequest(
            inputs=inputs,
            n=n,
            is_single=False,
            deterministic=parameters.deterministic,
            seed=parameters.seed,
            timeout_s=min(deadlines, default=None),
            outputs=frozenset(name for name in OUTPUT_NAMES if name in outputs),
            version=None,
        )

    def _conform_beside(
        self, arrays: Mapping[str, NDArray[Any]], n: int
    ) -> dict[str, NDArray[Any]]:
        """State, reward and action mask, where they came."""
        found: dict[str, NDArray[Any]] = {}
        state = {
            name: arrays[f"state/{name}"] for name in self._state_names if f"state/{name}" in arrays
        }
        if state:
            if len(state) < len(self._state_names):
                missing = next(name for name in self._state_names if name not in state)
                raise InvalidRequestError(
                    f"input 'state/{missing}' is missing: expected all of the state, or none of it"
                )
            found |= self._beside.conform_state(state, n)
        if "reward" in arrays:
            found |= self._beside.conform_rewards(arrays["reward"], n, pointer="/reward")
        if "action_mask" in arrays:
            found |= self._beside.conform_masks(arrays["action_mask"], n)
        return found

    def answer(self, output: PolicyOutput, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The named outputs of n rows, each in its datatype, in the order of `names`."""
        found: dict[str, Any] = flatten(self._action_space, "action", output.actions)
        found |= output.outputs()
        if output.state is not None:
            found |= {f"next_state/{name}": values for name, values in output.state.items()}
        return {name: self.outputs[name].cast(found[name]) for name in names}


@dataclass(frozen=True)
class OutputSpec(TensorSpec):
    """One output of a model.

    Attributes:
        dtype: The NumPy dtype name of its elements.
    """

    dtype: str = "float32"

    def cast(self, values: Any) -> NDArray[Any]:
        """The values in this output's dtype; the same array where it has it."""
        return np.asarray(values, self.dtype)


def _input_spec(spec: InputSpec) -> TensorSpec:
    return TensorSpec(
        name=spec.name,
        datatype=datatype_of(spec.dtype),
        shape=(-1, *spec.shape),
        is_optional=spec.role != "observation",
    )


def _output_specs(manifest: PolicyManifest, available: Sequence[OutputName]) -> list[OutputSpec]:
    specs = [
        _output_spec(name, "float32" if leaf.dtype == "float16" else leaf.dtype, leaf.shape)
        for name, leaf in leaves(manifest.action_space, "action").items()
    ]
    for output in available:
        # How many parameters a distribution has, or how many actions, the manifest does not say.
        width = (-1,) if output in ("action_dist_inputs", "q_values") else ()
        specs.append(_output_spec(output, "float32", width))
    for name, state in manifest.state.items():
        specs.append(_output_spec(f"next_state/{name}", state.dtype, state.shape))
    return specs


def _output_spec(name: str, dtype: str, shape: tuple[int, ...]) -> OutputSpec:
    return OutputSpec(name, datatype_of(dtype), (-1, *shape), dtype=dtype)


def _conformed(name: str, array: NDArray[Any], leaf: LeafSpace) -> NDArray[Any]:
    try:
        return conform_leaf(array, leaf, pointer="")
    except CallerError as exc:
        place = exc.details.pop("pointer", "").strip("/").replace("/", ", ")
        raise type(exc)(f"input {name!r}: {exc.message} at [{place}]", **exc.details) from None


def _shortened(shape: Sequence[int]) -> str:
    text = str(list(shape))
    return text if len(text) <= 100 else f"{text[:100]}..."


_models: WeakKeyDictionary[PolicyService, Model] = WeakKeyDictionary()


def model_of(service: PolicyService) -> Model:
    """The service's model, made once."""
    model = _models.get(service)
    if model is None:
        model = _models[service] = Model(service)
    return model


def find_model(
    services: PolicyServices, name: str, version: str | None
) -> tuple[PolicyService, Model]:
    """A policy and its model.

    Raises:
        UnknownPolicyError: No policy of that name is served, or not in that version.
    """
    service = services.require(name)
    model = model_of(service)
    if version not in (None, "", model.version):
        raise UnknownPolicyError(
            f"version {str(version)[:40]!r} of {name!r} is not served here; version "
            f"{model.version} is"
        )
    return service, model
