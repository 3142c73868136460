"""`train --video`: before and after, and what a run with a video leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.processes import policyserve
from tests.training.test_tensorboard import expected_of, scalars
from training.config import PPOTrainingConfig
from training.errors import ConfigError, VideoError
from training.run_directory import INITIAL, RunDirectory
from training.video import check_video, make_video, run_record

CARTPOLE = PPOTrainingConfig(env="CartPole-v1")


@pytest.mark.parametrize(
    ("file", "config", "said"),
    [
        ("a.avi", CARTPOLE, "expected .mp4 or .gif"),
        ("none/a.mp4", CARTPOLE, "no such directory"),
        (
            "a.mp4",
            PPOTrainingConfig(env="tests.export.test_recording:TextOnly"),
            "names ansi, human",
        ),
    ],
)
def test_a_video_that_could_not_be_made_is_refused_before_training(
    tmp_path: Path, file: str, config: PPOTrainingConfig, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_video(tmp_path / file, config)
    check_video(tmp_path / "a.mp4", CARTPOLE)


def test_a_resumed_run_has_to_have_kept_its_untrained_policy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it was started without --video"):
        check_video(tmp_path / "a.mp4", CARTPOLE, RunDirectory(tmp_path))


def test_a_run_that_kept_no_untrained_policy_has_no_video(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no checkpoint of the untrained policy"):
        make_video(tmp_path / "a.mp4", RunDirectory(tmp_path), CARTPOLE)


def test_a_projects_own_folders_are_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("training", "serving", "export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('of the project')\n")
    (tmp_path / "policyserve.py").write_text("raise RuntimeError('of the project')\n")
    monkeypatch.chdir(tmp_path)
    done = run_record("--help")
    assert done.returncode == 0, done.stderr
    assert "--title" in done.stdout


@pytest.mark.slow
def test_train_shows_before_and_after_and_event_files_agree_with_progress(tmp_path: Path) -> None:
    run, video = RunDirectory(tmp_path / "run"), tmp_path / "a.gif"
    # Three iterations, of which one checkpoint stays beside the linked ones.
    budget = ("--stop-timesteps", "3000", "--seed", "1", "--set", "checkpoint.keep=1")
    arguments = ("train", "--env", "CartPole-v1", *budget, "--run-dir", run.path)
    done = policyserve(*arguments, "--video", video)
    assert done.returncode == 0, done.stderr
    assert "untrained: return " in done.stdout
    with Image.open(video) as image:
        assert image.size[0] > 2 * 600  # two panels of CartPole's 600 pixels
        assert getattr(image, "n_frames", 1) > 50
    untrained = run.linked(INITIAL)
    assert untrained is not None
    assert untrained.name == "iteration_000000"
    found = {(tag, step): value for tag, step, value in scalars(run.tensorboard)}
    assert found == pytest.approx(expected_of(run.progress_file), rel=1e-5)

    resumed = policyserve("train", "--resume", run.path, "--stop-timesteps", "4000")
    assert resumed.returncode == 0, resumed.stderr
    points = scalars(run.tensorboard)
    expected = expected_of(run.progress_file)
    assert len(points) == len(expected)
    assert len({step for _, step, _ in points}) == 4
    assert {(tag, step): value for tag, step, value in points} == pytest.approx(expected, rel=1e-5)
