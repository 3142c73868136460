"""Files and folders at a URI, with a deadline and one clear line for whatever fails."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from training.errors import ConfigError, StorageError

_T = TypeVar("_T")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ANSWER_S = 60.0  # for whatever moves no more than a few bytes
_SLOWEST_BYTES_PER_S = 100_000.0  # below this a storage is as good as unreachable
_N_CONNECTIONS = 8
_BLOCK_BYTES = 2**20
# Where the libraries' own defaults are too patient (Google's: 15 min) or take three requests for a
# file where one would do.
_URI_OPTIONS = {
    "gs": ("retry_limit_seconds", "30"),
    "gcs": ("retry_limit_seconds", "30"),
    "s3": ("allow_delayed_open", "true"),
}
_DENIED = (
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT"
    r"|HTTP (response code|status) 40[13]|AuthenticationFailed|PERMISSION_DENIED|UNAUTHENTICATED"
)
_UNREACHABLE = (
    r"NETWORK_CONNECTION|REQUEST_TIMEOUT|curlCode|[Cc]ould ?n[o']t (resolve|connect)|UNAVAILABLE"
)
_CAUSES = (
    (r"NO_SUCH_BUCKET|bucket does not exist|NoSuchBucket|ContainerNotFound", "no such bucket"),
    (_DENIED, "access is denied; are its credentials set, and may they do this there?"),
    (_UNREACHABLE, "no answer from its server"),
)


def is_uri(text: str) -> bool:
    """Whether a text is a URI and no path."""
    return _URI.match(text) is not None


class RemoteFiles:
    """A folder at a URI; names in it are relative and have forward slashes.

    Every method raises a StorageError where the storage does not do what is asked.

    Args:
        filesystem: A `pyarrow.fs.FileSystem`.
        folder: The folder's path in it.
        shown: The URI as a user is shown it.
    """

    def __init__(self, filesystem: Any, folder: str, shown: str) -> None:
        self._filesystem = filesystem
        self._folder = folder.rstrip("/")
        self.shown = shown
        self._unanswered: Future[Any] | None = None

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none."""

        def read() -> bytes | None:
            try:
                with self._filesystem.open_input_stream(self._path(name)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._ask("be read", read)

    def names(self) -> list[str]:
        """What is in the folder, not below it."""

        def names() -> list[str]:
            from pyarrow.fs import FileSelector  # type: ignore[import-untyped]

            selector = FileSelector(self._folder, allow_not_found=True)
            return sorted(info.base_name for info in self._filesystem.get_file_info(selector))

        return self._ask("be read", names)

    def folders(self, name: str) -> list[str]:
        """The folders in a folder of it."""
        # Those with a file in them: in an object store there are no others.
        found = self._ask("be read", lambda: self._sizes(name))
        return sorted({each.split("/")[0] for each in found if "/" in each})

    def put(self, sources: dict[str, Path]) -> None:
        """Copy local files there, each in one step."""
        size = sum(path.stat().st_size for path in sources.values())

        def put() -> None:
            with ThreadPoolExecutor(_N_CONNECTIONS) as pool:
                list(pool.map(self._put, sources, sources.values()))

        self._ask("be written", put, size_bytes=size)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file in one step."""
        self._ask("be written", lambda: self._write(name, [content]))

    def get(self, name: str, directory: Path) -> bool:
        """Copy a folder of it into a local one; False where there is none."""
        sizes = self._ask("be read", lambda: self._sizes(name))
        if any(".." in PurePosixPath(found).parts for found in sizes):
            raise StorageError(f"{self.shown}/{name} has a file whose name leads out of its folder")

        def get() -> None:
            for parent in {(directory / found).parent for found in sizes}:
                parent.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(_N_CONNECTIONS) as pool:
                copies = [
                    pool.submit(self._get, f"{name}/{found}", directory / found) for found in sizes
                ]
                for copied in copies:
                    copied.result()

        self._ask("be read", get, size_bytes=sum(sizes.values()))
        return bool(sizes)

    def get_file(self, name: str, path: Path) -> bool:
        """Copy a file of it to a local one; False where there is none."""
        sizes = self._ask("be read", lambda: self._sizes_of(self._info(name)))
        if sizes:
            self._ask("be read", lambda: self._get(name, path), size_bytes=sum(sizes))
        return bool(sizes)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with everything in it; nothing where there is none."""

        def delete() -> None:
            info = self._info(name)
            if info.type.name == "Directory":
                self._filesystem.delete_dir(self._path(name))
            elif info.type.name == "File":
                self._filesystem.delete_file(self._path(name))

        self._ask("be written", delete)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if name else self._folder

    def _info(self, name: str) -> Any:
        return self._filesystem.get_file_info(self._path(name))

    def _sizes_of(self, *infos: Any) -> list[int]:
        return [info.size for info in infos if info.type.name == "File"]

    def _sizes(self, name: str) -> dict[str, int]:
        from pyarrow.fs import FileSelector

        base = self._path(name)
        selector = FileSelector(base, recursive=True, allow_not_found=True)
        found = self._filesystem.get_file_info(selector)
        files = (info for info in found if info.type.name == "File")
        return {info.path.removeprefix(base).lstrip("/"): info.size for info in files}

    def _put(self, name: str, path: Path) -> None:
        with path.open("rb") as file:
            self._write(name, iter(lambda: file.read(_BLOCK_BYTES), b""))

    def _write(self, name: str, blocks: Any) -> None:
        final = self._path(name)
        # An object appears when it is whole; a file of a file system already while it is written.
        is_store = self._filesystem.type_name in ("s3", "gcs", "abfs")
        temporary = final if is_store else f"{final}.tmp"
        if not is_store:
            self._filesystem.create_dir(final.rpartition("/")[0], recursive=True)
        with self._filesystem.open_output_stream(temporary) as stream:
            for block in blocks:
                stream.write(block)
        if not is_store:
            if self._filesystem.type_name == "hdfs":  # it renames over nothing
                self.delete(name)
            self._filesystem.move(temporary, final)

    def _get(self, name: str, path: Path) -> None:
        with (
            self._filesystem.open_input_stream(self._path(name)) as stream,
            path.open("wb") as file,
        ):
            while block := stream.read(_BLOCK_BYTES):
                file.write(block)

    def _ask(self, what: str, work: Callable[[], _T], *, size_bytes: int = 0) -> _T:
        if self._unanswered is not None and not self._unanswered.done():
            raise StorageError(f"{self.shown} can't {what}: an earlier request is still unanswered")
        with _explained(f"{self.shown} can't {what}"):
            self._unanswered = _start(work)
            timeout_s = _ANSWER_S + size_bytes / _SLOWEST_BYTES_PER_S
            answer: _T = self._unanswered.result(timeout_s)
            return answer


def open_remote(uri: str) -> RemoteFiles:
    """Open the folder at a URI; it need not be there yet.

    Raises:
        ConfigError: The URI has no scheme that is known, or no path.
        StorageError: Its server doesn't answer, or has no such bucket.
    """
    parts = urlsplit(uri)
    if not (parts.path.strip("/") or parts.netloc):
        raise ConfigError(f"{uri!r} names no folder: expected SCHEME://BUCKET/FOLDER")
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    name, value = _URI_OPTIONS.get(parts.scheme, ("", ""))
    if name and name not in parts.query:
        uri += f"{'&' if parts.query else '?'}{name}={value}"

    def connect() -> tuple[Any, str]:
        from pyarrow.fs import FileSystem

        filesystem, folder = FileSystem.from_uri(uri)
        return filesystem, folder

    with _explained(f"{shown} can't be reached"):
        try:
            filesystem, folder = _start(connect).result(_ANSWER_S)
        except ValueError as exc:  # pyarrow's ArrowInvalid is one
            raise ConfigError(
                f"{shown} is no URI that can be stored at ({_first_line(exc)}): expected s3://, "
                "gs://, abfs://, hdfs:// or file://"
            ) from exc
    return RemoteFiles(filesystem, folder, shown)


def _start(work: Callable[[], _T]) -> Future[_T]:
    # A thread of its own that nobody waits for at the end: whatever hangs doesn't hang the command.
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:  # it is raised by `result`
            future.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except FutureTimeoutError as exc:
        raise StorageError(f"{what}: no answer for {_ANSWER_S:.0f} s or more") from exc
    except OSError as exc:
        found = str(exc)
        causes = [cause for pattern, cause in _CAUSES if re.search(pattern, found)]
        cause = f"{causes[0]} ({_first_line(exc)})" if causes else _first_line(exc)
        raise StorageError(f"{what}: {cause}") from exc


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().partition("\n")[0][:300]
