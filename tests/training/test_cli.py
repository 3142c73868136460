from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def policyserve(tmp_path):
    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "policyserve", "train", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "XDG_DATA_HOME": str(tmp_path / "share"), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_help_is_fast_and_names_every_flag(policyserve):
    started = time.monotonic()
    done = policyserve("--help", COLUMNS="120")
    assert done.returncode == 0
    flags = ["--env", "--algo", "--run-dir", "--seed", "--resume", "--set"]
    for flag in [*flags, "--stop-return", "--stop-timesteps", "--stop-time-s"]:
        assert flag in done.stdout
    # Importing Ray alone takes 2 s on two cores.
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no environment"),
        (["--env", "CartPole-v9"], "CartPole-v1"),
        (["--env", "CartPole-v1", "--algo", "A2C"], "supported: PPO"),
        (["--env", "CartPole-v1", "--set", "gama=0.9"], "gamma"),
        (["--env", "FrozenLake-v1", "--set", "frame_stack=4"], "Discrete(16)"),
        (["--env", "Pendulum-v1", "--set", "prev_actions=1"], "needs Discrete actions"),
        (["--env", "CartPole-v1", "--num-gpus", "1"], "num_gpus is 1"),
        (["no-such.yaml"], "no config file"),
        (["--resume", "somewhere", "--run-dir", "elsewhere"], "--resume"),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(policyserve, tmp_path, arguments, expected):
    done = policyserve(*arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("policyserve: error: ")
    assert expected in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_in_use_is_wrong_usage(policyserve, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    done = policyserve("--env", "CartPole-v1", "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "--resume" in done.stderr


def test_resuming_what_is_no_run_fails(policyserve, tmp_path):
    done = policyserve("--resume", tmp_path)
    assert done.returncode == 1
    assert "run.json" in done.stderr
