"""Policies of any space in NumPy: a sum of everything a row holds, in place of a network.

`Summing` is a graph for `GraphPolicy`, so codec, batcher, service and client can be tested for
any space without ONNX. What it answers to a row follows from `total_of`, which the tests work out
for themselves from the same observation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from serving.config import PolicySource, ServingConfig
from serving.engines.graph import GraphPolicy
from serving.manifest import PolicyManifest
from serving.manifest_parser import parse_manifest
from serving.metrics import ServerMetrics
from serving.service import PolicyService, PolicyServices
from serving.spaces import graph_dtype, leaves, space_from_gymnasium

IMAGE = spaces.Box(0, 255, (4, 4, 3), np.uint8)
# A name, an observation space; every kind of leaf alone and nested, with awkward keys.
OBSERVATION_SPACES: dict[str, gym.Space[Any]] = {
    "scalar": spaces.Box(-1, 1, (), np.float32),
    "vector": spaces.Box(-1, 1, (3,), np.float32),
    "doubles": spaces.Box(-1, 1, (2, 2), np.float64),
    "image": IMAGE,
    "int32": spaces.Box(-5, 5, (2,), np.int32),
    "discrete": spaces.Discrete(5, start=-2),
    "multi-discrete": spaces.MultiDiscrete([3, 4], start=[1, -1]),
    "grid": spaces.MultiDiscrete([[3, 4], [2, 5]]),
    "multi-binary": spaces.MultiBinary([2, 3]),
    "dict": spaces.Dict(
        {
            "z/last": spaces.Discrete(3),
            "a.b[0] `c` ~": spaces.Box(-1, 1, (2,), np.float32),
            "class": spaces.Dict({"self": spaces.MultiBinary(2), "0": spaces.Discrete(2)}),
        }
    ),
    "tuple": spaces.Tuple(
        (spaces.Discrete(4), spaces.Dict({"image": IMAGE}), spaces.Box(-1, 1, (1,), np.float32))
    ),
    "unnameable": spaces.Dict({'quo"te': spaces.Discrete(3), "back\\slash": spaces.Discrete(4)}),
}
ACTION_SPACES: dict[str, gym.Space[Any]] = {
    "discrete": spaces.Discrete(3, start=5),
    "box": spaces.Box(-1e6, 1e6, (2,), np.float32),
    "multi-discrete": spaces.MultiDiscrete([3, 4]),
    "multi-binary": spaces.MultiBinary(3),
    "dict": spaces.Dict({"turn": spaces.Discrete(3), "a/b": spaces.Box(-1e6, 1e6, (2,))}),
    "tuple": spaces.Tuple((spaces.Discrete(2), spaces.Dict({"grip": spaces.MultiBinary(2)}))),
}
GOES_ON = {"total": {"dtype": "float32", "shape": [], "initial": 0.5}}
MEMORY = {**GOES_ON, "frames": {"dtype": "float32", "shape": [2, 3], "initial": -1.0}}


def manifest_of(
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    *,
    state: Mapping[str, Any] | None = None,
    has_reward: bool = False,
    has_mask: bool = False,
    is_stochastic: bool = True,
) -> PolicyManifest:
    """The manifest of a summing policy."""
    observation = space_from_gymnasium(observation_space)
    action = space_from_gymnasium(action_space)
    state = state or {}
    actions = list(leaves(action, "action"))
    inputs = [
        (name, "observation", graph_dtype(leaf), leaf.shape)
        for name, leaf in leaves(observation, "observation").items()
    ]
    inputs += [(f"state/{k}", "state", v["dtype"], v["shape"]) for k, v in state.items()]
    inputs += [("reward", "reward", "float32", ())] * has_reward
    if has_mask:
        inputs.append(("action_mask", "action_mask", "bool", (n_scores(action_space),)))
    noise = _noise(action_space) if is_stochastic else []
    if noise:
        inputs.append(("noise", "noise", "float32", (sum(each["size"] for each in noise),)))
    outputs = [*actions, "q_values", *(f"next_state/{name}" for name in state)]
    if noise:
        outputs += [f"sampled_{name}" for name in actions]
        outputs += ["action_logp", "sampled_action_logp"]
    raw = {
        "policy_id": "0123456789ab",
        "algorithm": "PPO",
        "module_id": "default_policy",
        "agents": {},
        "environment": None,
        "observation_space": observation.to_json(),
        "action_space": action.to_json(),
        "distribution": "multi" if noise else "none",
        "noise": noise,
        "inputs": [
            {"name": name, "role": role, "dtype": dtype, "shape": [-1, *shape]}
            for name, role, dtype, shape in inputs
        ],
        "state": state,
        "outputs": outputs,
        "tolerance": 1e-5,
        "golden": {"n_rows": 1, "n_steps": 1},
        "files": {},
        "deterministic_action": "rllib",
    }
    return parse_manifest(raw, Path("manifest.json"))


def _noise(space: gym.Space[Any]) -> list[dict[str, Any]]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        children = (
            [space[key] for key in sorted(space)] if isinstance(space, spaces.Dict) else space
        )
        return [segment for child in children for segment in _noise(child)]
    gumbel = isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    return [{"distribution": "gumbel" if gumbel else "normal", "size": n_scores(space)}]


def n_scores(space: gym.Space[Any]) -> int:
    """M of an action mask; for the others one number per component."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    assert space.shape is not None
    return int(np.prod(space.shape))


def flat(observation: Any) -> np.ndarray[Any, Any]:
    """All numbers of an observation (or a batch of rows), Dict keys sorted, as float64."""
    if isinstance(observation, dict):
        return np.concatenate([flat(observation[key]) for key in sorted(observation)])
    if isinstance(observation, tuple):
        return np.concatenate([flat(each) for each in observation])
    return np.asarray(observation, dtype=np.float64).ravel()


