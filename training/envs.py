"""Environments: ids checked, built once, and their spaces compared with what can be trained."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from training.errors import ConfigError, EnvironmentFailedError


def check_environment(env_id: str, env_config: Mapping[str, Any]) -> None:
    """Make sure that an environment can be built, reset, and trained on.

    Needs no Ray, so that a wrong id or a space that can't be trained is said at once.

    Args:
        env_id: A registered Gymnasium id, or `module:EnvId`.
        env_config: Keyword arguments for `gymnasium.make`.

    Raises:
        ConfigError: The id is unknown, an argument is wrong, or a space is not supported.
        EnvironmentFailedError: The environment raised while it was built or reset.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same warnings come again, and are logged, in training
        env = _make(env_id, env_config)
        try:
            _check_observation_space(env_id, env.observation_space)
            _check_action_space(env_id, env.action_space)
            observation, _ = env.reset()
        except ConfigError:
            raise
        except Exception as exc:
            raise EnvironmentFailedError(
                f"environment {env_id!r} raised in reset(): {type(exc).__name__}: {exc}"
            ) from exc
        finally:
            env.close()
    found = np.shape(observation)
    if found != env.observation_space.shape:
        raise EnvironmentFailedError(
            f"environment {env_id!r} returned an observation of shape {found} from reset(), "
            f"its space says {env.observation_space.shape}"
        )


def _make(env_id: str, env_config: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(env_id, **env_config)
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
        if not env_config:
            raise _failed(env_id, exc) from exc
        keys = ", ".join(env_config)
        raise ConfigError(
            f"environment {env_id!r} does not take these arguments (env_config: {keys}): {exc}"
        ) from exc
    except Exception as exc:
        raise _failed(env_id, exc) from exc


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


def _check_observation_space(env_id: str, space: spaces.Space[Any]) -> None:
    if isinstance(space, spaces.Box) and len(space.shape) == 1 and _is_float(space):
        return
    raise ConfigError(
        f"environment {env_id!r} has observations {_describe(space)}, which can't be trained "
        "on yet: expected a float Box with one axis (wrap the environment, e.g. in "
        "gymnasium.wrappers.FlattenObservation)"
    )


def _check_action_space(env_id: str, space: spaces.Space[Any]) -> None:
    if isinstance(space, spaces.Box) and len(space.shape) == 1 and _is_float(space):
        return
    if isinstance(space, spaces.Discrete):
        if int(space.start) == 0:
            return
        # RLlib's connectors send 0..n-1 whatever `start` is, so every action would be wrong.
        raise ConfigError(
            f"environment {env_id!r} has actions {_describe(space)}, and RLlib ignores the start: "
            "wrap the environment so that its actions count from 0"
        )
    raise ConfigError(
        f"environment {env_id!r} has actions {_describe(space)}, which can't be trained on yet: "
        "expected Discrete, or a float Box with one axis"
    )


def _is_float(space: spaces.Box) -> bool:
    return np.issubdtype(space.dtype, np.floating)


def _describe(space: spaces.Space[Any]) -> str:
    if isinstance(space, spaces.Box):  # a Box's own text lists every bound
        return f"Box(shape={space.shape}, dtype={space.dtype})"
    text = str(space)
    return text if len(text) <= 80 else text[:77] + "..."
