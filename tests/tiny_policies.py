"""Tiny bundles of every further kind, each as ONNX and as an independent NumPy twin.

| | observation | action | also |
|---|---|---|---|
| `dict_policy()` | Dict(mode: Discrete(3), position: Box(2)) | Discrete(3) | mask, value |
| `image_policy()` | Box(2, 2, 3) uint8 | MultiDiscrete([2, 3]) | mask |
| `nested_policy()` | Tuple(Box(2), MultiBinary(3)) | Dict(gear: Discrete(3), steer: Box(1)) | |
| `q_policy()` | Box(3) | Discrete(3) | q_values, no distribution |
| `memory_policy()` | Box(2) | Discrete(2) | state, previous action, reward, mask |

`TinyPolicy.play(inputs)` steps the NumPy twin of a policy with memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from serving.spaces import Space, space_from_json, unflatten
from tests.bundles import (
    COMMON_FACTS,
    GOLDEN_SEED,
    N_GOLDEN,
    Arrays,
    Types,
    discrete_answers,
    discrete_head,
    make_model,
    save_bundle,
)

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
N_STEPS = 6
N_EPISODES = 9
_DISCRETE_OUTPUTS = {
    "action": (INT64, ["B"]),
    "action_logp": (FLOAT, ["B"]),
    "sampled_action": (INT64, ["B"]),
    "sampled_action_logp": (FLOAT, ["B"]),
}
_NUMPY = {
    FLOAT: "float32",
    INT64: "int64",
    BOOL: "bool",
    TensorProto.UINT8: "uint8",
    TensorProto.INT8: "int8",
}
_W = np.array([[0.5, -1.0, 0.25], [1.5, 0.75, -0.5]], np.float32)


def _box(*shape: int, dtype: str = "float32") -> dict[str, Any]:
    return {"type": "Box", "shape": list(shape), "dtype": dtype, "low": None, "high": None}


def _discrete(n: int) -> dict[str, Any]:
    return {"type": "Discrete", "n": n, "start": 0}


def _node(operation: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operation, inputs, [output], **attributes)


@dataclass(frozen=True)
class TinyPolicy:
    """A policy as a graph, as a function in NumPy, and as a manifest states it."""

    observation_space: Mapping[str, Any]
    action_space: Mapping[str, Any]
    distribution: str
    noise: list[dict[str, Any]]
    inputs: Types
    outputs_types: Types
    nodes: list[onnx.NodeProto]
    constants: Arrays
    twin: Callable[[Arrays], Arrays]
    draw: Callable[[np.random.Generator, int], Arrays]
    state: Mapping[str, Any] = field(default_factory=dict)
    algorithm: str = "PPO"

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.outputs_types)

    @property
    def noise_size(self) -> int:
        return sum(segment["size"] for segment in self.noise)

    @property
    def space(self) -> Space:
        return space_from_json(self.observation_space)

    def observations(self, n: int, seed: int = 0) -> Any:
        """A nested batch."""
        return unflatten(self.space, "observation", self.observation_arrays(n, seed))

    def observation_arrays(self, n: int, seed: int = 0) -> Arrays:
        """The same by the graph's input names."""
        return self.draw(np.random.default_rng(seed), n)

    def answers(self, inputs: Arrays) -> Arrays:
        """What the graph has to answer to all of its inputs, by output name."""
        return self.twin(inputs)

    def model(self) -> onnx.ModelProto:
        return make_model(self.nodes, self.inputs, self.outputs_types, self.constants)

    def random_inputs(self, generator: np.random.Generator, n: int) -> Arrays:
        """Inputs of n rows but the state, with a mask on some and noise on all."""
        found = self.draw(generator, n)
        for name, (_, shape) in self.inputs.items():
            if name == "action_mask":
                found[name] = np.ones((n, shape[1]), dtype=np.bool_)
                found[name][1::4, 0] = False
            elif name in ("noise", "reward"):
                found[name] = generator.normal(size=(n, *shape[1:])).astype(np.float32)
        return found

    def initial_state(self, n: int) -> Arrays:
        return {
            f"state/{name}": np.full((n, *spec["shape"]), spec["initial"], np.float32)
            for name, spec in self.state.items()
        }

    def play(self, inputs: Arrays) -> Arrays:
        """Step through episodes: inputs (N, T, ...) with `is_sampled`, answers (N, T, ...)."""
        is_sampled = inputs["is_sampled"][..., None]
        remembered = self.initial_state(len(is_sampled))
        steps = []
        for step in range(is_sampled.shape[1]):
            here = {name: values[:, step] for name, values in inputs.items()}
            found = self.answers({**here, **remembered})
            steps.append(found)
            for name in self.state:
                greedy = found[f"next_state/{name}"]
                sampled = found.get(f"sampled_next_state/{name}", greedy)
                remembered[f"state/{name}"] = np.where(is_sampled[:, step], sampled, greedy)
        return {name: np.stack([each[name] for each in steps], axis=1) for name in steps[0]}

    def golden(self) -> Arrays:
        generator = np.random.default_rng(GOLDEN_SEED)
        if not self.state:
            inputs = self.random_inputs(generator, N_GOLDEN)
            return {**inputs, **self.answers(inputs)}
        flat = self.random_inputs(generator, N_EPISODES * N_STEPS)
        inputs = {
            name: values.reshape(N_EPISODES, N_STEPS, *values.shape[1:])
            for name, values in flat.items()
        }
        inputs["reward"][:, 0] = 0.0
        inputs["is_sampled"] = generator.random((N_EPISODES, N_STEPS)) < 0.5
        return {**inputs, **self.play(inputs)}

    def facts(self) -> dict[str, Any]:
        roles = ("state", "reward", "action_mask", "noise")
        return {
            **COMMON_FACTS,
            "algorithm": self.algorithm,
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "distribution": self.distribution,
            "noise": self.noise,
            "state": self.state,
            "inputs": [
                {
                    "name": name,
                    "role": next((role for role in roles if name.startswith(role)), "observation"),
                    "dtype": _NUMPY[dtype],
                    "shape": [-1, *shape[1:]],
                }
                for name, (dtype, shape) in self.inputs.items()
            ],
            "outputs": list(self.outputs),
            "golden": {
                "n_rows": N_EPISODES if self.state else N_GOLDEN,
                "n_steps": N_STEPS if self.state else 1,
            },
        }

    def save(
        self,
        target: Path,
        *,
        damage_golden: Callable[[Arrays], None] | None = None,
        damage_model: Callable[[onnx.ModelProto], None] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the bundle; see `tests.bundles.save_bundle`."""
        return save_bundle(
            target,
            self.model(),
            self.golden(),
            self.facts(),
            damage_golden=damage_golden,
            damage_model=damage_model,
            replace_facts=facts,
        )


def dict_policy() -> TinyPolicy:
    """logits = position @ W + one row of a table by mode; value = their sum."""
    table = np.array([[0.0, 1.0, -1.0], [2.0, 0.0, 0.5], [-1.0, 0.25, 1.0]], np.float32)

    def twin(inputs: Arrays) -> Arrays:
        logits = inputs["observation/position"].astype(np.float64) @ _W
        logits = logits + table[inputs["observation/mode"]]
        return {
            **discrete_answers(logits, inputs["noise"], inputs["action_mask"]),
            "action_dist_inputs": logits.astype(np.float32),
            "value": logits.sum(axis=1).astype(np.float32),
        }

    head, constants = discrete_head()
    return TinyPolicy(
        observation_space={
            "type": "Dict",
            "spaces": {"mode": _discrete(3), "position": _box(2)},
        },
        action_space=_discrete(3),
        distribution="categorical",
        noise=[{"distribution": "gumbel", "size": 3}],
        inputs={
            "observation/mode": (INT64, ["B"]),
            "observation/position": (FLOAT, ["B", 2]),
            "action_mask": (BOOL, ["B", 3]),
            "noise": (FLOAT, ["B", 3]),
        },
        outputs_types={
            **_DISCRETE_OUTPUTS,
            "action_dist_inputs": (FLOAT, ["B", 3]),
            "value": (FLOAT, ["B"]),
        },
        nodes=[
            _node("MatMul", ["observation/position", "W"], "moved"),
            _node("Gather", ["table", "observation/mode"], "row"),
            _node("Add", ["moved", "row"], "action_dist_inputs"),
            _node("ReduceSum", ["action_dist_inputs", "last"], "value", keepdims=0),
            *head,
        ],
        constants={"W": _W, "table": table, **constants},
        twin=twin,
        draw=lambda generator, n: {
            "observation/mode": generator.integers(0, 3, n),
            "observation/position": generator.normal(size=(n, 2)).astype(np.float32),
        },
    )


def image_policy() -> TinyPolicy:
    """logits = (sum of each channel of the image / 255) @ V, split into 2 and 3."""
    weights = np.random.default_rng(4).normal(size=(3, 5)).astype(np.float32)

    def twin(inputs: Arrays) -> Arrays:
        logits = inputs["observation"].astype(np.float64).sum(axis=(1, 2)) / 255.0 @ weights
        first, second = (
            discrete_answers(
                logits[:, part], inputs["noise"][:, part], inputs["action_mask"][:, part]
            )
            for part in (slice(0, 2), slice(2, 5))
        )
        found: Arrays = {}
        for prefix in ("", "sampled_"):
            found[f"{prefix}action"] = np.stack(
                [first[f"{prefix}action"], second[f"{prefix}action"]], axis=1
            )
            name = f"{prefix}action_logp"
            found[name] = first[name] + second[name]
        return {**found, "action_dist_inputs": logits.astype(np.float32)}

    nodes = [
        _node("Cast", ["observation"], "pixels", to=FLOAT),
        _node("ReduceSum", ["pixels", "image_axes"], "channels", keepdims=0),
        _node("Div", ["channels", "white"], "scaled"),
        _node("MatMul", ["scaled", "V"], "action_dist_inputs"),
    ]
    for index, (start, end) in enumerate((("0", "2"), ("2", "5"))):
        nodes += [
            _node("Slice", [source, start, end, "last"], f"{source}.{index}")
            for source in ("action_dist_inputs", "action_mask", "noise")
        ]
        nodes += [
            _node(
                "Where",
                [f"action_mask.{index}", f"action_dist_inputs.{index}", "floor"],
                f"masked.{index}",
            ),
            _node("LogSoftmax", [f"masked.{index}"], f"logp.{index}", axis=-1),
            _node("Add", [f"masked.{index}", f"noise.{index}"], f"sampled_masked.{index}"),
        ]
        for prefix in ("", "sampled_"):
            best = f"{prefix}best.{index}"
            nodes += [
                _node("ArgMax", [f"{prefix}masked.{index}"], best, axis=-1),
                _node("GatherElements", [f"logp.{index}", best], f"{prefix}taken.{index}", axis=1),
            ]
    for prefix in ("", "sampled_"):
        nodes += [
            _node("Concat", [f"{prefix}best.0", f"{prefix}best.1"], f"{prefix}action", axis=1),
            _node("Add", [f"{prefix}taken.0", f"{prefix}taken.1"], f"{prefix}column"),
            _node("Squeeze", [f"{prefix}column", "last"], f"{prefix}action_logp"),
        ]
    return TinyPolicy(
        observation_space={**_box(2, 2, 3, dtype="uint8"), "low": 0.0, "high": 255.0},
        action_space={
            "type": "MultiDiscrete",
            "nvec": [2, 3],
            "start": [0, 0],
            "dtype": "int64",
        },
        distribution="multi_categorical",
        noise=[{"distribution": "gumbel", "size": 5}],
        inputs={
            "observation": (TensorProto.UINT8, ["B", 2, 2, 3]),
            "action_mask": (BOOL, ["B", 5]),
            "noise": (FLOAT, ["B", 5]),
        },
        outputs_types={
            **_DISCRETE_OUTPUTS,
            "action": (INT64, ["B", 2]),
            "sampled_action": (INT64, ["B", 2]),
            "action_dist_inputs": (FLOAT, ["B", 5]),
        },
        nodes=nodes,
        constants={
            "V": weights,
            "white": np.array(255.0, np.float32),
            "image_axes": np.array([1, 2]),
            "last": np.array([1]),
            "floor": np.array(np.finfo(np.float32).min, np.float32),
            **{str(index): np.array([index]) for index in (0, 2, 5)},
        },
        twin=twin,
        draw=lambda generator, n: {
            "observation": generator.integers(0, 256, (n, 2, 2, 3)).astype(np.uint8)
        },
    )


def nested_policy() -> TinyPolicy:
    """gear from the first Tuple entry @ W, steer from how many bits of the second are set."""

    def twin(inputs: Arrays) -> Arrays:
        logits = inputs["observation/0"].astype(np.float64) @ _W
        count = inputs["observation/1"].sum(axis=1, keepdims=True).astype(np.float64)
        mean, log_std = count * 0.5, count * -0.25
        noise = inputs["noise"]
        gear = discrete_answers(logits, noise[:, :3], np.ones((len(logits), 3)))
        found: Arrays = {}
        for prefix, z in (("", np.zeros_like(mean)), ("sampled_", noise[:, 3:])):
            steer = mean + np.exp(log_std) * z
            density = np.exp(-0.5 * z**2) / (np.exp(log_std) * np.sqrt(2 * np.pi))
            logp = gear[f"{prefix}action_logp"] + np.log(density)[:, 0]
            found |= {
                f"{prefix}action/gear": gear[f"{prefix}action"],
                f"{prefix}action/steer": steer.astype(np.float32),
                f"{prefix}action_logp": logp.astype(np.float32),
            }
        inputs_of_both = np.concatenate([logits, mean, log_std], axis=1)
        return {**found, "action_dist_inputs": inputs_of_both.astype(np.float32)}

    nodes = [
        _node("MatMul", ["observation/0", "W"], "logits"),
        _node("Cast", ["observation/1"], "bits", to=FLOAT),
        _node("ReduceSum", ["bits", "last"], "count", keepdims=1),
        _node("Mul", ["count", "half"], "mean"),
        _node("Mul", ["count", "slope"], "log_std"),
        _node("Concat", ["logits", "mean", "log_std"], "action_dist_inputs", axis=1),
        _node("Slice", ["noise", "0", "3", "last"], "sampled_gumbel"),
        _node("Slice", ["noise", "3", "4", "last"], "sampled_z"),
        _node("Mul", ["sampled_gumbel", "zero"], "gumbel"),
        _node("Mul", ["sampled_z", "zero"], "z"),
        _node("LogSoftmax", ["logits"], "logp", axis=-1),
        _node("Exp", ["log_std"], "std"),
    ]
    for prefix in ("", "sampled_"):
        nodes += [
            _node("Add", ["logits", f"{prefix}gumbel"], f"{prefix}scores"),
            _node("ArgMax", [f"{prefix}scores"], f"{prefix}best", axis=-1),
            _node("Squeeze", [f"{prefix}best", "last"], f"{prefix}action/gear"),
            _node("GatherElements", ["logp", f"{prefix}best"], f"{prefix}gear_logp", axis=1),
            _node("Mul", ["std", f"{prefix}z"], f"{prefix}spread"),
            _node("Add", ["mean", f"{prefix}spread"], f"{prefix}action/steer"),
            _node("Mul", [f"{prefix}z", f"{prefix}z"], f"{prefix}squared"),
            _node("Mul", [f"{prefix}squared", "half"], f"{prefix}distance"),
            _node("Sub", [f"{prefix}gear_logp", f"{prefix}distance"], f"{prefix}nearer"),
            _node("Sub", [f"{prefix}nearer", "log_std"], f"{prefix}narrower"),
            _node("Sub", [f"{prefix}narrower", "half_log_two_pi"], f"{prefix}column"),
            _node("Squeeze", [f"{prefix}column", "last"], f"{prefix}action_logp"),
        ]
    by_mode: dict[str, tuple[int, list[Any]]] = {}
    for prefix in ("", "sampled_"):
        by_mode |= {
            f"{prefix}action/gear": (INT64, ["B"]),
            f"{prefix}action/steer": (FLOAT, ["B", 1]),
            f"{prefix}action_logp": (FLOAT, ["B"]),
        }
    return TinyPolicy(
        observation_space={
            "type": "Tuple",
            "spaces": [_box(2), {"type": "MultiBinary", "shape": [3]}],
        },
        action_space={"type": "Dict", "spaces": {"gear": _discrete(3), "steer": _box(1)}},
        distribution="multi",
        noise=[
            {"distribution": "gumbel", "size": 3},
            {"distribution": "normal", "size": 1},
        ],
        inputs={
            "observation/0": (FLOAT, ["B", 2]),
            "observation/1": (TensorProto.INT8, ["B", 3]),
            "noise": (FLOAT, ["B", 4]),
        },
        outputs_types={**by_mode, "action_dist_inputs": (FLOAT, ["B", 5])},
        nodes=nodes,
        constants={
            "W": _W,
            "last": np.array([1]),
            "half": np.array(0.5, np.float32),
            "slope": np.array(-0.25, np.float32),
            "zero": np.array(0.0, np.float32),
            "half_log_two_pi": np.array(0.5 * np.log(2 * np.pi), np.float32),
            **{str(index): np.array([index]) for index in (0, 3, 4)},
        },
        twin=twin,
        draw=lambda generator, n: {
            "observation/0": generator.normal(size=(n, 2)).astype(np.float32),
            "observation/1": generator.integers(0, 2, (n, 3)).astype(np.int8),
        },
    )


def q_policy() -> TinyPolicy:
    """q_values = observation @ Q; the action is their argmax, and nothing is sampled."""
    weights = np.random.default_rng(6).normal(size=(3, 3)).astype(np.float32)

    def twin(inputs: Arrays) -> Arrays:
        q_values = inputs["observation"].astype(np.float64) @ weights
        return {"action": q_values.argmax(axis=1), "q_values": q_values.astype(np.float32)}

    return TinyPolicy(
        observation_space=_box(3),
        action_space=_discrete(3),
        distribution="none",
        noise=[],
        inputs={"observation": (FLOAT, ["B", 3])},
        outputs_types={"action": (INT64, ["B"]), "q_values": (FLOAT, ["B", 3])},
        nodes=[
            _node("MatMul", ["observation", "Q"], "q_values"),
            _node("ArgMax", ["q_values"], "action", axis=-1, keepdims=0),
        ],
        constants={"Q": weights},
        twin=twin,
        draw=lambda generator, n: {"observation": generator.normal(size=(n, 3)).astype(np.float32)},
        algorithm="DQN",
    )


def memory_policy() -> TinyPolicy:
    """h' = 0.5 h + observation; logits = h' + 0.25 reward + previous action (one-hot) * 0.5.

    `h` starts at 0.25, `previous` at zeros, as no action was taken. The next `previous` depends
    on the mode; the next `h` does not.
    """

    def twin(inputs: Arrays) -> Arrays:
        h = 0.5 * inputs["state/h"].astype(np.float64) + inputs["observation"]
        logits = h + 0.25 * inputs["reward"][:, None] + 0.5 * inputs["state/previous"]
        found = discrete_answers(logits, inputs["noise"], inputs["action_mask"])
        one_hot = np.eye(2, dtype=np.float32)
        return {
            **found,
            "action_dist_inputs": logits.astype(np.float32),
            "next_state/h": h.astype(np.float32),
            "next_state/previous": one_hot[found["action"]],
            "sampled_next_state/previous": one_hot[found["sampled_action"]],
        }

    head, constants = discrete_head()
    return TinyPolicy(
        observation_space=_box(2),
        action_space=_discrete(2),
        distribution="categorical",
        noise=[{"distribution": "gumbel", "size": 2}],
        inputs={
            "observation": (FLOAT, ["B", 2]),
            "state/h": (FLOAT, ["B", 2]),
            "state/previous": (FLOAT, ["B", 2]),
            "reward": (FLOAT, ["B"]),
            "action_mask": (BOOL, ["B", 2]),
            "noise": (FLOAT, ["B", 2]),
        },
        outputs_types={
            **_DISCRETE_OUTPUTS,
            "action_dist_inputs": (FLOAT, ["B", 2]),
            "next_state/h": (FLOAT, ["B", 2]),
            "next_state/previous": (FLOAT, ["B", 2]),
            "sampled_next_state/previous": (FLOAT, ["B", 2]),
        },
        nodes=[
            _node("Mul", ["state/h", "half"], "faded"),
            _node("Add", ["faded", "observation"], "next_state/h"),
            _node("Mul", ["reward", "quarter"], "weighed"),
            _node("Unsqueeze", ["weighed", "last"], "weighed_column"),
            _node("Mul", ["state/previous", "half"], "habit"),
            _node("Add", ["next_state/h", "weighed_column"], "rewarded"),
            _node("Add", ["rewarded", "habit"], "action_dist_inputs"),
            *head,
            _node("OneHot", ["action", "two", "off_on"], "next_state/previous", axis=-1),
            _node(
                "OneHot",
                ["sampled_action", "two", "off_on"],
                "sampled_next_state/previous",
                axis=-1,
            ),
        ],
        constants={
            "half": np.array(0.5, np.float32),
            "quarter": np.array(0.25, np.float32),
            "two": np.array(2),
            "off_on": np.array([0.0, 1.0], np.float32),
            **constants,
        },
        twin=twin,
        draw=lambda generator, n: {"observation": generator.normal(size=(n, 2)).astype(np.float32)},
        state={
            "h": {"dtype": "float32", "shape": [2], "initial": 0.25},
            "previous": {"dtype": "float32", "shape": [2], "initial": 0.0},
        },
    )


TINY_POLICIES: dict[str, Callable[[], TinyPolicy]] = {
    "dict": dict_policy,
    "image": image_policy,
    "nested": nested_policy,
    "q": q_policy,
    "memory": memory_policy,
}
