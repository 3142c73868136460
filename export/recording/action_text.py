"""An action as a few words for a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np


def action_meanings(env: gym.Env[Any, Any]) -> Sequence[str]:
    """The names of a Discrete action's values where the environment has them, as Atari's do."""
    meanings = getattr(env.unwrapped, "get_action_meanings", None)
    try:
        return [] if meanings is None else [str(name) for name in meanings()]
    except Exception:  # a user's environment can raise anything; names are only an ornament
        return []


def action_text(action: Any, meanings: Sequence[str] = ()) -> str:
    """An action of any space in one line.

    Args:
        action: As the environment takes it; None before the first.
        meanings: Names of a Discrete action's values.
    """
    if action is None:
        return "-"
    if isinstance(action, Mapping):
        return "  ".join(f"{key} {action_text(part)}" for key, part in action.items())
    if isinstance(action, tuple):
        return "  ".join(map(action_text, action))
    values = np.asarray(action)
    if values.ndim == 0:
        return _scalar_text(values, meanings)
    number = "d" if values.dtype.kind in "iub" else "+.2f"
    return " ".join(format(value, number) for value in values.ravel().tolist())


def _scalar_text(value: Any, meanings: Sequence[str]) -> str:
    if value.dtype.kind not in "iub":
        return f"{value:+.2f}"
    index = int(value)
    if 0 <= index < len(meanings):
        return f"{index} {meanings[index].lower()}"
    return str(index)
