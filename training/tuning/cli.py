"""`policyserve tune`: arguments to a search and its directory, and what the user sees."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from training.errors import ConfigError, StopNotReachedError, TrainingError
from training.provenance import ensure_key
from training.ray_environment import set_ray_environment
from training.run_facts import run_facts
from training.terminal import Interrupts, output_to
from training.tuning.definition import Search, Trial, load_search
from training.tuning.directory import SearchDirectory, read_search
from training.tuning.outcomes import FAILED, Outcome, forget_failure, read_outcome

if TYPE_CHECKING:
    from training.config import TrainingConfig
    from training.tuning.machine import Resources
    from training.tuning.search import SearchJob


def tune(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[SEARCH]", help="A YAML file, or a shipped search's name."),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Where everything goes; runs/tune-ENV-ALGO-TIME if not given."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="SEARCH_DIR", help="Go on with a search.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: failed trials go on too.")
    ] = False,
    num_samples: Annotated[int | None, typer.Option(help="Trials per point of the grid.")] = None,
    max_concurrent_trials: Annotated[
        int | None, typer.Option(help="Trials at a time; as many as fit if not given.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any setting, e.g. --set 'lr={uniform: [0, 1e-2]}'."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The result as one JSON object, the last line.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
) -> None:
    """Search for good settings: many runs, a table of them, and the best one's config.

    Exit status: 0 done, 1 no trial reached what was asked for or all failed, 2 wrong usage, 130 or
    143 interrupted (every trial saved first; `--resume` goes on).
    """
    sets = [
        *(sets or []),
        *([f"tune.num_samples={num_samples}"] if num_samples is not None else []),
        *(
            [f"tune.max_concurrent_trials={max_concurrent_trials}"]
            if max_concurrent_trials is not None
            else []
        ),
    ]
    if resume is None:
        search, directory, trials = _new_search(config, run_dir, sets, retry_failed)
    else:
        search, directory, trials = _search_to_resume(resume, config, run_dir, sets)
    set_ray_environment()  # before an environment's module can import Ray
    notes = _check_environments(search, trials)
    job, notes_of_machine = _job(search, directory, trials)
    if resume is None:
        directory.create(search, trials, _facts(job))
    with directory.locked():
        if retry_failed:
            _forget_failures(job)
        _run(job, [*notes, *notes_of_machine], quiet=quiet, as_json=as_json, is_new=resume is None)


def _new_search(
    config: str | None, run_dir: Path | None, sets: Sequence[str], retry_failed: bool
) -> tuple[Search, SearchDirectory, list[Trial]]:
    if config is None:
        raise ConfigError(
            "no search: give a YAML file with a `tune` section, or `tune-cartpole`, which comes "
            "with policyserve"
        )
    if run_dir is not None and re.match(r"[a-z0-9]+:/", str(run_dir)):
        raise ConfigError(
            f"--run-dir {run_dir}: a search goes to a local directory; copy it when it is done"
        )
    if retry_failed:
        raise ConfigError("--retry-failed goes with --resume: a new search has no failed trials")
    search = load_search(config, sets)
    trials = search.draw_trials()
    directory = SearchDirectory(run_dir or _default_directory(search.trial_config(trials[0])))
    directory.refuse_if_used()
    return search, directory, trials


def _search_to_resume(
    path: Path, config: str | None, run_dir: Path | None, sets: Sequence[str]
) -> tuple[Search, SearchDirectory, list[Trial]]:
    if config is not None or run_dir is not None or sets:
        raise ConfigError(
            "--resume has its search's settings and directory: give it alone (to search "
            "differently, start a new search)"
        )
    directory = SearchDirectory(path)
    search, trials = read_search(directory)
    return search, directory, trials


def _check_environments(search: Search, trials: Sequence[Trial]) -> list[str]:
    """Build each environment that a trial uses, once; what the user should know about it."""
    from training.envs import check_environment

    notes: dict[str, None] = {}
    seen = []
    for trial in trials:
        config = search.trial_config(trial)
        # What the check looks at: all but what only the learning reads.
        aspects = config.model_dump(exclude={"algo_config", "seed", "stop", "checkpoint"})
        if aspects in seen:
            continue
        seen.append(aspects)
        notes.update(dict.fromkeys(check_environment(config)))
    return list(notes)


def _job(
    search: Search, directory: SearchDirectory, trials: Sequence[Trial]
) -> tuple[SearchJob, list[str]]:
    from training.tuning.machine import (
        fitting_trials,
        machine_resources,
        trial_resources,
    )
    from training.tuning.search import SearchJob

    needs = [trial_resources(search.trial_config(trial)) for trial in trials]
    needed = max(needs, key=lambda need: (need.n_gpus, need.n_cpus))
    if os.environ.get("RAY_ADDRESS"):
        given = search.settings.max_concurrent_trials
        n_concurrent = len(trials) if given == "auto" else min(given, len(trials))
        note = (
            "trials run on the cluster of RAY_ADDRESS, as many as it has room for: the search "
            "directory has to be on storage that every node sees under this path"
        )
        return SearchJob(search, directory, trials, n_concurrent, needed), [note]
    n_gpus = _count_gpus(needed)
    fitting = fitting_trials(needed, machine_resources(n_gpus=n_gpus))
    given = search.settings.max_concurrent_trials
    n_concurrent = min(fitting if given == "auto" else given, len(trials))
    notes = []
    if n_concurrent > fitting:
        notes.append(f"{n_concurrent} trials at a time, where this machine has room for {fitting}")
    if needed.n_gpus and n_concurrent * needed.n_gpus > n_gpus:
        raise ConfigError(
            f"{n_concurrent} trials at a time need {n_concurrent * needed.n_gpus} GPUs, and torch "
            f"sees {n_gpus}: lower `tune.max_concurrent_trials`"
        )
    return SearchJob(search, directory, trials, n_concurrent, needed), notes


def _count_gpus(needed: Resources) -> int:
    if not needed.n_gpus:
        return 0
    import torch

    from training.devices import check_gpus

    check_gpus(needed.n_gpus)
    return torch.cuda.device_count()


def _facts(job: SearchJob) -> dict[str, Any]:
    facts = run_facts(job.search.trial_config(job.trials[0]))
    return {name: facts[name] for name in ("env", "algo", "versions", "machine")}


def _forget_failures(job: SearchJob) -> None:
    for trial in job.trials:
        run = job.directory.run(trial.name)
        if read_outcome(trial, run, job.search).status == FAILED:
            forget_failure(run)


def _run(job: SearchJob, notes: Sequence[str], *, quiet: bool, as_json: bool, is_new: bool) -> None:
    started_s = time.monotonic()
    interrupts = Interrupts()
    with interrupts.noted(), output_to(job.directory.log_file) as stdout:
        console = Console(file=stdout, highlight=False)
        if not quiet:
            for text in _announcement(job, notes, is_new):
                console.print(text, markup=False, soft_wrap=True)
        from training.tuning.display import SearchDisplay
        from training.tuning.search import run_search

        with SearchDisplay(console, job, quiet=quiet) as display:
            try:
                outcomes, best = run_search(job, display, interrupts.is_set)
            except OSError as exc:
                path = _shown(job.directory.path)
                raise TrainingError(
                    f"the search directory {path} can't be written: {exc}; once it can, "
                    f"`policyserve tune --resume {path}` goes on"
                ) from exc
    is_interrupted = interrupts.is_set() and not all(item.has_ended for item in outcomes)
    try:
        _report(job, outcomes, best, time.monotonic() - started_s, is_interrupted)
    finally:
        if as_json:
            print(json.dumps(_as_json(job, outcomes, best, is_interrupted)))
    if is_interrupted and interrupts.signal_number is not None:
        raise typer.Exit(128 + interrupts.signal_number)


def _announcement(job: SearchJob, notes: Sequence[str], is_new: bool) -> list[str]:
    from training.tuning.display import objective_name

    config = job.search.trial_config(job.trials[0])
    n_ended = sum(outcome.has_ended for outcome in job.outcomes())
    verb = "searching" if is_new else f"resuming ({n_ended} trials have ended)"
    sought = "fewest" if job.search.settings.mode == "min" else "highest"
    what = (
        f"{verb}: {len(job.trials)} trials of {config.algo} on {config.env}, "
        f"{job.n_concurrent} at a time, for the {sought} "
        f"{objective_name(job.search.settings.objective)}, in {_shown(job.directory.path)}"
    )
    lines = [what, *notes]
    try:
        ensure_key()
    except (OSError, RuntimeError) as exc:
        lines.append(
            "warning: checkpoints can't be signed, so that a resumed trial starts again and export "
            f"asks about them: {exc}"
        )
    return lines


def _report(
    job: SearchJob,
    outcomes: Sequence[Outcome],
    best: Outcome | None,
    duration_s: float,
    is_interrupted: bool,
) -> None:
    path = _shown(job.directory.path)
    counts = Counter(outcome.status for outcome in outcomes)
    states = ", ".join(f"{n} {status}" for status, n in counts.items())
    print(f"{len(outcomes)} trials in {duration_s:.0f} s: {states}")
    if best is not None:
        _print_best(job, best)
    if is_interrupted:
        print(f"go on with: policyserve tune --resume {path}")
        return
    if counts[FAILED] == len(outcomes):
        raise TrainingError(
            f"all {len(outcomes)} trials failed, the first with: {outcomes[0].error}; each one's "
            f"reason is in {path}/trials.csv"
        )
    # Any of them: one that reached its return may have a worse objective than one that did not.
    if best is None or not any(outcome.reached for outcome in outcomes):
        raise StopNotReachedError(
            "no trial reached what was asked for; the best of them "
            f"{f'is {best.trial} ({best.best_return}), in {path}/best.yaml' if best else 'is none'}"
        )
    print(f"next: policyserve train {path}/best.yaml")
    print(f"      policyserve plot {path} -o search.png")
    print(f"      policyserve export {path}/trials/{best.trial} -o BUNDLE")


def _print_best(job: SearchJob, best: Outcome) -> None:
    from training.tuning.display import objective_name, show_value

    objective = "" if best.objective is None else f", {best.objective:,.6g}"
    objective += f" {objective_name(job.search.settings.objective)}" if objective else ""
    returned = "-" if best.best_return is None else f"{best.best_return:.1f}"
    print(f"best: {best.trial}{objective}, return {returned} after {best.env_steps:,} steps")
    for key, value in best.values.items():
        print(f"  {key}: {show_value(value)}")


def _as_json(
    job: SearchJob, outcomes: Sequence[Outcome], best: Outcome | None, is_interrupted: bool
) -> dict[str, Any]:
    return {
        "search_dir": str(job.directory.path),
        "status": "interrupted" if is_interrupted else "done",
        "objective": job.search.settings.objective,
        "mode": job.search.settings.mode,
        "n_trials": len(outcomes),
        "statuses": dict(Counter(outcome.status for outcome in outcomes)),
        "best": None
        if best is None
        else {
            "trial": best.trial,
            "reached": best.reached,
            "objective": best.objective,
            "return": best.best_return,
            "env_steps": best.env_steps,
            "config": dict(best.values),
            "run_dir": str(job.directory.run(best.trial).path),
            "config_file": str(job.directory.best_file),
        },
    }


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _default_directory(config: TrainingConfig) -> Path:
    env = re.sub(r"[^A-Za-z0-9.-]+", "-", config.env)
    moment = dt.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"tune-{env}-{config.algo}-{moment}"
