"""A run's progress as TensorBoard event files, which hold what progress.csv holds."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_EVENT_FILES = "events.out.tfevents.*"
# What only says where a row stands.
_PLACES = ("iteration", "env_steps", "time_s")
_EVALUATION = "evaluation_"


class TensorBoardFiles:
    """Writes rows of progress.csv as scalars; the step is `env_steps`.

    A row's wall time is that of training: seconds between two events are seconds of training, also
    across an interruption.

    Args:
        directory: Where the event files go; it is made.
        progress_file: The run's progress.csv. Whatever event files a run has when it is resumed
            are replaced by what this file holds, so that a curve has neither a gap nor a double
            point, however the run ended.

    Raises:
        OSError: The directory can't be written.
    """

    def __init__(self, directory: Path, progress_file: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # it imports torch

        for path in directory.glob(_EVENT_FILES) if directory.is_dir() else ():
            path.unlink()
        rows = list(_rows(progress_file))
        trained_s = rows[-1]["time_s"] if rows else 0.0
        self._zero_s = time.time() - (trained_s or 0.0)
        directory.mkdir(parents=True, exist_ok=True)
        # Not SummaryWriter: its thread ends where the disk is full, and then training waits for it.
        self._writer: Any = EventsWriter(str(directory / "events"))
        for row in rows:
            self.append(row)

    def append(self, row: Mapping[str, float | int | None]) -> None:
        """Write a row to the disk; what is None or NaN is left out."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        steps, trained_s = row["env_steps"], row["time_s"]
        assert steps is not None
        values = [
            Summary.Value(tag=tag_of(name), simple_value=value)
            for name, value in row.items()
            if name not in _PLACES and value is not None and not math.isnan(value)
        ]
        # One event for all of them: a row costs a fifth of a millisecond.
        event = Event(step=int(steps), wall_time=self._zero_s + (trained_s or 0.0))
        event.summary.value.extend(values)
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def tag_of(column: str) -> str:
    """The tag of a column, such as `train/episode_return_mean` or `loss/vf_loss`."""
    if column.startswith(_EVALUATION):
        return f"evaluation/{column.removeprefix(_EVALUATION)}"
    if column == "n_evaluation_episodes":
        return "evaluation/n_episodes"
    if column.startswith(("episode_", "n_")):
        return f"train/{column}"
    if column.endswith("_per_s"):
        return f"speed/{column}"
    return f"{'loss' if column.endswith('loss') else 'learner'}/{column}"


def _rows(path: Path) -> Iterator[dict[str, float | None]]:
    """The rows of a progress.csv that `RunDirectory.drop_after` has left, or of none."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            yield {name: float(cell) if cell else None for name, cell in cells.items()}
