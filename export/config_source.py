"""The config and spaces that a safe reading needs, from code that the user vouches for.

A checkpoint holds its own config only as pickled code. So the user names it, in one of three ways:
the run directory's `config.yaml` (data, found beside the checkpoint), another such YAML, or
`module:attribute`, the user's own Python that built the AlgorithmConfig.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.utils import _gym_env_creator
from ray.tune.registry import ENV_CREATOR, _global_registry

from export.errors import CheckpointError
from serving.errors import UsageError
from training.algorithm import rllib_config
from training.config_files import load_config
from training.errors import TrainingError
from training.import_paths import let_modules_of_this_directory_be_imported
from training.run_directory import RunDirectory

SpacePair = tuple[gym.Space[Any], gym.Space[Any]]

_WAYS = (
    "give --config the YAML that `policyserve train` took, or module:attribute naming an RLlib "
    "AlgorithmConfig or a function that returns one"
)


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """Let `module:attribute` name a file of the current directory, behind what is installed."""
    here = str(Path.cwd())
    is_new = here not in sys.path
    let_modules_of_this_directory_be_imported()
    try:
        yield
    finally:
        if is_new and here in sys.path:
            sys.path.remove(here)


def read_config(source: str | None, checkpoint: Path) -> AlgorithmConfig:
    """Read the config that a checkpoint was trained with, from elsewhere than the checkpoint.

    Args:
        source: A training YAML (or the name of a shipped one), or `module:attribute`; None takes
            the `config.yaml` of the run directory that the checkpoint lies in.
        checkpoint: The checkpoint's directory.

    Returns:
        A copy that may be changed.

    Raises:
        CheckpointError: No source, and the checkpoint lies in no run directory.
        UsageError: The source can't be read, or is no config of the new API stack.
    """
    if source is None:
        config = _config_of_run(checkpoint)
    elif ":" in source and not Path(source).exists():
        config = _imported(source)
    else:
        config = _config_of_yaml(source)
    if not (config.enable_rl_module_and_learner and config.enable_env_runner_and_connector_v2):
        raise UsageError(
            f"the config of {source or checkpoint} is of RLlib's old API stack; expected one with "
            "api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)"
        )
    if config.algo_class is None:
        raise UsageError(
            f"the config of {source or checkpoint} names no algorithm; expected one such as "
            "PPOConfig, not a bare AlgorithmConfig"
        )
    return config.copy(copy_frozen=False)


def environment_spaces(config: Any) -> dict[str, SpacePair]:
    """The spaces that an RLlib env runner would find, without one.

    Args:
        config: Its own spaces count first; else its environment is made here, and closed.

    Returns:
        RLlib's names of the environment's spaces to (observation space, action space); with
        several agents each is a Dict of the agents' spaces.

    Raises:
        UsageError: The environment can't be made, or has no spaces.
    """
    pair = (config.observation_space, config.action_space)
    if pair[0] is None or pair[1] is None:
        pair = _spaces_of_environment(config)
    for space in pair:
        if not isinstance(space, gym.Space):
            raise UsageError(
                f"the config's environment has {type(space).__name__} for a space; expected a "
                "gymnasium space, or give both by config.environment(observation_space=..., "
                "action_space=...)"
            )
    return {INPUT_ENV_SPACES: pair, INPUT_ENV_SINGLE_SPACES: pair}


def _config_of_run(checkpoint: Path) -> AlgorithmConfig:
    run = checkpoint.resolve().parent.parent
    if not (run / "run.json").is_file() or not RunDirectory(run).config_file.is_file():
        raise CheckpointError(
            f"{checkpoint} lies in no run directory of `policyserve train`, and its own config is "
            f"pickled code, which --safe never reads: {_WAYS}"
        )
    path = RunDirectory(run).config_file
    try:
        config = load_config(path)
    except TrainingError as exc:
        raise CheckpointError(f"{exc.message}; {_WAYS}") from exc
    named = [config.env] if ":" in config.env else []
    named += [wrapper for wrapper, _ in config.wrapper_calls()]
    named += [config.model.module] if config.model.module else []
    if named:
        # The file is as little trusted as the checkpoint, and this would import what it names.
        raise CheckpointError(
            f"{path} names {named[0]!r}, which imports a module by name; if that is yours, say so "
            f"with --config {path}"
        )
    return rllib_config(config)


def _config_of_yaml(source: str) -> AlgorithmConfig:
    try:
        return rllib_config(load_config(source))
    except TrainingError as exc:
        raise UsageError(f"--config {source}: {exc.message}; {_WAYS}") from exc


def _imported(source: str) -> AlgorithmConfig:
    module_name, _, attribute = source.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
        if callable(found) and not isinstance(found, AlgorithmConfig):
            found = found()
    except Exception as exc:  # the user's own code can raise anything
        raise UsageError(
            f"--config {source} can't be imported ({type(exc).__name__}: {exc}); {_WAYS}; the "
            "module is looked for in the current directory and on PYTHONPATH"
        ) from exc
    if not isinstance(found, AlgorithmConfig):
        raise UsageError(f"--config {source} is a {type(found).__name__}; {_WAYS}")
    return found


def _spaces_of_environment(config: Any) -> SpacePair:
    if not config.env:
        raise UsageError(
            "the config has neither an environment nor both spaces; set them by "
            "config.environment(observation_space=..., action_space=...)"
        )
    try:
        env = _make_environment(config)
        try:
            if config.is_multi_agent:
                return _agents_spaces(env.unwrapped)
            return env.observation_space, env.action_space
        finally:
            env.close()
    except Exception as exc:  # an environment can raise anything
        raise UsageError(
            f"the spaces of the config's environment {config.env!r} can't be had "
            f"({type(exc).__name__}: {exc}); install what it needs, or set both by "
            "config.environment(observation_space=..., action_space=...)"
        ) from exc


def _make_environment(config: Any) -> Any:
    # As SingleAgentEnvRunner.make_env does: a name registered with Tune, a class, a Gymnasium id.
    context = EnvContext(config.env_config or {}, worker_index=0)
    if isinstance(config.env, str) and _global_registry.contains(ENV_CREATOR, config.env):
        return _global_registry.get(ENV_CREATOR, config.env)(context)
    return _gym_env_creator(context, config.env)


def _agents_spaces(env: Any) -> SpacePair:
    # As SyncVectorMultiAgentEnv finds them.
    spaces = [
        gym.spaces.Dict({agent: get(agent) for agent in env.possible_agents})
        for get in (env.get_observation_space, env.get_action_space)
    ]
    return spaces[0], spaces[1]
