"""Why an export was refused. Whatever is raised, no bundle is left behind."""

from __future__ import annotations

from typing import ClassVar


class ExportError(Exception):
    """The base of all errors of `export`.

    Attributes:
        code: A stable name for programs.
        exit_code: What the command line exits with.
        message: One sentence: what was found, what was expected, what to do.
    """

    code: ClassVar[str] = "export_failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CheckpointError(ExportError):
    """The checkpoint is missing, unreadable, half-written, or not one."""

    code = "checkpoint_error"


class UntrustedCheckpointError(CheckpointError):
    """Reading the checkpoint would run code that nobody vouched for."""

    code = "untrusted_checkpoint"
    exit_code = 2


class UnsupportedPolicyError(ExportError):
    """The algorithm, a space, a connector or the network is one that cannot be exported yet."""

    code = "unsupported_policy"


class ConversionError(ExportError):
    """The exporter failed, or wrote something other than asked (a fixed batch size)."""

    code = "conversion_failed"


class ParityError(ExportError):
    """The exported graph does not act as RLlib does."""

    code = "parity_failed"
