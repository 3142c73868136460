"""PolicyGraph: raw observations to the actions that the environment takes, as one torch module.

The only file that knows RLlib's column names.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from export.bounds import action_bounds
from export.connectors import action_bounding, check_module_to_env, observation_twins
from export.distributions import (
    ActionDistribution,
    DeterministicAction,
    action_distribution,
    masked,
)
from export.errors import UnsupportedPolicyError
from export.gym_spaces import leaf_spaces
from export.policy import Checkpoint
from export.twins import ConnectorTwin
from serving.manifest import InputSpec, StateSpec
from serving.spaces import (
    MultiDiscreteSpace,
    Space,
    escape,
    flatten,
    graph_dtype,
    leaves,
    space_from_gymnasium,
    unflatten,
)

OBS = "obs"  # ray.rllib.core.columns.Columns.OBS
STATE_IN = "state_in"
STATE_OUT = "state_out"
ACTIONS = "actions"
ACTION_DIST_INPUTS = "action_dist_inputs"
QF_PREDS = "qf_preds"  # ray.rllib.algorithms.dqn: what compute_q_values answers
CRITIC = "critic"  # ray.rllib.core.models.base.CRITIC
ACTOR = "actor"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ModuleState:
    """How an RLModule's own memory maps to named arrays.

    Attributes:
        names: The leaves that travel, in the order of `spec`'s flattening.
        initial: Each leaf at an episode's start, without the batch axis, by name.
        dropped: Leaves that only the critic needs: constants here.
        spec: torch's pytree description of the nested state.
    """

    names: tuple[str, ...]
    initial: Mapping[str, NDArray[Any]]
    dropped: frozenset[str]
    spec: Any


class PolicyGraph(torch.nn.Module):
    """The whole policy: connectors, network, memory, distribution and action bounding.

    Sampling takes its noise as an input, so that a caller can repeat a sample. docs/bundle.md
    names every input and output.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        deterministic_action: DeterministicAction = "rllib",
    ) -> None:
        """Build the graph.

        Args:
            checkpoint: The policy.
            deterministic_action: What a squashed Gaussian's greedy action is.

        Raises:
            UnsupportedPolicyError: Names the part that cannot be exported.
        """
        super().__init__()
        check_module_to_env(checkpoint.module_to_env)
        self.twins = torch.nn.ModuleList(
            observation_twins(
                checkpoint.env_to_module, checkpoint.action_space, checkpoint.agent_id
            )
        )
        self.module = with_dynamic_batch(checkpoint.rl_module)
        self.observation_space = _plain(checkpoint.observation_space, "observation")
        self.action_space = _plain(checkpoint.action_space, "action")
        names = leaves(self.observation_space, "observation")
        spaces = leaf_spaces(checkpoint.observation_space)
        self._low = {name: _low(space) for name, space in zip(names, spaces, strict=True)}
        self.deterministic_action = deterministic_action
        self.bounding = action_bounding(checkpoint.module_to_env)
        self.bounds = torch.nn.ModuleList(action_bounds(checkpoint.action_space, self.bounding))
        self.is_recurrent = bool(self.module.is_stateful())
        self._module_state = _module_state(self.module)
        self._initial = self._initial_state()
        sample = self._probe()
        self._check_sample(sample)
        self.answers_q_values = _has_q_values(self.module, sample, checkpoint.action_space)
        self.distribution = self._distribution(sample, checkpoint.action_space)
        self.has_value = self._has_value()
        self.inputs = self._inputs()
        self.output_names = self._output_names()
        self.eval().requires_grad_(False)

    # What the graph is, for the manifest.

    @property
    def state(self) -> dict[str, StateSpec]:
        """The memory: name to dtype, shape and initial values."""
        return {
            name: StateSpec(values.dtype.name, values.shape, values)
            for name, values in self._initial.items()
        }

    @property
    def has_memory(self) -> bool:
        """Whether a step depends on the steps before."""
        return bool(self._initial)

    @property
    def reads_reward(self) -> bool:
        """Whether the last reward is an input."""
        return any(twin.reads_reward for twin in self._twins())

    @property
    def mask_size(self) -> int:
        """M in action_mask (B, M); 0 where the policy takes none."""
        if self.answers_q_values:
            return int(self.action_space.n)  # type: ignore[union-attr]
        return self.distribution.mask_size if self.distribution else 0

    @property
    def mask_sizes(self) -> tuple[int, ...]:
        """How `mask_size` splits into the components of a MultiDiscrete."""
        if isinstance(self.action_space, MultiDiscreteSpace):
            return tuple(int(n) for n in np.asarray(self.action_space.nvec).reshape(-1))
        return (self.mask_size,)

    @property
    def noise_size(self) -> int:
        """D in noise (B, D)."""
        return self.distribution.noise_size if self.distribution else 0

    @property
    def distribution_name(self) -> str:
        """The distribution's name in the manifest; `none` where actions are not sampled."""
        return self.distribution.name if self.distribution else "none"

    def named_module_state(self, nested: Any) -> dict[str, Any]:
        """The RLModule's nested memory by name, without what only its critic needs."""
        found = _by_path(nested)
        if found.keys() != set(self._module_state.names):
            raise UnsupportedPolicyError(
                f"the RLModule {type(self.module).__name__} begins with the state "
                f"{', '.join(self._module_state.names)} and answers {', '.join(found)}"
            )
        return {
            name: found[name]
            for name in self._module_state.names
            if name not in self._module_state.dropped
        }

    def _twins(self) -> list[ConnectorTwin]:
        return [twin for twin in self.twins if isinstance(twin, ConnectorTwin)]

    def _initial_state(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {}
        own = {
            name: values
            for name, values in self._module_state.initial.items()
            if name not in self._module_state.dropped
        }
        for part in (own, *(twin.initial_state() for twin in self._twins())):
            for name, values in part.items():
                if name in found:
                    raise UnsupportedPolicyError(
                        f"two parts of the policy keep a memory called {name!r}; rename one"
                    )
                found[name] = np.asarray(values)
        return found

    def _check_sample(self, sample: Mapping[str, Any]) -> None:
        """What RLlib reads of the RLModule's answer has to be there, in both of its modes."""
        kind = type(self.module).__name__
        if self.is_recurrent and STATE_OUT not in sample:
            raise UnsupportedPolicyError(
                f"the RLModule {kind} has a state but answers no {STATE_OUT} in forward_inference"
            )
        if any(twin.reads_action for twin in self._twins()) and (
            "action" not in leaves(self.action_space, "action")
        ):
            raise UnsupportedPolicyError(
                "a connector reads the previous action, and the actions are nested; flatten them"
            )
        if ACTION_DIST_INPUTS not in sample or ACTIONS in sample:
            return
        with torch.no_grad():
            explored = self.module._forward_exploration(self._probe_batch(), t=0)
        if ACTIONS in explored:
            raise UnsupportedPolicyError(
                f"the RLModule {kind} answers action_dist_inputs in forward_inference but chooses "
                "its own actions in forward_exploration; what it samples from cannot be known"
            )

    def _distribution(
        self, sample: Mapping[str, Any], action_space: gym.Space[Any]
    ) -> ActionDistribution | None:
        # Actions that the module chose itself are what RLlib takes, distribution or not.
        if ACTION_DIST_INPUTS not in sample or ACTIONS in sample:
            if ACTIONS not in sample:
                raise UnsupportedPolicyError(
                    f"the RLModule {type(self.module).__name__} answers {', '.join(sample)} in "
                    "forward_inference; expected action_dist_inputs or actions"
                )
            return None
        distribution = action_distribution(self.module, action_space, self.deterministic_action)
        width = sample[ACTION_DIST_INPUTS].shape[-1]
        if width != distribution.n_inputs:
            raise UnsupportedPolicyError(
                f"the RLModule answers {width} distribution inputs, {distribution.name} over "
                f"{action_space} needs {distribution.n_inputs}"
            )
        return distribution

    def _has_value(self) -> bool:
        # The critic of a policy with an own memory for it is dropped together with that memory.
        if self._module_state.dropped or not hasattr(self.module, "compute_values"):
            return False
        if self.distribution is None:
            return False
        try:
            with torch.no_grad():
                value = self.module.compute_values(self._probe_batch())
        except Exception:  # a module without its critic's part, such as an inference-only copy
            return False
        expected = (2, 1) if self.is_recurrent else (2,)
        return isinstance(value, torch.Tensor) and value.shape == expected

    def example(self, n_rows: int) -> tuple[torch.Tensor, ...]:
        """Valid inputs, in the order of `inputs`: what the spaces hold, at an episode's start."""
        return tuple(self._example_of(spec, n_rows) for spec in self.inputs)

    def _example_of(self, spec: InputSpec, n_rows: int) -> torch.Tensor:
        shape = (n_rows, *spec.shape)
        if spec.role == "action_mask":
            return torch.ones(shape, dtype=torch.bool)
        if spec.role != "observation":
            return torch.zeros(shape, dtype=torch_dtype(spec.dtype))
        # Zero need not be an element: an embedding of Discrete(5, start=10) has no row for it.
        row = np.asarray(self._low[spec.name], dtype=spec.dtype).reshape(spec.shape)
        return torch.from_numpy(np.array(np.broadcast_to(row, shape)))

    def _probe_batch(self) -> dict[str, Any]:
        tensors = {spec.name: self._example_of(spec, 2) for spec in self._inputs_before_action()}
        batch, _ = self._module_batch(tensors)
        return batch

    def _probe(self) -> dict[str, Any]:
        try:
            with torch.no_grad():
                output: dict[str, Any] = self.module._forward_inference(self._probe_batch())
        except UnsupportedPolicyError:
            raise
        except Exception as exc:  # a network raises whatever its layers raise
            raise UnsupportedPolicyError(
                f"the RLModule {type(self.module).__name__} fails on a batch of two observations "
                f"after its connectors: {type(exc).__name__}: {exc}"
            ) from exc
        return output

    def _inputs_before_action(self) -> list[InputSpec]:
        found = [
            InputSpec(name, "observation", graph_dtype(leaf), tuple(leaf.shape))
            for name, leaf in leaves(self.observation_space, "observation").items()
        ]
        found += [
            InputSpec(f"state/{name}", "state", values.dtype.name, values.shape)
            for name, values in self._initial.items()
        ]
        if self.reads_reward:
            found.append(InputSpec("reward", "reward", "float32", ()))
        return found

    def _inputs(self) -> tuple[InputSpec, ...]:
        found = self._inputs_before_action()
        if self.mask_size:
            found.append(InputSpec("action_mask", "action_mask", "bool", (self.mask_size,)))
        if self.noise_size:
            found.append(InputSpec("noise", "noise", "float32", (self.noise_size,)))
        return tuple(found)

    def _output_names(self) -> tuple[str, ...]:
        actions = list(leaves(self.action_space, "action"))
        names = list(actions)
        if self.distribution:
            names += ["action_logp", *(f"sampled_{name}" for name in actions)]
            names += ["sampled_action_logp", "action_dist_inputs"]
        names += ["q_values"] * self.answers_q_values + ["value"] * self.has_value
        names += [f"next_state/{name}" for name in self._initial]
        if self.distribution:
            names += [f"sampled_next_state/{name}" for name in self._names_of_action_state()]
        return tuple(names)

    def _names_of_action_state(self) -> list[str]:
        """State that depends on which action was taken."""
        return [
            name for twin in self._twins() if twin.reads_action for name in twin.initial_state()
        ]

    # What the graph computes.

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute everything that can be asked of the policy.

        Args:
            tensors: One for each of `inputs`, in that order, with the batch axis first.

        Returns:
            The tensors of `output_names`, in that order.
        """
        named = {spec.name: tensor for spec, tensor in zip(self.inputs, tensors, strict=True)}
        batch, memory = self._module_batch(named)
        answers, output = self._actions(batch, named)
        if self.has_value:
            answers["value"] = self._without_time(self.module.compute_values(copied(batch)))
        answers.update(self._next_state(output, memory, answers))
        bounded = self._bounded(answers)
        return tuple(bounded[name] for name in self.output_names)

    def _module_batch(self, named: Tensors) -> tuple[dict[str, Any], list[Tensors]]:
        """Run the connectors; the RLModule's batch, and each connector's memory."""
        observation = unflatten(self.observation_space, "observation", named)
        memory: list[Tensors] = []
        for twin in self._twins():
            own = {name: named[f"state/{name}"] for name in twin.initial_state()}
            reward = named.get("reward") if twin.reads_reward else None
            observation, own = twin(observation, own, reward)
            memory.append(own)
        observation = _map(_as_module_input, observation)
        if not self.is_recurrent:
            return {OBS: observation}, memory
        batch = {OBS: _map(lambda leaf: leaf.unsqueeze(1), observation)}
        batch[STATE_IN] = self._module_state_in(named)
        return batch, memory

    def _module_state_in(self, named: Tensors) -> Any:
        n = next(iter(named.values())).shape[0]
        found = []
        for name in self._module_state.names:
            if name in self._module_state.dropped:
                start = torch.as_tensor(self._module_state.initial[name])
                found.append(start.unsqueeze(0).expand(n, *start.shape))
            else:
                found.append(named[f"state/{name}"])
        return torch.utils._pytree.tree_unflatten(found, self._module_state.spec)

    def _actions(self, batch: dict[str, Any], named: Tensors) -> tuple[Tensors, dict[str, Any]]:
        mask = named.get("action_mask")
        if self.answers_q_values:
            output = self.module.compute_q_values(copied(batch))
            q_values = self._without_time(output[QF_PREDS])
            return {"action": masked(q_values, mask).argmax(dim=1), "q_values": q_values}, output
        output = self.module._forward_inference(copied(batch))
        names = list(leaves(self.action_space, "action"))
        if self.distribution is None:
            actions = flatten(self.action_space, "action", output[ACTIONS])
            return {name: self._without_time(actions[name]) for name in names}, output
        inputs = self._without_time(output[ACTION_DIST_INPUTS])
        answers: Tensors = {"action_dist_inputs": inputs}
        for prefix, results in (
            ("", self.distribution.greedy(inputs, mask)),
            ("sampled_", self.distribution.sampled(inputs, named["noise"], mask)),
        ):
            answers[f"{prefix}action_logp"] = sum_logp([logp for _, logp in results])
            for name, (action, _) in zip(names, results, strict=True):
                answers[prefix + name] = action
        return answers, output

    def _next_state(
        self, output: dict[str, Any], memory: list[Tensors], answers: Tensors
    ) -> Tensors:
        found: Tensors = {}
        if self.is_recurrent:
            for name, values in self.named_module_state(output[STATE_OUT]).items():
                found[f"next_state/{name}"] = values.to(torch_dtype(self._initial[name].dtype.name))
        for twin, own in zip(self._twins(), memory, strict=True):
            for prefix in ("", "sampled_"):
                if prefix + "action" not in answers and twin.reads_action:
                    continue
                after = own
                if twin.reads_action:
                    after = twin.after_action(own, answers[prefix + "action"])
                for name, values in after.items():
                    found[f"{prefix}next_state/{name}"] = values
        return found

    def _bounded(self, answers: Tensors) -> Tensors:
        bounded = dict(answers)
        for bounds, name in zip(self.bounds, leaves(self.action_space, "action"), strict=True):
            for key in (name, f"sampled_{name}"):
                if key in answers:
                    bounded[key] = bounds(answers[key])
        return bounded

    def _without_time(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.squeeze(1) if self.is_recurrent else tensor


def _low(space: gym.Space[Any]) -> Any:
    """An element of a leaf space: its low end, for float Boxes the one nearest to zero."""
    if isinstance(space, gym.spaces.Discrete):
        return int(space.start)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return np.asarray(getattr(space, "start", np.zeros_like(space.nvec)))
    if isinstance(space, gym.spaces.Box):
        return np.clip(np.zeros(space.shape, space.dtype), space.low, space.high)
    return np.zeros(space.shape or ())


def sum_logp(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The log-probability of a nested action: its leaves are independent."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(dim=0)


def _plain(space: gym.Space[Any], what: str) -> Space:
    try:
        return space_from_gymnasium(space)
    except TypeError as exc:
        raise UnsupportedPolicyError(f"the {what} space {space} cannot be exported: {exc}") from exc


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of a NumPy dtype's name."""
    return torch.from_numpy(np.zeros(0, dtype=name)).dtype


def _as_module_input(leaf: torch.Tensor) -> torch.Tensor:
    # RLlib `convert_to_torch_tensor`: float64 becomes float32, integers stay.
    return leaf.float() if leaf.dtype == torch.float64 else leaf


def copied(nested: Any) -> Any:
    """The same tensors in dicts of their own: some modules pop keys out of their batch."""
    return _map(lambda leaf: leaf, nested)


def _map(function: Any, nested: Any) -> Any:
    return torch.utils._pytree.tree_map(function, nested)


def _module_state(module: Any) -> ModuleState:
    if not module.is_stateful():
        return ModuleState((), {}, frozenset(), None)
    initial = _map(_as_state, module.get_initial_state())
    _, spec = torch.utils._pytree.tree_flatten(initial)
    named = _by_path(initial)
    # An actor-critic with two encoders: acting needs the actor's memory alone.
    has_both = isinstance(initial, dict) and set(initial) == {ACTOR, CRITIC}
    dropped = frozenset(name for name in named if has_both and name.split("/")[0] == CRITIC)
    return ModuleState(tuple(named), named, dropped, spec)


def _as_state(leaf: Any) -> NDArray[Any]:
    # RLlib's NumpyToTensor narrows float64 states too.
    values = np.asarray(leaf)
    return values.astype(np.float32) if values.dtype == np.float64 else values


def _by_path(nested: Any) -> dict[str, Any]:
    """Leaves by the path to them, whatever order their dicts have."""
    paths, _ = torch.utils._pytree.tree_flatten_with_path(nested)
    return {"/".join(escape(_key(entry)) for entry in path): leaf for path, leaf in paths}


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _has_q_values(module: Any, sample: Mapping[str, Any], action_space: gym.Space[Any]) -> bool:
    """Whether RLlib's own deterministic action is the argmax of Q values that can be had."""
    from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule

    return (
        ACTION_DIST_INPUTS not in sample
        and isinstance(action_space, gym.spaces.Discrete)
        and isinstance(module, DefaultDQNTorchRLModule)
        and type(module)._forward_inference is DefaultDQNTorchRLModule._forward_inference
    )


def with_dynamic_batch(rl_module: Any) -> Any:
    """A copy of the module in which no part fixes the batch size.

    RLlib's free-log-std head repeats its parameter `len(mean)` times, which a tracer writes
    down as a constant; `expand_as` says the same for any batch.
    """
    rl_module = copy.deepcopy(rl_module)
    rl_module.eval()
    for part in rl_module.modules():
        if type(part).__name__ == "TorchFreeLogStdMLPHead":
            part._forward = types.MethodType(_free_log_std_forward, part)
    return rl_module


def _free_log_std_forward(self: Any, inputs: torch.Tensor, **_: Any) -> torch.Tensor:
    mean = self.net(inputs)
    log_std = self.log_std
    if self.clip_log_std:
        limit = self.log_std_clip_param_const
        log_std = torch.clamp(log_std, -limit, limit)
    # The last axis is the action's; before it stand the batch and, with memory, the time.
    return torch.cat([mean, log_std.expand_as(mean)], dim=-1)
