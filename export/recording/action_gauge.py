"""A small picture of an action: which of a few, or how far towards which bound."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from PIL import ImageDraw

_CHOSEN, _EMPTY, _ZERO = (86, 180, 233), (58, 62, 72), (150, 156, 168)
_MAX_CHOICES, _MAX_COMPONENTS = 12, 8

Rectangle = tuple[float, float, float, float]


def gauge_width(space: gym.Space[Any], height: int) -> int:
    """How wide the picture of an action is, in pixels; 0 where it has none.

    Discrete actions up to 12 and bounded Boxes up to 8 components have one.
    """
    if isinstance(space, gym.spaces.Discrete) and int(space.n) <= _MAX_CHOICES:
        return int(space.n) * (height + 3) - 3
    if _is_small_box(space):
        n = int(np.prod(space.shape or ()))
        return n * (4 * height if n <= 2 else height) + (n - 1) * 4
    return 0


def draw_gauge(
    draw: ImageDraw.ImageDraw, box: Rectangle, space: gym.Space[Any], action: Any
) -> None:
    """Draw it: for Discrete a row of cells, for a Box a bar from the middle of each range."""
    if isinstance(space, gym.spaces.Discrete):
        _draw_cells(draw, box, space, action)
    elif isinstance(space, gym.spaces.Box):
        _draw_bars(draw, box, space, action)


def _is_small_box(space: gym.Space[Any]) -> bool:
    return (
        isinstance(space, gym.spaces.Box)
        and 0 < int(np.prod(space.shape)) <= _MAX_COMPONENTS
        and space.is_bounded()
    )


def _draw_cells(
    draw: ImageDraw.ImageDraw, box: Rectangle, space: gym.spaces.Discrete[Any], action: Any
) -> None:
    left, top, _, bottom = box
    side = bottom - top
    chosen = None if action is None else int(action) - int(space.start)
    for index in range(int(space.n)):
        cell = (left, top, left + side, bottom)
        draw.rounded_rectangle(cell, 3, fill=_CHOSEN if index == chosen else _EMPTY)
        left += side + 3


def _draw_bars(
    draw: ImageDraw.ImageDraw, box: Rectangle, space: gym.spaces.Box, action: Any
) -> None:
    left, top, right, bottom = box
    low, high = space.low.ravel(), space.high.ravel()
    n = len(low)
    width = (right - left - 4 * (n - 1)) / n
    middle = (low + high) / 2
    values = middle if action is None else np.asarray(action, dtype=np.float64).ravel()
    shares = np.clip((values - low) / np.maximum(high - low, 1e-12), 0.0, 1.0)
    for share in shares:
        center, at = left + width / 2, left + width * float(share)
        draw.rounded_rectangle((left, top, left + width, bottom), 3, fill=_EMPTY)
        draw.rectangle((min(center, at), top, max(center, at), bottom), fill=_CHOSEN)
        draw.line((center, top, center, bottom), fill=_ZERO)
        left += width + 4
