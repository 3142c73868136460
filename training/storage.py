"""Runs at a URI, such as s3://bucket/cartpole: copies of run directories that outlive a machine.

What `pyarrow.fs.FileSystem.from_uri` takes, as Ray's own storage does: s3, gs, abfs, hdfs, file.
The names are those of the run directory, with `checkpoints.json` in place of the links, which no
object store has. It is written last and names each checkpoint that is whole: what it doesn't name
is not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from training.errors import CheckpointNotFoundError, ConfigError, StorageError, TrainingError
from training.provenance import SIGNATURE_FILE
from training.remote_files import RemoteFiles, open_remote
from training.run_directory import BEST, INITIAL, LAST, RunDirectory, is_checkpoint_name

logger = logging.getLogger("policyserve.training")

INDEX = "checkpoints.json"
_FORMAT, _FORMAT_VERSION = "policyserve-run-copy", 1
_LINKS = (BEST, LAST, INITIAL)
_BUFFER = re.compile(r"iteration_\d{6,}\.pkl")
# A run that saves several times a second is not copied as often.
_LEAST_PAUSE_S = 1.0
_LARGEST_SHARE = 0.1  # of the training time that copying may take


class _Index(NamedTuple):
    """What `checkpoints.json` says: each whole checkpoint's fingerprint, the links, the buffers."""

    checkpoints: Mapping[str, str]
    links: Mapping[str, str]
    buffers: Mapping[str, str]


