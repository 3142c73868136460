"""Frames to an MP4 or a GIF, one at a time, by the ffmpeg that imageio-ffmpeg brings.

An MP4 is H.264 in yuv420p with its index in front, which browsers and QuickTime play, tagged as
BT.709, which they would guess wrongly for a small picture. A GIF gets a palette of its own: the
frames go to a lossless file first, which is read twice.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from export.recording.errors import RecordingError
from export.recording.ffmpeg import Ffmpeg, FfmpegError, ffmpeg_path
from serving.errors import UsageError

SUFFIXES = (".mp4", ".gif")
# Browsers show a GIF's frames of less than two hundredths of a second for ten.
_MAX_GIF_FPS = 50.0
_RGB_TO_BT709 = "scale=out_color_matrix=bt709:out_range=tv"
_BT709 = "colorprim=bt709:transfer=bt709:colormatrix=bt709"
_MP4 = (
    *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-preset", "veryfast"),
    *("-vf", _RGB_TO_BT709, "-colorspace", "bt709", "-color_range", "tv", "-x264-params", _BT709),
    *("-movflags", "+faststart"),
)
_LOSSLESS = ("-c:v", "libx264rgb", "-qp", "0", "-preset", "ultrafast")


def check_output(path: Path) -> None:
    """Refuse an output that can't be written, before anything is played.

    Raises:
        UsageError: An unknown suffix, no such directory, or not one to write into.
        RecordingError: There is no ffmpeg.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"-o {path}: the suffix says which kind of video; expected {' or '.join(SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: there is no directory {path.parent}; make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"-o {path} can't be written there")
    ffmpeg_path()


class VideoFile:
    """A video that is written frame by frame and appears under its name once it is whole.

    Leaving the context by an exception leaves nothing behind.
    """

    def __init__(self, path: Path, *, fps: float) -> None:
        self._path = path
        self._fps = fps
        self._is_gif = path.suffix.lower() == ".gif"
        stem = f".{path.stem}.{os.getpid()}.tmp"
        self._streamed = path.with_name(f"{stem}.mkv" if self._is_gif else f"{stem}.mp4")
        self._palette = path.with_name(f"{stem}.png")
        self._gif = path.with_name(f"{stem}.gif")
        self._encoder: Ffmpeg | None = None
        self.n_frames = 0

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._encoder is not None:
                self._encoder.close()
            for path in (self._streamed, self._palette, self._gif):
                path.unlink(missing_ok=True)

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Add a frame.

        Args:
            frame: (height, width, 3) uint8, RGB; both even, and the same for all frames.

        Raises:
            RecordingError: ffmpeg failed, for example as the disk is full.
        """
        if self._encoder is None:
            height, width, _ = frame.shape
            self._encoder = Ffmpeg(self._streaming(width, height))
        try:
            self._encoder.write(frame.tobytes())
        except FfmpegError as exc:
            raise RecordingError(f"{self._path} could not be written: {exc}") from exc
        self.n_frames += 1

    @property
    def duration_s(self) -> float:
        """How long it plays."""
        return self.n_frames / self._fps

    def _streaming(self, width: int, height: int) -> list[str]:
        """Ffmpeg's words for raw frames on its standard input."""
        raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}")
        source = (*raw, "-r", f"{self._fps:g}", "-i", "-", "-an")
        return [*source, *(_LOSSLESS if self._is_gif else _MP4), str(self._streamed)]

    def _finish(self) -> None:
        assert self._encoder is not None, "a video without a frame"
        try:
            self._encoder.finish()
            if self._is_gif:
                self._write_gif()
            (self._gif if self._is_gif else self._streamed).replace(self._path)
        except (FfmpegError, OSError) as exc:
            raise RecordingError(f"{self._path} could not be written: {exc}") from exc

    def _write_gif(self) -> None:
        slowed = f"fps={_MAX_GIF_FPS:g}," if self._fps > _MAX_GIF_FPS else ""
        source = ("-i", str(self._streamed))
        self._run(*source, "-vf", f"{slowed}palettegen=stats_mode=full", str(self._palette))
        # Ordered dithering keeps still areas still, so that they cost no bytes.
        mapping = f"{slowed[:-1] or 'null'}[x];[x][1:v]paletteuse=dither=bayer:bayer_scale=4"
        mapping += ":diff_mode=rectangle"
        palette = ("-i", str(self._palette))
        self._run(*source, *palette, "-lavfi", mapping, "-loop", "0", str(self._gif))

    def _run(self, *arguments: str) -> None:
        with contextlib.closing(Ffmpeg(arguments)) as run:
            run.finish()
