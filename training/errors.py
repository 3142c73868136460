"""What can go wrong in training: each error knows its code and the command's exit status."""

from __future__ import annotations


class TrainingError(Exception):
    """Training could not do what was asked; the base of every error in this package.

    Args:
        message: One line for the user: what was found, what was expected, what to do.
    """

    code = "training_failed"
    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(TrainingError):
    """Wrong usage: a flag, a config key or value, an environment id, an existing run directory."""

    code = "invalid_config"
    exit_code = 2


class EnvironmentFailedError(TrainingError):
    """The environment raised while it was built, reset or stepped."""

    code = "environment_failed"


class StopNotReachedError(TrainingError):
    """A stop return was asked for and the budget ended first; the checkpoints are kept."""

    code = "stop_return_not_reached"


class CheckpointNotFoundError(TrainingError):
    """A path holds neither a run with a checkpoint nor a checkpoint."""

    code = "checkpoint_not_found"


class CheckpointDamagedError(TrainingError):
    """A checkpoint that RLlib can't restore: damaged, or of other versions or settings."""

    code = "checkpoint_error"


class StorageError(TrainingError):
    """What is at a URI can't be read or written: no such bucket, no credentials, no network."""

    code = "storage_failed"


class UntrustedCheckpointError(TrainingError):
    """A checkpoint (pickled code) would have to be loaded that this user's `train` did not sign."""

    code = "untrusted_checkpoint"


class VideoError(TrainingError):
    """The run has ended as it should, and its video could not be made."""

    code = "video_failed"
