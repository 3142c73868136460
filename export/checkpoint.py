"""Reading an RLlib checkpoint: trust first, then its parts.

Every RLlib checkpoint holds cloudpickle files, and unpickling runs whatever code is in them.
So nothing is unpickled before `_require_trust` has agreed.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import ray

from export.errors import CheckpointError, UnsupportedPolicyError, UntrustedCheckpointError
from training.errors import TrainingError
from training.provenance import verify_checkpoint
from training.run_directory import find_checkpoint

DEFAULT_MODULE_ID = "default_policy"
_MODULES = "learner_group/learner/rl_module"


@dataclass(frozen=True)
class Checkpoint:
    """The parts of an RLlib checkpoint that make its policy.

    Attributes:
        path: The checkpoint's directory.
        algorithm: The algorithm's name, such as `PPO`.
        module_id: Which RLModule of the checkpoint this is.
        rl_module: The RLModule, in evaluation mode.
        env_to_module: RLlib's own pipeline from episodes to the module's batch.
        module_to_env: RLlib's own pipeline from the module's output to the environment's action.
        observation_space: What the environment gives.
        action_space: What the environment takes.
        env_id: The environment's id, where the checkpoint names one.
        env_config: Its keyword arguments.
        facts: Iteration, steps and versions, for the manifest.
    """

    path: Path
    algorithm: str
    module_id: str
    rl_module: Any
    env_to_module: Any
    module_to_env: Any
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    env_id: str | None
    env_config: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)


def load_checkpoint(
    path: Path, *, trust: bool = False, module_id: str = DEFAULT_MODULE_ID
) -> Checkpoint:
    """Read a checkpoint, or a run directory's best one.

    Args:
        path: A run directory of `policyserve train`, or a checkpoint of RLlib.
        trust: Unpickle it whoever wrote it.
        module_id: The RLModule to read.

    Raises:
        CheckpointError: It is missing, half-written, of another Ray version, or no checkpoint.
        UntrustedCheckpointError: It was not written by this user's own `policyserve train`.
        UnsupportedPolicyError: Its algorithm cannot be exported yet.
    """
    try:
        directory = find_checkpoint(path)
    except TrainingError as exc:
        raise CheckpointError(exc.message) from exc
    ray_version = _check_layout(directory)
    _require_trust(directory, trust)
    algorithm_class, config = _read_algorithm(directory)
    _check_algorithm(algorithm_class)
    rl_module = _load_module(directory, module_id)
    env_to_module, module_to_env = _load_pipelines(directory)
    return Checkpoint(
        path=directory,
        algorithm=algorithm_class.__name__,
        module_id=module_id,
        rl_module=rl_module,
        env_to_module=env_to_module,
        module_to_env=module_to_env,
        observation_space=env_to_module.input_observation_space,
        action_space=env_to_module.input_action_space,
        env_id=config.env if isinstance(config.env, str) else None,
        env_config=dict(config.env_config or {}),
        facts={"checkpoint": directory.name, "ray_version": ray_version} | _run_facts(directory),
    )


def _check_layout(directory: Path) -> str:
    marker = directory / "rllib_checkpoint.json"
    if not marker.is_file():
        raise CheckpointError(
            f"{directory} is no RLlib checkpoint: it has no rllib_checkpoint.json; expected a run "
            "directory of `policyserve train` or what `Algorithm.save_to_path` wrote"
        )
    try:
        version = str(json.loads(marker.read_text())["ray_version"])
    except (ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(
            f"{marker} is not readable ({exc}): the checkpoint is damaged or of an RLlib older "
            "than 2.40 (the old API stack), which cannot be exported"
        ) from exc
    if version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise CheckpointError(
            f"{directory} was written by Ray {version}, this is Ray {ray.__version__}, and RLlib "
            f"promises no compatibility between them; export with ray=={version} installed"
        )
    needed = ["class_and_ctor_args.pkl", f"{_MODULES}/metadata.json"]
    missing = [name for name in needed if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} is incomplete: {', '.join(missing)} missing (half-written, or of the old "
            "API stack, which has no RLModule)"
        )
    return version


def _require_trust(directory: Path, trust: bool) -> None:
    if trust:
        return
    provenance = verify_checkpoint(directory)
    if not provenance.is_trusted:
        raise UntrustedCheckpointError(
            f"{directory} is pickled code, and reading it runs whatever it holds; it is not known "
            f"as this user's own training ({provenance.reason}). If you trust where it came from, "
            "add --trust-checkpoint"
        )


def _run_facts(directory: Path) -> dict[str, Any]:
    """How far training was, from the file that `train` puts beside a checkpoint's own."""
    facts = verify_checkpoint(directory).facts
    return {key: facts[key] for key in ("iteration", "env_steps") if key in facts}


