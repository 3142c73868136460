"""A trial of a search as Ray Tune runs it: in a process that is used again for the next one."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from training.errors import TrainingError
from training.run_directory import BEST, LAST
from training.tuning.definition import Trial
from training.tuning.directory import SearchDirectory, read_search
from training.tuning.files import read_json, write_json
from training.tuning.history import begin_history, note_exploit, read_history
from training.tuning.outcomes import FAILED, read_progress, write_verdict

if TYPE_CHECKING:
    from training.tuning.session import TrialSession

TRIAL = "trial"
"""The one key of the config of Ray Tune's trials; below it:"""

DIRECTORY, NAME, VALUES = "directory", "name", "values"

FINISHED, RETURN = "finished", "return"
"""Columns of its results, beside those of progress.csv that every algorithm has."""

_DONOR = "donor.json"
_COLUMNS = ("iteration", "env_steps", "time_s", "env_steps_per_s")


class TuneTrial(tune.Trainable):
    """One trial after another, each a run of `train` in its own run directory."""

    _session: TrialSession
    _newest: dict[str, Any]
    _evaluation_return: float | None

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial on.

        Args:
            config: Under `trial`: `directory` of the search, `name` of the trial, and the `values`
                of its varying settings by their dotted keys.
        """
        self._begin(config[TRIAL])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Leave the trial before, with a checkpoint, and take another one on."""
        self._session.end()
        self._begin(new_config[TRIAL])
        return True

    def step(self) -> dict[str, Any]:
        """Train an iteration.

        Returns:
            The row's `iteration`, `env_steps`, `time_s` and `env_steps_per_s`; `return`, of the
            newest evaluation where there are some, else of the newest training episodes, nan
            before the first; and `finished`, true after the last iteration.
        """
        try:
            report = self._session.advance()
        except TrainingError as exc:
            # Told, not raised: the process is as good as before, and the next trial can have it.
            write_verdict(self._run, FAILED, exc.message)
            return {**self._newest, FINISHED: True, "done": True}
        if not hasattr(report, "env_steps_per_s"):
            return {**self._newest, FINISHED: True, "done": True}
        evaluation = getattr(report, "evaluation_return_mean", None)
        if evaluation is not None:
            self._evaluation_return = evaluation
        seen = report.episode_return_mean
        if self._has_evaluations:
            seen = self._evaluation_return
        self._newest = {name: getattr(report, name) for name in _COLUMNS}
        self._newest[RETURN] = math.nan if seen is None else seen
        return {**self._newest, FINISHED: False}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy what another trial needs to go on from here: checkpoints, curve and record."""
        self._session.save()
        directory = Path(checkpoint_dir)
        for link in (LAST, BEST):
            checkpoint = self._run.linked(link)
            if checkpoint is not None:
                shutil.copytree(checkpoint, directory / link / checkpoint.name)
        if self._run.replay_buffer.is_dir():
            shutil.copytree(self._run.replay_buffer, directory / self._run.replay_buffer.name)
        if self._run.progress_file.exists():
            shutil.copy(self._run.progress_file, directory)
        schedule = read_history(self._run)["schedule"]
        donor = {NAME: self._name, "iteration": self._session.iteration, "schedule": schedule}
        write_json(directory / _DONOR, donor)

    def load_checkpoint(self, checkpoint: dict[Any, Any] | str | None) -> None:
        """Go on from what `save_checkpoint` copied: population based training's exploit."""
        assert isinstance(checkpoint, str)  # what `save_checkpoint` wrote to
        directory = Path(checkpoint)
        donor = read_json(directory / _DONOR)
        if donor[NAME] == self._name:
            return  # it was paused: its own run directory has all that
        with self._ownership.locked():
            self._ownership.take()  # whoever trained it until now writes no more
            self._become(directory, donor)

    def cleanup(self) -> None:
        """End the trial with a checkpoint."""
        self._session.end()

    def _begin(self, config: dict[str, Any]) -> None:
        # RLlib, which the search's own process can do without.
        from training.tuning.session import Ownership, TrialSession

        search_directory = SearchDirectory(Path(config[DIRECTORY]))
        search, trials = read_search(search_directory)
        self._name = self.trial_name  # not the config's: pbt copies that from trial to trial
        self._values = dict(config[VALUES])
        self._run = search_directory.run(self._name)
        seed = next(trial.seed for trial in trials if trial.name == self._name)
        trial_config = search.trial_config(Trial(self._name, self._values, seed))
        self._has_evaluations = bool(trial_config.evaluation.interval)
        self._evaluation_return = None
        self._newest = {}
        self._ownership = Ownership(search_directory.scratch, self._name)
        is_pbt = search.settings.scheduler == "pbt"
        self._session = TrialSession(
            trial_config, self._run, self._ownership, self._begin_history if is_pbt else _nothing
        )

    def _begin_history(self) -> None:
        if not read_history(self._run)["schedule"]:
            begin_history(self._run, self._values)

    def _become(self, directory: Path, donor: dict[str, Any]) -> None:
        rows = read_progress(self._run.progress_file)
        own_iteration = int(rows[-1]["iteration"]) if rows else 0
        shutil.rmtree(self._run.checkpoints, ignore_errors=True)
        self._run.checkpoints.mkdir(parents=True)
        self._run.result_file.unlink(missing_ok=True)
        for link in (BEST, LAST):
            for checkpoint in (directory / link).glob("iteration_*"):
                target = self._run.checkpoints / checkpoint.name
                if not target.exists():
                    shutil.copytree(checkpoint, target)
                self._run.link(link, target)
        buffer = self._run.replay_buffer
        shutil.rmtree(buffer, ignore_errors=True)
        if (directory / buffer.name).is_dir():
            shutil.copytree(directory / buffer.name, buffer)
        shutil.copy(directory / self._run.progress_file.name, self._run.progress_file)
        note_exploit(
            self._run,
            own_iteration=own_iteration,
            donor=donor[NAME],
            donor_iteration=donor["iteration"],
            donor_schedule=donor["schedule"],
            values=self._values,
        )


def _nothing() -> None:
    """What a trial without a history notes."""
