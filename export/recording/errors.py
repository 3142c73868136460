"""What can go wrong while a video is made."""

from __future__ import annotations

from serving.errors import PolicyServingError


class RecordingError(PolicyServingError):
    """The video could not be made; no file is left."""

    code = "recording_failed"
    title = "Recording failed"
    http_status = None
