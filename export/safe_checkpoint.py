"""Reading a checkpoint without unpickling code: `--safe`.

RLlib builds the module and the connectors anew, from the user's own config; of the checkpoint only
the states are read (weights and filter statistics), as plain data and checked name by name. No
`class_and_ctor_args.pkl` is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.connector_pipeline_v2 import ConnectorPipelineV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.apis import TargetNetworkAPI
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.torch import TorchRLModule

from export.agents import split_agents
from export.config_source import (
    SpacePair,
    current_directory_importable,
    environment_spaces,
    read_config,
)
from export.connectors import freeze_filters
from export.errors import CheckpointError, UnsupportedPolicyError
from export.layout import MODULES, locate, only_policy, pipelines_directory, without_module
from export.policy import Checkpoint
from export.safe_states import restore_connectors, restore_weights
from training.provenance import SIGNATURE_FILE
from training.rllib_env import registered_wrappers


def load_safe_checkpoint(
    directory: Path, *, config: str | None = None, module_id: str = DEFAULT_MODULE_ID
) -> Checkpoint:
    """Read one policy of a checkpoint without unpickling code; see `load_safe_checkpoints`."""
    return only_policy(load_safe_checkpoints(directory, config=config, module_id=module_id))


def load_safe_checkpoints(
    directory: Path,
    *,
    config: str | None = None,
    module_id: str | None = None,
    agents: Mapping[str, str] | None = None,
) -> list[Checkpoint]:
    """Read a checkpoint's weights and filter statistics into what the user's config builds.

    The config has to be the one that the checkpoint was trained with. Networks of other names or
    sizes are noticed, as are missing or additional filters; settings that leave no trace in the
    states (an activation function, `clip_actions`) are the user's word.

    Args:
        directory: A run directory of `policyserve train`, or a checkpoint of RLlib.
        config: Where the config is: see `read_config`.
        module_id: Only this RLModule; None: every one that an agent acts by.
        agents: Agent to module, for several agents; None: ask the config's own mapping function.

    Returns:
        The policies, as `export.checkpoint.load_checkpoints` returns them.

    Raises:
        CheckpointError: The checkpoint is missing, half-written, of another Ray version, holds
            anything but plain data, or doesn't fit the config.
        UsageError: The config can't be read.
        UnsupportedPolicyError: Its modules or connectors can't be restored from states alone.
    """
    path, ray_version = locate(directory)
    with current_directory_importable():
        rllib_config = read_config(config, path)
        spaces = environment_spaces(rllib_config)
        env_to_module, module_to_env = _build_pipelines(rllib_config, spaces)
        modules = _build_modules(rllib_config, spaces, env_to_module)
        _restore(path, modules, env_to_module, module_to_env)
        base = without_module(
            path,
            module_id,
            rllib_config,
            (env_to_module, module_to_env),
            algorithm=getattr(rllib_config.algo_class, "__name__", "unknown"),
            facts={"ray_version": ray_version} | _run_facts(path),
            wrappers=registered_wrappers(str(rllib_config.env)),
        )
        if rllib_config.is_multi_agent:
            return split_agents(base, modules, rllib_config, module_id, agents)
    if base.module_id not in modules:
        raise CheckpointError(
            f"the config has no RLModule {base.module_id!r}; it has: "
            f"{', '.join(sorted(modules.keys()))}"
        )
    rl_module = modules[base.module_id]
    return [replace(base, rl_module=rl_module, pipeline_module=rl_module)]


def _restore(path: Path, modules: Any, env_to_module: Any, module_to_env: Any) -> None:
    for module_id, rl_module in modules.items():
        restore_weights(rl_module, path / MODULES / module_id)
    base = pipelines_directory(path)
    restore_connectors(env_to_module, base / "env_to_module_connector")
    restore_connectors(module_to_env, base / "module_to_env_connector")
    freeze_filters(env_to_module)


def _run_facts(path: Path) -> dict[str, Any]:
    """How far training was, as far as `train` noted it; told, not proved."""
    try:
        noted = json.loads((path / SIGNATURE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(noted, dict):
        return {}
    return {key: noted[key] for key in ("iteration", "env_steps") if type(noted.get(key)) is int}


def _build_pipelines(
    config: AlgorithmConfig, spaces: Mapping[str, SpacePair]
) -> tuple[ConnectorPipelineV2, ConnectorPipelineV2]:
    env_to_module: Any
    module_to_env: Any
    try:
        env_to_module = config.build_env_to_module_connector(env=None, spaces=spaces)
        module_to_env = config.build_module_to_env_connector(env=None, spaces=spaces)
    except Exception as exc:  # the user's own code can raise anything
        raise UnsupportedPolicyError(
            f"the config's connectors can't be built from the spaces alone "
            f"({type(exc).__name__}: {exc}); let their function take the spaces from `spaces` "
            "where `env` is None"
        ) from exc
    return env_to_module, module_to_env


def _build_modules(
    config: AlgorithmConfig, spaces: Mapping[str, SpacePair], env_to_module: ConnectorPipelineV2
) -> MultiRLModule:
    module_spaces = _module_spaces(config, spaces, env_to_module)
    try:
        spec = config.get_multi_rl_module_spec(
            spaces={**spaces, **module_spaces}, inference_only=False
        )
        modules: Any = spec.build()
        for rl_module in modules.values():
            # As the learners of DQN, SAC and APPO do: the target networks are among the weights.
            if isinstance(rl_module, TargetNetworkAPI):
                rl_module.make_target_networks()
    except Exception as exc:  # RLlib and the user's own modules can raise anything
        raise UnsupportedPolicyError(
            f"the config's RLModules can't be built ({type(exc).__name__}: {exc})"
        ) from exc
    if type(modules) is not MultiRLModule:
        raise UnsupportedPolicyError(
            f"the config's RLModules are joined by {type(modules).__name__}; modules that speak "
            "to each other cannot be exported one by one"
        )
    for module_id, rl_module in modules.items():
        if not isinstance(rl_module, TorchRLModule):
            raise UnsupportedPolicyError(
                f"the config's RLModule {module_id!r} is a {type(rl_module).__name__}; expected a "
                "TorchRLModule"
            )
    return modules


def _module_spaces(
    config: AlgorithmConfig, spaces: Mapping[str, SpacePair], env_to_module: ConnectorPipelineV2
) -> dict[str, SpacePair]:
    # As the env runners' `get_spaces` say.
    space: Any = env_to_module.observation_space
    if not config.is_multi_agent:
        (_, action_space), *_ = spaces.values()
        return {DEFAULT_MODULE_ID: (space, action_space)}
    actions: Any = env_to_module.action_space
    return {module_id: (space[module_id], actions[module_id]) for module_id in space}
