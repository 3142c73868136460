from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from training.config import StopConfig
from training.progress import ProgressFile, ProgressLine, ProgressRow, return_text

ROW = ProgressRow(
    iteration=4,
    env_steps=4000,
    time_s=2.0,
    episode_return_mean=21.25,
    episode_return_min=10.0,
    episode_return_max=30.0,
    episode_length_mean=21.25,
    n_episodes=12,
    n_terminated=11,
    n_truncated=1,
    evaluation_return_mean=None,
    evaluation_return_std=None,
    evaluation_length_mean=None,
    n_evaluation_episodes=None,
    n_evaluation_terminated=None,
    n_evaluation_truncated=None,
    env_steps_per_s=2000.0,
    losses={"policy_loss": -0.01, "vf_loss": 0.5},
)
EVALUATED = replace(
    ROW,
    evaluation_return_mean=40.0,
    evaluation_return_std=1.5,
    evaluation_length_mean=41.0,
    n_evaluation_episodes=10,
    n_evaluation_terminated=9,
    n_evaluation_truncated=1,
)


def lines(stop: StopConfig, *rows: ProgressRow, quiet: bool = False) -> list[str]:
    stdout = io.StringIO()
    with ProgressLine(Console(file=stdout, width=40), stop, quiet=quiet) as line:
        for row in rows:
            line.show(row)
    return stdout.getvalue().splitlines()


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "progress.csv"
    nothing = {"policy_loss": -0.01, "vf_loss": math.nan}
    ProgressFile(path).append(replace(ROW, episode_return_mean=None, losses=nothing))
    ProgressFile(path).append(replace(EVALUATED, iteration=5))  # a resumed run
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["4", "5"]
    assert (rows[0]["episode_return_mean"], rows[0]["vf_loss"]) == ("", "")
    assert (rows[1]["episode_return_mean"], rows[1]["env_steps"]) == ("21.25", "4000")
    assert [row["evaluation_return_mean"] for row in rows] == ["", "40"]
    assert [row["n_truncated"] for row in rows] == ["1", "1"]
    for column in "time_s episode_return_min episode_length_mean n_episodes".split():  # noqa: SIM905
        assert column in rows[0]


def test_a_pipe_gets_a_plain_line_with_return_speed_and_time_left():
    (line,) = lines(StopConfig(timesteps=10_000), ROW)
    for part in ("iteration 4", "4,000 steps", "return 21.2", "2,000 steps/s", "3 s left"):
        assert part in line  # (10,000 - 4,000) / 2,000 per second
    assert "at most" not in line
    assert "\x1b" not in line


def test_with_a_stop_return_the_time_left_is_an_upper_bound_and_the_nearest_budget_counts():
    stop = StopConfig(episode_return=475.0, timesteps=10_000, time_s=4.0)
    (line,) = lines(stop, ROW)
    assert "at most 2 s left" in line  # 4 s less the 2 s of training so far


def test_a_pipe_is_not_flooded_and_quiet_is_quiet():
    assert len(lines(StopConfig(timesteps=10_000), *[ROW] * 100)) == 1
    assert lines(StopConfig(timesteps=10_000), ROW, quiet=True) == []


def test_before_an_episode_has_ended_there_is_no_return():
    (line,) = lines(StopConfig(time_s=600.0), replace(ROW, episode_return_mean=None))
    assert "return -" in line
    assert "9 min 58 s left" in line


@pytest.mark.parametrize(
    ("value", "text"), [(484.04, "484.0"), (-1076.14, "-1076.1"), (0.7441, "0.744"), (0.0, "0")]
)
def test_small_returns_keep_their_digits(value, text):
    assert return_text(value) == text
