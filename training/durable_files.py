"""Files that are either as they were or as they should be, whenever the process or machine ends."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SYNC_THREADS = 8  # a file system writes several files in little more time than one


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: a reader finds the old text or the new one.

    Raises:
        OSError: It can't be written; the old text stays.
    """
    temporary = temporary_name(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rename(temporary: Path, final: Path) -> None:
    """Give a whole file its name, so that it is whole under that name after a power cut too.

    Raises:
        OSError: It can't be written to the disk, or not be renamed.
    """
    sync(temporary)
    temporary.replace(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Have a file or directory on the disk before anything that comes after.

    Raises:
        OSError: The disk failed, or is full.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Have a directory with everything in it on the disk; some milliseconds for each file."""
    found = [Path(folder) for folder, _, _ in os.walk(directory)]
    found += [path for folder in found for path in folder.iterdir() if path.is_file()]
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        list(pool.map(sync, found))
    sync(directory.parent)


def delete_tree(directory: Path) -> None:
    """Delete a directory so that no part of it is left under its name, whenever it is killed."""
    doomed = temporary_name(directory)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """Where something is kept while it is written or deleted; `leftovers` finds it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def leftovers(directory: Path) -> Iterator[Path]:
    """What a killed process left half written or half deleted in a directory."""
    if directory.is_dir():
        yield from list(directory.glob(".*.tmp"))


def delete_leftovers(directory: Path) -> None:
    """Delete them."""
    for path in leftovers(directory):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
