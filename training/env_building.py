"""An environment from its name, its arguments and the wrappers around it. Imports no Ray."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium

from training.errors import ConfigError
from training.import_paths import let_modules_of_this_directory_be_imported, load_object

WrapperCall = tuple[str, Mapping[str, Any]]
"""A wrapper's import path and its keyword arguments."""


def is_plain(env: str, wrappers: Iterable[Any]) -> bool:
    """Whether `gymnasium.make` alone makes the environment, in any process."""
    return ":" not in env and not tuple(wrappers)


def build_env(
    env: str, env_config: Mapping[str, Any], wrappers: Iterable[WrapperCall] = ()
) -> gymnasium.Env[Any, Any]:
    """Make one environment.

    Args:
        env: A registered id; `module:EnvId`; or `module:factory`, a class or function.
        env_config: Keyword arguments.
        wrappers: The innermost first; each is called with the environment and its own arguments.

    Raises:
        ConfigError: An import path leads nowhere, or what it names makes no environment.
        Exception: Whatever `gymnasium.make`, the factory or a wrapper raises.
    """
    factory = _factory(env)
    made = gymnasium.make(env, **env_config) if factory is None else factory(**env_config)
    if not isinstance(made, gymnasium.Env):
        raise ConfigError(
            f"`env` names {env}, which made a {type(made).__name__}, expected a gymnasium.Env"
        )
    for path, kwargs in wrappers:
        made = load_object(path, setting="wrappers")(made, **kwargs)
        if not isinstance(made, gymnasium.Env):
            raise ConfigError(
                f"`wrappers` names {path}, which made a {type(made).__name__}, expected a "
                "gymnasium.Env"
            )
    return made


def _factory(env: str) -> Any:
    # `module:factory` where the module has a function or class of that name, else None: then it is
    # `module:EnvId`, which Gymnasium makes once the module has registered it.
    module_name, colon, name = env.partition(":")
    if not colon:
        return None
    let_modules_of_this_directory_be_imported()
    found = getattr(importlib.import_module(module_name), name, None)
    return found if callable(found) else None
