"""Real trainings, by the command, each in its own process: small networks of steps, all slow."""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
import os
import pickle
import signal
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.processes import READY_S, command, policyserve, wait_until
from training.provenance import verify_checkpoint
from training.run_directory import find_checkpoint, read_run

pytestmark = pytest.mark.slow

FAILING_ENV = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class FailingCartPole(CartPoleEnv):
    n_steps = 0

    def step(self, action):
        FailingCartPole.n_steps += 1
        if FailingCartPole.n_steps > 1500:
            raise RuntimeError("the pole broke")
        return super().step(action)

gymnasium.register("FailingCartPole-v0", entry_point=FailingCartPole, max_episode_steps=500)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "failing_env.py").write_text(FAILING_ENV)
    path = os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])
    return {"HOME": str(home), "XDG_DATA_HOME": str(home), "PYTHONPATH": path}


@pytest.fixture(scope="module")
def train(environment):
    return functools.partial(policyserve, "train", env=environment)


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def result(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def short_run(train, tmp_path_factory):
    """Two iterations of 512 steps, seeded; from a new interpreter, imports and all."""
    run_dir = tmp_path_factory.mktemp("short") / "run"
    done = train(
        *("--env", "CartPole-v1", "--run-dir", run_dir, "--seed", 5, "--stop-timesteps", 1000),
        *("--set", "train_batch_size_per_learner=512", "--set", "model.fcnet_hiddens=[16]"),
        in_new_interpreter=True,
    )
    return run_dir, done


@pytest.fixture
def signed_by_test_user(environment, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", environment["XDG_DATA_HOME"])


@pytest.mark.usefixtures("signed_by_test_user")
def test_a_run_leaves_what_the_contract_names(short_run):
    run_dir, done = short_run
    assert (done.returncode, done.stderr) == (0, "")
    assert "policyserve export" in done.stdout
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["algo_config"]["train_batch_size_per_learner"] == 512
    assert config["model"]["fcnet_hiddens"] == [16]
    info = read_run(run_dir)
    assert (info.env, info.algo, info.seed) == ("CartPole-v1", "PPO", 5)
    assert info.versions["ray"].startswith("2.60")
    ended = result(run_dir)
    assert ended["status"] == "stop_timesteps"
    assert ended["iterations"] == len(rows(run_dir)) == 2
    assert ended["env_steps"] == int(rows(run_dir)[-1]["env_steps"]) >= 1000
    checkpoint = find_checkpoint(run_dir)
    assert checkpoint.name == "iteration_000002"
    provenance = verify_checkpoint(checkpoint)
    assert provenance.is_trusted, provenance.reason
    assert provenance.facts["env_steps"] == ended["env_steps"]
    # Ray's chatter is in the log, not on the terminal, and no token in the user's home.
    assert "rllib" in (run_dir / "train.log").read_text().lower()


def test_ray_leaves_nothing_in_the_users_home(short_run, environment):
    assert short_run[1].returncode == 0
    home = Path(environment["HOME"])
    ours = {"failing_env.py", "policyserve", "__pycache__"}
    assert {path.name for path in home.iterdir()} <= ours


def test_episode_lengths_of_cartpole_equal_its_returns(short_run):
    # CartPole pays 1 per step; RLlib's own lengths count chunks of an episode double.
    for row in rows(short_run[0]):
        assert float(row["episode_length_mean"]) == float(row["episode_return_mean"])


def test_a_seed_makes_the_same_curve_and_a_config_in_force_the_same_run(train, short_run, tmp_path):
    run_dir, _ = short_run
    done = train(run_dir / "config.yaml", "--run-dir", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    timing = {"time_s", "env_steps_per_s"}
    first, again = (
        [{name: row[name] for name in row if name not in timing} for row in rows(path)]
        for path in (run_dir, tmp_path / "again")
    )
    assert first == again


def test_an_environment_that_raises_keeps_the_checkpoint_and_the_traceback(train, tmp_path):
    run_dir = tmp_path / "run"
    done = train(
        *("--env", "failing_env:FailingCartPole-v0", "--run-dir", run_dir, "--seed", 1),
        *("--set", "train_batch_size_per_learner=512", "--set", "checkpoint.every=1"),
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "the pole broke" in done.stderr
    assert "environment 'failing_env:FailingCartPole-v0'" in done.stderr
    assert "Traceback" in (run_dir / "train.log").read_text()
    assert "the pole broke" in (run_dir / "train.log").read_text()
    assert result(run_dir)["status"] == "failed"
    assert find_checkpoint(run_dir).name == "iteration_000002"


def test_ctrl_c_saves_and_a_killed_run_resumes_without_gap_or_double_point(
    train, environment, tmp_path
):
    run_dir = tmp_path / "run"
    environment = {**os.environ, **environment}
    arguments = (
        *("train", "--env", "Pendulum-v1", "--run-dir", run_dir, "--stop-timesteps", 1_000_000),
        *("--set", "train_batch_size_per_learner=256"),
    )
    process = subprocess.Popen(command(arguments), env=environment, stdout=subprocess.DEVNULL)
    wait_for_rows(process, run_dir, 12)  # past the checkpoint at iteration 10
    process.kill()
    process.wait()
    n_killed = len(rows(run_dir))
    steps_before = [int(row["env_steps"]) for row in rows(run_dir) if int(row["iteration"]) <= 10]

    process = subprocess.Popen(
        command(["train", "--resume", run_dir]),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(process, run_dir, n_killed + 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=READY_S)
    assert process.returncode == 130
    assert f"--resume {run_dir}" in output
    curve = rows(run_dir)
    assert [int(row["iteration"]) for row in curve] == list(range(1, len(curve) + 1))
    assert [int(row["env_steps"]) for row in curve][:10] == steps_before
    ended = result(run_dir)
    assert ended["status"] == "interrupted"
    assert ended["last_checkpoint"] == f"checkpoints/iteration_{len(curve):06d}"

    missed = train("--resume", run_dir, "--stop-return", 0, "--stop-timesteps", 1000)
    assert missed.returncode == 1  # a Pendulum's return is below 0, and the steps are used up
    assert missed.stderr.count("\n") == 1
    assert "0 was asked for" in missed.stderr
    assert rows(run_dir) == curve


def filter_statistics(checkpoint: Path) -> tuple[int, np.ndarray]:
    """How many observations a checkpoint's filter has seen, and their mean."""
    path = checkpoint / "env_runner" / "env_to_module_connector" / "MeanStdFilter" / "state.pkl"
    (found,) = pickle.loads(path.read_bytes())[None]["running_stats"]
    mean = np.load(io.BytesIO(zlib.decompress(base64.b64decode(found["mean_array"]))))
    return found["num_pushes"], mean


def test_memory_and_filter_are_trained_by_two_processes_kept_and_resumed(train, tmp_path):
    run_dir = tmp_path / "run"
    done = train(
        *("--env", "tests.environments:ShiftedCartPole-v1", "--run-dir", run_dir, "--seed", 1),
        *("--num-env-runners", 2, "--stop-timesteps", 500, "--set", "model.use_lstm=true"),
        *("--set", "observation_filter=mean_std", "--set", "model.lstm_cell_size=8"),
        *("--set", "train_batch_size_per_learner=256", "--set", "model.fcnet_hiddens=[8]"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    refused = train("--resume", run_dir, "--set", "observation_filter=none")
    assert refused.returncode == 2
    assert "can't change `observation_filter`" in refused.stderr
    resumed = train("--resume", run_dir, "--stop-timesteps", 1000)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert len(rows(run_dir)) == 4
    for iteration in (2, 4):
        n_seen, mean = filter_statistics(run_dir / f"checkpoints/iteration_00000{iteration}")
        n_steps = int(rows(run_dir)[iteration - 1]["env_steps"])
        # It sees what the environments show: an observation a step, and the last of each episode;
        # resumed, 16 environments start again.
        n_episodes = sum(int(row["n_episodes"]) for row in rows(run_dir)[:iteration])
        assert n_steps + n_episodes <= n_seen <= n_steps + n_episodes + 2 * 16 + 2 * 16
        # 40,000 and -2, and the small changes of a pole that falls beyond 0.21 rad.
        np.testing.assert_allclose(mean[2:], [40_000, -2.0], atol=0.05)


def wait_for_rows(process: subprocess.Popen, run_dir: Path, n_rows: int) -> None:
    def has_rows() -> bool:
        assert process.poll() is None, process.returncode
        return (run_dir / "progress.csv").exists() and len(rows(run_dir)) >= n_rows

    wait_until(has_rows, f"{run_dir} has {n_rows} iterations", READY_S)


def test_the_shipped_cartpole_config_reaches_its_return(cartpole_run):
    ended = result(cartpole_run)  # tests/conftest.py trains it once, by the command
    assert ended["status"] == "stop_return"
    assert ended["episode_return_mean"] >= 475
    assert ended["best_checkpoint"] == ended["last_checkpoint"]
    # It is the mean of the run's last 20 episodes, none longer than CartPole's 500 steps.
    assert 475 <= float(rows(cartpole_run)[-1]["episode_return_max"]) <= 500
