"""RLlib checkpoints without training and without Ray: real modules and pipelines, drawn weights.

RLlib's own config builds the RLModule and the two connector pipelines, and RLlib's own
`save_to_path` writes them; only the frame around them, which `Algorithm.save_to_path` would write
from a running algorithm, is put together here. `test_matrix.py` compares the layout with that of a
checkpoint from real training.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from ray import cloudpickle
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.env_to_module import (
    FlattenObservations,
    MeanStdFilter,
    PrevActionsPrevRewards,
)
from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.apis import TargetNetworkAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.policy.policy import PolicySpec
from ray.rllib.utils.serialization import gym_space_from_dict, gym_space_to_dict

ENV_ID = "tests.export.checkpoints:Spaces-v0"
_FILTER_ROWS = 50  # observations that a MeanStdFilter has seen


class SpacesEnv(gym.Env[Any, Any]):
    """Any spaces, observations drawn from them, and a reward that depends on the action.

    Args:
        observation_space: As `gym_space_to_dict` describes it, so that the manifest can hold it.
        action_space: Likewise.
        n_steps: How long an episode is.
    """

    def __init__(
        self,
        observation_space: Mapping[str, Any],
        action_space: Mapping[str, Any],
        n_steps: int = 12,
    ) -> None:
        self.observation_space = gym_space_from_dict(dict(observation_space))
        self.action_space = gym_space_from_dict(dict(action_space))
        self._n_steps = n_steps
        self._step = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        if seed is not None:
            self.observation_space.seed(seed)
        self._step = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._step += 1
        total = sum(float(np.sum(leaf)) for leaf in _action_leaves(action))
        is_over = self._step >= self._n_steps
        return self.observation_space.sample(), math.cos(total + self._step), is_over, False, {}


def _action_leaves(action: Any) -> Iterator[Any]:
    if isinstance(action, Mapping):
        for key in sorted(action):
            yield from _action_leaves(action[key])
    elif isinstance(action, tuple):
        for item in action:
            yield from _action_leaves(item)
    else:
        yield action


gym.register("Spaces-v0", entry_point=SpacesEnv, disable_env_checker=True)


@dataclass(frozen=True)
class Case:
    """What a checkpoint is made of.

    Attributes:
        observation_space: Of the environment; of each agent where there are agents.
        action_space: Likewise.
        algorithm: RLlib's name of it, such as `PPO`.
        connectors: Pieces put before RLlib's own: `flatten`, `mean_std`, `frames`, `prev`, or any
            callable that takes `multi_agent` and returns a ConnectorV2.
        model_config: The RLModule's, over a small network of 32 units.
        training: Keywords of `AlgorithmConfig.training`.
        normalize_actions: RLlib's setting.
        clip_actions: RLlib's setting.
        module_class: A custom RLModule instead of the algorithm's.
        agents: Agent id -> module id; empty for a single agent.
        has_env: Whether the checkpoint names an environment that can be made here.
        has_local_runner: False is the layout of `create_local_env_runner=False`, in which the two
            pipelines lie at the top.
        observation_scale: Typical size of what the module sees; its first layer is divided by it,
            as training would, or every unit would be saturated.
        weight_scale: The weights' standard deviation is this over the square root of the fan-in.
        seed: Of the weights and of the filter's observations.
    """

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    algorithm: str = "PPO"
    connectors: tuple[Any, ...] = ()
    model_config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    normalize_actions: bool = True
    clip_actions: bool = False
    module_class: type[Any] | None = None
    agents: Mapping[str, str] = field(default_factory=dict)
    has_env: bool = True
    has_local_runner: bool = True
    observation_scale: float = 1.0
    weight_scale: float = 2.0
    seed: int = 0


def write_checkpoint(directory: Path, case: Case) -> Path:
    """Write a checkpoint as `Algorithm.save_to_path` writes it.

    Args:
        directory: Made if it is missing.
        case: What it holds.

    Returns:
        `directory`, absolute (RLlib reads no relative path).

    Raises:
        Exception: Whatever RLlib raises on a case that it does not support itself.
    """
    directory = directory.resolve()
    algorithm_class = _algorithm_class(case.algorithm)
    config = _config(algorithm_class.get_default_config(), case)
    spaces = _env_spaces(case)
    env_to_module = config.build_env_to_module_connector(spaces=spaces, device=torch.device("cpu"))
    module_to_env = config.build_module_to_env_connector(spaces=spaces)
    module_spec = config.get_multi_rl_module_spec(
        spaces=spaces | _module_spaces(case, env_to_module), inference_only=False
    )
    modules = module_spec.build()
    for module_id in modules.keys():  # noqa: SIM118 (a MultiRLModule is no mapping)
        _draw_weights(modules[module_id], case)
    _fill_filters(env_to_module, modules, case)

    frame = _Frame(directory)
    frame.write("", algorithm_class, ((config.get_state(),), {}), _ALGORITHM_STATE)
    arguments = {"config": config, "module_spec": module_spec}
    frame.write("learner_group", LearnerGroup, ((), arguments), {})
    frame.write(
        "learner_group/learner",
        config.learner_class,
        ((), arguments | {"module": None}),
        _LEARNER_STATE,
    )
    modules.save_to_path(directory / "learner_group/learner/rl_module")
    runners = ""
    if case.has_local_runner:
        runners = "env_runner"
        runner = MultiAgentEnvRunner if case.agents else SingleAgentEnvRunner
        frame.write(runners, runner, ((), {"config": config}), _RUNNER_STATE)
    for name, pipeline in (
        ("env_to_module_connector", env_to_module),
        ("module_to_env_connector", module_to_env),
    ):
        pipeline.save_to_path(directory / runners / name, state=pipeline.get_state())
    return directory


def _algorithm_class(name: str) -> Any:
    # Not through RLlib's registry: TQC is not in it.
    return getattr(importlib.import_module(f"ray.rllib.algorithms.{name.lower()}"), name)


def _config(config: AlgorithmConfig, case: Case) -> AlgorithmConfig:
    if case.has_env and not case.agents:
        kwargs = {
            "observation_space": gym_space_to_dict(case.observation_space),
            "action_space": gym_space_to_dict(case.action_space),
        }
        config.environment(ENV_ID, env_config=kwargs)
    else:
        config.environment("only_the_trainer_had_this")
    config.environment(normalize_actions=case.normalize_actions, clip_actions=case.clip_actions)
    config.env_runners(num_env_runners=0)
    if case.connectors:
        config.env_runners(env_to_module_connector=_connector_function(case))
    config.training(**case.training)
    small = {} if case.module_class else {"fcnet_hiddens": [32, 32]}
    model_config = small | dict(case.model_config)
    config.rl_module(model_config=model_config)
    if case.module_class is not None:
        config.rl_module(
            rl_module_spec=RLModuleSpec(module_class=case.module_class, model_config=model_config)
        )
    if case.agents:
        agents = dict(case.agents)
        config.multi_agent(
            policies={module_id: PolicySpec() for module_id in sorted(set(agents.values()))},
            policy_mapping_fn=lambda agent_id, *_, **__: agents[agent_id],
        )
    return config


def _connector_function(case: Case) -> Any:
    names, multi_agent = case.connectors, bool(case.agents)

    def build(env: Any = None, spaces: Any = None, device: Any = None) -> list[Any]:  # noqa: ARG001
        return [_connector(name, multi_agent) for name in names]

    return build


def _connector(name: Any, multi_agent: bool) -> Any:
    if callable(name):
        return name(multi_agent=multi_agent)
    return {
        "flatten": lambda: FlattenObservations(multi_agent=multi_agent),
        "mean_std": lambda: MeanStdFilter(multi_agent=multi_agent),
        "frames": lambda: FrameStackingEnvToModule(num_frames=3, multi_agent=multi_agent),
        "prev": lambda: PrevActionsPrevRewards(
            n_prev_actions=2, n_prev_rewards=3, multi_agent=multi_agent
        ),
    }[name]()


def _env_spaces(case: Case) -> dict[str, tuple[gym.Space[Any], gym.Space[Any]]]:
    spaces: tuple[gym.Space[Any], gym.Space[Any]] = (case.observation_space, case.action_space)
    if case.agents:
        spaces = (
            gym.spaces.Dict(dict.fromkeys(case.agents, case.observation_space)),
            gym.spaces.Dict(dict.fromkeys(case.agents, case.action_space)),
        )
    return {INPUT_ENV_SPACES: spaces, INPUT_ENV_SINGLE_SPACES: spaces}


def _module_spaces(case: Case, env_to_module: Any) -> dict[str, Any]:
    """What the env runners' `get_spaces` say of the modules."""
    if not case.agents:
        return {DEFAULT_MODULE_ID: (env_to_module.observation_space, case.action_space)}
    return {
        module_id: (space, env_to_module.action_space[module_id])
        for module_id, space in env_to_module.observation_space.spaces.items()
    }


