"""Files that are there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.durable_files import rename, temporary_name


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a reader sees the old one until then.

    Raises:
        OSError: It can't be written; the old one stays, and nothing else.
    """
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(content)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document, whole or not at all."""
    write_atomically(path, json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} where there is none that can be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