class RunStorage:
    """The copy of one run directory at a URI.

    Args:
        remote: The folder there.
    """

    def __init__(self, remote: RemoteFiles) -> None:
        self._remote = remote
        self._index: _Index | None = None
        self._copied: object = None
        self._next_s = 0.0

    def __str__(self) -> str:
        return self._remote.shown

    def refuse_if_used(self) -> None:
        """Raise ConfigError if a new run can't start there: a run is never overwritten."""
        found = self._remote.names()
        if "run.json" in found:
            raise ConfigError(
                f"{self} already holds a run: continue it with `--resume {self}`, or give another "
                "--run-dir"
            )
        if found:
            raise ConfigError(f"{self} is not empty (it has {found[0]}): give another --run-dir")

    @contextmanager
    def kept(self, run: RunDirectory) -> Iterator[None]:
        """Copy a run directory there before and after the block, and delete it in the end.

        A run that fails is copied too; one that can't be copied in the end is not deleted.

        Raises:
            StorageError: It can't be copied.
            TrainingError: What the block raised, with the URI in place of the directory.
        """
        try:
            self.copy(run)
        except StorageError:
            shutil.rmtree(run.path, ignore_errors=True)  # nothing has happened in it
            raise
        failure: TrainingError | None = None
        try:
            yield
        except TrainingError as exc:
            failure = exc
        try:
            self.copy(run)
        except StorageError as exc:
            before = f"{failure.message}; and " if failure else ""
            raise StorageError(
                f"{before}{exc.message}; the run is kept in {run.path}, and `policyserve train "
                f"--resume {run.path}` goes on there"
            ) from (failure or exc)
        shutil.rmtree(run.path, ignore_errors=True)
        if failure is not None:
            raise type(failure)(failure.message.replace(str(run.path), str(self))) from failure

    def copy_if_due(self, run: RunDirectory) -> None:
        """Copy a run that has a new checkpoint, unless that would cost much of the training's time.

        Where it fails training goes on: the log says so, and the next call tries again.
        """
        if time.monotonic() < self._next_s or _state(run) == self._copied:
            return
        try:
            self.copy(run)
        except StorageError as exc:
            logger.warning("the run is not copied, which is tried again: %s", exc.message)

    def copy(self, run: RunDirectory) -> None:
        """Make the copy the same as a run directory.

        Killed at any moment, it leaves a copy that can be resumed: files come before whatever
        names them, and go after it.

        Raises:
            StorageError: It can't be written.
        """
        started = time.monotonic()
        state = _state(run)
        try:
            self._copy(run)
        except OSError as exc:
            raise StorageError(f"{self} can't be written: {exc}") from exc
        finally:
            duration_s = time.monotonic() - started
            self._next_s = time.monotonic() + max(_LEAST_PAUSE_S, duration_s / _LARGEST_SHARE)
        self._copied = state

    def _copy(self, run: RunDirectory) -> None:
        before = self._index if self._index is not None else self._read_index()
        self._index = None  # unknown, should this fail
        now = _local_index(run)
        for name in _changed(before.checkpoints, now.checkpoints):
            self._remote.delete(f"checkpoints/{name}")  # the rest of a copy that was cut short
            self._put_folder(run.checkpoints / name, f"checkpoints/{name}")
        buffers = _changed(before.buffers, now.buffers)
        self._remote.put({f"replay_buffer/{name}": run.replay_buffer / name for name in buffers})
        self._remote.put(_small_files(run))
        if not run.tensorboard.is_dir():  # a resumed run makes its event files anew
            self._remote.delete("tensorboard")
        self._put_folder(run.tensorboard, "tensorboard")
        if not run.result_file.exists():
            self._remote.delete(run.result_file.name)
        self._remote.write(INDEX, _to_json(now))
        for name in set(self._remote.folders("checkpoints")) - set(now.checkpoints):
            self._remote.delete(f"checkpoints/{name}")
        for name in set(before.buffers) - set(now.buffers):
            self._remote.delete(f"replay_buffer/{name}")
        self._index = now

    def _put_folder(self, directory: Path, name: str) -> None:
        files = [path for path in directory.rglob("*") if path.is_file()]
        named = {f"{name}/{path.relative_to(directory).as_posix()}": path for path in files}
        self._remote.put(named)

    def fetch(self, which: str = "all") -> RunDirectory:
        """Copy the run from there into a new local directory.

        Args:
            which: The checkpoints to bring: "all" with the replay buffer, "none", "best" (the last
                where there is no best), a link's name, or a checkpoint's.

        Raises:
            CheckpointNotFoundError: There is no run, or no such checkpoint.
            StorageError: It can't be read.
        """
        run = new_local_run()
        try:
            self._fetch(run, which)
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        return run

    def _fetch(self, run: RunDirectory, which: str) -> None:
        if self._remote.read("run.json") is None:
            raise CheckpointNotFoundError(f"{self} is not a run: no run.json there")
        index = self._read_index()
        names = _chosen(index, which, str(self))
        run.path.mkdir(mode=0o700)
        run.checkpoints.mkdir()
        for path in _all_small_files(run):
            self._remote.get_file(path.name, path)
        for name in names:
            self._remote.get(f"checkpoints/{name}", run.checkpoints / name)
        if which == "all":
            for name in index.buffers:
                run.replay_buffer.mkdir(exist_ok=True)
                self._remote.get_file(f"replay_buffer/{name}", run.replay_buffer / name)
        for link, name in index.links.items():
            if (run.checkpoints / name).is_dir():
                run.link(link, run.checkpoints / name)
        self._index = None

    def _read_index(self) -> _Index:
        content = self._remote.read(INDEX)
        if content is None:
            return _Index({}, {}, {})
        try:
            document = json.loads(content)
            if (document["format"], document["format_version"]) != (_FORMAT, _FORMAT_VERSION):
                raise ValueError(f"not a {_FORMAT} document of version {_FORMAT_VERSION}")
            index = _Index(document["checkpoints"], document["links"], document["replay_buffers"])
            _check_names(index)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise StorageError(f"{self}/{INDEX} is damaged: {exc}") from exc
        return index


def open_storage(uri: str) -> RunStorage:
    """The run at a URI, which need not be there yet.

    Raises:
        ConfigError: It is no URI that can be stored at.
        StorageError: Its server doesn't answer.
    """
    return RunStorage(open_remote(uri))