def _draw_weights(rl_module: Any, case: Case) -> None:
    """Weights large enough that actions differ and that means pass the bounds at times.

    RLlib starts its heads near zero, where a wrong export can hide in the tolerance.
    """
    generator = torch.Generator().manual_seed(case.seed)
    n_inputs = math.prod(rl_module.observation_space.shape or (0,))
    for name, parameter in rl_module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            drawn *= case.weight_scale / math.sqrt(parameter[0].numel())
            if parameter.dim() == 2 and parameter.shape[1] == n_inputs:
                drawn /= case.observation_scale
        else:
            # A vector called `weight` belongs to a normalisation and lies around one.
            drawn = 0.3 * drawn + float(name.endswith("weight"))
        parameter.data.copy_(drawn)
    if isinstance(rl_module, TargetNetworkAPI):
        rl_module.make_target_networks()


def _fill_filters(env_to_module: Any, modules: Any, case: Case) -> None:
    """Let the filters see observations through the pipeline, as they would in training."""
    if "mean_std" not in case.connectors:
        return
    case.observation_space.seed(case.seed)
    for _ in range(_FILTER_ROWS):
        rl_module: Any = modules
        episode: Any
        if case.agents:
            episode = MultiAgentEpisode(
                observation_space=env_to_module.input_observation_space,
                action_space=env_to_module.input_action_space,
                agent_to_module_mapping_fn=lambda agent_id, _: case.agents[agent_id],
            )
            # The third agent's observations differ, so its filter differs from the others'.
            rows = {agent: case.observation_space.sample() for agent in case.agents}
            episode.add_env_reset(observations=rows)
        else:
            rl_module = modules[DEFAULT_MODULE_ID]
            episode = SingleAgentEpisode(
                observation_space=case.observation_space, action_space=case.action_space
            )
            episode.add_env_reset(observation=case.observation_space.sample())
        env_to_module(
            rl_module=rl_module, batch={}, episodes=[episode], explore=False, shared_data={}
        )


