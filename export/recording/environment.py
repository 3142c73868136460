"""Environments that render pictures without a screen."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import gymnasium as gym

from serving.environments import NamedEnvironment
from serving.errors import PolicyServingError, UsageError

MODE, _ARGUMENT = "rgb_array", "render_mode"
_DEFAULT_FPS, _MAX_FPS = 30.0, 1000.0


def render_without_screen() -> None:
    """Have pygame and MuJoCo draw into memory, and say nothing; before they are imported."""
    os.environ["SDL_VIDEODRIVER"] = "dummy"
    os.environ["SDL_AUDIODRIVER"] = "dummy"
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")


def make_rendering_env(named: NamedEnvironment) -> gym.Env[Any, Any]:
    """An environment whose `render()` gives arrays.

    Args:
        named: Which.

    Raises:
        UsageError: It can't be made, or has no such render mode; the message says which it has.
        EnvironmentFailedError: It raised while it was made.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's about render modes: an error here
        try:
            env = named.make(render_mode=MODE)
        except PolicyServingError:
            # Without the mode it can perhaps be made, and then says which modes it has.
            without = {name: value for name, value in named.kwargs.items() if name != _ARGUMENT}
            with_no_mode = named._replace(kwargs=without).make()
            modes = _modes(with_no_mode)
            with_no_mode.close()
            if MODE in modes:
                raise
            raise _no_mode(named.id, modes) from None
    modes = _modes(env)
    if MODE not in modes:
        env.close()
        raise _no_mode(named.id, modes)
    return env


def frames_per_second(env: gym.Env[Any, Any]) -> float:
    """What the environment's metadata calls `render_fps`; 30 where it says nothing usable."""
    fps = env.metadata.get("render_fps")
    if isinstance(fps, int | float) and 0 < fps <= _MAX_FPS:
        return float(fps)
    return _DEFAULT_FPS


def _modes(env: gym.Env[Any, Any]) -> list[str]:
    return [str(mode) for mode in env.metadata.get("render_modes") or ()]


def _no_mode(env_id: str, modes: list[str]) -> UsageError:
    found = f"only {', '.join(modes)}" if modes else "none at all"
    return UsageError(
        f"{env_id} has no render mode {MODE!r}, which a video is made of; its metadata names "
        f"{found}"
    )
