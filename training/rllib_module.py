"""The networks that a config asks for, as RLlib is told of them."""

from __future__ import annotations

from typing import Any

from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec

from training.algorithm_builders import as_lists
from training.config import TrainingConfig
from training.errors import ConfigError
from training.import_paths import load_object


def rllib_module(config: TrainingConfig) -> dict[str, Any]:
    """The arguments of RLlib's `rl_module()`.

    Raises:
        ConfigError: `model.module` can't be imported, or is no torch RLModule.
    """
    if config.model.module is not None:
        model = {"max_seq_len": config.model.max_seq_len, **config.model.module_config}
        spec = RLModuleSpec(module_class=module_class(config.model.module), model_config=model)
        return {"rl_module_spec": spec, "model_config": model}
    given = config.model.model_dump(exclude={"module", "module_config"})
    model = {name: as_lists(value) for name, value in given.items()}
    return {"model_config": DefaultModelConfig(**model)}


def module_class(path: str) -> type[RLModule]:
    """The RLModule class that an import path names.

    Raises:
        ConfigError: It can't be imported, or is no torch RLModule.
    """
    from ray.rllib.core.rl_module.torch import TorchRLModule

    found = load_object(path, setting="model.module")
    if not (isinstance(found, type) and issubclass(found, TorchRLModule)):
        raise ConfigError(
            f"`model.module` names {path}, which is {found!r}, expected a class derived from "
            "RLlib's TorchRLModule"
        )
    return found
