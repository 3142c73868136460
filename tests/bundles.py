"""Tiny bundles, made in milliseconds: a linear policy as ONNX, and the same policy in NumPy.

The NumPy half is an independent implementation: its answers are the tests' expected values.

`discrete_policy()` (Box -> Discrete, with an action mask) and `box_policy()` (Box -> Box) are
here; `tests/tiny_policies.py` has the other spaces, memory and a policy without a distribution.
All of them have

- `save(target, damage_golden=, damage_model=, facts=) -> target`, the bundle on disk
- `outputs`, the graph's outputs; `noise_size`
- `observations(n, seed)`, a batch as `compute_actions` takes it
- `golden()` and `facts()`, what the bundle says

`LinearPolicy.answers(observations, noise, mask=None)`, `TinyPolicy.answers(inputs)`: what the
graph has to answer, by output name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from serving.bundle import GOLDEN, ONNX, replacing_bundle, write_manifest

OUTPUTS = (
    "action",
    "action_logp",
    "sampled_action",
    "sampled_action_logp",
    "action_dist_inputs",
    "value",
)
LOW = np.array([-2.0, -1.0], dtype=np.float32)
HIGH = np.array([2.0, 3.0], dtype=np.float32)
GOLDEN_SEED = 11
N_GOLDEN = 70
# What every tiny policy states alike, with the keys of an export.
COMMON_FACTS: dict[str, Any] = {
    "created": "2026-01-01T00:00:00+00:00",
    "algorithm": "PPO",
    "module_id": "default_policy",
    "agents": {},
    "environment": {"id": "Tiny-v0", "kwargs": {}},
    "action_bounding": "none",
    "connectors": {"env_to_module": [], "module_to_env": []},
    "state": {},
    "tolerance": 1e-5,
    "deterministic_action": "rllib",
    "golden": {"n_rows": N_GOLDEN, "n_steps": 1},
    "opset": 20,
    "provenance": {"python": "3.11"},
    "warnings": [],
    "parity": {},
}

Arrays = dict[str, NDArray[Any]]


def log_softmax(logits: NDArray[Any]) -> NDArray[Any]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def discrete_answers(logits: NDArray[Any], noise: NDArray[Any], mask: NDArray[Any]) -> Arrays:
    """Actions and log-probabilities of masked logits; the twin of `discrete_head`."""
    logits = np.where(mask, logits, -np.inf)
    logp = log_softmax(logits)
    every = np.arange(len(logits))
    greedy = logits.argmax(axis=1)
    sampled = (logits + noise).argmax(axis=1)
    return {
        "action": greedy,
        "action_logp": logp[every, greedy].astype(np.float32),
        "sampled_action": sampled,
        "sampled_action_logp": logp[every, sampled].astype(np.float32),
    }


def save_bundle(
    target: Path,
    model: onnx.ModelProto,
    golden: Arrays,
    facts: Mapping[str, Any],
    *,
    damage_golden: Callable[[Arrays], None] | None = None,
    damage_model: Callable[[onnx.ModelProto], None] | None = None,
    replace_facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a bundle; the damages change what they get before it is written."""
    if damage_model is not None:
        damage_model(model)
    if damage_golden is not None:
        damage_golden(golden)
    with replacing_bundle(target) as scratch:
        (scratch / ONNX).write_bytes(model.SerializeToString())
        np.savez_compressed(scratch / GOLDEN, allow_pickle=False, **golden)
        write_manifest(scratch, {**facts, **(replace_facts or {})}, [ONNX, GOLDEN])
    return target


