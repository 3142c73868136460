from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess

import pytest

from tests.processes import READY_S, command, policyserve, wait_until
from tests.storage_server import BUCKET, s3_server
from training.errors import (
    CheckpointNotFoundError,
    ConfigError,
    StorageError,
    TrainingError,
)
from training.provenance import sign_checkpoint, verify_checkpoint
from training.remote_files import RemoteFiles, is_uri
from training.run_directory import BEST, INITIAL, LAST, RunDirectory, read_run
from training.storage import RunStorage, fetch_run, open_storage

FACTS = {"env": "CartPole-v1", "env_config": {}, "algo": "PPO", "seed": 3, "versions": {}}


@pytest.fixture(autouse=True)
def _own_key(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "local")
    run.create(FACTS, "env: CartPole-v1\n")
    return run


@pytest.fixture
def uri(tmp_path):
    return f"file://{tmp_path}/bucket/run"


def save(run, iteration, weights="weights"):
    def write(path):
        (path / "learner").mkdir()
        (path / "learner" / "state.pkl").write_text(f"{weights} {iteration}")
        (path / "rllib_checkpoint.json").write_text("{}")
        sign_checkpoint(path, {"iteration": iteration})

    with run.progress_file.open("a") as file:
        file.write(f"{iteration},{100 * iteration}\n")
    return run.save_checkpoint(iteration, write)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("text", ["s3://bucket/run", "gs://b", "file:///tmp/run", "S3://x"])
def test_a_uri_has_a_scheme(text):
    assert is_uri(text)


@pytest.mark.parametrize("text", ["runs/a", "/tmp/s3:/x", "C:\\runs", "a b://c", ""])
def test_a_path_is_no_uri(text):
    assert not is_uri(text)


def test_a_run_comes_back_as_it_was(run, uri):
    run.link(INITIAL, save(run, 1))
    run.link(BEST, save(run, 2))
    save(run, 3)
    run.replay_buffer.mkdir()
    (run.replay_buffer / "iteration_000003.pkl").write_bytes(b"experience")
    run.tensorboard.mkdir()
    (run.tensorboard / "events.1").write_bytes(b"events")
    open_storage(uri).copy(run)
    back = open_storage(uri).fetch()
    assert read_run(back.path).env == "CartPole-v1"
    assert back.progress_file.read_text() == "1,100\n2,200\n3,300\n"
    found = {name: back.linked(name).name for name in (INITIAL, BEST, LAST)}
    assert found == {
        "initial": "iteration_000001",
        "best": "iteration_000002",
        "last": "iteration_000003",
    }
    assert [verify_checkpoint(path).is_trusted for path in back.all_checkpoints()] == [True] * 3
    assert (back.replay_buffer / "iteration_000003.pkl").read_bytes() == b"experience"
    assert back.path.stat().st_mode & 0o077 == 0  # its parent is shared with other users


def test_what_a_run_deletes_goes_there_too(run, uri, tmp_path):
    storage = open_storage(uri)
    run.tensorboard.mkdir()
    (run.tensorboard / "events.1").write_bytes(b"events")
    run.replay_buffer.mkdir()
    for iteration in range(1, 5):
        save(run, iteration)
        for old in run.replay_buffer.iterdir():
            old.unlink()
        (run.replay_buffer / f"iteration_{iteration:06d}.pkl").write_bytes(b"experience")
        run.write_result({"iterations": iteration})
        storage.copy(run)
    run.prune(2)
    storage.copy(run)
    copy = tmp_path / "bucket" / "run"
    assert names(copy / "checkpoints") == ["iteration_000003", "iteration_000004"]
    assert names(copy / "replay_buffer") == ["iteration_000004.pkl"]
    run.drop_after(3)  # as a resumed run does
    shutil.rmtree(run.tensorboard)
    open_storage(uri).copy(run)
    assert names(copy / "checkpoints") == ["iteration_000003"]
    assert not (copy / "result.json").exists()
    assert not (copy / "tensorboard").exists()


def test_a_checkpoint_of_the_same_iteration_is_replaced(run, uri):
    storage = open_storage(uri)
    save(run, 1)
    storage.copy(run)
    save(run, 1, "other weights")
    storage.copy(run)
    (found,) = open_storage(uri).fetch().all_checkpoints()
    assert verify_checkpoint(found).is_trusted
    assert (found / "learner" / "state.pkl").read_text() == "other weights 1"


