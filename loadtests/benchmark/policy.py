"""What every server serves: one CartPole policy, as a checkpoint, a bundle and an ONNX file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from loadtests.benchmark.bodies import Answers, read_answers
from loadtests.commands import installed, run
from loadtests.errors import LoadTestError


@dataclass(frozen=True)
class ServedPolicy:
    """The policy of the comparison.

    Attributes:
        checkpoint: RLlib's own files.
        bundle: What policyserve serves.
        model: The ONNX file that the others serve: observation -> action.
        answers: Observations and what the model answers to them.
    """

    checkpoint: Path
    bundle: Path
    model: Path
    answers: Answers


def prepare_policy(directory: Path) -> ServedPolicy:
    """Train and export the policy, if that is not done.

    Raises:
        LoadTestError: A step failed.
    """
    run_dir, bundle, files = directory / "run", directory / "cartpole", directory / "model"
    if not (bundle / "manifest.json").is_file():
        train = ["train", "ppo-cartpole", "--run-dir", str(run_dir), "--seed", "0", "--quiet"]
        _policyserve(train)
        _policyserve(["export", str(run_dir), "-o", str(bundle)])
    files.mkdir(exist_ok=True)
    ladder = [sys.executable, "-m", "loadtests.ladder.greedy_model", str(bundle), str(files)]
    done = run(ladder, capture=True)
    if done.returncode != 0:
        raise LoadTestError(f"the model could not be cut: {done.stdout.strip()[-300:]}")
    checkpoints = sorted((run_dir / "checkpoints").iterdir())
    if not checkpoints:
        raise LoadTestError(f"there is no checkpoint in {run_dir}; remove {directory} and repeat")
    answers = read_answers(files / "answers.json")
    return ServedPolicy(checkpoints[-1], bundle, files / "model.onnx", answers)


def _policyserve(arguments: list[str]) -> None:
    done = run([*installed("policyserve"), *arguments], capture=True)
    if done.returncode != 0:
        last = done.stdout.strip().splitlines()[-1:]
        raise LoadTestError(f"`policyserve {arguments[0]}` ended with {done.returncode}: {last}")