_ALGORITHM_STATE = {"metrics_logger": {"stats": {}}, "training_iteration": 0}
_RUNNER_STATE = {"num_env_steps_sampled_lifetime": 0}
_LEARNER_STATE = {
    "should_module_be_updated": None,
    "weights_seq_no": 0,
    "optimizer": {},
    "metrics_logger": {"stats": {}},
}


class _Frame:
    """Writes what `Checkpointable.save_to_path` writes for an object that does not exist here."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, component: str, owner: Any, arguments: Any, state: Mapping[str, Any]) -> None:
        path = self._directory / component
        path.mkdir(parents=True, exist_ok=True)
        is_algorithm = component == ""
        state_name = "algorithm_state" if is_algorithm else "state"
        metadata = {
            "class_and_ctor_args_file": "class_and_ctor_args.pkl",
            "state_file": state_name,
            "ray_version": ray.__version__,
            "ray_commit": ray.__commit__,
            "checkpoint_version": "2.1",
        }
        name = Algorithm.METADATA_FILE_NAME if is_algorithm else "metadata.json"
        (path / name).write_text(json.dumps(metadata))
        content = {"class": owner, "ctor_args_and_kwargs": arguments}
        (path / "class_and_ctor_args.pkl").write_bytes(cloudpickle.dumps(content))
        (path / f"{state_name}.pkl").write_bytes(cloudpickle.dumps(dict(state)))
