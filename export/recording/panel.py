"""One policy's picture: its title above the environment's frame, the figures below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from export.recording.action_gauge import draw_gauge, gauge_width
from export.recording.action_text import action_text

BACKGROUND = (22, 24, 29)
_TEXT, _LABEL = (240, 241, 243), (150, 156, 168)
# Okabe and Ito's vermilion, blue and grey: told apart with any colour vision, as are the words.
_ENDINGS = {
    "terminated": (213, 94, 0),
    "truncated": (0, 114, 178),
    "cut": (96, 100, 110),
}
_MIN_FONT, _MAX_FONT = 13, 30
_LINES_PER_PANEL = 26  # of a font's size in a panel's width


@dataclass(frozen=True)
class Moment:
    """What is said about an episode at one frame.

    Attributes:
        step: Steps taken so far.
        action: Of the newest step, None before the first.
        episode_return: Sum of rewards so far.
        episode: Such as `episode 2/3`; empty for a single one.
        ending: terminated, truncated or cut (by --max-steps); empty while it goes on.
    """

    step: int
    action: Any
    episode_return: float
    episode: str = ""
    ending: str = ""


class Panel:
    """Draws moments of one policy; all pictures have the same size.

    Args:
        title: Above the frame.
        frame_size: (width, height) of the frame in the picture, pixels.
        action_space: For the gauge beside the action.
        meanings: Names of a Discrete action's values.
    """

    def __init__(
        self,
        title: str,
        frame_size: tuple[int, int],
        action_space: gym.Space[Any],
        meanings: Sequence[str] = (),
    ) -> None:
        self._title = title
        self._width, self._frame_height = frame_size
        self._space = action_space
        self._meanings = meanings
        size = min(_MAX_FONT, max(_MIN_FONT, round(self._width / _LINES_PER_PANEL)))
        self._font = _font(size)
        self._pad = round(size * 0.6)
        self._line = round(size * 1.5)
        self._header = self._line + self._pad
        self._footer = 2 * self._line + 2 * self._pad

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of a picture, pixels."""
        return self._width, self._header + self._frame_height + self._footer

    def picture(self, frame: NDArray[np.uint8], moment: Moment) -> Image.Image:
        """The frame with what is said about it.

        Args:
            frame: (height, width, 3) uint8, RGB, of any size: it is scaled to the panel's.
            moment: The figures.
        """
        image = Image.new("RGB", self.size, BACKGROUND)
        draw = ImageDraw.Draw(image)
        image.paste(scaled(frame, (self._width, self._frame_height)), (0, self._header))
        self._draw_header(draw, moment)
        self._draw_footer(draw, moment)
        if moment.ending:
            self._draw_ending(draw, moment)
        return image

    def _draw_header(self, draw: ImageDraw.ImageDraw, moment: Moment) -> None:
        middle = self._header // 2
        right = self._width - self._pad
        used = 0.0
        if moment.episode:
            draw.text((right, middle), moment.episode, _LABEL, self._font, anchor="rm")
            used = self._font.getlength(moment.episode) + 2 * self._pad
        title = self._fitted(self._title, right - self._pad - used)
        draw.text((self._pad, middle), title, _TEXT, self._font, anchor="lm")

    def _draw_footer(self, draw: ImageDraw.ImageDraw, moment: Moment) -> None:
        top = self._header + self._frame_height + self._pad
        first, second = top + self._line // 2, top + self._line + self._line // 2
        column = self._pad + self._font.getlength("action  ")
        for label, y in (("step", first), ("action", second)):
            draw.text((self._pad, y), label, _LABEL, self._font, anchor="lm")
        draw.text((column, y := first), f"{moment.step:,}", _TEXT, self._font, anchor="lm")
        right = self._width - self._pad
        # The number's digits have one width, so it stands still while it grows.
        total = f"{moment.episode_return:,.1f}"
        draw.text((right, y), total, _TEXT, self._font, anchor="rm")
        label_right = right - max(self._font.getlength(total), self._font.getlength("-0,000.0"))
        draw.text((label_right - self._pad, y), "return", _LABEL, self._font, anchor="rm")
        self._draw_action(draw, moment.action, column, second)

    def _draw_action(
        self, draw: ImageDraw.ImageDraw, action: Any, left: float, middle: int
    ) -> None:
        height = round(self._line * 0.62)
        width = gauge_width(self._space, height)
        right = self._width - self._pad
        text = action_text(action, self._meanings)
        room = right - left - (width + self._pad if width else 0)
        if width and self._font.getlength(text) > room and room < self._width * 0.4:
            width, room = 0, right - left  # the words before the ornament
        draw.text((left, middle), self._fitted(text, room), _TEXT, self._font, anchor="lm")
        if width:
            box = (right - width, middle - height // 2, right, middle - height // 2 + height)
            draw_gauge(draw, box, self._space, action)

    def _draw_ending(self, draw: ImageDraw.ImageDraw, moment: Moment) -> None:
        steps = f"{moment.step:,} step" + ("s" if moment.step != 1 else "")
        words = {"cut": f"cut after {steps}"}.get(moment.ending, f"{moment.ending} after {steps}")
        words = self._fitted(words, self._width - 4 * self._pad)
        half = (self._font.getlength(words) + 2 * self._pad) / 2
        center, bottom = self._width / 2, self._header + self._frame_height - self._pad
        box = (center - half, bottom - self._line - self._pad / 2, center + half, bottom)
        draw.rounded_rectangle(box, radius=self._line / 2, fill=_ENDINGS[moment.ending])
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(middle, words, (255, 255, 255), self._font, anchor="mm")

    def _fitted(self, text: str, room: float) -> str:
        """The text, cut so that it fits into so many pixels."""
        if self._font.getlength(text) <= room:
            return text
        while text and self._font.getlength(text + "…") > room:
            text = text[:-1]
        return text.rstrip() + "…"


def scaled(frame: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """A frame as a picture of `size`; whole pixels are repeated, anything else is smoothed."""
    image = Image.fromarray(frame)
    if image.size == size:
        return image
    is_whole = size[0] % image.width == 0 and size[1] % image.height == 0
    how = Image.Resampling.NEAREST if is_whole else Image.Resampling.LANCZOS
    return image.resize(size, how)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what Pillow has for a size
    return font
