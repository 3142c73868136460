"""The bundle: what a policy is on disk, its manifest and its checksums.

Loading one unpickles nothing and needs only NumPy. `docs/bundle.md` describes the format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import BundleError, ChecksumError, ManifestError
from serving.spaces import BoxSpace, Space, space_from_json

FORMAT = "policyserve-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ONNX = "policy.onnx"
TORCHSCRIPT = "policy.torchscript.pt"
GOLDEN = "golden.npz"
# Distribution and the noise that samples it.
_DISTRIBUTIONS = (("categorical", "gumbel"), ("diag_gaussian", "normal"))
# A manifest holds a few kilobytes; a larger one is a mistake or an attack.
_MANIFEST_LIMIT_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle: its SHA-256 in hex and its size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class NoiseSpec:
    """What the graph's `noise` input, (B, size) float32, is drawn from.

    Attributes:
        distribution: `gumbel` (standard Gumbel) or `normal` (standard normal).
        size: Its width.
    """

    distribution: str
    size: int

    def draw(self, generator: np.random.Generator, n: int) -> NDArray[np.float32]:
        """Draw (n, size) float32."""
        if self.distribution == "gumbel":
            return generator.gumbel(size=(n, self.size)).astype(np.float32)
        return generator.standard_normal((n, self.size), dtype=np.float32)


@dataclass(frozen=True)
class PolicyManifest:
    """What a policy expects and returns, where it came from, and how it was proved.

    Attributes:
        policy_id: First 12 hex digits of the SHA-256 of `policy.onnx`.
        algorithm: The RLlib algorithm that trained it.
        observation_space: What an observation looks like, raw, as the environment gives it.
        action_space: What an action looks like, as the environment takes it.
        distribution: `categorical` or `diag_gaussian`.
        noise: The noise that sampling takes.
        outputs: The graph's outputs, by name.
        files: The bundle's other files.
        environment: `{"id", "kwargs"}` of the training environment, or None.
        raw: The whole manifest as written.
    """

    policy_id: str
    algorithm: str
    observation_space: BoxSpace
    action_space: Space
    distribution: str
    noise: NoiseSpec
    outputs: tuple[str, ...]
    files: Mapping[str, FileEntry]
    environment: Mapping[str, Any] | None
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def has_value(self) -> bool:
        """Whether the policy has a critic to ask for `value`."""
        return "value" in self.outputs


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
        """The raw observations and noise, and what RLlib itself answered to them."""
        path = self.file(GOLDEN)
        try:
            # Opened as an archive first: NumPy would take other kinds of files as well.
            with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
            raise BundleError(f"{path} is not readable: {exc}") from exc


def read_bundle(path: Path) -> Bundle:
    """Read a bundle and check every file against the manifest.

    Raises:
        ManifestError: The manifest is missing, unreadable, incomplete or of another format.
        ChecksumError: A file is missing, or not the one that was written.
    """
    path = Path(path)
    manifest = _parse_manifest(_read_manifest(path), path)
    for name, entry in manifest.files.items():
        _check_file(path / name, entry)
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
    try:
        observation_space = space_from_json(raw["observation_space"])
        if not isinstance(observation_space, BoxSpace):
            raise ManifestError(f"{where}: the observation space is not a Box")
        manifest = PolicyManifest(
            policy_id=str(raw["policy_id"]),
            algorithm=str(raw["algorithm"]),
            observation_space=observation_space,
            action_space=space_from_json(raw["action_space"]),
            distribution=str(raw["distribution"]),
            noise=NoiseSpec(str(raw["noise"]["distribution"]), int(raw["noise"]["size"])),
            outputs=tuple(str(name) for name in raw["outputs"]),
            files={
                str(name): FileEntry(str(entry["sha256"]), int(entry["size_bytes"]))
                for name, entry in raw["files"].items()
            },
            environment=raw.get("environment"),
            raw=raw,
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as exc:
        raise ManifestError(f"{where} is incomplete: {type(exc).__name__} {exc}") from exc
    _check_names(manifest, where)
    return manifest


def _digest(raw: Mapping[str, Any]) -> str:
    """SHA-256 over all other fields, written in one way only."""
    fields = {key: value for key, value in raw.items() if key != "manifest_sha256"}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_names(manifest: PolicyManifest, where: Path) -> None:
    pair = (manifest.distribution, manifest.noise.distribution)
    if pair not in _DISTRIBUTIONS:
        raise ManifestError(
            f"{where}: the distribution {pair[0]!r} with {pair[1]!r} noise is unknown"
        )
    for name in (ONNX, GOLDEN):
        if name not in manifest.files:
            raise ManifestError(f"{where} lists no {name}")
    for name in manifest.files:
        if Path(name).name != name or name == MANIFEST:
            raise ManifestError(f"{where} lists the file {name!r}; only plain names are allowed")
    if manifest.policy_id != manifest.files[ONNX].sha256[:12]:
        raise ManifestError(f"{where}: policy_id is not the beginning of {ONNX}'s SHA-256")


def _check_file(path: Path, entry: FileEntry) -> None:
    if not path.is_file():
        raise ChecksumError(f"{path} is missing", file=path.name)
    size_bytes = path.stat().st_size
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