def new_local_run() -> RunDirectory:
    """A run directory, not made yet, in which a run works that is kept at a URI."""
    name = f"policyserve-run-{secrets.token_hex(8)}"
    return RunDirectory(Path(tempfile.gettempdir()) / name)


@contextmanager
def fetch_run(uri: str, checkpoints: str = "best") -> Iterator[Path]:
    """Have a local copy of a run at a URI, deleted after the block.

    Args:
        uri: Of a run, or of a checkpoint in it, such as s3://bucket/run/checkpoints/last.
        checkpoints: As in `RunStorage.fetch`; what the URI itself names comes first.

    Yields:
        The run directory, or the checkpoint in it that the URI names.

    Raises:
        ConfigError: It is no URI that can be read.
        CheckpointNotFoundError: There is no run, or no such checkpoint.
        StorageError: It can't be read.
    """
    match = re.fullmatch(r"([^?]*)/checkpoints/([^/?]+)/?(\?.*)?", uri)
    if match:
        base, name, query = match.groups()
        uri, checkpoints = base + (query or ""), name
    run = open_storage(uri).fetch(checkpoints)
    try:
        yield (run.checkpoints / checkpoints).resolve() if match else run.path
    finally:
        shutil.rmtree(run.path, ignore_errors=True)


def _state(run: RunDirectory) -> object:
    return [path.name for path in run.all_checkpoints()], _local_links(run)


def _local_links(run: RunDirectory) -> dict[str, str]:
    linked = {name: run.linked(name) for name in _LINKS}
    return {name: path.name for name, path in linked.items() if path is not None}


def _local_index(run: RunDirectory) -> _Index:
    checkpoints = {path.name: _fingerprint(path) for path in run.all_checkpoints()}
    buffers = run.replay_buffer.glob("iteration_*.pkl")
    return _Index(
        checkpoints,
        {link: name for link, name in _local_links(run).items() if name in checkpoints},
        {
            path.name: str(path.stat().st_mtime_ns)
            for path in buffers
            if _BUFFER.fullmatch(path.name)
        },
    )


def _fingerprint(checkpoint: Path) -> str:
    # The signature holds the digest of every other file.
    file = checkpoint / SIGNATURE_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "unsigned"


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [name for name, value in now.items() if before.get(name) != value]


def _all_small_files(run: RunDirectory) -> tuple[Path, ...]:
    marker = run.path / "run.json"
    return (marker, run.config_file, run.progress_file, run.result_file, run.log_file)


def _small_files(run: RunDirectory) -> dict[str, Path]:
    return {path.name: path for path in _all_small_files(run) if path.exists()}


def _to_json(index: _Index) -> bytes:
    document: dict[str, Any] = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "checkpoints": index.checkpoints,
        "links": index.links,
        "replay_buffers": index.buffers,
    }
    return json.dumps(document, indent=2).encode() + b"\n"


def _check_names(index: _Index) -> None:
    # They become paths here.
    for name in (*index.checkpoints, *index.links.values()):
        if not is_checkpoint_name(name):
            raise ValueError(f"{name!r} is no checkpoint's name")
    for name in index.buffers:
        if not _BUFFER.fullmatch(name):
            raise ValueError(f"{name!r} is no replay buffer's name")
    for name in index.links:
        if name not in _LINKS:
            raise ValueError(f"{name!r} is no link's name")


def _chosen(index: _Index, which: str, shown: str) -> list[str]:
    if which == "all":
        return list(index.checkpoints)
    if which == "none":
        return []
    wanted = index.links.get(which, which)
    if which == BEST and BEST not in index.links:
        wanted = index.links.get(LAST, which)
    if wanted not in index.checkpoints:
        found = ", ".join(sorted(index.checkpoints)) or "none"
        raise CheckpointNotFoundError(f"{shown} has no checkpoint {which!r} (it has {found})")
    return [wanted]
