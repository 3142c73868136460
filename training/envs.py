"""Environments: ids checked, built once, and their spaces compared with what can be trained."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from training.config import TrainingConfig
from training.env_building import build_env
from training.errors import ConfigError, EnvironmentFailedError, TrainingError
from training.spaces import check_spaces, describe


def check_environment(config: TrainingConfig) -> list[str]:
    """Make sure that an environment can be built, reset, and trained on with these settings.

    Needs no Ray, so that a wrong id or a space that can't be trained is said at once.

    Returns:
        What the user should know about the environment's spaces, one line each.

    Raises:
        ConfigError: The id is unknown, an argument is wrong, or a space is not supported.
        EnvironmentFailedError: The environment raised while it was built or reset, or its first
            observation is not of its space.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same warnings come again, and are logged, in training
        env = _make(config)
        try:
            notes = check_spaces(config, env.observation_space, env.action_space)
            _check_evaluation(config, env)
            observation, _ = env.reset()
        except ConfigError:
            raise
        except Exception as exc:
            raise EnvironmentFailedError(
                f"environment {config.env!r} raised in reset(): {type(exc).__name__}: {exc}"
            ) from exc
        finally:
            env.close()
    if misfit := _misfit(env.observation_space, observation):
        raise EnvironmentFailedError(
            f"environment {config.env!r} returned an observation from reset() that is not of its "
            f"space: {misfit}"
        )
    return notes


def _check_evaluation(config: TrainingConfig, env: gymnasium.Env[Any, Any]) -> None:
    changed = config.evaluation.env_config
    if not (changed and config.evaluation.interval):
        return
    other = config.model_copy(update={"env_config": {**config.env_config, **changed}})
    try:
        evaluated = _make(other)
    except ConfigError as exc:
        raise ConfigError(f"with `evaluation.env_config` {exc.message}") from exc
    try:
        for name in ("observation_space", "action_space"):
            found, expected = getattr(evaluated, name), getattr(env, name)
            if found != expected:
                raise ConfigError(
                    f"with `evaluation.env_config` the environment has the {name} "
                    f"{describe(found)}, and in training {describe(expected)}"
                )
    finally:
        evaluated.close()


def _make(config: TrainingConfig) -> gymnasium.Env[Any, Any]:
    env_id, env_config = config.env, config.env_config
    try:
        return build_env(env_id, env_config, tuple(config.wrapper_calls()))
    except TrainingError:
        raise
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv) as exc:
        raise ConfigError(f"no environment {env_id!r}{_nearest(env_id)}") from exc
    except gymnasium.error.DependencyNotInstalled as exc:
        raise ConfigError(
            f"environment {env_id!r} needs a package that is not installed: {exc}"
        ) from exc
    except ModuleNotFoundError as exc:
        raise ConfigError(f"environment {env_id!r} can't be imported: {exc}") from exc
    except gymnasium.error.Error as exc:
        raise ConfigError(f"environment id {env_id!r} can't be used: {exc}") from exc
    except TypeError as exc:
        raise _wrong_arguments(config, exc) from exc
    except Exception as exc:
        raise _failed(env_id, exc) from exc


def _wrong_arguments(
    config: TrainingConfig, exc: TypeError
) -> ConfigError | EnvironmentFailedError:
    if not config.env_config:
        return _failed(config.env, exc)
    return ConfigError(
        f"environment {config.env!r} does not take these arguments (env_config: "
        f"{', '.join(config.env_config)}): {exc}"
    )


def _failed(env_id: str, exc: Exception) -> EnvironmentFailedError:
    return EnvironmentFailedError(
        f"environment {env_id!r} raised while it was built: {type(exc).__name__}: {exc}"
    )


def _nearest(env_id: str) -> str:
    bare = env_id.rpartition(":")[2]
    known = sorted(gymnasium.registry)
    near = difflib.get_close_matches(bare, known, n=3, cutoff=0.6)
    # `cartpole` and `CartPole-v9` are nearer to CartPole-v1 than difflib thinks.
    name = bare.rpartition("-v")[0] or bare
    same = [candidate for candidate in known if candidate.lower().startswith(name.lower())]
    suggestions = list(dict.fromkeys([*same[::-1], *near]))[:3]
    if suggestions:
        return f"; did you mean {' or '.join(suggestions)}?"
    return (
        "; it is not registered with Gymnasium (for one registered by a package of yours "
        f"give `module:{bare}`)"
    )


def _misfit(space: spaces.Space[Any], value: Any, pointer: str = "") -> str | None:
    # Structure, shapes and indices alone: RLlib casts values to the space's dtype, and many
    # environments' bounds are wrong.
    where = f" at {pointer}" if pointer else ""
    wrong = f"expected {describe(space)}{where}, found {_shorten(value)}"
    children: Iterable[tuple[Any, spaces.Space[Any]]] = ()
    if isinstance(space, spaces.Dict):
        if not isinstance(value, Mapping) or set(value) != set(space.spaces):
            return wrong
        children = space.spaces.items()
    elif isinstance(space, spaces.Tuple):
        if not isinstance(value, tuple) or len(value) != len(space.spaces):
            return wrong
        children = enumerate(space.spaces)
    elif np.shape(value) != space.shape:
        return f"expected shape {space.shape}{where}, found {np.shape(value)}"
    elif isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) and not space.contains(value):
        return wrong
    misfits = (_misfit(child, value[name], f"{pointer}/{name}") for name, child in children)
    return next(filter(None, misfits), None)


def _shorten(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