def _read_algorithm(directory: Path) -> tuple[type[Any], Any]:
    content = _unpickle(directory / "class_and_ctor_args.pkl")
    try:
        algorithm_class = content["class"]
        arguments, keywords = content["ctor_args_and_kwargs"]
        config = arguments[0] if arguments else keywords["config"]
    except (KeyError, TypeError, IndexError, ValueError) as exc:
        raise CheckpointError(
            f"{directory / 'class_and_ctor_args.pkl'} holds no algorithm and config: {exc!r}"
        ) from exc
    if isinstance(config, dict):
        config = algorithm_class.get_default_config().from_dict(config)
    return algorithm_class, config


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return pickle.load(file)
    except ModuleNotFoundError as exc:
        raise CheckpointError(
            f"{path} needs the Python module {exc.name!r}, which is not importable here; install "
            "it or add its folder to PYTHONPATH"
        ) from exc
    except Exception as exc:  # unpickling damaged bytes can raise anything
        raise CheckpointError(f"{path} is not readable ({exc}): damaged or half-written") from exc


def _check_algorithm(algorithm_class: type[Any]) -> None:
    if algorithm_class.__name__ != "PPO":
        raise UnsupportedPolicyError(
            f"the checkpoint is of the algorithm {algorithm_class.__name__}; this version exports "
            "PPO"
        )


def _load_module(directory: Path, module_id: str) -> Any:
    from ray.rllib.core.rl_module.rl_module import RLModule
    from ray.rllib.core.rl_module.torch import TorchRLModule

    modules = directory / _MODULES
    path = modules / module_id
    if not path.is_dir():
        found = sorted(entry.name for entry in modules.iterdir() if entry.is_dir())
        raise CheckpointError(
            f"{modules} holds no RLModule {module_id!r}; it holds: {', '.join(found) or 'none'}"
        )
    # RLlib logs and hands out a bare RLModule where the class cannot be imported: so look first.
    _unpickle(path / "class_and_ctor_args.pkl")
    try:
        rl_module = RLModule.from_checkpoint(str(path.resolve()))
    except Exception as exc:  # RLlib raises whatever its parts raise
        raise CheckpointError(f"the RLModule in {path} is not readable: {exc}") from exc
    if not isinstance(rl_module, TorchRLModule):
        raise UnsupportedPolicyError(
            f"the module in {path} is a {type(rl_module).__name__}; expected a TorchRLModule (new "
            "API stack, torch)"
        )
    rl_module.eval()
    rl_module.requires_grad_(False)
    return rl_module


def _load_pipelines(directory: Path) -> tuple[Any, Any]:
    from ray.rllib.connectors.env_to_module import EnvToModulePipeline
    from ray.rllib.connectors.module_to_env import ModuleToEnvPipeline

    # Without a local env runner RLlib writes the two pipelines at the top of the checkpoint.
    base = directory / "env_runner"
    base = base if base.is_dir() else directory
    pipelines: list[Any] = []
    for pipeline_class, name in (
        (EnvToModulePipeline, "env_to_module_connector"),
        (ModuleToEnvPipeline, "module_to_env_connector"),
    ):
        path = base / name
        if not path.is_dir():
            raise CheckpointError(f"{directory} is incomplete: {path.name} is missing")
        try:
            pipelines.append(pipeline_class.from_checkpoint(str(path.resolve())))
        except Exception as exc:  # RLlib raises whatever its parts raise
            raise CheckpointError(f"the connectors in {path} are not readable: {exc}") from exc
    return pipelines[0], pipelines[1]
