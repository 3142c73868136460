"""The bundle: what a policy is on disk, its manifest and its checksums.

Loading one unpickles nothing and needs only NumPy. `docs/bundle.md` describes the format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from serving.errors import BundleError, ChecksumError, ManifestError
from serving.golden import read_golden
from serving.manifest import FileEntry, PolicyManifest
from serving.manifest_parser import parse_manifest

FORMAT = "policyserve-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ONNX = "policy.onnx"
TORCHSCRIPT = "policy.torchscript.pt"
PT2 = "policy.pt2"
GOLDEN = "golden.npz"
# A manifest holds a few kilobytes; a larger one is a mistake or an attack.
_MANIFEST_LIMIT_BYTES = 16 * 1024 * 1024
# protobuf's own limit for one message, so for one ONNX file.
MAX_FILE_BYTES = 2**31 - 1
# What a policy may be called: a URL's segment, and a directory that no glob overlooks.
POLICY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose checksums were right when it was read."""

    path: Path
    manifest: PolicyManifest

    def file(self, name: str) -> Path:
        """The path of one of its files.

        Raises:
            BundleError: The bundle has no such file.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.path} has no {name}; it has {', '.join(sorted(self.manifest.files))}"
            )
        return self.path / name

    def golden(self) -> dict[str, NDArray[Any]]:
        """The raw inputs, and what RLlib itself answered to them.

        Raises:
            BundleError: The file is damaged, holds objects, or is absurdly large when unpacked.
        """
        return read_golden(self.file(GOLDEN))


def read_bundle(path: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> Bundle:
    """Read a bundle and check every file against the manifest.

    Args:
        path: Its directory.
        max_file_bytes: A larger file is refused before it is read.

    Raises:
        ManifestError: The manifest is missing, unreadable, incomplete, contradicts itself or is
            of another format.
        BundleError: A file is larger than `max_file_bytes`.
        ChecksumError: A file is missing, or not the one that was written.
    """
    path = Path(path)
    manifest = _parse_manifest(_read_manifest(path), path)
    for name, entry in manifest.files.items():
        _check_file(path / name, entry, max_file_bytes)
    return Bundle(path=path, manifest=manifest)


def _read_manifest(path: Path) -> Any:
    manifest_path = path / MANIFEST
    if not path.is_dir():
        raise ManifestError(f"{path} is no bundle: there is no such directory")
    if not manifest_path.is_file():
        raise ManifestError(
            f"{path} is no bundle: it has no {MANIFEST} (an export that was cut short leaves none)"
        )
    if manifest_path.stat().st_size > _MANIFEST_LIMIT_BYTES:
        raise ManifestError(f"{manifest_path} is larger than {_MANIFEST_LIMIT_BYTES} bytes")
    try:
        return json.loads(manifest_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ManifestError(f"{manifest_path} is not readable as JSON: {exc}") from exc


def _parse_manifest(raw: Any, path: Path) -> PolicyManifest:
    where = path / MANIFEST
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ManifestError(f"{where} is no manifest of a {FORMAT}")
    if raw.get("format_version") != FORMAT_VERSION:
        raise ManifestError(
            f"{where} has format_version {raw.get('format_version')!r}, this version reads "
            f"{FORMAT_VERSION}; export the policy again"
        )
    if raw.get("manifest_sha256") != _digest(raw):
        raise ChecksumError(
            f"{where} is not as it was written; the bundle is damaged, export it again",
            file=MANIFEST,
        )
    manifest = parse_manifest(raw, where)
    _check_names(manifest, where)
    return manifest


def _digest(raw: Mapping[str, Any]) -> str:
    """SHA-256 over all other fields, written in one way only."""
    fields = {key: value for key, value in raw.items() if key != "manifest_sha256"}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_names(manifest: PolicyManifest, where: Path) -> None:
    for name in (ONNX, GOLDEN):
        if name not in manifest.files:
            raise ManifestError(f"{where} lists no {name}")
    for name in manifest.files:
        if Path(name).name != name or name == MANIFEST:
            raise ManifestError(f"{where} lists the file {name!r}; only plain names are allowed")
    if manifest.policy_id != manifest.files[ONNX].sha256[:12]:
        raise ManifestError(f"{where}: policy_id is not the beginning of {ONNX}'s SHA-256")


def _check_file(path: Path, entry: FileEntry, max_file_bytes: int) -> None:
    if not path.is_file():
        raise ChecksumError(f"{path} is missing", file=path.name)
    size_bytes = path.stat().st_size
    if size_bytes > max_file_bytes:
        raise BundleError(
            f"{path} has {size_bytes} bytes, at most {max_file_bytes} are read", file=path.name
        )
    if size_bytes != entry.size_bytes:
        raise ChecksumError(
            f"{path} has {size_bytes} bytes, the manifest says {entry.size_bytes}; the bundle is "
            "damaged, export it again",
            file=path.name,
        )
    found = sha256_of(path)
    if found != entry.sha256:
        raise ChecksumError(
            f"{path} has SHA-256 {found[:12]}…, the manifest says {entry.sha256[:12]}…; the bundle "
            "is damaged, export it again",
            file=path.name,
        )


def sha256_of(path: Path) -> str:
    """A file's SHA-256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(
    directory: Path, facts: Mapping[str, Any], files: Sequence[str]
) -> PolicyManifest:
    """Write `manifest.json` over files that already lie in `directory`, as the last step.

    Args:
        directory: Where the files are.
        facts: Everything but `format`, `format_version`, `policy_id` and `files`.
        files: The names of the bundle's files.
    """
    entries = {
        name: {
            "sha256": sha256_of(directory / name),
            "size_bytes": (directory / name).stat().st_size,
        }
        for name in files
    }
    raw = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "policy_id": str(entries[ONNX]["sha256"])[:12],
        **facts,
        "files": entries,
    }
    raw["manifest_sha256"] = _digest(raw)
    manifest = _parse_manifest(raw, directory)
    text = json.dumps(raw, indent=2, allow_nan=False) + "\n"
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return manifest


