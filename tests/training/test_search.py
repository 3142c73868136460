"""Real searches by the command, small ones: killed, interrupted, resumed, and trained again."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import READY_S, STOP_S, command, policyserve, wait_until
from training.provenance import verify_checkpoint
from training.run_directory import RunDirectory

pytestmark = pytest.mark.slow

# Two trials train to their end, one is in an environment that raises. The first one is the best, as
# the others' rewards are none or a hundredth.
GRID = """
env: {grid: [CartPole-v1, "search_envs:RaisingCartPole-v0", "search_envs:PoorCartPole-v0"]}
model: {fcnet_hiddens: [8]}
algo_config:
  lr: {loguniform: [1e-4, 1e-2]}
  train_batch_size_per_learner: 512
  minibatch_size: 256
  num_epochs: 2
stop: {timesteps: 2560}
checkpoint: {every: 2}
tune: {seed: 1, max_concurrent_trials: 1}
"""
POPULATION = """
env: CartPole-v1
model: {fcnet_hiddens: [8]}
algo_config:
  lr: {loguniform: [1e-4, 1e-2]}
  train_batch_size_per_learner: 256
  minibatch_size: 256
  num_epochs: 1
stop: {timesteps: 2600}
tune:
  num_samples: 2
  seed: 1
  scheduler: pbt
  pbt: {perturbation_interval: 4, quantile_fraction: 0.5, synchronous: true}
"""
ENVS = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class RaisingCartPole(CartPoleEnv):
    def step(self, action):
        raise RuntimeError("the pole broke")

class PoorCartPole(CartPoleEnv):
    def step(self, action):
        observation, reward, *others = super().step(action)
        return observation, reward / 100, *others

for env in (RaisingCartPole, PoorCartPole):
    gymnasium.register(env.__name__ + "-v0", entry_point=env, max_episode_steps=500)
"""
TIMES = ("time_s", "env_steps_per_s")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "search_envs.py").write_text(ENVS)
    path = os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])
    return {"HOME": str(home), "XDG_DATA_HOME": str(home), "PYTHONPATH": path}


def rows(run_dir: Path) -> list[dict[str, str]]:
    with contextlib.suppress(FileNotFoundError), (run_dir / "progress.csv").open() as file:
        return list(csv.DictReader(file))
    return []


def table(search_dir: Path) -> list[dict[str, str]]:
    with (search_dir / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def tuning(
    text: str, search_dir: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """A search that was started; it is gone after the block."""
    file = search_dir.with_suffix(".yaml")
    file.write_text(text)
    process = subprocess.Popen(
        command(["tune", file, "--run-dir", search_dir]),
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=STOP_S)


def wait_for_rows(process: subprocess.Popen[str], run_dir: Path, n_rows: int) -> None:
    def has_rows() -> bool:
        assert process.poll() is None, process.communicate()
        return len(rows(run_dir)) >= n_rows

    wait_until(has_rows, f"{run_dir} has {n_rows} iterations", READY_S)


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run_dir)]


def test_a_killed_search_goes_on_and_its_best_config_repeats_the_best_trial(
    environment, tmp_path, monkeypatch
):
    search_dir = tmp_path / "search"
    runs = [search_dir / "trials" / f"trial_{number:04d}" for number in (1, 2, 3)]
    with tuning(GRID, search_dir, environment) as process:
        wait_for_rows(process, runs[2], 2)  # the first has ended, the second failed
        process.kill()
        process.wait(STOP_S)
    first_ended = (runs[0] / "result.json").stat().st_mtime_ns
    done = policyserve("tune", "--resume", search_dir, "--json", env=environment)
    assert done.returncode == 0, done.stdout + done.stderr

    found = json.loads(done.stdout.splitlines()[-1])
    assert found["statuses"] == {"done": 2, "failed": 1}
    assert (runs[0] / "result.json").stat().st_mtime_ns == first_ended
    trials = table(search_dir)
    assert [row["trial"] for row in trials] == [run.name for run in runs]
    for row, run in zip(trials[::2], runs[::2], strict=True):
        numbers = [int(progress["iteration"]) for progress in rows(run)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert int(row["env_steps"]) == int(rows(run)[-1]["env_steps"]) >= 2560
    assert "RuntimeError: the pole broke" in trials[1]["error"]
    assert {path.name for path in search_dir.iterdir() if path.name[0] != "."} == {
        *("best.yaml", "search.json", "search.yaml"),
        *("trials", "trials.csv", "trials.parquet", "tune.log"),
    }
    assert not (search_dir / ".tune").exists()
    assert found["best"]["trial"] == runs[0].name
    last = RunDirectory(runs[0]).last()
    assert last is not None
    monkeypatch.setenv("XDG_DATA_HOME", environment["XDG_DATA_HOME"])
    assert verify_checkpoint(last).is_trusted

    again = tmp_path / "again"
    done = policyserve("train", search_dir / "best.yaml", "--run-dir", again, env=environment)
    assert done.returncode == 0, done.stderr
    # The best ran from its start to its end, so that it is the same, number for number.
    assert len(rows(again)) == 5
    assert untimed(again) == untimed(runs[0])


def test_an_interrupted_population_goes_on_and_its_bad_members_learn_from_the_good(
    environment, tmp_path
):
    search_dir = tmp_path / "search"
    runs = [search_dir / "trials" / f"trial_{number:04d}" for number in (1, 2)]
    with tuning(POPULATION, search_dir, environment) as process:
        for run in runs:
            wait_for_rows(process, run, 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=STOP_S)
    assert process.returncode == 128 + signal.SIGINT, err
    assert f"go on with: policyserve tune --resume {search_dir}" in out
    for run in runs:
        last = RunDirectory(run).last()
        assert last is not None
        assert int(last.name.split("_")[1]) == len(rows(run))  # saved where it was

    done = policyserve("tune", "--resume", search_dir, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    histories = [json.loads((run / "history.json").read_text()) for run in runs]
    events = [(n, event) for n, history in enumerate(histories) for event in history["events"]]
    assert events
    for number, event in events:
        assert event["from_trial"] == runs[1 - number].name
        assert 1e-4 <= event["config"]["algo_config.lr"] <= 1e-2
    for run, history in zip(runs, histories, strict=True):
        numbers = [int(row["iteration"]) for row in rows(run)]
        assert numbers == list(range(1, len(numbers) + 1))
        # From each iteration on the policy was trained with the rate that the history names.
        for begin in history["schedule"]:
            rate = begin["config"]["algo_config.lr"]
            if begin["iteration"] < len(numbers):
                assert float(rows(run)[begin["iteration"]]["lr"]) == pytest.approx(rate, rel=1e-4)
