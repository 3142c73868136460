"""Policies in their environments, side by side, to a video."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.recording.action_text import action_meanings
from export.recording.errors import RecordingError
from export.recording.panel import BACKGROUND, Moment, Panel
from export.recording.video_file import VideoFile
from serving.episodes import EpisodeResult
from serving.interface import Policy
from serving.play_loop import EnvironmentFailedError, RunningEpisode
from serving.rollout import play_steps

_MIN_SIDE = 320  # pixels: what text of a readable size needs beside it
_MAX_WIDTH = 1920  # pixels: what players show without scaling, and H.264 decoders take
_GAP = 8  # pixels between panels
_HOLD_S = 1.0  # how long an episode's last frame stands


@dataclass(frozen=True)
class Player:
    """One panel: a policy, the environment that it plays in, and its title.

    Attributes:
        title: Above the panel.
        policy: Anything that `evaluate_policy` takes.
        env: Made with `render_mode="rgb_array"`; one for each player.
    """

    title: str
    policy: Policy
    env: gym.Env[Any, Any]


@dataclass(frozen=True)
class RecordOptions:
    """How to play and to draw.

    Attributes:
        n_episodes: Episode i is reset with `seed + i` in every panel.
        seed: Of the first episode.
        deterministic: Take the most likely actions instead of sampling.
        max_steps: An episode is cut after so many steps.
        fps: Frames, which are steps, per second.
        scale: Pixels of the video per pixel of the environment's frame; None makes small frames
            large enough for text, and large ones fit 1920 pixels.
        use_action_mask: As of `evaluate_policy`.
    """

    n_episodes: int = 1
    seed: int = 0
    deterministic: bool = True
    max_steps: int | None = None
    fps: float = 30.0
    scale: float | None = None
    use_action_mask: bool = False


@dataclass(frozen=True)
class Recording:
    """What was written.

    Attributes:
        path: The video.
        episodes: Per player, in the order given: its episodes. One that `max_steps` cut is
            neither terminated nor truncated.
        n_frames: In the video.
        duration_s: How long it plays.
        size: (width, height), pixels.
        size_bytes: Of the file.
    """

    path: Path
    episodes: tuple[tuple[EpisodeResult, ...], ...]
    n_frames: int
    duration_s: float
    size: tuple[int, int]
    size_bytes: int


def record(players: Sequence[Player], path: Path, options: RecordOptions) -> Recording:
    """Play whole episodes and write what the environments render, a panel per player.

    The panels step together; one whose episode is over shows its last frame until the others are
    done. Frames go to the encoder one by one.

    Args:
        players: At least one.
        path: An .mp4 or .gif that `check_output` has passed; it appears when it is whole.
        options: How.

    Raises:
        RecordingError: An environment doesn't render, or the file can't be written.
        EnvironmentFailedError: An environment raised.
    """
    stages = [_Stage(player, options) for player in players]
    size = (0, 0)
    with VideoFile(path, fps=options.fps) as video:
        for index in range(options.n_episodes):
            for picture in _pictures(stages, index, options):
                size = picture.size
                video.write(np.asarray(picture))
    return Recording(
        path=path,
        episodes=tuple(tuple(stage.results) for stage in stages),
        n_frames=video.n_frames,
        duration_s=video.duration_s,
        size=size,
        size_bytes=path.stat().st_size,
    )


def _pictures(
    stages: Sequence[_Stage], index: int, options: RecordOptions
) -> Iterator[Image.Image]:
    """The frames of one episode of every stage."""
    plays = [stage.play(index) for stage in stages]
    # The frames are looked at before any picture is made: together they say how large one is.
    for moves in plays:
        next(moves)
    if index == 0:
        _fit(stages, options.scale)
    picture = _joined([stage.picture() for stage in stages])
    yield picture
    while _advance(plays):
        picture = _joined([stage.picture() for stage in stages])
        yield picture
    for _ in range(math.ceil(_HOLD_S * options.fps)):
        yield picture


def _advance(plays: Sequence[Iterator[bool]]) -> bool:
    """Take a step in each play that goes on; False once all are over."""
    moved = [next(moves, False) for moves in plays]
    return any(moved)


class _Stage:
    """A player at work: its environment's newest frame, and what is said about it."""

    def __init__(self, player: Player, options: RecordOptions) -> None:
        self._player = player
        self._options = options
        self._panel: Panel | None = None
        self._picture: Image.Image | None = None
        self.frame: NDArray[np.uint8] = np.zeros((1, 1, 3), dtype=np.uint8)
        self._moment = Moment(0, None, 0.0)
        self.results: list[EpisodeResult] = []

    def set_frame_size(self, size: tuple[int, int]) -> None:
        """Say how large the frame is in the picture."""
        env = self._player.env
        meanings = action_meanings(env)
        self._panel = Panel(self._player.title, size, env.action_space, meanings)

    def play(self, index: int) -> Iterator[bool]:
        """Play an episode; each step's frame is drawn when `picture` asks for it."""
        options = self._options
        steps = play_steps(
            self._player.policy,
            self._player.env,
            seed=options.seed + index,
            deterministic=options.deterministic,
            use_action_mask=options.use_action_mask,
        )
        limit = options.max_steps
        for episode in itertools.islice(steps, None if limit is None else limit + 1):
            self._look(episode, index)
            if episode.is_over or episode.episode_length == limit:
                self.results.append(replace(episode.result(), index=index))
            yield True

    def picture(self) -> Image.Image:
        """The panel as it stands; drawn once per step."""
        assert self._panel is not None
        if self._picture is None:
            self._picture = self._panel.picture(self.frame, self._moment)
        return self._picture

    def _look(self, episode: RunningEpisode, index: int) -> None:
        n_episodes = self._options.n_episodes
        self.frame = _rendered(self._player.env)
        self._picture = None
        self._moment = Moment(
            step=episode.episode_length,
            action=episode.action,
            episode_return=episode.episode_return,
            episode=f"episode {index + 1}/{n_episodes}" if n_episodes > 1 else "",
            ending=_ending(episode, self._options.max_steps),
        )