@dataclass(frozen=True)
class LinearPolicy:
    """A policy whose distribution inputs and value are linear in the observation.

    `kind` is `discrete` (K logits) or `box` (two actions: means, log standard deviations;
    unsquashed from [-1, 1] to LOW..HIGH and clipped there, as RLlib does).
    """

    kind: str
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    value_weights: NDArray[np.float32]
    value_bias: NDArray[np.float32]
    observation_shape: tuple[int, ...]
    has_value: bool = True

    @property
    def outputs(self) -> tuple[str, ...]:
        return OUTPUTS if self.has_value else OUTPUTS[:-1]

    @property
    def noise_size(self) -> int:
        return self.weights.shape[1] if self.kind == "discrete" else self.weights.shape[1] // 2

    def observations(self, n: int, seed: int = 0) -> NDArray[np.float32]:
        return (
            np.random.default_rng(seed).normal(size=(n, *self.observation_shape)).astype(np.float32)
        )

    def inputs(self, observations: NDArray[Any]) -> NDArray[Any]:
        """The distribution inputs in float64."""
        rows = np.asarray(observations, dtype=np.float64).reshape(len(observations), -1)
        return rows @ self.weights.astype(np.float64) + self.bias

    def answers(
        self, observations: NDArray[Any], noise: NDArray[Any], mask: NDArray[Any] | None = None
    ) -> Arrays:
        """What the graph has to answer, by output name; a discrete policy may be masked."""
        inputs = self.inputs(observations)
        if self.kind == "discrete":
            found = discrete_answers(inputs, noise, np.ones_like(inputs) if mask is None else mask)
        else:
            found = _box(inputs, noise)
        found["action_dist_inputs"] = inputs.astype(np.float32)
        if self.has_value:
            rows = np.asarray(observations, dtype=np.float64).reshape(len(observations), -1)
            value = rows @ self.value_weights.astype(np.float64) + self.value_bias
            found["value"] = value[:, 0].astype(np.float32)
        return found

    def save(
        self,
        target: Path,
        *,
        damage_golden: Callable[[Arrays], None] | None = None,
        damage_model: Callable[[onnx.ModelProto], None] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the bundle.

        Args:
            target: Its directory.
            damage_golden: Changes the golden vectors before they are written.
            damage_model: Changes the ONNX model before it is written.
            facts: Replaces facts of the manifest.
        """
        return save_bundle(
            target,
            onnx_model(self),
            self.golden(),
            self.facts(),
            damage_golden=damage_golden,
            damage_model=damage_model,
            replace_facts=facts,
        )

    def golden(self, n: int = N_GOLDEN) -> Arrays:
        generator = np.random.default_rng(GOLDEN_SEED)
        observations = generator.normal(size=(n, *self.observation_shape)).astype(np.float32)
        noise = generator.normal(size=(n, self.noise_size)).astype(np.float32)
        inputs: Arrays = {"observation": observations, "noise": noise}
        if self.kind == "discrete":
            inputs["action_mask"] = np.ones((n, self.noise_size), dtype=np.bool_)
            inputs["action_mask"][5:15:2, 0] = False
        return {**inputs, **self.answers(observations, noise, inputs.get("action_mask"))}

    def facts(self) -> dict[str, Any]:
        """Everything that `export.convert` states, with the same keys."""
        action_space = (
            {"type": "Discrete", "n": self.weights.shape[1], "start": 0}
            if self.kind == "discrete"
            else {
                "type": "Box",
                "shape": [2],
                "dtype": "float32",
                "low": LOW.tolist(),
                "high": HIGH.tolist(),
            }
        )
        size = self.noise_size
        inputs = [
            {
                "name": "observation",
                "role": "observation",
                "dtype": "float32",
                "shape": [-1, *self.observation_shape],
            },
            {"name": "noise", "role": "noise", "dtype": "float32", "shape": [-1, size]},
        ]
        if self.kind == "discrete":
            mask = {"name": "action_mask", "role": "action_mask", "dtype": "bool"}
            inputs.insert(1, {**mask, "shape": [-1, size]})
        return {
            **COMMON_FACTS,
            "observation_space": {
                "type": "Box",
                "shape": list(self.observation_shape),
                "dtype": "float32",
                "low": None,
                "high": None,
            },
            "action_space": action_space,
            "distribution": "categorical" if self.kind == "discrete" else "diag_gaussian",
            "noise": [
                {"distribution": "gumbel" if self.kind == "discrete" else "normal", "size": size}
            ],
            "action_bounding": "none" if self.kind == "discrete" else "unsquash",
            "inputs": inputs,
            "outputs": list(self.outputs),
        }


def _box(inputs: NDArray[Any], noise: NDArray[Any]) -> Arrays:
    mean, log_std = inputs[:, :2], inputs[:, 2:]
    std = np.exp(log_std)

    def bounded(action: NDArray[Any]) -> NDArray[np.float32]:
        return np.clip(LOW + (action + 1.0) * (HIGH - LOW) / 2.0, LOW, HIGH).astype(np.float32)

    def logp(z: NDArray[Any]) -> NDArray[np.float32]:
        density = np.exp(-0.5 * z.astype(np.float64) ** 2) / (std * np.sqrt(2.0 * np.pi))
        return np.log(density).sum(axis=1).astype(np.float32)

    return {
        "action": bounded(mean),
        "action_logp": logp(np.zeros_like(mean)),
        "sampled_action": bounded(mean + std * noise),
        "sampled_action_logp": logp(noise),
    }


def discrete_policy(
    *,
    observation_shape: tuple[int, ...] = (4,),
    n_actions: int = 3,
    seed: int = 1,
    has_value: bool = True,
) -> LinearPolicy:
    return _linear("discrete", observation_shape, n_actions, seed, has_value)


def box_policy(
    *, observation_shape: tuple[int, ...] = (3,), seed: int = 2, has_value: bool = True
) -> LinearPolicy:
    return _linear("box", observation_shape, 4, seed, has_value)


def _linear(
    kind: str, observation_shape: tuple[int, ...], width: int, seed: int, has_value: bool
) -> LinearPolicy:
    generator = np.random.default_rng(seed)
    n_inputs = int(np.prod(observation_shape))
    scale = 1.0 if kind == "discrete" else 0.4

    def draw(*shape: int) -> NDArray[np.float32]:
        return generator.normal(scale=scale, size=shape).astype(np.float32)

    return LinearPolicy(
        kind=kind,
        weights=draw(n_inputs, width),
        bias=draw(width),
        value_weights=draw(n_inputs, 1),
        value_bias=draw(1),
        observation_shape=observation_shape,
        has_value=has_value,
    )


def onnx_model(policy: LinearPolicy) -> onnx.ModelProto:
    """The policy as an ONNX model with the graph contract of a bundle."""
    nodes = [
        helper.make_node("Flatten", ["observation"], ["rows"], axis=1),
        helper.make_node("Gemm", ["rows", "weights", "bias"], ["action_dist_inputs"]),
    ]
    constants: dict[str, NDArray[Any]] = {"weights": policy.weights, "bias": policy.bias}
    if policy.kind == "discrete":
        more_nodes, more_constants = discrete_head()
        action_shape, action_type = ["B"], TensorProto.INT64
    else:
        more_nodes, more_constants = _box_nodes()
        action_shape, action_type = ["B", 2], TensorProto.FLOAT
    nodes += more_nodes
    constants |= more_constants
    if policy.has_value:
        nodes += [
            helper.make_node("Gemm", ["rows", "value_weights", "value_bias"], ["value_column"]),
            helper.make_node("Squeeze", ["value_column", "last_axis"], ["value"]),
        ]
        constants |= {
            "value_weights": policy.value_weights,
            "value_bias": policy.value_bias,
            "last_axis": np.array([1]),
        }
    types: dict[str, tuple[int, list[Any]]] = {
        "action": (action_type, action_shape),
        "action_logp": (TensorProto.FLOAT, ["B"]),
        "sampled_action": (action_type, action_shape),
        "sampled_action_logp": (TensorProto.FLOAT, ["B"]),
        "action_dist_inputs": (TensorProto.FLOAT, ["B", policy.weights.shape[1]]),
        "value": (TensorProto.FLOAT, ["B"]),
    }
    inputs = {
        "observation": (TensorProto.FLOAT, ["B", *policy.observation_shape]),
        "noise": (TensorProto.FLOAT, ["B", policy.noise_size]),
    }
    if policy.kind == "discrete":
        inputs["action_mask"] = (TensorProto.BOOL, ["B", policy.noise_size])
    return make_model(nodes, inputs, {name: types[name] for name in policy.outputs}, constants)


Types = Mapping[str, tuple[int, list[Any]]]


def make_model(
    nodes: Sequence[onnx.NodeProto], inputs: Types, outputs: Types, constants: Arrays
) -> onnx.ModelProto:
    """A checked model; types are (TensorProto's element type, shape)."""
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


def discrete_head() -> tuple[list[onnx.NodeProto], Arrays]:
    """From `action_dist_inputs`, `action_mask` and `noise` to the actions and their logp."""
    nodes = [
        helper.make_node("Where", ["action_mask", "action_dist_inputs", "floor"], ["masked"]),
        helper.make_node("LogSoftmax", ["masked"], ["logp"], axis=-1),
        helper.make_node("Add", ["masked", "noise"], ["perturbed"]),
    ]
    for prefix, scores in (("", "masked"), ("sampled_", "perturbed")):
        action, column = f"{prefix}action", f"{prefix}column"
        nodes += [
            helper.make_node("ArgMax", [scores], [action], axis=-1, keepdims=0),
            helper.make_node("Unsqueeze", [action, "last"], [column]),
            helper.make_node("GatherElements", ["logp", column], [f"{column}_logp"], axis=1),
            helper.make_node("Squeeze", [f"{column}_logp", "last"], [f"{action}_logp"]),
        ]
    return nodes, {"last": np.array([1]), "floor": np.array(np.finfo(np.float32).min, np.float32)}


def _box_nodes() -> tuple[list[onnx.NodeProto], Arrays]:
    nodes = [
        helper.make_node(
            "Split", ["action_dist_inputs"], ["mean", "log_std"], axis=1, num_outputs=2
        ),
        helper.make_node("Exp", ["log_std"], ["std"]),
        helper.make_node("Mul", ["std", "noise"], ["spread"]),
        helper.make_node("Add", ["mean", "spread"], ["sampled"]),
        helper.make_node("Neg", ["log_std"], ["narrowness"]),
        helper.make_node("Sub", ["narrowness", "half_log_two_pi"], ["peak"]),
        helper.make_node("ReduceSum", ["peak", "axis"], ["action_logp"], keepdims=0),
        helper.make_node("Mul", ["noise", "noise"], ["squared"]),
        helper.make_node("Mul", ["squared", "half"], ["distance"]),
        helper.make_node("Sub", ["peak", "distance"], ["densities"]),
        helper.make_node("ReduceSum", ["densities", "axis"], ["sampled_action_logp"], keepdims=0),
    ]
    for prefix, source in (("", "mean"), ("sampled_", "sampled")):
        nodes += [
            helper.make_node("Add", [source, "one"], [f"{prefix}shifted"]),
            helper.make_node("Mul", [f"{prefix}shifted", "range"], [f"{prefix}scaled"]),
            helper.make_node("Div", [f"{prefix}scaled", "two"], [f"{prefix}halved"]),
            helper.make_node("Add", [f"{prefix}halved", "low"], [f"{prefix}unsquashed"]),
            helper.make_node("Max", [f"{prefix}unsquashed", "low"], [f"{prefix}floored"]),
            helper.make_node("Min", [f"{prefix}floored", "high"], [f"{prefix}action"]),
        ]
    constants = {
        "half_log_two_pi": np.float32(0.5 * np.log(2.0 * np.pi)),
        "half": np.float32(0.5),
        "one": np.float32(1.0),
        "two": np.float32(2.0),
        "low": LOW,
        "high": HIGH,
        "range": HIGH - LOW,
        "axis": np.array([1]),
    }
    return nodes, {name: np.asarray(value) for name, value in constants.items()}
