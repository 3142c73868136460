"""Why a load test gave no result, or not the one asked for."""

from __future__ import annotations

from typing import ClassVar


class LoadTestError(Exception):
    """The load test failed.

    Attributes:
        exit_code: What the command line exits with.
        message: One sentence.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class LoadTestUsageError(LoadTestError):
    """The command's arguments are wrong."""

    exit_code = 2
