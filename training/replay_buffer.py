"""The replay buffer of an off-policy run, kept beside its two newest checkpoints.

RLlib's checkpoints of the new API stack leave it out, and it is too large to be in each of them.
Two, since the one before is gone on from where the newest is damaged.
The checkpoint's signed facts hold the file's SHA-256, so that nothing else is ever unpickled.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.durable_files import rename, temporary_name

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm

_N_KEPT = 2


def save_replay_buffer(algorithm: Algorithm, directory: Path, iteration: int) -> dict[str, str]:
    """Write an algorithm's buffer beside the one before, which an older checkpoint still needs.

    Returns:
        The facts that `restore_replay_buffer` wants; none where there is no buffer.
    """
    buffer: Any = algorithm.local_replay_buffer
    if buffer is None:
        return {}
    directory.mkdir(exist_ok=True)
    final = directory / f"iteration_{iteration:06d}.pkl"
    data = pickle.dumps(buffer.get_state(), protocol=pickle.HIGHEST_PROTOCOL)
    temporary = temporary_name(final)
    try:
        temporary.write_bytes(data)
        rename(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    return {"file": final.name, "sha256": hashlib.sha256(data).hexdigest()}


def prune_replay_buffers(directory: Path, checkpoints: Sequence[Path]) -> None:
    """Delete every buffer but those of the first two of a run's checkpoints, newest first."""
    kept = {f"{checkpoint.name}.pkl" for checkpoint in checkpoints[:_N_KEPT]}
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name not in kept:
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
    if not path.is_file():
        return False
    data = path.read_bytes()  # once: what is unpickled is what was hashed
    if hashlib.sha256(data).hexdigest() != facts.get("sha256"):
        return False
    state: Any = pickle.loads(data)
    del data
    try:
        buffer.set_state(state)
    except KeyError:  # of another kind of buffer: settings changed that the fast one doesn't know
        return False
    return True