class BreakingFiles(RemoteFiles):
    """A storage whose connection is lost after so many requests that change something."""

    n_left = 10**6

    def __init__(self, remote):
        super().__init__(remote._filesystem, remote._folder, remote.shown)

    def _count(self):
        self.n_left -= 1
        if self.n_left < 0:
            raise StorageError("the connection is lost")

    def put(self, sources):
        for name, path in sources.items():
            self._count()
            super().put({name: path})

    def write(self, name, content):
        self._count()
        super().write(name, content)

    def delete(self, name):
        self._count()
        super().delete(name)


def test_a_copy_that_is_cut_short_anywhere_can_be_resumed_and_is_mended(run, tmp_path):
    for iteration in (1, 2):
        save(run, iteration)
    first = open_storage(f"file://{tmp_path}/bucket/first")
    first.copy(run)
    save(run, 3)
    run.prune(1)
    for n_requests in range(10**6):
        copy = tmp_path / "bucket" / str(n_requests)
        shutil.copytree(tmp_path / "bucket" / "first", copy)
        files = BreakingFiles(open_storage(f"file://{copy}")._remote)
        files.n_left = n_requests
        try:
            RunStorage(files).copy(run)
        except StorageError:
            is_cut = True
        else:
            is_cut = False
        back = open_storage(f"file://{copy}").fetch()
        newest = back.last()
        assert verify_checkpoint(newest).is_trusted
        # The index names either the checkpoints of before or those of now, with all of their rows.
        assert newest.name in ("iteration_000002", "iteration_000003")
        n_rows = len(back.progress_file.read_text().splitlines())
        assert n_rows >= int(newest.name[-1])
        files.n_left = 10**6
        RunStorage(files).copy(run)
        assert names(copy / "checkpoints") == ["iteration_000003"]
        if not is_cut:
            break
    assert n_requests > 6


def test_a_run_is_kept_in_its_place_and_its_directory_is_gone(run, uri):
    storage = open_storage(uri)
    with storage.kept(run):
        assert open_storage(uri).fetch("none").path.exists()  # claimed from the start
        save(run, 1)
    assert not run.path.exists()
    with fetch_run(uri) as path:
        assert read_run(path).last_checkpoint.name == "iteration_000001"
    assert not path.exists()


def test_a_run_that_fails_is_kept_and_named_by_its_uri(run, uri):
    def fail():
        with open_storage(uri).kept(run):
            save(run, 1)
            raise TrainingError(f"the log is in {run.log_file}")

    with pytest.raises(TrainingError, match=f"the log is in {uri}/train.log"):
        fail()
    with fetch_run(uri) as path:
        assert RunDirectory(path).linked(LAST).name == "iteration_000001"


def test_a_run_that_can_not_be_copied_is_not_lost(run, uri, caplog):
    files = BreakingFiles(open_storage(uri)._remote)
    storage = RunStorage(files)

    def train():
        with storage.kept(run):
            save(run, 1)
            files.n_left = 0
            wait_until(lambda: is_tried(storage.copy_if_due(run)), "it is tried again")

    def is_tried(_):  # training goes on
        return "connection is lost" in caplog.text

    with pytest.raises(StorageError, match=f"connection is lost; .* kept in {run.path}"):
        train()
    assert run.linked(LAST) is not None


def test_a_run_that_saves_at_every_moment_is_not_copied_as_often(run, uri, tmp_path):
    storage = open_storage(uri)
    for iteration in (1, 2):
        save(run, iteration)
        storage.copy_if_due(run)
    assert names(tmp_path / "bucket" / "run" / "checkpoints") == ["iteration_000001"]


def test_a_run_at_a_uri_is_never_overwritten(run, uri, tmp_path):
    open_storage(uri).refuse_if_used()
    open_storage(uri).copy(run)
    with pytest.raises(ConfigError, match="--resume"):
        open_storage(uri).refuse_if_used()
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"not empty .*thesis\.tex"):
        open_storage(f"file://{tmp_path}/papers").refuse_if_used()


@pytest.mark.parametrize(
    ("chosen", "name"),
    [("", "best"), ("/checkpoints/last", "last"), ("/checkpoints/iteration_000001", "first")],
)
def test_one_checkpoint_is_fetched_where_one_is_wanted(run, uri, chosen, name):
    save(run, 1)
    run.link(BEST, save(run, 2))
    save(run, 3)
    open_storage(uri).copy(run)
    iteration = {"best": 2, "last": 3, "first": 1}[name]
    with fetch_run(uri + chosen) as path:
        run_path = path.parent.parent if chosen else path
        found = [checkpoint.name for checkpoint in RunDirectory(run_path).all_checkpoints()]
        assert found == [f"iteration_00000{iteration}"]
        if chosen:
            assert path.name == found[0]


