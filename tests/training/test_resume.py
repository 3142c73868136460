from __future__ import annotations

import csv
import functools
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.processes import READY_S, command, policyserve, python, wait_until
from training.errors import CheckpointNotFoundError, UntrustedCheckpointError
from training.provenance import describe_checkpoint, sign_checkpoint, verify_checkpoint
from training.resuming import checkpoints_to_resume
from training.run_directory import RunDirectory

ROWS = ["iteration,env_steps,lr\n", "1,100,0.5\n", "2,200,0.25\n", "3,300,0.125\n"]


@pytest.fixture(autouse=True)
def _user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create({}, "")
    for iteration in (1, 2, 3):
        save(run, iteration, sign_checkpoint)
    return run


def save(run, iteration, describe):
    def write(path):
        (path / "rllib_checkpoint.json").write_text("{}")
        (path / "state.pkl").write_text(f"weights {iteration}")
        describe(path, {"iteration": iteration})

    return run.save_checkpoint(iteration, write)


def damage(checkpoint):
    (checkpoint / "state.pkl").write_text("half of the weig")


def test_the_newest_checkpoint_is_gone_on_from_and_the_others_may_follow(run):
    found, notes = checkpoints_to_resume(run, trust=False)
    assert [path.name[-1] for path in found] == ["3", "2", "1"]
    assert notes == []


@pytest.mark.parametrize("trust", [True, False])
def test_a_damaged_checkpoint_is_passed_over_and_said(run, trust):
    damage(run.checkpoints / "iteration_000003")
    damage(run.checkpoints / "iteration_000001")
    (found,), (note,) = checkpoints_to_resume(run, trust=trust)
    assert found.name == "iteration_000002"
    assert note.startswith("iteration_000003 is passed over: a file changed")
    assert "state.pkl" in note


def test_trust_lets_in_what_is_whole_and_signed_by_nobody(run):
    save(run, 4, describe_checkpoint)
    assert checkpoints_to_resume(run, trust=False)[0][0].name == "iteration_000003"
    assert checkpoints_to_resume(run, trust=True)[0][0].name == "iteration_000004"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {"state.pkl": 3}}'])
def test_trust_does_not_let_in_a_checkpoint_without_its_list(run, text):
    (run.checkpoints / "iteration_000003" / "policyserve.json").write_text(text)
    found, (note,) = checkpoints_to_resume(run, trust=True)
    assert found[0].name == "iteration_000002"
    assert "iteration_000003 is passed over" in note


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(run):
    for checkpoint in run.all_checkpoints():
        damage(checkpoint)
    with pytest.raises(CheckpointNotFoundError, match=r"every checkpoint .* state\.pkl"):
        checkpoints_to_resume(run, trust=True)
    with pytest.raises(UntrustedCheckpointError, match="--trust-checkpoint"):
        checkpoints_to_resume(run, trust=False)


@given(n_bytes=st.integers(0, len("".join(ROWS))), n_junk=st.integers(0, 20))
def test_rows_up_to_a_checkpoint_stay_wherever_the_file_is_cut_behind_them(
    tmp_path_factory, n_bytes, n_junk
):
    run = RunDirectory(tmp_path_factory.mktemp("cut"))
    text = "".join(ROWS)
    # A full disk or a kill cuts a row; after a power cut there can be zeros where a row was.
    run.progress_file.write_bytes(text[:n_bytes].encode() + b"\0" * n_junk)
    whole = [row for i, row in enumerate(ROWS) if n_bytes >= len("".join(ROWS[: i + 1]))]
    for iteration in (3, 2, 1, 0):
        run.drop_after(iteration)
        kept = whole[: iteration + 1]
        if len(kept) > 1:
            assert run.progress_file.read_text() == "".join(kept)
        else:  # it begins anew, header and all
            assert not run.progress_file.exists()


@pytest.mark.slow
def test_a_run_killed_at_any_of_its_file_operations_goes_on(tmp_path):
    # Every seventh, for the time; `python -m tests.training.crash_checks DIR 1` takes them all.
    done = python(
        *("-m", "tests.training.crash_checks", tmp_path, 7),
        env={"XDG_DATA_HOME": str(tmp_path / "share")},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] > 15
    assert found["resumed"] > 10


def rows(run: RunDirectory) -> list[dict[str, str]]:
    if not run.progress_file.exists():
        return []
    with run.progress_file.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["env_steps"]]


def unrestorable(checkpoint: Path) -> None:
    """Make a checkpoint one that is signed and that RLlib can't restore."""
    facts = dict(verify_checkpoint(checkpoint).facts)
    (checkpoint / "algorithm_state.pkl").write_bytes(b"no pickle")
    for name in ("format", "format_version"):
        facts.pop(name)
    sign_checkpoint(checkpoint, facts)


@pytest.mark.slow
def test_a_training_killed_three_times_has_one_curve_and_passes_over_damage(tmp_path):
    environment = {"XDG_DATA_HOME": str(tmp_path / "share")}
    run = RunDirectory(tmp_path / "run")
    arguments = (
        *("train", "--env", "CartPole-v1", "--run-dir", run.path, "--stop-timesteps", 6000),
        *("--set", "train_batch_size_per_learner=256", "--set", "evaluation.interval=0"),
        *("--set", "checkpoint.every=2", "--seed", 1),
    )
    for n_more in (3, 1, 4):
        n_wanted = len(rows(run)) + n_more
        process = subprocess.Popen(
            command(arguments), env={**os.environ, **environment}, stdout=subprocess.DEVNULL
        )
        is_there = functools.partial(has_rows, process, run, n_wanted)
        wait_until(is_there, f"{n_wanted} iterations", READY_S)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        arguments = ("train", "--resume", run.path)
    train = functools.partial(policyserve, "train", "--resume", run.path, env=environment)
    done = train()
    assert (done.returncode, done.stderr) == (0, "")
    assert_one_curve(run, 6000)

    newest, before, *_ = run.all_checkpoints()
    damage(newest)
    unrestorable(before)
    done = train("--trust-checkpoint", "--stop-timesteps", 7000)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{newest.name} is passed over: a file was added" in done.stdout
    assert f"{before.name} is passed over: RLlib can't restore it" in done.stdout
    assert_one_curve(run, 7000)


def has_rows(process: subprocess.Popen[bytes], run: RunDirectory, n_rows: int) -> bool:
    assert process.poll() is None, process.returncode
    return bool(run.all_checkpoints()) and len(rows(run)) >= n_rows


def assert_one_curve(run: RunDirectory, n_steps: int) -> None:
    found = rows(run)
    assert [int(row["iteration"]) for row in found] == list(range(1, len(found) + 1))
    steps = [int(row["env_steps"]) for row in found]
    assert steps == sorted(set(steps))
    assert steps[-2] < n_steps <= steps[-1]
    times = [float(row["time_s"]) for row in found]
    assert times == sorted(set(times))
    ended = json.loads(run.result_file.read_text())
    assert ended["status"] == "stop_timesteps"
    assert ended["last_checkpoint"] == f"checkpoints/iteration_{len(found):06d}"
