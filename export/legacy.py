"""What a path is that looks like a policy and is no checkpoint that can be exported.

Only names and small JSON files are looked at; nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

_MARKER = "rllib_checkpoint.json"
_RAY_1_FILE = re.compile(r"checkpoint-\d+")
_MAX_MARKER_BYTES = 2**20

_RETRAIN = (
    "it has no RLModule to export: train again on the new API stack (RLlib's default since Ray "
    "2.40, and what `policyserve train` uses)"
)


def explain_legacy(directory: Path) -> str | None:
    """Say what a path is, if it is one of the things that users take for a checkpoint.

    Args:
        directory: What the user gave; a file or a directory, or nothing at all.

    Returns:
        One sentence with the reason and the way out; None where this module knows nothing
        against it (it may still be no checkpoint).
    """
    if directory.is_file():
        return _explain_file(directory)
    if not directory.is_dir() or (directory / "run.json").is_file():
        return None
    if (directory / _MARKER).is_file():
        return _explain_marker(directory)
    return _explain_old(directory) or _explain_part(directory) or _explain_tune(directory)


def _explain_file(path: Path) -> str | None:
    if _RAY_1_FILE.fullmatch(path.name):
        return f"{path} is a checkpoint of Ray 1 or 2.0 (the old API stack); {_RETRAIN}"
    if path.name == _MARKER:
        return f"{path} is a file of a checkpoint; give its directory {path.parent}"
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = set(archive.namelist())
        except (zipfile.BadZipFile, OSError):
            return None
        if "_stable_baselines3_version" in names or {"data", "policy.pth"} <= names:
            return (
                f"{path} is a model of Stable-Baselines3, not of RLlib; it cannot be exported: "
                "train the same environment with `policyserve train`"
            )
    return None


def _explain_marker(directory: Path) -> str | None:
    facts = _read_json(directory / _MARKER)
    version = str(facts.get("checkpoint_version", ""))
    # On the new API stack the file has no `type`, and version 2.0 or later.
    is_old = version.startswith(("0.", "1.")) or facts.get("type") in ("Algorithm", "Policy")
    if not (is_old or _has_old_files(directory)):
        return None
    what = "a Policy" if facts.get("type") == "Policy" else "an Algorithm"
    written = f", written by Ray {facts['ray_version']}" if "ray_version" in facts else ""
    return (
        f"{directory} is a checkpoint of {what} of RLlib's old API stack (checkpoint version "
        f"{version or 'unknown'}{written}); {_RETRAIN}"
    )


def _explain_old(directory: Path) -> str | None:
    if any(_RAY_1_FILE.fullmatch(entry.name) for entry in directory.iterdir()):
        return f"{directory} is a checkpoint of Ray 1 or 2.0 (the old API stack); {_RETRAIN}"
    if _has_old_files(directory):
        return f"{directory} is a checkpoint of RLlib's old API stack; {_RETRAIN}"
    return None


def _has_old_files(directory: Path) -> bool:
    names = ("policy_state.pkl", "policy_state.msgpck", "policies")
    return any((directory / name).exists() for name in names)


def _explain_part(directory: Path) -> str | None:
    """A component that RLlib wrote, without the algorithm around it."""
    if not (directory / "class_and_ctor_args.pkl").is_file():
        return None
    is_module = any((directory / f"module_state.{end}").is_file() for end in ("pkl", "msgpack"))
    what = "an RLModule" if is_module else "a part of a checkpoint"
    whole = next(
        (parent for parent in directory.absolute().parents if (parent / _MARKER).is_file()), None
    )
    if whole is not None:
        way_out = f"give the checkpoint that it lies in: {whole}"
        if is_module:
            way_out += f" (with --module-id {directory.name} for this module)"
        return f"{directory} is {what}, without the connectors around it; {way_out}"
    return (
        f"{directory} is {what} alone, and how observations and actions are transformed lies in "
        "the connectors beside it; give the whole directory that `Algorithm.save_to_path` wrote "
        f"(it holds {_MARKER})"
    )


def _explain_tune(directory: Path) -> str | None:
    is_experiment = any(directory.glob("experiment_state-*.json"))
    is_trial = any((directory / name).is_file() for name in ("params.json", "params.pkl"))
    if not (is_experiment or is_trial):
        return None
    what = "an experiment" if is_experiment else "a trial"
    checkpoints = "*/checkpoint_*" if is_experiment else "checkpoint_*"
    found = [marker.parent for marker in directory.glob(f"{checkpoints}/{_MARKER}")]
    old = f"{checkpoints}/checkpoint-*"
    if not found and any(_RAY_1_FILE.fullmatch(path.name) for path in directory.glob(old)):
        return (
            f"{directory} is {what} of Ray Tune, with checkpoints of Ray 1 or 2.0 (the old API "
            f"stack); {_RETRAIN}"
        )
    if not found:
        return (
            f"{directory} is {what} of Ray Tune without a checkpoint in it; save one with "
            "CheckpointConfig(checkpoint_at_end=True)"
        )
    # Each trial counts its checkpoints from 0, so the highest is not always the newest.
    newest = max(found, key=lambda path: ((path / _MARKER).stat().st_mtime, path.name))
    return (
        f"{directory} is {what} of Ray Tune, not a checkpoint; it holds {len(found)}, and the "
        f"newest is {newest}: give that or another one"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_MAX_MARKER_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
