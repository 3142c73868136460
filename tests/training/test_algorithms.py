"""Each algorithm by the command: trained for a moment, resumed, exported as RLlib acts."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from tests.processes import policyserve, refuse, succeed
from training.losses import LOSSES

pytestmark = pytest.mark.slow

SMALL = ("--set", "model.fcnet_hiddens=[16]", "--set", "evaluation.episodes=2", "--seed", "3")
RUNS = {
    "DQN": ("--env", "CartPole-v1", "--set", "n_step=[1,3]"),
    "SAC": (
        "--env",
        "Pendulum-v1",
    ),
    "APPO": ("--env", "CartPole-v1", "--set", "min_sample_timesteps_per_iteration=500"),
}
OFF_POLICY = (
    *("--set", "min_sample_timesteps_per_iteration=200"),
    *("--set", "num_steps_sampled_before_learning_starts=100"),
    *("--set", "training_intensity=4", "--set", "train_batch_size_per_learner=16"),
)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("algo", RUNS)
def test_an_algorithm_trains_resumes_and_is_exported(algo: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (*RUNS[algo], *SMALL, *(OFF_POLICY if algo in ("DQN", "SAC") else ()))
    first, second = (400, 800) if algo in ("DQN", "SAC") else (1000, 2000)
    succeed("train", "--algo", algo, *settings, "--run-dir", run, "--stop-timesteps", str(first))
    before = rows(run)
    assert int(before[-1]["env_steps"]) >= first
    assert set(LOSSES[algo]) <= set(before[0])
    for name in LOSSES[algo]:
        assert math.isfinite(float(before[-1][name])), name
    assert before[-1]["evaluation_return_mean"] != ""
    succeed("train", "--resume", run, "--stop-timesteps", str(second))
    after = rows(run)
    assert after[: len(before)] == before
    assert [int(row["iteration"]) for row in after] == list(range(1, len(after) + 1))
    assert int(after[-1]["env_steps"]) >= second
    # The parity gate compares the bundle with RLlib's own module and connectors.
    printed = json.loads(succeed("export", run, "-o", tmp_path / "bundle", "--json"))
    assert printed["algorithm"] == algo


@pytest.mark.parametrize(
    ("algo", "settings", "expected"),
    [
        ("DQN", (), "DQN chooses among Discrete actions"),
        ("SAC", ("--set", "normalize_actions=false"), "SAC's actions lie in [-1, 1]"),
    ],
)
def test_an_algorithm_is_refused_actions_that_it_cannot_take(
    algo: str, settings: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    arguments = ("train", "--algo", algo, "--env", "Pendulum-v1", *settings)
    assert expected in refuse(*arguments, "--run-dir", tmp_path / "run", exit_code=2)
    assert not (tmp_path / "run").exists()


def test_a_module_and_a_wrapper_of_ones_own_are_trained_and_played(tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed(
        *("train", "--env", "CartPole-v1", "--run-dir", run, "--seed", "1"),
        *("--stop-timesteps", "512", "--set", "train_batch_size_per_learner=512"),
        *("--set", "model.module=tests.export.custom_modules:PlainMlp"),
        *("--set", "wrappers=[{training.wrappers:SelectComponents: {components: [0, 2]}}]"),
    )
    bundle = tmp_path / "bundle"
    manifest = json.loads(succeed("export", run, "-o", bundle, "--json"))
    assert manifest["module_class"] == "PlainMlp"
    assert manifest["environment"] == {
        "id": "CartPole-v1",
        "kwargs": {},
        "wrappers": [["training.wrappers:SelectComponents", {"components": [0, 2]}]],
    }
    played = json.loads(succeed("evaluate", run, "--episodes", "2", "--json").splitlines()[-1])
    assert played["n_episodes"] == 2


def test_a_module_that_cannot_be_exported_is_said_before_training(tmp_path: Path) -> None:
    done = policyserve(
        *("train", "--env", "CartPole-v1", "--run-dir", tmp_path / "run", "--stop-timesteps", "64"),
        *("--set", "train_batch_size_per_learner=64", "--set", "minibatch_size=64"),
        *("--set", "model.module=tests.export.custom_modules:UnknownDistribution"),
    )
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    warned = next(i for i, line in enumerate(lines) if "export` will refuse it" in line)
    assert "HalfTemperature" in lines[warned]
    assert warned < next(i for i, line in enumerate(lines) if "iteration 1 " in line)
