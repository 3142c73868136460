"""An environment from its name, its arguments and the wrappers around it. Imports no Ray."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium

from training.errors import ConfigError, EnvironmentFailedError
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
        ConfigError: An import path leads nowhere, or what it names makes no environment; or a
            wrapper does not take its arguments or this environment.
        EnvironmentFailedError: A wrapper raised something else.
        Exception: Whatever `gymnasium.make` or the factory raises.
    """
    factory = find_factory(env)
    made = gymnasium.make(env, **env_config) if factory is None else factory(**env_config)
    if not isinstance(made, gymnasium.Env):
        raise ConfigError(
            f"`env` names {env}, which made a {type(made).__name__}, expected a gymnasium.Env"
        )
    for path, kwargs in wrappers:
        made = _wrapped(made, path, kwargs)
        if not isinstance(made, gymnasium.Env):
            raise ConfigError(
                f"`wrappers` names {path}, which made a {type(made).__name__}, expected a "
                "gymnasium.Env"
            )
    return made


def _wrapped(env: gymnasium.Env[Any, Any], path: str, kwargs: Mapping[str, Any]) -> Any:
    wrapper = load_object(path, setting="wrappers")
    given = ", ".join(kwargs) or "none"
    try:
        return wrapper(env, **kwargs)
    except (TypeError, ImportError, gymnasium.error.Error) as exc:
        raise ConfigError(
            f"`wrappers` names {path}, which can't be put around the environment (arguments: "
            f"{given}): {exc}"
        ) from exc
    except Exception as exc:  # a user's wrapper can raise anything
        raise EnvironmentFailedError(
            f"`wrappers` names {path}, which raised (arguments: {given}): {type(exc).__name__}: "
            f"{exc}"
        ) from exc


def find_factory(env: str) -> Any:
    """The function or class that `module:factory` names, else None.

    None is a registered id, or `module:EnvId`, which Gymnasium makes once it has imported the
    module.

    Raises:
        ImportError: There is no such module.
    """
    module_name, colon, name = env.partition(":")
    if not colon:
        return None
    let_modules_of_this_directory_be_imported()
    found = getattr(importlib.import_module(module_name), name, None)
    return found if callable(found) else None