def test_without_a_best_checkpoint_the_last_is_fetched(run, uri):
    save(run, 1)
    open_storage(uri).copy(run)
    with fetch_run(uri, "best") as path:
        assert RunDirectory(path).last().name == "iteration_000001"


@pytest.mark.parametrize("chosen", ["/checkpoints/iteration_000009", "/checkpoints/best/"])
def test_a_checkpoint_that_is_not_there_is_a_clear_error(run, uri, chosen):
    open_storage(uri).copy(run)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"), fetch_run(uri + chosen):
        pass


def test_no_run_at_a_uri_is_a_clear_error(uri):
    with pytest.raises(CheckpointNotFoundError, match=r"no run\.json"):
        open_storage(uri).fetch()


@pytest.mark.parametrize(
    "uri", ["nope://bucket/run", "s3://", "file://", "s3://bucket/run?colour=red"]
)
def test_a_uri_that_can_not_be_stored_at_is_wrong_usage(uri):
    with pytest.raises(ConfigError, match="expected"):
        open_storage(uri)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoints": {"../../iteration_000001": "x"}},
        {"links": {"best": "/etc"}},
        {"links": {"../best": "iteration_000001"}},
        {"replay_buffers": {"../x.pkl": "1"}},
        {"format_version": 2},
        {"checkpoints": 3},
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(run, uri, tmp_path, changes):
    save(run, 1)
    open_storage(uri).copy(run)
    index = tmp_path / "bucket" / "run" / "checkpoints.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))
    with pytest.raises(StorageError, match=r"checkpoints\.json is damaged"):
        open_storage(uri).fetch()
    assert names(tmp_path / "temporary") == []


def test_a_password_in_a_uri_is_not_shown():
    found = open_storage("s3://key:secret@bucket/run?endpoint_override=127.0.0.1:9&scheme=http")
    assert str(found) == "s3://bucket/run"


@pytest.mark.slow
def test_a_run_in_a_bucket_outlives_its_machine(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    with s3_server(tmp_path / "s3.log") as servers:
        environment = {**servers, "XDG_DATA_HOME": str(tmp_path / "home")}
        run = functools.partial(policyserve, env=environment)
        uri = f"s3://{BUCKET}/cartpole"
        arguments = (
            *("train", "--env", "CartPole-v1", "--run-dir", uri, "--stop-timesteps", 1_000_000),
            *("--set", "train_batch_size_per_learner=256", "--set", "evaluation.interval=0"),
            *("--set", "checkpoint.every=3", "--seed", 1),
        )
        first = {**os.environ, **environment, "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(command(arguments), env=first, stdout=subprocess.DEVNULL)

        def n_copies() -> int:
            assert process.poll() is None, process.returncode
            return (tmp_path / "s3.log").read_text().count("PUT /runs/cartpole/checkpoints.json")

        # The first is that of a run without a checkpoint.
        wait_until(lambda: n_copies() >= 3, "two copies are in the bucket", READY_S)
        process.kill()
        process.wait()
        for path in tmp_path.glob("policyserve-run-*"):
            shutil.rmtree(path)  # the machine's disk is gone with it
        again = run("train", "--env", "CartPole-v1", "--run-dir", uri)
        assert again.returncode == 2
        assert "already holds a run" in again.stderr
        resumed = run("train", "--resume", uri, "--stop-timesteps", 8000)
        assert (resumed.returncode, resumed.stderr) == (0, "")
        assert f"policyserve export {uri}" in resumed.stdout
        missing = run("train", "--env", "CartPole-v1", "--run-dir", "s3://nowhere/cartpole")
        assert missing.returncode == 1
        assert missing.stderr.count("\n") == 1
        assert "no such bucket" in missing.stderr
        for name, value in servers.items():
            monkeypatch.setenv(name, value)
        with fetch_run(uri, "none") as path:
            rows = [line.split(",") for line in (path / "progress.csv").read_text().split()]
            ended = json.loads((path / "result.json").read_text())
    assert [int(row[0]) for row in rows[1:]] == list(range(1, len(rows)))
    steps = [int(row[1]) for row in rows[1:]]
    assert steps == sorted(set(steps))
    assert ended["status"] == "stop_timesteps"
    assert ended["env_steps"] == steps[-1] >= 8000
