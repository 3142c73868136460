"""Kill a run at every one of its file operations, and see that it goes on as if nothing had been.

The run is real but for its algorithm, which learns nothing. Run with the directory to work in, and
with n to kill it at every n-th operation only.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from training.config import TrainingConfig
from training.config_files import config_from_mapping, dump_config
from training.resuming import checkpoints_to_resume
from training.run_directory import BEST, LAST, RunDirectory, find_checkpoint
from training.run_facts import run_facts
from training.session import Session

N_ITERATIONS = 3
STEPS = 100
_WATCHED = ("open", "os.", "shutil.")


class Algorithm:
    """As much of RLlib's as a session asks for: a counter, which is also its replay buffer."""

    def __init__(self) -> None:
        self.iteration = 0
        self.local_replay_buffer = self

    def train(self) -> dict[str, Any]:
        self.iteration += 1
        episode = (float(10 * self.iteration), 20, True, False)
        runners = {
            "num_env_steps_sampled_lifetime": STEPS * self.iteration,
            "policyserve_episodes": [episode, episode],
        }
        return {"training_iteration": self.iteration, "env_runners": runners}

    def save_to_path(self, path: str) -> None:
        (Path(path) / "learner").mkdir()
        (Path(path) / "learner" / "state").write_text(str(self.iteration))
        (Path(path) / "rllib_checkpoint.json").write_text("{}")

    def get_state(self) -> dict[str, int]:
        return {"iteration": self.iteration}

    def set_state(self, state: dict[str, int]) -> None:
        assert state["iteration"] == self.iteration, "the buffer is of another iteration"


def config(keep: int = 1) -> TrainingConfig:
    return config_from_mapping(
        {
            "env": "CartPole-v1",
            "algo": "DQN",
            "seed": 1,
            "algo_config": {"store_buffer_in_checkpoints": True},
            "evaluation": {"interval": 0},
            "stop": {"timesteps": STEPS * N_ITERATIONS},
            "checkpoint": {"every": 1, "keep": keep, "best_window_episodes": 2},
        },
        source="this check",
    ).complete()


def train(run: RunDirectory, keep: int = 1) -> str | None:
    """Start or resume the run, as the command does; what is to be said of its replay buffer."""
    algorithm: Any = Algorithm()
    note = None
    session = Session(config(keep), run, lambda _: None, keeps_initial=True)
    if run.all_checkpoints():
        (newest, *_), _ = checkpoints_to_resume(run, trust=False)
        session.resume(newest)
        algorithm.iteration = int((newest / "learner" / "state").read_text())
        session.take_over(newest)
        note = session.restore_buffer(algorithm)
    run.write_config(dump_config(config(keep)))
    session.loop(algorithm, lambda: False)
    run.write_result({"iterations": session.iteration})
    return note


def kill_at(operation: int, directory: Path) -> None:
    """Have this process killed right before one of its file operations below a directory."""
    n_done = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal n_done
        if not event.startswith(_WATCHED) or not arguments:
            return
        if any(str(path).startswith(str(directory)) for path in arguments[:2]):
            n_done += 1
            if n_done == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def forked(run: RunDirectory, operation: int) -> int:
    """Train in a child that is killed at an operation (0: never); how it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if operation:
                kill_at(operation, run.path)
            assert train(run) is None  # it goes on with its buffer
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(run: RunDirectory, operation: int) -> None:
    """The run is whole: one curve, the last and the best checkpoint, and no leftovers."""
    with run.progress_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(int(row["iteration"]), int(row["env_steps"])) for row in rows]
    expected = [(i, STEPS * i) for i in range(1, N_ITERATIONS + 1)]
    assert found == expected, (operation, found)
    times = [float(row["time_s"]) for row in rows]
    assert times == sorted(times), (operation, times)
    assert json.loads(run.result_file.read_text())["iterations"] == N_ITERATIONS
    final = f"iteration_{N_ITERATIONS:06d}"
    assert {run.linked(name) for name in (BEST, LAST)} == {run.checkpoints / final}, operation
    assert find_checkpoint(run.path).name == final, operation
    left = sorted(path.name for path in run.checkpoints.iterdir())
    assert left == ["best", "initial", "iteration_000000", final, "last"], (operation, left)
    assert [path.name for path in run.replay_buffer.iterdir()] == [f"{final}.pkl"], operation


def check_the_one_before(base: Path, keep: int) -> None:
    """With the newest checkpoint damaged: where two are kept, the buffer is there, else it's said.

    With one, the untrained policy's is all that is left.
    """
    run = RunDirectory(base / f"run-keep-{keep}")
    run.create(run_facts(config(keep)), dump_config(config(keep)))
    assert train(run, keep) is None
    newest = f"iteration_{N_ITERATIONS:06d}"
    (run.checkpoints / newest / "learner" / "state").write_text("half of the wei")
    note = train(run, keep)
    if keep == 1:
        assert note is not None
        assert "replay buffer of iteration 0 " in note, note
    else:
        assert note is None, note
    expected = [f"iteration_{i:06d}.pkl" for i in range(N_ITERATIONS + 1)][-min(keep, 2) :]
    assert sorted(path.name for path in run.replay_buffer.iterdir()) == expected
    shutil.rmtree(run.path)


def main() -> None:
    base, step = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    importlib.import_module("tensorboardX.event_file_writer")  # once, not in each fork
    for keep in (1, 2, 3):
        check_the_one_before(base, keep)
    n_killed = n_resumed = 0
    for operation in range(1, 10_000, step):
        run = RunDirectory(base / f"run-{operation}")
        run.create(run_facts(config()), dump_config(config()))
        status = forked(run, operation)
        if status == 0:
            break
        assert status == -signal.SIGKILL, (operation, status)
        n_killed += 1
        n_resumed += bool(run.all_checkpoints())
        if not run.all_checkpoints():
            run.drop_after(0)  # as `tune` starts a trial anew that has nothing to go on from
        assert forked(run, 0) == 0, operation
        check(run, operation)
        shutil.rmtree(run.path)
    print(json.dumps({"killed": n_killed, "resumed": n_resumed}))


if __name__ == "__main__":
    main()
