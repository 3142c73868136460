"""ffmpeg as a process: the one that imageio-ffmpeg brings, or $IMAGEIO_FFMPEG_EXE."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Sequence

from export.recording.errors import RecordingError

_QUIETLY = ("-y", "-nostdin", "-v", "error")


class FfmpegError(Exception):
    """It failed; the text says why."""


def ffmpeg_path() -> str:
    """Where it is.

    Raises:
        RecordingError: There is none.
    """
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as exc:
        raise RecordingError(
            "there is no ffmpeg: the wheel of imageio-ffmpeg brings one for most machines; else "
            "install it and name it in IMAGEIO_FFMPEG_EXE"
        ) from exc


class Ffmpeg:
    """One run, from its start to its end; `close` it whatever happens.

    Whatever it says goes to a file, so that it never waits for a reader.

    Args:
        arguments: Beside those that have it overwrite and keep quiet.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            [ffmpeg_path(), *_QUIETLY, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
        )

    def write(self, content: bytes) -> None:
        """Give it bytes.

        Raises:
            FfmpegError: It has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(content)
        except OSError as exc:
            self.finish()
            raise FfmpegError("ffmpeg ended early") from exc

    def finish(self) -> None:
        """Have it write what it has.

        Raises:
            FfmpegError: It failed.
        """
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        status = self._process.wait()
        if status == 0:
            return
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        ended = f"status {status}" if status > 0 else signal.Signals(-status).name
        raise FfmpegError(f"ffmpeg: {lines[0]}" if lines else f"ffmpeg ended with {ended}")

    def close(self) -> None:
        """End it at once, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._said.close()