def _ending(episode: RunningEpisode, max_steps: int | None) -> str:
    if episode.terminated:
        return "terminated"
    if episode.truncated:
        return "truncated"
    return "cut" if episode.episode_length == max_steps else ""


def _rendered(env: gym.Env[Any, Any]) -> NDArray[np.uint8]:
    """The environment's picture, (height, width, 3) uint8."""
    try:
        frame: Any = env.render()
    except Exception as exc:  # a user's environment can raise anything
        raise EnvironmentFailedError(
            f"the environment failed in render: {type(exc).__name__}: {exc}"
        ) from exc
    if isinstance(frame, np.ndarray) and frame.dtype == np.uint8:
        if frame.ndim == 2:
            frame = np.repeat(frame[..., None], 3, axis=2)
        if frame.ndim == 3 and frame.shape[2] in (3, 4) and frame.size:
            return np.ascontiguousarray(frame[..., :3])
        found = f"an array of shape {frame.shape}"
    else:
        found = f"an array of {frame.dtype}" if isinstance(frame, np.ndarray) else repr(frame)[:80]
    raise RecordingError(
        f"the environment's render() gave {found}; expected (height, width, 3) uint8, which is "
        "what render_mode='rgb_array' promises"
    )


def _fit(stages: Sequence[_Stage], scale: float | None) -> None:
    """Give every stage its frame's size: all of one height, the whole no wider than a screen."""
    shapes = [stage.frame.shape[:2] for stage in stages]
    if scale is not None:
        sizes = [(width * scale, height * scale) for height, width in shapes]
    else:
        grown = [(shape, max(1, math.ceil(_MIN_SIDE / min(shape)))) for shape in shapes]
        tallest = max(height * factor for (height, _), factor in grown)
        sizes = [(width * tallest / height, tallest) for height, width in shapes]
        columns = _n_columns(len(stages))
        total = max(width for width, _ in sizes) * columns + _GAP * (columns - 1)
        shrunk = min(1.0, _MAX_WIDTH / total)
        sizes = [(width * shrunk, height * shrunk) for width, height in sizes]
    for stage, (width, height) in zip(stages, sizes, strict=True):
        stage.set_frame_size((max(2, round(width)), max(2, round(height))))


def _n_columns(n: int) -> int:
    return n if n <= 3 else math.ceil(math.sqrt(n))


def _joined(pictures: Sequence[Image.Image]) -> Image.Image:
    """Panels in rows, left to right; both sides even, as H.264 with yuv420p needs them."""
    columns = _n_columns(len(pictures))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = max(sum(each.width for each in row) + _GAP * (len(row) - 1) for row in rows)
    heights = [max(each.height for each in row) for row in rows]
    height = sum(heights) + _GAP * (len(rows) - 1)
    whole = Image.new("RGB", (width + width % 2, height + height % 2), BACKGROUND)
    top = 0
    for row, row_height in zip(rows, heights, strict=True):
        left = 0
        for each in row:
            whole.paste(each, (left, top))
            left += each.width + _GAP
        top += row_height + _GAP
    return whole
