"""Environments by name: an id, `module:EnvId` or `module:factory`, and wrappers around it.

A name is followed as far as its giver is trusted: whoever may name a function and its arguments may
run anything. What the user writes is imported and called; what a bundle or a served policy says is
made only where it is a registered id (docs/decisions/0010-environments.md).
"""

from __future__ import annotations

import difflib
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym

from serving.errors import UsageError
from serving.play_loop import EnvironmentFailedError

OUR_WRAPPERS = ("training.wrappers:SelectComponents",)
"""Wrappers that a bundle may name, as they do nothing but choose among observations."""

Wrapper = tuple[str, dict[str, Any]]


class NamedEnvironment(NamedTuple):
    """An environment by name.

    Attributes:
        id: A registered id, `module:EnvId`, or `module:factory`: a class or function.
        kwargs: What it is made with.
        wrappers: Import path and keyword arguments of each wrapper, the innermost first.
    """

    id: str
    kwargs: dict[str, Any]
    wrappers: tuple[Wrapper, ...] = ()

    def make(self, **more: Any) -> gym.Env[Any, Any]:
        """Make one.

        Args:
            more: Beside its keyword arguments, such as the render mode.

        Raises:
            UsageError: It can't be made, or not with these arguments.
            EnvironmentFailedError: It raised while it was made.
        """
        env = make_env(self.id, **{**self.kwargs, **more})
        for path, kwargs in self.wrappers:
            env = _wrapped(env, path, kwargs)
        return env


def make_env(env_id: str, /, **kwargs: Any) -> gym.Env[Any, Any]:
    """An environment by what the user calls it.

    Args:
        env_id: Such as `CartPole-v1`; `module:EnvId`; or `module:factory`. The module may lie in
            the current directory.
        kwargs: What the environment is made with.

    Raises:
        UsageError: No such environment (with the nearest ids), or not with these arguments.
        EnvironmentFailedError: It raised while it was made.
    """
    try:
        factory = _attribute(env_id) if ":" in env_id else None
        made = factory(**kwargs) if callable(factory) else gym.make(env_id, **kwargs)
    except gym.error.Error as exc:
        raise UsageError(f"cannot make the environment {env_id!r}: {exc}") from exc
    except (ImportError, TypeError) as exc:
        raise UsageError(f"cannot build the environment {env_id!r}: {exc}") from exc
    except Exception as exc:  # a user's environment can raise anything
        raise EnvironmentFailedError(
            f"the environment {env_id!r} failed while it was made: {type(exc).__name__}: {exc}"
        ) from exc
    return _checked(made, env_id)


def described_environment(described: Mapping[str, Any]) -> NamedEnvironment | None:
    """The environment that a bundle or a served policy was trained in.

    Args:
        described: A policy's description (`PolicyClient.describe`) or manifest.

    Returns:
        None if it names none.

    Raises:
        UsageError: To make it, code of the bundle's choice would have to run here; or what it says
            can't be read.
    """
    environment = arguments_of(described, "environment", source="the policy's description")
    env_id = environment.get("id")
    if not isinstance(env_id, str):
        return None
    wrappers = wrappers_of(environment, source="the policy's description")
    kwargs = arguments_of(environment, "kwargs", source="the policy's description")
    strange = [env_id] if ":" in env_id else []
    strange += [path for path, _ in wrappers if path not in OUR_WRAPPERS]
    if strange:
        options = "".join(f" --wrapper '{_option(wrapper)}'" for wrapper in wrappers)
        raise UsageError(
            f"the policy was trained in {env_id} with {strange[0]}, which would run code that the "
            f"policy names: if it is yours, say so with --env {env_id}{options}"
        )
    return NamedEnvironment(env_id, kwargs, wrappers)


def wrappers_of(facts: Mapping[str, Any], *, source: str) -> tuple[Wrapper, ...]:
    """The wrappers that a manifest or a checkpoint's facts name.

    Args:
        facts: With or without an entry `wrappers`.
        source: Where they were read, for the message.

    Raises:
        UsageError: What is there are no wrappers.
    """
    found = facts.get("wrappers") or ()
    try:
        return tuple((str(path), dict(kwargs)) for path, kwargs in found)
    except (TypeError, ValueError) as exc:
        raise UsageError(
            f"{source} says `wrappers` {found!r}, expected a list of pairs "
            '["module:Class", {...}]; say how to play it: --env ID'
        ) from exc


def arguments_of(facts: Mapping[str, Any], name: str, *, source: str) -> dict[str, Any]:
    """What a manifest or a checkpoint's facts hold under a name; {} where there is nothing.

    Args:
        facts: With or without that entry.
        name: Such as `kwargs`.
        source: Where they were read, for the message.

    Raises:
        UsageError: It isn't names and values.
    """
    found = facts.get(name) or {}
    if not isinstance(found, Mapping):
        raise UsageError(
            f"{source} says `{name}` {found!r}, expected names and values; say how to play it: "
            "--env ID"
        )
    return dict(found)


def parse_env_config(text: str | None) -> dict[str, Any]:
    """The keyword arguments of an environment from a command's `--env-config`.

    Raises:
        UsageError: Not a JSON object.
    """
    return {} if text is None else _json_object("--env-config", text)


def parse_wrappers(texts: Sequence[str]) -> tuple[Wrapper, ...]:
    """Wrappers from a command's `--wrapper` options: `module:Class` or `module:Class=JSON`.

    Raises:
        UsageError: One is neither.
    """
    wrappers = []
    for text in texts:
        path, equals, arguments = text.partition("=")
        module, colon, name = path.partition(":")
        if not (module and colon and name.isidentifier()):
            raise UsageError(
                f"--wrapper {text!r}: expected module:Class, or module:Class={{...}} with its "
                "arguments as JSON"
            )
        kwargs = _json_object(f"--wrapper {path}=", arguments) if equals else {}
        wrappers.append((path, kwargs))
    return tuple(wrappers)


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"{option} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise UsageError(f'{option} is {text!r}, expected an object like {{"gravity": 5.0}}')
    return value


def _option(wrapper: Wrapper) -> str:
    path, kwargs = wrapper
    return f"{path}={json.dumps(kwargs)}" if kwargs else path


def _wrapped(env: gym.Env[Any, Any], path: str, kwargs: Mapping[str, Any]) -> gym.Env[Any, Any]:
    try:
        return _checked(_wrapper_class(path)(env, **kwargs), path)
    except UsageError:
        raise
    except Exception as exc:  # a user's wrapper can raise anything
        raise UsageError(f"the wrapper {path} fails: {type(exc).__name__}: {exc}") from exc


def _wrapper_class(path: str) -> Any:
    found = _attribute(path)
    if found is None:
        module, _, name = path.partition(":")
        near = difflib.get_close_matches(name, dir(importlib.import_module(module)), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"the wrapper {path}: the module {module!r} has no {name!r}{hint}")
    return found


def _attribute(path: str) -> Any:
    module, _, name = path.partition(":")
    if path not in OUR_WRAPPERS:  # those a bundle may name, which must not open this directory
        _let_modules_of_this_directory_be_imported()
    return getattr(importlib.import_module(module), name, None)


def _let_modules_of_this_directory_be_imported() -> None:
    # Behind all others: what is installed is never taken from here.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _checked(made: Any, path: str) -> gym.Env[Any, Any]:
    if not isinstance(made, gym.Env):
        raise UsageError(f"{path} made a {type(made).__name__}, expected a gymnasium.Env")
    return made