def total_of(observation: Any) -> float:
    """A number that every number of an observation has its own share in."""
    numbers = flat(observation)
    return float(numbers @ np.arange(1, len(numbers) + 1))


def sample(space: gym.Space[Any], n: int, seed: int = 0) -> list[Any]:
    """n observations whose numbers are quarters, so that sums of them are exact."""
    space.seed(seed)
    return [_rounded(space.sample()) for _ in range(n)]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    if np.asarray(value).dtype.kind == "f":
        return (np.round(value * 4) / 4).astype(value.dtype)
    return value


def as_json(value: Any) -> Any:
    """An observation, state or action as JSON writes it."""
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [as_json(each) for each in value]
    return np.asarray(value).tolist()


def action_of(space: gym.Space[Any], total: float) -> Any:
    """The action that a total stands for, in the environment's form."""
    if isinstance(space, spaces.Dict):
        return {key: action_of(child, total) for key, child in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(action_of(child, total) for child in space)
    step = int(np.floor(total)) % 27720  # whose remainders by 2 ... 12 are the same
    if isinstance(space, spaces.Discrete):
        return int(space.start) + step % int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return (step + np.arange(len(space.nvec))) % space.nvec
    assert space.shape is not None
    places = np.arange(int(np.prod(space.shape))).reshape(space.shape)
    if isinstance(space, spaces.MultiBinary):
        return ((step + places) % 2).astype(np.int8)
    return (total + places).astype(np.float32)


class Summing:
    """Answers `action_of` the row's total, plus 1 where sampled; keeps what it was given.

    State `total` adds up an episode's totals, and the reward counts ten times; `frames` moves up
    and takes the row's total. A mask forbids: the first allowed action from the wanted one on.
    """

    name = "numpy"
    device = "cpu"

    def __init__(self, space: gym.Space[Any], manifest: PolicyManifest) -> None:
        self._space = space
        self._manifest = manifest
        self.seen: list[dict[str, Any]] = []

    def run(self, names: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See `serving.engines.graph.Graph`."""
        self.seen.append(dict(inputs))
        for spec in self._manifest.inputs:  # what the real engines check
            found = inputs[spec.name]
            assert (found.dtype, found.shape[1:]) == (np.dtype(spec.dtype), spec.shape), spec
        observations = [
            inputs[spec.name] for spec in self._manifest.inputs if spec.role == "observation"
        ]
        n = len(observations[0])
        rows = np.concatenate([each.reshape(n, -1) for each in observations], axis=1)
        # No number is too large for what follows.
        totals = np.clip(rows.astype(np.float64), -1e30, 1e30) @ np.arange(1, rows.shape[1] + 1)
        if "reward" in inputs:
            totals += 10.0 * inputs["reward"]
        totals = np.clip(totals, -1e30, 1e30)
        found = {}
        if "state/frames" in inputs:
            frames = np.roll(inputs["state/frames"], -1, axis=1)
            frames[:, -1] = totals[:, None]
            found["next_state/frames"] = frames
        if "state/total" in inputs:
            totals = np.clip(totals + inputs["state/total"], -1e30, 1e30)
            found["next_state/total"] = totals.astype(np.float32)
        found["q_values"] = totals[:, None].astype(np.float32)
        masks = inputs.get("action_mask")
        for prefix, shift in (("", 0), ("sampled_", 1)):
            found[f"{prefix}action_logp"] = (-totals - shift).astype(np.float32)
            actions = [action_of(self._space, total + shift) for total in totals]
            if masks is not None:
                actions = [
                    self._allowed(action, mask) for action, mask in zip(actions, masks, strict=True)
                ]
            found |= _columns(f"{prefix}action", actions, self._space)
        return {name: found[name] for name in names}

    def _allowed(self, action: Any, mask: Any) -> Any:
        if isinstance(self._space, spaces.Discrete):
            start = self._space.start
            return start + _first_allowed(action - start, mask)
        parts = np.split(mask, np.cumsum(self._space.nvec)[:-1])
        return np.array(
            [_first_allowed(wanted, part) for wanted, part in zip(action, parts, strict=True)]
        )


def _first_allowed(wanted: int, mask: Any) -> int:
    n = len(mask)
    return next(k % n for k in range(wanted, wanted + n) if mask[k % n])


def _columns(name: str, actions: list[Any], space: gym.Space[Any]) -> dict[str, Any]:
    if isinstance(space, spaces.Dict):
        found = {}
        for key, child in space.items():
            escaped = key.replace("~", "~0").replace("/", "~1")
            found |= _columns(f"{name}/{escaped}", [each[key] for each in actions], child)
        return found
    if isinstance(space, spaces.Tuple):
        found = {}
        for index, child in enumerate(space):
            found |= _columns(f"{name}/{index}", [each[index] for each in actions], child)
        return found
    return {name: np.array(actions, dtype=space.dtype)}


def summing_policy(
    observation_space: gym.Space[Any], action_space: gym.Space[Any], **kwargs: Any
) -> GraphPolicy:
    """A summing policy; `kwargs` as of `manifest_of`."""
    manifest = manifest_of(observation_space, action_space, **kwargs)
    return GraphPolicy(manifest, Summing(action_space, manifest))


def services_of(policies: Mapping[str, GraphPolicy], **settings: Any) -> PolicyServices:
    """Policies ready to answer."""
    metrics = ServerMetrics()
    # What is loaded is timed up to its largest batch, and these answer large ones row by row.
    config = ServingConfig(**{"max_batch_size": 16, **settings})
    services = [
        PolicyService(PolicySource(name=name, path=Path(name)), policy, config, metrics)
        for name, policy in policies.items()
    ]
    return PolicyServices(services, metrics)
