"""Who wrote a checkpoint: an RLlib checkpoint is pickled code, so it is signed as it is written.

Each user has a secret key. `train` writes `policyserve.json` into every checkpoint: the SHA-256 of
each file and an HMAC over the whole document. Whoever reads a checkpoint calls `verify_checkpoint`
before unpickling anything; a checkpoint from elsewhere, or one changed since, is not trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIGNATURE_FILE = "policyserve.json"
FORMAT = "policyserve-checkpoint"
FORMAT_VERSION = 1
KEY_BYTES = 32  # the block of HMAC-SHA256's hash output; RFC 2104 section 3 asks for no less


@dataclass(frozen=True)
class Provenance:
    """What `verify_checkpoint` found.

    Attributes:
        is_trusted: This user's own `train` wrote every file as it is now.
        reason: One line for the user: why it is trusted or why not.
        facts: The signature file without its file list, {} where it can't be read. Don't believe
            it unless `is_trusted`.
    """

    is_trusted: bool
    reason: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def key_path() -> Path:
    """Where this user's key is: `$XDG_DATA_HOME/policyserve/run-key`."""
    data_home = os.environ.get("XDG_DATA_HOME", "")
    # The XDG base directory specification: a relative value is invalid and to be ignored.
    base = Path(data_home) if Path(data_home).is_absolute() else Path.home() / ".local" / "share"
    return base / "policyserve" / "run-key"


def ensure_key() -> bytes:
    """Read this user's key, creating it on first use.

    Raises:
        OSError: There is no key and none can be written (a read-only home), or it can't be read.
    """
    path = key_path()
    try:
        return _read_key(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Written whole under another name and linked into place: two first runs at once agree on one.
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # mkstemp creates it with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        Path(temporary).unlink()
    return _read_key(path)


def sign_checkpoint(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the signature file into a checkpoint directory that is otherwise whole.

    Args:
        path: The checkpoint directory.
        facts: JSON values to hold beside the signature (`env`, `iteration`, ...).

    Raises:
        OSError: No key, or the file can't be written.
    """
    key = ensure_key()
    document = _document(path, facts)
    document["hmac"] = _hmac(key, document)
    _write_document(path, document)


def describe_checkpoint(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the same file without a signature, for a user who can't have a key."""
    _write_document(path, _document(path, facts))


def verify_checkpoint(path: Path) -> Provenance:
    """Say whether this user's own `train` wrote a checkpoint and nothing changed since.

    Unpickles nothing. Every answer but "trusted" names what is wrong.
    """
    try:
        document = json.loads((path / SIGNATURE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Provenance(False, f"it has no signature ({SIGNATURE_FILE} is missing)")
    except (OSError, ValueError, RecursionError):
        return Provenance(False, f"its signature can't be read ({SIGNATURE_FILE} is damaged)")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return Provenance(False, f"{SIGNATURE_FILE} is not a {FORMAT} document")
    facts = {key: value for key, value in document.items() if key not in ("files", "hmac")}
    if document.get("format_version") != FORMAT_VERSION:
        found = document.get("format_version")
        return Provenance(False, f"its signature has format_version {found!r}, not 1", facts)
    try:
        reason = _why_not_signed(document) or _why_files_differ(path, document["files"])
    except OSError as exc:
        reason = f"a file can't be read: {exc}"
    if reason:
        return Provenance(False, reason, facts)
    return Provenance(True, "this user's own `policyserve train` wrote it", facts)


def why_damaged(path: Path) -> str | None:
    """Say how a checkpoint's files differ from the list in it; None where they don't.

    Whoever wrote the checkpoint wrote the list: this finds accidents, `verify_checkpoint` intent.
    """
    try:
        document = json.loads((path / SIGNATURE_FILE).read_text(encoding="utf-8"))
        return _why_files_differ(path, dict(document["files"]))
    except FileNotFoundError:
        return f"{SIGNATURE_FILE} is missing"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return f"{SIGNATURE_FILE} is damaged"


def _why_not_signed(document: Mapping[str, Any]) -> str | None:
    signature = document.get("hmac")
    if not isinstance(signature, str) or not isinstance(document.get("files"), dict):
        return "it is not signed"
    try:
        key = _read_key(key_path())
    except FileNotFoundError:
        return "it was signed elsewhere: this user has no key, so never trained here"
    except (OSError, RuntimeError) as exc:  # RuntimeError: this user has no home
        return f"this user's key can't be read: {exc}"
    signed = {name: value for name, value in document.items() if name != "hmac"}
    try:
        is_ours = hmac.compare_digest(signature.encode(), _hmac(key, signed).encode())
    except ValueError:  # a NaN or half a surrogate pair, which `sign_checkpoint` never writes
        is_ours = False
    if not is_ours:
        return "its signature is not this user's (another user or machine, or it was edited)"
    return None


def _why_files_differ(path: Path, signed: Mapping[str, str]) -> str | None:
    found = set(_relative_files(path))
    if missing := sorted(set(signed) - found):
        return f"a file is missing since it was signed: {missing[0]}"
    if extra := sorted(found - set(signed)):
        return f"a file was added since it was signed: {extra[0]}"
    for name in sorted(signed):
        if not hmac.compare_digest(str(signed[name]), _sha256(path / name)):
            return f"a file changed since it was signed: {name}"
    return None


def _read_key(path: Path) -> bytes:
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise OSError(f"{path} holds {len(key)} bytes, expected {KEY_BYTES}: delete it")
    return key


def _document(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    files = {name: _sha256(path / name) for name in _relative_files(path)}
    return {"format": FORMAT, "format_version": FORMAT_VERSION, **facts, "files": files}


def _write_document(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False)
    (path / SIGNATURE_FILE).write_text(text + "\n", encoding="utf-8")


def _hmac(key: bytes, document: Mapping[str, Any]) -> str:
    # One way to write a document, so that the same facts always give the same bytes.
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key, canonical.encode("utf-8"), hashlib.sha256).hexdigest()


def _relative_files(path: Path) -> list[str]:
    # A link counts as a file: one that appears where none was signed is an extra file.
    names = []
    for folder, folders, files in os.walk(path):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        names += [(Path(folder) / name).relative_to(path).as_posix() for name in files + links]
    return sorted(name for name in names if name != SIGNATURE_FILE)


def _sha256(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return "not a plain file"
    return hashlib.sha256(path.read_bytes()).hexdigest()
