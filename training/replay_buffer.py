"""The replay buffer of an off-policy run, kept beside its newest checkpoint.

RLlib's checkpoints of the new API stack leave it out, and it is too large to be in each of them.
The checkpoint's signed facts hold the file's SHA-256, so that nothing else is ever unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm

logger = logging.getLogger("policyserve.training")


def save_replay_buffer(algorithm: Algorithm, directory: Path, iteration: int) -> dict[str, str]:
    """Write an algorithm's buffer, and delete the one before.

    Returns:
        The facts that `restore_replay_buffer` wants; none where there is no buffer.
    """
    buffer: Any = algorithm.local_replay_buffer
    if buffer is None:
        return {}
    directory.mkdir(exist_ok=True)
    final = directory / f"iteration_{iteration:06d}.pkl"
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(pickle.dumps(buffer.get_state(), protocol=pickle.HIGHEST_PROTOCOL))
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)
    return {"file": final.name, "sha256": _sha256(final)}


def prune_replay_buffers(directory: Path, facts: Mapping[str, str]) -> None:
    """Delete every buffer but the one that a checkpoint's facts name."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name != facts.get("file"):
            path.unlink()


def restore_replay_buffer(algorithm: Algorithm, directory: Path, facts: Mapping[str, str]) -> bool:
    """Load the buffer that a checkpoint's facts name.

    Args:
        algorithm: Restored from that checkpoint.
        directory: Where the run keeps it.
        facts: As `save_replay_buffer` returned them; believed, since it is unpickled by them.

    Returns:
        Whether the algorithm goes on as it was: False if it has a buffer and the file is gone or
        another one. Then it starts empty.
    """
    buffer: Any = algorithm.local_replay_buffer
    if buffer is None:
        return True
    path = directory / Path(facts.get("file", "none")).name
    if not path.is_file() or _sha256(path) != facts.get("sha256"):
        return False
    state: Any = pickle.loads(path.read_bytes())
    buffer.set_state(state)
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
