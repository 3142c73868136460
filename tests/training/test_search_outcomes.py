"""How trials stand, which is best, and the tables: from run directories made by hand."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from rich.console import Console

from training.config_files import load_config
from training.errors import CheckpointNotFoundError, ConfigError, StopNotReachedError
from training.plotting.search import read_search as read_drawn_search
from training.provenance import sign_checkpoint
from training.run_directory import RunDirectory
from training.tuning import cli
from training.tuning.definition import load_search
from training.tuning.directory import SearchDirectory, read_search
from training.tuning.display import SearchDisplay
from training.tuning.files import write_atomically
from training.tuning.history import begin_history, note_exploit, read_history
from training.tuning.machine import Resources, fitting_trials, machine_resources
from training.tuning.outcomes import (
    forget_failure,
    rank,
    read_outcome,
    read_progress,
    write_verdict,
)
from training.tuning.schedulers import build_scheduler, remember
from training.tuning.search import SearchJob
from training.tuning.tables import write_tables
from training.tuning.trial import TRIAL, VALUES

SEARCH = """
env: CartPole-v1
model:
  fcnet_hiddens: {grid: [[8], [16, 16]]}
algo_config:
  lr: {loguniform: [1e-4, 1e-2]}
stop: {return: 475, timesteps: 5000}
tune: {num_samples: 3, seed: 7}
"""
COLUMNS = ("iteration", "env_steps", "time_s", "episode_return_mean", "evaluation_return_mean")


@pytest.fixture
def job(tmp_path: Path) -> SearchJob:
    return make_job(tmp_path)


def make_job(path: Path, *sets: str) -> SearchJob:
    (path / "search.yaml").write_text(SEARCH)
    search = load_search(path / "search.yaml", sets)
    directory = SearchDirectory(path / "search")
    trials = search.draw_trials()
    directory.create(search, trials, {"env": "CartPole-v1", "algo": "PPO"})
    return SearchJob(search, directory, trials, 2, Resources(1, 0, 2**30))


def leave(job: SearchJob, number: int, rows: list[tuple[Any, ...]], **result: Any) -> RunDirectory:
    """What a run of so many rows would have left."""
    run = job.directory.run(f"trial_{number:04d}")
    run.path.mkdir()
    lines = [COLUMNS, *rows]
    text = "".join(",".join("" if cell is None else str(cell) for cell in x) + "\n" for x in lines)
    run.progress_file.write_text(text)
    if result:
        stop = {"return": 475, "timesteps": 5000}
        run.result_file.write_text(json.dumps({"stop": stop, **result}))
    return run


def six_trials(job: SearchJob) -> None:
    leave(job, 1, [(1, 1024, 0.5, 100, None), (2, 2048, 1.0, 480, None)], status="stop_return")
    leave(job, 2, [(1, 1024, 0.5, 476.5, None)], status="stop_return")
    leave(job, 3, [(1, 5120, 2.5, 300, None)], status="stop_timesteps")
    leave(job, 4, [(1, 1024, 0.5, 20, None)], status="failed", error="it\nraised")
    write_verdict(leave(job, 5, [(1, 1024, 0.5, 30, None)]), "stopped")
    # trial 6 has not begun


def test_a_trial_stands_as_its_run_ended(job):
    six_trials(job)
    outcomes = job.outcomes(running=frozenset({"trial_0006"}))
    seen = [(item.status, item.reached, item.objective, item.env_steps) for item in outcomes]
    assert seen == [
        ("done", True, 2048, 2048),
        ("done", True, 1024, 1024),
        ("done", False, None, 5120),
        ("failed", False, None, 1024),
        ("stopped", False, None, 1024),
        ("running", False, None, 0),
    ]
    assert outcomes[3].error == "it raised"
    assert outcomes[0].episode_return_mean == 480


def test_an_unfinished_trial_is_interrupted_and_is_run_again(job):
    leave(job, 1, [(1, 1024, 0.5, 20, None)], status="interrupted")
    leave(job, 2, [(1, 1024, 0.5, 20, None)])  # killed: it had no time to say how it ended
    outcomes = job.outcomes()
    assert [item.status for item in outcomes[:3]] == ["interrupted", "interrupted", "pending"]
    assert not any(item.has_ended for item in outcomes)


def test_the_fewest_steps_are_best_and_then_the_highest_return(job):
    six_trials(job)
    order = [item.trial[-1] for item in rank(job.outcomes(), job.search.settings)]
    assert order[:3] == ["2", "1", "3"]
    assert set(order[3:]) == {"4", "5"}


def test_the_highest_evaluation_is_best_where_it_is_asked_for(tmp_path):
    job = make_job(tmp_path, "tune.objective=evaluation_return", "stop.return=null")
    stop = {"stop": {"return": None, "timesteps": 5000}, "status": "stop_timesteps"}
    leave(job, 1, [(1, 100, 1, 90, 200), (2, 200, 2, 95, 150)], **stop)
    leave(job, 2, [(1, 100, 1, 99, None), (2, 200, 2, 99, 180)], **stop)
    ranked = rank(job.outcomes(), job.search.settings)
    assert [(item.trial, item.objective, item.reached) for item in ranked] == [
        ("trial_0001", 200, True),
        ("trial_0002", 180, True),
    ]


def two_evaluated_trials(path: Path, first: str) -> SearchJob:
    """The first ended so with an evaluation of 480, the second at its budget with 490."""
    job = make_job(path, "tune.objective=evaluation_return", "evaluation.interval=1")
    leave(job, 1, [(1, 1024, 0.5, 476, 480)], status=first)
    leave(job, 2, [(1, 5120, 2.5, 300, 490)], status="stop_timesteps")
    return job


def test_a_search_is_done_where_a_trial_that_is_not_the_best_reached_its_return(tmp_path, capsys):
    job = two_evaluated_trials(tmp_path, "stop_return")
    outcomes = job.outcomes()
    best = write_tables(job.directory, job.search, job.trials, outcomes)
    assert best is not None
    assert (best.trial, best.reached) == ("trial_0002", False)
    cli._report(job, outcomes, best, 1.0, is_interrupted=False)
    assert "best: trial_0002, 490 evaluation return" in capsys.readouterr().out


def test_a_search_has_failed_where_no_trial_reached_its_return(tmp_path):
    job = two_evaluated_trials(tmp_path, "stop_timesteps")
    outcomes = job.outcomes()
    best = write_tables(job.directory, job.search, job.trials, outcomes)
    with pytest.raises(StopNotReachedError, match="the best of them is trial_0002"):
        cli._report(job, outcomes, best, 1.0, is_interrupted=False)


def test_the_best_trial_of_the_table_is_the_one_that_is_drawn_as_best(tmp_path):
    job = two_evaluated_trials(tmp_path, "stop_return")
    write_tables(job.directory, job.search, job.trials, job.outcomes())
    with job.directory.csv_file.open(newline="") as file:
        marked = [row["trial"] for row in csv.DictReader(file) if row["best"] == "true"]
    drawn = read_drawn_search(job.directory.path).best
    assert drawn is not None
    assert marked == [drawn.name] == ["trial_0002"]


@pytest.mark.parametrize(
    ("sets", "is_reached"),
    [
        ((), False),
        (("stop.return=null", "stop.evaluation_return=400"), False),
        (("stop.return={choice: [475]}",), False),
        (("stop={choice: [{return: 475}]}",), False),
        (("stop.return=null",), True),
    ],
)
def test_a_trial_without_a_result_has_not_reached_the_return_of_its_search(
    tmp_path, sets, is_reached
):
    job = make_job(tmp_path, "tune.objective=episode_return", *sets)
    leave(job, 1, [(1, 1024, 0.5, 20, None)])  # runs
    leave(job, 2, [(1, 1024, 0.5, 20, None)])  # killed
    write_verdict(leave(job, 3, [(1, 1024, 0.5, 20, None)]), "stopped")
    outcomes = job.outcomes(running=frozenset({"trial_0001"}))[:3]
    assert [item.status for item in outcomes] == ["running", "interrupted", "stopped"]
    assert [item.reached for item in outcomes] == [is_reached] * 3


def test_a_failed_trial_goes_on_once_it_is_forgiven(job):
    run = leave(job, 1, [(1, 1024, 0.5, 20, None)], status="failed", error="no")
    other = leave(job, 2, [(1, 1024, 0.5, 20, None)])
    write_verdict(other, "failed", "its process died")
    assert [item.status for item in job.outcomes()[:2]] == ["failed", "failed"]
    for each in (run, other):
        forget_failure(each)
    assert [item.status for item in job.outcomes()[:2]] == ["interrupted", "interrupted"]


def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "progress.csv").write_text("iteration,env_steps,x\n1,10,\n2,20,nan\n3,3")
    assert read_progress(tmp_path / "progress.csv") == [
        {"iteration": 1, "env_steps": 10},
        {"iteration": 2, "env_steps": 20},
    ]


@pytest.mark.parametrize(
    "junk",
    [b"\x00" * 20, b"\xff\xfe\x9c", b'3,"30,0.3', b"3,3o,0.3", b"," * 2, b"3," + b"9" * 200_000],
)
@pytest.mark.parametrize("end", [b"\n4,40,0.4\n", b""])
def test_junk_that_a_power_cut_left_is_no_row(tmp_path, junk, end):
    path = tmp_path / "progress.csv"
    path.write_bytes(b"iteration,env_steps,x\n1,10,0.1\n" + junk + end)
    assert [row["env_steps"] for row in read_progress(path)] == ([10, 40] if end else [10])


def test_a_last_row_without_its_end_is_no_row(tmp_path):
    (tmp_path / "progress.csv").write_text("iteration,env_steps,x\n1,10,0.1\n2,20,12")  # of 123.4
    assert len(read_progress(tmp_path / "progress.csv")) == 1


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.json", []
    path.write_bytes(b"old")
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(path.read_bytes())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_atomically(path, b"new")
    assert synced == [b"old", b"new"]  # its content before the renaming, its directory after it


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a.json", b"old")]


def test_who_runs_a_search_deletes_what_a_kill_left_half_written(job):
    leftover = job.directory.path / ".trials.csv.4711.tmp"
    leftover.write_text("trial,sta")
    with job.directory.locked():
        assert not leftover.exists()


def test_a_trial_goes_on_from_every_checkpoint_that_was_signed_newest_first(
    job, tmp_path, monkeypatch
):
    from training.tuning.session import prepare_run

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    config = job.search.trial_config(job.trials[0])
    run = job.directory.run("trial_0001")
    assert prepare_run(config, run) == []
    checkpoints = [run.checkpoints / f"iteration_{number:06d}" for number in (2, 4, 6)]
    for checkpoint in checkpoints:
        checkpoint.mkdir()
        (checkpoint / "rllib_checkpoint.json").write_text("{}")
        sign_checkpoint(checkpoint, {})
    (checkpoints[2] / "rllib_checkpoint.json").write_text("{ }")  # it changed since
    assert prepare_run(config, run) == [checkpoints[1], checkpoints[0]]

    run.progress_file.write_text("iteration,env_steps\n1,1024\n")
    for checkpoint in checkpoints[:2]:
        (checkpoint / "policyserve.json").unlink()
    assert prepare_run(config, run) == []  # from nothing: no row and no checkpoint stays
    assert not run.progress_file.exists()
    assert run.all_checkpoints() == []


def test_the_tables_have_a_row_per_trial_and_say_the_same(job):
    six_trials(job)
    best = write_tables(job.directory, job.search, job.trials, job.outcomes())
    assert best is not None
    assert best.trial == "trial_0002"
    with job.directory.csv_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [trial.name for trial in job.trials]
    assert rows[0]["config/model.fcnet_hiddens"] == "[8]"
    assert (rows[0]["reached"], rows[0]["objective"]) == ("true", "2048")
    assert [row["best"] for row in rows].index("true") == 1
    assert (rows[5]["status"], rows[5]["objective"]) == ("pending", "")
    table = pyarrow.parquet.read_table(job.directory.parquet_file).to_pylist()
    assert list(table[0]) == list(rows[0])
    for row, same in zip(rows, table, strict=True):
        assert int(row["env_steps"]) == same["env_steps"]
        assert float(row["config/algo_config.lr"]) == pytest.approx(same["config/algo_config.lr"])


def test_best_yaml_is_the_best_trials_whole_config(job):
    six_trials(job)
    write_tables(job.directory, job.search, job.trials, job.outcomes())
    assert load_config(job.directory.best_file) == job.search.trial_config(job.trials[1])
    assert job.directory.best_file.read_text().startswith("# The best trial of this search, trial_")


def test_where_none_reached_its_return_best_yaml_says_so(job):
    leave(job, 3, [(1, 5120, 2.5, 300, None)], status="stop_timesteps")
    best = write_tables(job.directory, job.search, job.trials, job.outcomes())
    assert best is not None
    assert not best.reached
    assert "None reached" in job.directory.best_file.read_text()


def test_a_search_reads_back_as_it_was_written(job):
    search, trials = read_search(job.directory)
    assert (search.settings, trials) == (job.search.settings, job.trials)
    facts = json.loads(job.directory.marker.read_text())
    assert facts["format"] == "policyserve-search"
    assert (facts["objective"], facts["mode"]) == ("timesteps_to_stop_return", "min")
    assert facts["parameters"] == {
        "model.fcnet_hiddens": {"kind": "grid", "values": [[8], [16, 16]]},
        "algo_config.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
    }


def test_a_search_is_never_overwritten_nor_run_twice_at_once(job):
    with pytest.raises(ConfigError, match="already holds a search"):
        job.directory.refuse_if_used()
    with (
        job.directory.locked(),
        pytest.raises(ConfigError, match="is in use"),
        SearchDirectory(job.directory.path).locked(),
    ):
        pass


@pytest.mark.parametrize(
    "damage",
    [
        {"trials": [{"trial": "../../elsewhere", "config": {}, "seed": 1}]},
        {"trials": [{"trial": "trial_0001"}]},
        {"format": "other"},
        {"format_version": 99},
    ],
)
def test_a_damaged_marker_is_refused(job, damage):
    facts = json.loads(job.directory.marker.read_text())
    job.directory.marker.write_text(json.dumps({**facts, **damage}))
    with pytest.raises(CheckpointNotFoundError):
        read_search(job.directory)


def test_a_search_file_that_was_edited_is_refused(job):
    text = job.directory.search_file.read_text().replace("lr:", "gamma:")
    job.directory.search_file.write_text(text.replace("0.01", "0.9"))
    with pytest.raises(ConfigError, match="other search spaces"):
        read_search(job.directory)


def test_the_schedule_of_an_exploited_trial_is_that_of_its_policy(job):
    donor, run = job.directory.run("trial_0001"), job.directory.run("trial_0002")
    for each in (donor, run):
        each.path.mkdir()
    begin_history(donor, {"algo_config.lr": 1e-3})
    begin_history(run, {"algo_config.lr": 1e-4})
    note_exploit(
        run,
        own_iteration=12,
        donor="trial_0001",
        donor_iteration=10,
        donor_schedule=read_history(donor)["schedule"],
        values={"algo_config.lr": 8e-4},
    )
    history = read_history(run)
    assert [(x["trial"], x["iteration"]) for x in history["schedule"]] == [
        ("trial_0001", 0),
        ("trial_0002", 10),
    ]
    assert history["events"][0]["from_iteration"] == 10
    assert read_outcome(job.trials[1], run, job.search).values["algo_config.lr"] == 8e-4


def test_asha_remembers_who_ended_before_the_search_was_resumed(tmp_path):
    job = make_job(tmp_path, "tune.scheduler=asha", "tune.asha.grace_period=1000")
    good = [{"env_steps": 1000.0, "episode_return_mean": 100.0}]

    def first_decision(ended: dict[str, Any]) -> str:
        scheduler = build_scheduler(job.search)
        remember(scheduler, ended)
        trial: Any = type("T", (), {"trial_id": "new"})()
        scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, {"env_steps": 1000, "return": 50.0})

    assert first_decision({}) == "CONTINUE"
    assert first_decision({"a": good, "b": good, "c": good}) == "STOP"


def test_values_that_pbt_changed_stay_in_their_ranges_and_fit_each_other(tmp_path):
    job = make_job(
        tmp_path,
        "tune.scheduler=pbt",
        "tune.objective=episode_return",
        "model.fcnet_hiddens=[8]",
        "minibatch_size={randint: [64, 520]}",
        "train_batch_size_per_learner={choice: [512, 2048]}",
        "tune.seed=4",
    )
    explore = build_scheduler(job.search)._custom_explore_fn
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = {
            "algo_config.lr": float(rng.choice([1e-5, 5e-3, 0.02])),
            "algo_config.minibatch_size": int(rng.choice([50, 300, 900])),
            "algo_config.train_batch_size_per_learner": int(rng.choice([512, 2048])),
        }
        kept = explore({TRIAL: {VALUES: dict(values)}})[TRIAL][VALUES]
        assert 1e-4 <= kept["algo_config.lr"] <= 1e-2
        size = kept["algo_config.minibatch_size"]
        assert 64 <= size <= kept["algo_config.train_batch_size_per_learner"]


def test_as_many_trials_run_at_a_time_as_there_is_room_for():
    trial = Resources(n_cpus=2, n_gpus=0, memory_bytes=100)
    assert fitting_trials(trial, Resources(8, 0, 10_000)) == 4
    assert fitting_trials(trial, Resources(8, 0, 250)) == 2
    assert fitting_trials(trial, Resources(1, 0, 10)) == 1  # it shares what there is
    assert fitting_trials(Resources(1, 1, 100), Resources(8, 2, 10_000)) == 2
    here = machine_resources()
    assert here.n_cpus >= 1
    assert here.memory_bytes > 0


def test_the_live_table_shows_who_runs_and_who_is_best(job):
    six_trials(job)
    console = Console(width=140, record=True, file=(job.directory.path / "out.txt").open("w"))
    display = SearchDisplay(console, job)
    row = {"env_steps": 3072, "env_steps_per_s": 2345.6, "return": 51.25}
    display.started("trial_0006")
    display.progressed("trial_0006", {**row, "config": {TRIAL: {VALUES: job.trials[5].values}}})
    console.print(display.render())
    lines = console.export_text().splitlines()
    console.file.close()
    assert lines[0].startswith("5 of 6 trials ended, 1 running, 1 failed")
    running = next(line for line in lines if line.startswith("trial_0006"))
    assert "3,072" in running
    assert "51.2" in running
    ended = [line.split()[0] for line in lines if line.startswith("trial_000")]
    assert ended[1:4] == ["trial_0002", "trial_0001", "trial_0003"]
