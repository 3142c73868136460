"""Event files hold what progress.csv holds: read back as the TFRecords that they are."""

from __future__ import annotations

import contextlib
import csv
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from training.tensorboard import TensorBoardFiles, tag_of

HEADER = "iteration,env_steps,time_s,episode_return_mean,policy_loss\n"


def events(directory: Path) -> list[Any]:
    """TFRecords: the length as 8 bytes, its checksum's 4, the event, its checksum's 4."""
    (path,) = directory.iterdir()
    content = path.read_bytes()
    found = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[12 + length + 4 :]
    return found[1:]  # the first says the format's version


def scalars(directory: Path) -> list[tuple[str, int, float]]:
    return [
        (value.tag, event.step, value.simple_value)
        for event in events(directory)
        for value in event.summary.value
    ]


def test_a_row_is_scalars_at_its_environment_steps(tmp_path: Path) -> None:
    with contextlib.closing(TensorBoardFiles(tmp_path / "tb", tmp_path / "none.csv")) as files:
        row = {"iteration": 1, "env_steps": 1024, "time_s": 2.5}
        files.append({**row, "episode_return_mean": 21.5, "policy_loss": None, "entropy": math.nan})
        # Read while the run goes on: each row is on the disk.
        assert scalars(tmp_path / "tb") == [("train/episode_return_mean", 1024, 21.5)]


def test_a_resumed_run_has_neither_a_gap_nor_a_double_point(tmp_path: Path) -> None:
    progress, directory = tmp_path / "progress.csv", tmp_path / "tb"
    with contextlib.closing(TensorBoardFiles(directory, progress)) as files:
        for step in (1, 2, 3):  # the third was logged, and lost with the killed run
            row = {"iteration": step, "env_steps": 100 * step, "time_s": 1.0 * step}
            files.append({**row, "episode_return_mean": -1.0})
    (killed,) = directory.iterdir()
    killed.rename(directory / "events.out.tfevents.1.vm")  # names have the second they started in
    progress.write_text(HEADER + "1,100,1,10,0.5\n2,200,2,20,\n")
    with contextlib.closing(TensorBoardFiles(directory, progress)) as files:
        row = {"iteration": 3, "env_steps": 300, "time_s": 3.0}
        files.append({**row, "episode_return_mean": 30.0})
    assert scalars(directory) == [
        ("train/episode_return_mean", 100, 10.0),
        ("loss/policy_loss", 100, 0.5),
        ("train/episode_return_mean", 200, 20.0),
        ("train/episode_return_mean", 300, 30.0),
    ]
    first, second, third = (event.wall_time for event in events(directory))
    assert (second - first, third - second) == pytest.approx((1.0, 1.0), abs=1e-5)


@pytest.mark.parametrize(
    ("column", "tag"),
    [
        ("episode_return_mean", "train/episode_return_mean"),
        ("n_truncated", "train/n_truncated"),
        ("evaluation_return_mean", "evaluation/return_mean"),
        ("n_evaluation_episodes", "evaluation/n_episodes"),
        ("policy_loss", "loss/policy_loss"),
        ("lr", "learner/lr"),
        ("env_steps_per_s", "speed/env_steps_per_s"),
    ],
)
def test_tags_are_grouped_as_tensorboard_shows_them(column: str, tag: str) -> None:
    assert tag_of(column) == tag


def expected_of(progress: Path) -> dict[tuple[str, int], float]:
    """What event files of this progress.csv hold."""
    with progress.open(newline="") as file:
        return {
            (tag_of(name), int(row["env_steps"])): float(cell)
            for row in csv.DictReader(file)
            for name, cell in row.items()
            if cell and name not in ("iteration", "env_steps", "time_s")
        }