@contextlib.contextmanager
def replacing_bundle(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target` that takes its place when the block ends well.

    If the block raises, the scratch directory goes and whatever was at `target` stays whole.

    Raises:
        BundleError: `target` holds something that is not a bundle, or cannot be written.
    """
    target = Path(target).resolve()  # a link stays one, and what it leads to is replaced
    if target.exists() and not _is_replaceable(target):
        raise BundleError(f"{target} exists and is no bundle; choose another place for the output")
    scratch = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
    except OSError as exc:
        raise BundleError(f"cannot write beside {target}: {exc.strerror or exc}") from exc
    try:
        yield scratch
        _swap(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_replaceable(target: Path) -> bool:
    return target.is_dir() and ((target / MANIFEST).is_file() or not any(target.iterdir()))


def _swap(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
        return
    old = scratch.with_suffix(".old")
    target.rename(old)
    try:
        scratch.rename(target)
    except BaseException:  # an interrupt between the two renames as well
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def adding_versions(repository: Path, names: Sequence[str]) -> Iterator[list[tuple[Path, Path]]]:
    """Places for new versions of policies in a repository; all appear when the block ends well.

    If the block raises, or one of them cannot be put in its place, nothing has changed.

    Args:
        repository: Its directory; made if it is not there.
        names: The policies, each once.

    Yields:
        For each name, where to write its bundle, and where that will lie: NAME/VERSION.

    Raises:
        BundleError: `repository` is a bundle, or cannot be written; or a name is not one of a
            policy (letters, digits, `.`, `_`, `-`), or comes twice.
    """
    repository = Path(repository).resolve()
    if (repository / MANIFEST).exists() or (repository.exists() and not repository.is_dir()):
        raise BundleError(
            f"{repository} is one bundle, and the checkpoint holds {len(names)} policies "
            f"({', '.join(names)}); choose a directory for all of them, or name one policy"
        )
    _check_policy_names(names)
    scratch = repository.parent / f".{repository.name}.{secrets.token_hex(4)}.tmp"
    with contextlib.ExitStack() as undo:
        try:
            _make_directory(scratch, undo)
        except OSError as exc:
            raise BundleError(f"cannot write beside {repository}: {exc.strerror or exc}") from exc
        undo.callback(shutil.rmtree, scratch, ignore_errors=True)
        places = [
            (scratch / name, repository / name / _next_version(repository / name)) for name in names
        ]
        yield places
        missing = [source.name for source, _ in places if not source.is_dir()]
        if missing:
            raise BundleError(f"no bundle was written for {missing[0]!r}; nothing was added")
        try:
            for source, final in places:
                _make_directory(final.parent, undo)
                # Noted before it is done, so that an interrupt in between is undone as well.
                undo.callback(_move_back, final, source)
                source.rename(final)
        except OSError as exc:
            raise BundleError(
                f"cannot put a policy into {repository}: {exc}; nothing was added"
            ) from exc
        undo.pop_all()
    shutil.rmtree(scratch, ignore_errors=True)


def _check_policy_names(names: Sequence[str]) -> None:
    for name in names:
        if not POLICY_NAME.fullmatch(name):
            raise BundleError(
                f"{name!r} cannot be a policy's name: expected letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit; export it alone, under a name of your own"
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BundleError(
            f"several policies would be called {twice[0]!r} in one repository; export them one by "
            "one, under names of your own"
        )


def _make_directory(path: Path, undo: contextlib.ExitStack) -> None:
    """Make a directory and its parents; undone, those that were made and are empty go again."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        undo.callback(_remove_if_empty, each)
        each.mkdir(exist_ok=True)


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def _move_back(final: Path, source: Path) -> None:
    if not source.exists():
        final.rename(source)


def _next_version(policy: Path) -> str:
    versions = [int(entry.name) for entry in policy.glob("*") if entry.name.isdecimal()]
    return str(max(versions, default=0) + 1)
