from __future__ import annotations

import errno
import functools
import json
import os
from pathlib import Path

import pytest

from tests.processes import policyserve
from training.errors import ConfigError, EnvironmentFailedError
from training.failures import as_training_error
from training.run_directory import RunDirectory, find_checkpoint

FAILING_ENV = """
import resource

import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class FailingCartPole(CartPoleEnv):
    n_steps = 0

    def __init__(self, fails_after=None, disk_is_full_after=None, **kwargs):
        super().__init__(**kwargs)
        self.fails_after, self.disk_is_full_after = fails_after, disk_is_full_after

    def step(self, action):
        FailingCartPole.n_steps += 1
        if self.fails_after is not None and FailingCartPole.n_steps > self.fails_after:
            raise RuntimeError("the pole broke")
        if (self.disk_is_full_after or 10**9) < FailingCartPole.n_steps:
            # No file of this process grows any more.
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return super().step(action)

gymnasium.register("FailingCartPole-v1", entry_point=FailingCartPole, max_episode_steps=500)
"""


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    return run


def raised(exc: Exception) -> Exception:
    try:
        raise exc
    except Exception as found:
        return found


def test_an_error_of_ours_stays_as_it_is(run):
    error = ConfigError("a line for the user")
    assert as_training_error(error, "CartPole-v1", run) is error


@pytest.mark.parametrize(
    ("number", "text"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EFBIG, "larger than")],
)
def test_a_full_disk_is_named_with_the_file_and_what_to_do(run, number, text):
    run.save_checkpoint(2, lambda path: (path / "rllib_checkpoint.json").touch())
    error = raised(OSError(number, os.strerror(number), "/data/state.pkl"))
    try:
        raise RuntimeError("RLlib could not save") from error
    except RuntimeError as exc:
        message = as_training_error(exc, "CartPole-v1", run).message
    assert text in message
    assert "/data/state.pkl" in message
    assert "iteration_000002" in message
    assert f"--resume {run.path}" in message


def test_a_real_device_without_space_is_named(run):
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    try:
        Path("/dev/full").write_text("a row")
    except OSError as exc:
        message = as_training_error(exc, "CartPole-v1", run).message
    assert "the disk is full" in message
    assert "no checkpoint yet" in message


class RayTaskError(Exception):
    """As Ray gives it: what another process raised, as a text."""


def test_an_error_from_another_process_is_named_by_its_first_cause(run):
    text = (
        "\x1b[36mray::FastEnvRunner.apply()\x1b[39m (pid=7)\n"
        '  File "/lib/gymnasium/vector/sync_vector_env.py", line 1, in step\n'
        "    env.step(action)\n"
        '  File "/home/me/my_env.py", line 3, in step\n'
        '    raise ValueError("no such gear")\n'
        "ValueError: no such gear\n"
        "choose another\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "\x1b[36mray::FastEnvRunner.apply()\x1b[39m (pid=7)\n"
        '  File "/lib/runner.py", line 1, in sample\n'
        "RuntimeError: an environment failed in step()"
    )
    error = as_training_error(raised(RayTaskError(text)), "my_env:Gears", run)
    assert isinstance(error, EnvironmentFailedError)
    assert "environment 'my_env:Gears' raised ValueError: no such gear;" in error.message


def test_an_error_that_is_not_the_environments_is_not_blamed_on_it(run):
    error = as_training_error(raised(ValueError("a bug")), "CartPole-v1", run)
    assert not isinstance(error, EnvironmentFailedError)
    assert "ValueError: a bug" in error.message


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "failing_cartpole.py").write_text(FAILING_ENV)
    path = os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])
    return functools.partial(
        policyserve,
        *("train", "--env", "failing_cartpole:FailingCartPole-v1", "--seed", 1, "--quiet"),
        *("--set", "train_batch_size_per_learner=512", "--set", "checkpoint.every=1"),
        *("--stop-timesteps", 4000),
        env={"HOME": str(home), "XDG_DATA_HOME": str(home), "PYTHONPATH": path},
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a runner process", "an evaluation"])
def test_an_environment_that_raises_is_named_wherever_it_runs(train, tmp_path, where):
    fails = ("--set", "evaluation.env_config.fails_after=10", "--set", "evaluation.interval=2")
    settings = {
        "a runner process": (
            *("--num-env-runners", 1, "--set", "env_config.fails_after=700"),
            *("--set", "evaluation.interval=0"),
        ),
        "an evaluation": fails,
    }[where]
    run_dir = tmp_path / "run"
    done = train("--run-dir", run_dir, *settings)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "environment 'failing_cartpole:FailingCartPole-v1'" in done.stderr
    assert "RuntimeError: the pole broke" in done.stderr
    assert ("in an evaluation" in done.stderr) == ("evaluation" in where)
    assert f"the last checkpoint is {find_checkpoint(run_dir)}" in done.stderr
    log = (run_dir / "train.log").read_text()
    assert "Traceback" in log
    assert 'raise RuntimeError("the pole broke")' in log
    assert json.loads((run_dir / "result.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint_and_with_space_the_run_goes_on(train, tmp_path):
    run_dir = tmp_path / "run"
    done = train(
        *("--run-dir", run_dir, "--set", "env_config.disk_is_full_after=1300"),
        *("--set", "evaluation.interval=0"),
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "a file is larger than allowed here" in done.stderr
    run = RunDirectory(run_dir)
    kept = run.linked("last")
    assert str(kept) in done.stderr
    left = sorted(path.name for path in run.checkpoints.iterdir() if not path.is_symlink())
    assert left == ["iteration_000001", "iteration_000002"]
    # The limit is the process's own, so there is space again.
    environment = dict(train.keywords["env"])
    config = run.config_file.read_text().replace("disk_is_full_after: 1300", "fails_after: null")
    run.config_file.write_text(config)
    resumed = policyserve("train", "--resume", run_dir, "--trust-checkpoint", env=environment)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    rows = run.progress_file.read_text().splitlines()[1:]
    iterations = [int(row.split(",")[0]) for row in rows]
    assert iterations == list(range(1, len(rows) + 1))
    assert int(rows[-1].split(",")[1]) >= 4000
