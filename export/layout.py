"""Where things lie in an RLlib checkpoint, and what of it is read without unpickling anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from export.errors import CheckpointError, UnsupportedPolicyError
from export.legacy import explain_legacy
from export.policy import Checkpoint
from training.errors import TrainingError
from training.rllib_env import environment_id
from training.run_directory import find_checkpoint

DEFAULT_MODULE_ID = "default_policy"
MODULES = "learner_group/learner/rl_module"


def locate(path: Path) -> tuple[Path, str]:
    """The checkpoint that a path leads to, and the version of Ray that wrote it.

    Args:
        path: A run directory of `policyserve train`, or a checkpoint of RLlib.

    Raises:
        CheckpointError: It is none, of the old API stack, or of another minor version of Ray.
    """
    if reason := explain_legacy(Path(path)):
        raise CheckpointError(reason)
    try:
        directory = find_checkpoint(path)
    except TrainingError as exc:
        raise CheckpointError(exc.message) from exc
    marker = directory / "rllib_checkpoint.json"
    if not marker.is_file():
        raise CheckpointError(
            f"{directory} is no RLlib checkpoint: it has no rllib_checkpoint.json; expected a run "
            "directory of `policyserve train` or what `Algorithm.save_to_path` wrote"
        )
    try:
        version = str(json.loads(marker.read_text(encoding="utf-8"))["ray_version"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(
            f"{marker} is not readable ({exc}): the checkpoint is damaged, half-written, or of an "
            "RLlib older than 2.40 (the old API stack), which cannot be exported"
        ) from exc
    if version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise CheckpointError(
            f"{directory} was written by Ray {version}, this is Ray {ray.__version__}, and RLlib "
            f"promises no compatibility between them; export with ray=={version} installed"
        )
    return directory, version


def pipelines_directory(checkpoint: Path) -> Path:
    """Where the two connector pipelines lie: without a local env runner at the top."""
    runner = checkpoint / "env_runner"
    return runner if runner.is_dir() else checkpoint


def without_module(
    directory: Path,
    module_id: str | None,
    config: Any,
    pipelines: tuple[Any, Any],
    *,
    algorithm: str,
    facts: Mapping[str, Any],
    wrappers: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> Checkpoint:
    """A checkpoint's policy but for its RLModule.

    Args:
        directory: The checkpoint.
        module_id: The RLModule that was asked for, or None.
        config: RLlib's AlgorithmConfig.
        pipelines: Env-to-module and module-to-env.
        algorithm: The algorithm's name.
        facts: For the manifest.
        wrappers: Around the environment, the innermost first.
    """
    env_to_module, module_to_env = pipelines
    return Checkpoint(
        path=directory,
        algorithm=algorithm,
        module_id=module_id or DEFAULT_MODULE_ID,
        rl_module=None,
        env_to_module=env_to_module,
        module_to_env=module_to_env,
        observation_space=env_to_module.input_observation_space,
        action_space=env_to_module.input_action_space,
        env_id=environment_id(config.env) if isinstance(config.env, str) else None,
        env_config=dict(config.env_config or {}),
        wrappers=wrappers,
        facts={"checkpoint": directory.name, **facts},
        env_class=config.env if isinstance(config.env, type) else None,
    )


def only_policy(found: Sequence[Checkpoint]) -> Checkpoint:
    """The one policy that was read.

    Raises:
        UnsupportedPolicyError: There are several: agents of one module with filters of their own.
    """
    if len(found) > 1:
        agents = "; ".join(", ".join(map(str, entry.members)) for entry in found)
        raise UnsupportedPolicyError(
            f"the agents of module {found[0].module_id!r} look through filters of their own "
            f"({agents}), so they are policies of their own: export them all, without --module-id, "
            "or one with --agent AGENT=MODULE"
        )
    return found[0]
