"""Which checkpoints of a run can be gone on from, and what is said about those that can't."""

from __future__ import annotations

from pathlib import Path

from training.errors import CheckpointNotFoundError, UntrustedCheckpointError
from training.provenance import verify_checkpoint, why_damaged
from training.run_directory import RunDirectory


def checkpoints_to_resume(run: RunDirectory, *, trust: bool) -> tuple[list[Path], list[str]]:
    """Find the checkpoints that may be unpickled, newest first.

    Args:
        run: The run.
        trust: Take also those that this user's own `train` did not sign, if they are whole.

    Returns:
        The checkpoints, at least one, and a line about each newer one that is passed over.

    Raises:
        CheckpointNotFoundError: There is none, or all of them are damaged.
        UntrustedCheckpointError: There are some, and `trust` was not given.
    """
    newest_first = run.all_checkpoints()
    if not newest_first:
        raise CheckpointNotFoundError(f"{run.path} has no checkpoint to resume from")
    reasons = {path: _why_not(path, trust) for path in newest_first}
    good = [path for path, reason in reasons.items() if reason is None]
    if not good:
        _refuse(newest_first[0], reasons[newest_first[0]], trust)
    n_newer = newest_first.index(good[0])
    notes = [f"{path.name} is passed over: {reasons[path]}" for path in newest_first[:n_newer]]
    return good, notes


def _why_not(checkpoint: Path, trust: bool) -> str | None:
    if trust:
        return why_damaged(checkpoint)
    provenance = verify_checkpoint(checkpoint)
    return None if provenance.is_trusted else provenance.reason


def _refuse(newest: Path, reason: str | None, trust: bool) -> None:
    if trust:
        raise CheckpointNotFoundError(
            f"every checkpoint of this run is damaged, the newest, {newest}: {reason}"
        )
    raise UntrustedCheckpointError(
        f"{newest} is not trusted: {reason}. A checkpoint is pickled code; if you trust where it "
        "came from, give --trust-checkpoint"
    )
