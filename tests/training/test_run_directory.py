from __future__ import annotations

import json
import pathlib
import pickle
import shutil

import pytest

from training.errors import CheckpointNotFoundError, ConfigError
from training.replay_buffer import (
    prune_replay_buffers,
    restore_replay_buffer,
    save_replay_buffer,
)
from training.run_directory import BEST, LAST, RunDirectory, find_checkpoint, read_run

FACTS = {
    "env": "CartPole-v1",
    "env_config": {"gravity": 9.8},
    "algo": "PPO",
    "seed": 3,
    "versions": {"ray": "2.60.0"},
}


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create(FACTS, "env: CartPole-v1\n")
    return run


def save(run, iteration, text="{}"):
    def write(path):
        (path / "rllib_checkpoint.json").write_text(text)

    return run.save_checkpoint(iteration, write)


def test_a_new_run_has_its_marker_and_config(run):
    marker = json.loads((run.path / "run.json").read_text())
    assert marker["format"] == "policyserve-run"
    assert marker["format_version"] == 1
    assert (run.path / "config.yaml").read_text() == "env: CartPole-v1\n"
    info = read_run(run.path)
    assert (info.env, info.env_config, info.algo, info.seed) == (
        "CartPole-v1",
        {"gravity": 9.8},
        "PPO",
        3,
    )
    assert info.best_checkpoint is None


def test_a_run_is_never_overwritten(run):
    with pytest.raises(ConfigError, match="--resume"):
        RunDirectory(run.path).create(FACTS, "env: Other\n")
    assert (run.path / "config.yaml").read_text() == "env: CartPole-v1\n"


def test_a_directory_with_other_files_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not an empty directory"):
        RunDirectory(tmp_path).create(FACTS, "")


def test_a_directory_that_cannot_be_written_is_wrong_usage(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        RunDirectory(tmp_path / "file" / "run").create(FACTS, "")


def test_the_best_is_found_before_the_last_and_a_checkpoint_is_itself(run):
    first = save(run, 10)
    assert find_checkpoint(run.path) == first
    run.link(BEST, first)
    second = save(run, 20)
    assert find_checkpoint(run.path) == first
    assert find_checkpoint(run.checkpoints / "last") == second
    assert find_checkpoint(second) == second
    assert second.name == "iteration_000020"
    assert (run.checkpoints / "best").readlink().as_posix() == "iteration_000010"
    assert read_run(run.path).last_checkpoint == second


def test_a_checkpoint_that_fails_leaves_the_last_one_and_no_rest(run):
    good = save(run, 1)

    def fail(path):
        (path / "rllib_checkpoint.json").write_text("{}")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.save_checkpoint(2, fail)
    assert run.linked(LAST) == good
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["iteration_000001", "last"]


def test_pruning_keeps_the_newest_the_best_and_the_last(run):
    for iteration in range(1, 7):
        checkpoint = save(run, iteration)
        if iteration == 2:
            run.link(BEST, checkpoint)
    run.prune(2)
    assert [path.name for path in run.all_checkpoints()] == [
        "iteration_000006",
        "iteration_000005",
        "iteration_000002",
    ]


def test_dropping_what_came_after_leaves_one_continuous_curve(run):
    for iteration in (2, 4):
        save(run, iteration)
    (run.checkpoints / ".iteration_000005.99.tmp").mkdir()
    run.progress_file.write_text("iteration,env_steps\n1,10\n2,20\n3,30\n1")
    run.drop_after(2)  # the file ends in the first digit of a row that the kill cut short
    assert run.progress_file.read_text() == "iteration,env_steps\n1,10\n2,20\n"
    assert [path.name for path in run.all_checkpoints()] == ["iteration_000002"]
    assert not list(run.checkpoints.glob(".*"))


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_path_without_a_checkpoint_is_a_clear_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=name):
        find_checkpoint(tmp_path / name)


def test_a_run_without_a_checkpoint_is_a_clear_error(run):
    with pytest.raises(CheckpointNotFoundError, match="without a checkpoint"):
        find_checkpoint(run.path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "policyserve-run", "format_version": 2}']
)
def test_a_damaged_marker_is_a_clear_error(run, text):
    (run.path / "run.json").write_text(text)
    with pytest.raises(CheckpointNotFoundError, match=r"run\.json"):
        read_run(run.path)
    with pytest.raises(CheckpointNotFoundError):
        read_run(run.path.parent)


def test_results_are_whole_json(run):
    run.write_result({"status": "stop_return"})
    assert json.loads(run.result_file.read_text()) == {"status": "stop_return"}
    with pytest.raises(ValueError, match="JSON"):
        run.write_result({"episode_return_mean": float("nan")})
    assert json.loads(run.result_file.read_text()) == {"status": "stop_return"}


def test_a_copy_of_a_run_without_its_links_still_has_its_newest_checkpoint(run):
    save(run, 1)
    newest = save(run, 2)
    for name in (BEST, LAST):
        (run.checkpoints / name).unlink(missing_ok=True)
    (run.checkpoints / "iteration_000003").mkdir()  # not whole
    assert find_checkpoint(run.path) == newest
    assert read_run(run.path).last_checkpoint == newest


def test_a_copy_of_a_run_that_followed_its_links_goes_on(run):
    shutil.copytree(save(run, 1), run.checkpoints / "copy")
    (run.checkpoints / LAST).unlink()
    (run.checkpoints / "copy").rename(run.checkpoints / LAST)
    newest = save(run, 2)
    assert run.linked(LAST) == newest


class Buffered:
    """An algorithm, and its replay buffer."""

    def __init__(self, state=None):
        self.local_replay_buffer = self
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def test_the_two_newest_checkpoints_keep_their_replay_buffers(run):
    facts = []
    for iteration in (1, 2, 3):
        facts.append(
            save_replay_buffer(Buffered(f"steps {iteration}"), run.replay_buffer, iteration)
        )
        save(run, iteration)
        prune_replay_buffers(run.replay_buffer, run.all_checkpoints())
    restored = [Buffered("none") for _ in facts]
    found = [
        restore_replay_buffer(one, run.replay_buffer, of)
        for one, of in zip(restored, facts, strict=True)
    ]
    assert found == [False, True, True]
    assert [one.state for one in restored] == ["none", "steps 2", "steps 3"]
    (run.replay_buffer / facts[2]["file"]).write_bytes(pickle.dumps("steps of another"))
    assert not restore_replay_buffer(restored[0], run.replay_buffer, facts[2])
    assert restored[0].state == "none"


def test_a_replay_buffer_that_is_replaced_while_it_is_read_is_not_unpickled(run, monkeypatch):
    facts = save_replay_buffer(Buffered("steps"), run.replay_buffer, 1)
    file, other = run.replay_buffer / facts["file"], run.path / "other.pkl"
    other.write_bytes(pickle.dumps("steps of another"))
    really_open = pathlib.Path.open

    def open_and_replace(path, *args, **kwargs):
        opened = really_open(path, *args, **kwargs)
        if path == file and other.exists():
            other.replace(file)
        return opened

    monkeypatch.setattr(pathlib.Path, "open", open_and_replace)
    restored = Buffered()
    assert restore_replay_buffer(restored, run.replay_buffer, facts)
    assert restored.state == "steps"
    assert pickle.loads(file.read_bytes()) == "steps of another"
