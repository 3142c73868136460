"""A run's own temporary directory: closed to other users, and deleted even after a kill."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "psv-train-"
LOCK_FILE = "lock"


@contextmanager
def private_directory(parent: Path | None = None) -> Iterator[Path]:
    """Make a directory that this user alone can enter, and delete it at the end.

    The lock in it is held while the block runs and ends with the process, however it ends: so the
    next run deletes what a killed one left. A pid would say nothing where containers share /tmp.

    Args:
        parent: Where the directory goes; None is a directory for temporary files whose path is
            short.
    """
    parent = parent or _short_temporary_directory()
    delete_leftovers(parent)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # its mode is 0700
    try:
        with (directory / "new").open("wb") as lock:
            # Taken before it has its name, so that nobody finds it free. Where the file system
            # has no locks there is no such file either, and the directory is never a leftover.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
                Path(lock.name).rename(directory / LOCK_FILE)
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def delete_leftovers(parent: Path) -> None:
    """Delete this user's private directories in `parent` whose run is dead."""
    for directory in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another run deletes the same one, or holds it
            if directory.lstat().st_uid == os.getuid() and not directory.is_symlink():
                _delete_if_unlocked(directory)


def _delete_if_unlocked(directory: Path) -> None:
    with (directory / LOCK_FILE).open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)


def _short_temporary_directory() -> Path:
    # A Unix socket's path has at most 107 bytes; below this directory, whose name has 18, Ray adds
    # up to 66: /r/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store.
    temporary = Path(tempfile.gettempdir())
    return temporary if len(os.fsencode(temporary)) <= 22 else Path("/tmp")
