"""Reading an RLlib checkpoint: trust first, then its parts.

Every RLlib checkpoint holds cloudpickle files, and unpickling runs whatever code is in them.
So nothing is unpickled before `_require_trust` has agreed.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.agents import split_agents
from export.connectors import freeze_filters
from export.errors import CheckpointError, UnsupportedPolicyError, UntrustedCheckpointError
from export.layout import (
    DEFAULT_MODULE_ID,
    MODULES,
    locate,
    only_policy,
    pipelines_directory,
    without_module,
)
from export.policy import Checkpoint
from serving.environments import Wrapper, wrappers_of
from serving.errors import UsageError
from training.import_paths import let_modules_of_this_directory_be_imported
from training.provenance import SIGNATURE_FILE, verify_checkpoint

# Its policy is a world model of its own, with no RLModule forward pass to export.
_WITHOUT_POLICY_MODULE = ("DreamerV3",)


def load_checkpoint(
    path: Path, *, trust: bool = False, module_id: str = DEFAULT_MODULE_ID
) -> Checkpoint:
    """Read one policy of a checkpoint, or of a run directory's best one.

    Args:
        path: A run directory of `policyserve train`, or a checkpoint of RLlib.
        trust: Unpickle it whoever wrote it.
        module_id: The RLModule to read.

    Raises:
        CheckpointError: It is missing, half-written, of another Ray version, or no checkpoint.
        UntrustedCheckpointError: It was not written by this user's own `policyserve train`.
        UnsupportedPolicyError: Its algorithm has no policy that can be exported.
    """
    return only_policy(load_checkpoints(path, trust=trust, module_id=module_id))


def load_checkpoints(
    path: Path,
    *,
    trust: bool = False,
    module_id: str | None = None,
    agents: Mapping[str, str] | None = None,
) -> list[Checkpoint]:
    """Read every policy of a checkpoint: one, or in a multi-agent checkpoint one per module.

    Agents that share a module but not an observation filter are policies of their own.

    Args:
        path: See `load_checkpoint`.
        trust: See `load_checkpoint`.
        module_id: Only this RLModule.
        agents: Agent to module; None: ask the checkpoint's own mapping function.

    Raises:
        CheckpointError: See `load_checkpoint`; or there is no such module or agent.
    """
    directory, ray_version = locate(path)
    _check_complete(directory)
    _require_trust(directory, trust)
    algorithm_class, config = _read_algorithm(directory)
    if algorithm_class.__name__ in _WITHOUT_POLICY_MODULE:
        raise UnsupportedPolicyError(
            f"the checkpoint is of {algorithm_class.__name__}, whose world model has no RLModule "
            "forward pass from an observation to an action; it cannot be exported"
        )
    env_to_module, module_to_env = _load_pipelines(directory)
    freeze_filters(env_to_module)
    noted = verify_checkpoint(directory).facts
    base = without_module(
        directory,
        module_id,
        config,
        (env_to_module, module_to_env),
        algorithm=algorithm_class.__name__,
        facts={"ray_version": ray_version}
        | {key: noted[key] for key in ("iteration", "env_steps") if key in noted},
        wrappers=_noted_wrappers(noted, directory),
    )
    if config.is_multi_agent:
        return split_agents(base, _load_modules(directory), config, module_id, agents)
    rl_module = _load_module(directory, base.module_id)
    return [replace(base, rl_module=rl_module, pipeline_module=rl_module)]


def _noted_wrappers(noted: Mapping[str, Any], directory: Path) -> list[Wrapper]:
    try:
        return list(wrappers_of(noted, source=str(directory / SIGNATURE_FILE)))
    except UsageError as exc:
        raise CheckpointError(exc.message) from exc


def _check_complete(directory: Path) -> None:
    needed = ["class_and_ctor_args.pkl", f"{MODULES}/metadata.json"]
    missing = [name for name in needed if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} is incomplete: {', '.join(missing)} missing (half-written, or of the old "
            "API stack, which has no RLModule)"
        )


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


def _read_algorithm(directory: Path) -> tuple[type[Any], Any]:
    from ray.rllib.algorithms.algorithm import Algorithm

    content = _unpickle(directory / "class_and_ctor_args.pkl")
    try:
        algorithm_class = content["class"]
        arguments, keywords = content["ctor_args_and_kwargs"]
        config = arguments[0] if arguments else keywords["config"]
    except (KeyError, TypeError, IndexError, ValueError) as exc:
        raise CheckpointError(
            f"{directory / 'class_and_ctor_args.pkl'} holds no algorithm and config: {exc!r}"
        ) from exc
    if not (isinstance(algorithm_class, type) and issubclass(algorithm_class, Algorithm)):
        raise CheckpointError(
            f"{directory / 'class_and_ctor_args.pkl'} is of {algorithm_class!r}, no algorithm of "
            "RLlib; give the checkpoint's own directory"
        )
    if isinstance(config, dict):
        try:
            config = algorithm_class.get_default_config().from_dict(config)
        except Exception as exc:  # a config of other code raises whatever its setters raise
            raise CheckpointError(f"the config in {directory} is not readable: {exc}") from exc
    return algorithm_class, config


def _unpickle(path: Path) -> Any:
    # A class of the user's own may lie in the directory that the command was started in.
    let_modules_of_this_directory_be_imported()
    try:
        with path.open("rb") as file:
            return pickle.load(file)
    except ModuleNotFoundError as exc:
        raise CheckpointError(
            f"{path} needs the Python module {exc.name!r}, which is not importable here; install "
            "it or add its folder to PYTHONPATH"
        ) from exc
    except AttributeError as exc:
        raise CheckpointError(
            f"{path} names a class that its module no longer has ({exc}); bring back the code "
            "that the policy was trained with"
        ) from exc
    except Exception as exc:  # unpickling damaged bytes can raise anything
        raise CheckpointError(f"{path} is not readable ({exc}): damaged or half-written") from exc


def _load_module(directory: Path, module_id: str) -> Any:
    from ray.rllib.core.rl_module.rl_module import RLModule
    from ray.rllib.core.rl_module.torch import TorchRLModule

    modules = directory / MODULES
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
    _check_weights(path, rl_module)
    rl_module.eval()
    rl_module.requires_grad_(False)
    return rl_module


def _check_weights(path: Path, rl_module: Any) -> None:
    """RLlib restores with `strict=False`: a weight that is not there would stay random."""
    for name, values in rl_module.state_dict().items():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise CheckpointError(
                f"the weight {name} of the RLModule in {path} holds NaN or infinity: the training "
                "diverged; export an earlier checkpoint"
            )
    state_path = path / "module_state.pkl"
    if not state_path.is_file():
        return  # msgpack; RLlib has read it or failed
    saved, own = set(_unpickle(state_path)), set(rl_module.state_dict())
    if own - saved:
        raise CheckpointError(
            f"{state_path} lacks {len(own - saved)} weights of {type(rl_module).__name__}, such as "
            f"{min(own - saved)}: the class has changed since the checkpoint was written, or the "
            "file is of another module"
        )


def _load_modules(directory: Path) -> Any:
    """Every RLModule of a multi-agent checkpoint, as RLlib's MultiRLModule."""
    from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule

    modules = directory / MODULES
    _unpickle(modules / "class_and_ctor_args.pkl")
    found = {
        entry.name: _load_module(directory, entry.name)
        for entry in sorted(modules.iterdir())
        if (entry / "class_and_ctor_args.pkl").is_file()
    }
    try:
        multi = MultiRLModule.from_checkpoint(str(modules.resolve()))
    except Exception as exc:  # RLlib raises whatever its parts raise
        raise CheckpointError(f"the RLModules in {modules} are not readable: {exc}") from exc
    # RLlib leaves a module whose directory is missing at its random weights.
    if missing := sorted(set(multi.keys()) - set(found)):
        raise CheckpointError(
            f"{modules} is incomplete: the RLModules {', '.join(missing)} are missing"
        )
    for module_id, rl_module in found.items():
        multi.remove_module(module_id, raise_err_if_not_found=False)
        multi.add_module(module_id, rl_module)
    if type(multi) is not MultiRLModule:
        raise UnsupportedPolicyError(
            f"the checkpoint's RLModules are joined by {type(multi).__name__}; modules that speak "
            "to each other cannot be exported one by one"
        )
    return multi


def _load_pipelines(directory: Path) -> tuple[Any, Any]:
    from ray.rllib.connectors.env_to_module import EnvToModulePipeline
    from ray.rllib.connectors.module_to_env import ModuleToEnvPipeline

    base = pipelines_directory(directory)
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
        _check_connector_states(path, pipelines[-1])
    return pipelines[0], pipelines[1]


def _check_connector_states(path: Path, pipeline: Any) -> None:
    """RLlib leaves a connector whose directory is missing in its first state."""
    for piece in pipeline.connectors:
        directory = path / type(piece).__name__
        if piece.get_state() and not any(directory.glob("state.*")):
            raise CheckpointError(
                f"{path} is incomplete: the state of {type(piece).__name__} is missing, without "
                "which it would treat observations as if it had seen none"
            )
