"""Population based training's record: which settings a trial trained with, and from when on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.run_directory import RunDirectory
from training.tuning.files import read_json, write_json

HISTORY = "history.json"


def read_history(run: RunDirectory) -> dict[str, list[dict[str, Any]]]:
    """Read a trial's record.

    Returns:
        `schedule`: the settings that the policy of now was trained with, each with the iteration
        that they began at, over the trials that it came from. `events`: what happened to this
        trial, in order: which trial it went on from, at which iterations, with which settings.
    """
    document = read_json(run.path / HISTORY)
    return {name: list(document.get(name) or []) for name in ("schedule", "events")}


def current_values(run: RunDirectory, first: Mapping[str, Any]) -> dict[str, Any]:
    """The newest values of a trial's varying settings."""
    schedule = read_history(run)["schedule"]
    return {**first, **(schedule[-1]["config"] if schedule else {})}


def begin_history(run: RunDirectory, values: Mapping[str, Any]) -> None:
    """Note the settings that a trial begins with."""
    _write(run, {"schedule": [_settings(run, 0, values)], "events": []})


def note_exploit(
    run: RunDirectory,
    *,
    own_iteration: int,
    donor: str,
    donor_iteration: int,
    donor_schedule: list[dict[str, Any]],
    values: Mapping[str, Any],
) -> None:
    """Note that a trial goes on from another one's checkpoint, with changed settings.

    Args:
        run: The trial's run directory.
        own_iteration: Where it was itself.
        donor: The other trial.
        donor_iteration: Of the checkpoint.
        donor_schedule: The settings that the checkpoint was trained with.
        values: The settings from here on.
    """
    before = [item for item in donor_schedule if item["iteration"] < donor_iteration]
    event = {
        "event": "exploit",
        "iteration": own_iteration,
        "from_trial": donor,
        "from_iteration": donor_iteration,
        "config": dict(values),
    }
    _write(
        run,
        {
            "schedule": [*before, _settings(run, donor_iteration, values)],
            "events": [*read_history(run)["events"], event],
        },
    )


def _settings(run: RunDirectory, iteration: int, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"trial": run.path.name, "iteration": iteration, "config": dict(values)}


def _write(run: RunDirectory, document: Mapping[str, Any]) -> None:
    write_json(run.path / HISTORY, document)
