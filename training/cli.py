"""`policyserve train`: arguments to a config and a run directory, and what the user sees."""

from __future__ import annotations

import datetime as dt
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from training.config import StopConfig, TrainingConfig
from training.config_files import dump_config, load_config, shipped_for
from training.errors import (
    CheckpointNotFoundError,
    ConfigError,
    StopNotReachedError,
    UntrustedCheckpointError,
)
from training.progress import ProgressLine
from training.provenance import ensure_key, verify_checkpoint
from training.ray_environment import set_ray_environment
from training.run_directory import RunDirectory, read_run
from training.run_facts import run_facts
from training.terminal import Interrupts, output_to

if TYPE_CHECKING:
    from training.train import TrainingResult


_FIXED = (
    # What a policy is made of, which a resumed run can't change.
    *("env", "env_config", "wrappers", "algo", "model", "normalize_actions", "clip_actions"),
    *("observation_filter", "prev_actions", "prev_rewards", "frame_stack"),
)


class _Job(NamedTuple):
    config: TrainingConfig
    run: RunDirectory
    resume_from: Path | None
    notes: list[str]


def train(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="A YAML file, or a shipped config's name."),
    ] = None,
    env: Annotated[
        str | None,
        typer.Option(
            help="Gymnasium environment id, module:EnvId or module:factory.", metavar="ID"
        ),
    ] = None,
    algo: Annotated[
        str | None, typer.Option(help="PPO (the default), DQN, SAC, IMPALA or APPO.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where everything goes; runs/ENV-ALGO-TIME if not given.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Go on from a run's last checkpoint.")
    ] = None,
    stop_return: Annotated[
        float | None, typer.Option(help="Stop at this mean return of recent training episodes.")
    ] = None,
    stop_evaluation_return: Annotated[
        float | None, typer.Option(help="Stop at this mean return of an evaluation.")
    ] = None,
    stop_timesteps: Annotated[
        float | None, typer.Option(help="Stop after this many environment steps.")
    ] = None,
    stop_time_s: Annotated[
        float | None, typer.Option(help="Stop after this many seconds of training.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the run reproducible.")] = None,
    num_env_runners: Annotated[
        int | None, typer.Option(help="Extra processes that step environments.")
    ] = None,
    num_gpus: Annotated[int | None, typer.Option(help="1 trains on a CUDA GPU.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. --set lr=1e-3."),
    ] = None,
    trust_checkpoint: Annotated[
        bool,
        typer.Option("--trust-checkpoint", help="Resume a checkpoint that you did not train."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
) -> None:
    """Train a policy: environment to checkpoints.

    Order: default, then CONFIG, then flags, then --set. Exit status: 0 done, 1 the run failed or
    missed the stop return that was asked for, 2 wrong usage, 130 or 143 interrupted (saved first).
    """
    flags = {
        "env": env,
        "algo": algo,
        "seed": seed,
        "num_env_runners": num_env_runners,
        "num_gpus": num_gpus,
        "stop.return": stop_return,
        "stop.evaluation_return": stop_evaluation_return,
        "stop.timesteps": stop_timesteps,
        "stop.time_s": stop_time_s,
    }
    if resume is None:
        job = _new_job(config, run_dir, flags, sets or [])
    elif config is not None or run_dir is not None:
        raise ConfigError("--resume has its run's config and directory: give it flags alone")
    else:
        job = _resumed_job(resume, flags, sets or [], trust_checkpoint)
    # The environment and Ray are imported once the arguments are known to be right.
    set_ray_environment()  # before an environment's module can import Ray
    from training.envs import check_environment

    job.notes.extend(check_environment(job.config))
    if job.config.num_gpus:
        from training.devices import check_gpus

        check_gpus(job.config.num_gpus)
    if job.resume_from is None:
        job.run.create(run_facts(job.config), dump_config(job.config))
    interrupts = Interrupts()
    with interrupts.noted():
        result = _run(job, interrupts, quiet=quiet)
    _report(result, job)
    if interrupts.signal_number is not None and result.status == "interrupted":
        raise typer.Exit(128 + interrupts.signal_number)  # as a shell reports an ended command


def _new_job(
    config_file: str | None, run_dir: Path | None, flags: dict[str, Any], sets: list[str]
) -> _Job:
    loaded = load_config(config_file, flags=flags, sets=sets)
    run = RunDirectory(run_dir or _default_run_dir(loaded))
    run.refuse_if_used()
    notes = []
    if loaded.stop.timesteps is None and loaded.stop.time_s is None:
        budget = loaded.complete().stop.timesteps
        notes.append(f"no budget given: {budget:,} steps at most (--stop-timesteps changes it)")
    if config_file is None and (names := shipped_for(loaded.env)):
        notes.append(f"a tuned config comes with policyserve: `policyserve train {names[0]}`")
    return _Job(loaded.complete(), run, None, notes)


def _resumed_job(
    path: Path, flags: dict[str, Any], sets: list[str], trust_checkpoint: bool
) -> _Job:
    read_run(path)
    run = RunDirectory(path)
    before = load_config(run.config_file)
    loaded = load_config(run.config_file, flags=flags, sets=sets)
    for name in _FIXED:
        if getattr(loaded, name) != getattr(before, name):
            raise ConfigError(f"a resumed run can't change `{name}`: start a new run")
    checkpoint, notes = _checkpoint_to_resume(run, trust_checkpoint)
    return _Job(loaded.complete(), run, checkpoint, notes)


def _checkpoint_to_resume(run: RunDirectory, trust_checkpoint: bool) -> tuple[Path, list[str]]:
    newest_first = run.all_checkpoints()
    if not newest_first:
        raise CheckpointNotFoundError(f"{run.path} has no checkpoint to resume from")
    if trust_checkpoint:
        return newest_first[0], []
    notes: list[str] = []
    reasons: list[str] = []
    for checkpoint in newest_first:
        provenance = verify_checkpoint(checkpoint)
        if provenance.is_trusted:
            return checkpoint, notes
        reasons.append(provenance.reason)
        notes.append(f"{checkpoint.name} is passed over: {provenance.reason}")
    raise UntrustedCheckpointError(
        f"{newest_first[0]} is not trusted: {reasons[0]}. A checkpoint is pickled code; if you "
        "trust where it came from, give --trust-checkpoint"
    )


def _run(job: _Job, interrupts: Interrupts, *, quiet: bool) -> TrainingResult:
    with output_to(job.run.log_file) as stdout:
        console = Console(file=stdout, highlight=False)
        for text in _announcement(job):
            console.print(text, markup=False, soft_wrap=True)
        from training import train as training

        with ProgressLine(console, job.config.stop, quiet=quiet) as line:
            return training.train(
                job.config,
                job.run,
                resume_from=job.resume_from,
                on_progress=line.show,
                is_interrupted=interrupts.is_set,
            )


def _announcement(job: _Job) -> list[str]:
    config = job.config
    verb = "resuming" if job.resume_from else "training"
    lines = [f"{verb} {config.env} with {config.algo}, seed {config.seed}, in {job.run.path}"]
    lines += job.notes
    try:
        ensure_key()
    except (OSError, RuntimeError) as exc:
        lines.append(f"warning: checkpoints can't be signed, export will ask about them: {exc}")
    return lines


def _report(result: TrainingResult, job: _Job) -> None:
    recent = result.episode_return_mean
    mean = "no episode ended" if recent is None else f"mean return {recent:.1f}"
    if result.evaluation_return_mean is not None:
        mean += f", evaluation {result.evaluation_return_mean:.1f},"
    run_dir = _relative(job.run.path)
    print(
        f"{_STATUS_TEXT[result.status]}: {mean} after {result.env_steps:,} steps "
        f"in {result.time_s:.1f} s"
    )
    if result.best_checkpoint is not None and result.best_return_mean is not None:
        by = "evaluation" if job.config.evaluation.interval else "mean return"
        best = f"{run_dir}/{result.best_checkpoint}"
        print(f"best checkpoint: {best} ({by} {result.best_return_mean:.1f})")
    print(f"last checkpoint: {run_dir}/{result.last_checkpoint}")
    if result.status == "interrupted":
        print(f"go on with: policyserve train --resume {run_dir}")
        return
    if result.status != "stop_return":
        _miss(result, job.config.stop, run_dir)
    print(f"next: policyserve export {run_dir} -o BUNDLE")


def _miss(result: TrainingResult, stop: StopConfig, run_dir: Path) -> None:
    missed = []
    if stop.episode_return is not None:
        recent = result.episode_return_mean
        found = "no full window of episodes" if recent is None else f"{recent:.1f}"
        missed.append(f"the mean return is {found} and {stop.episode_return:g} was asked for")
    if stop.evaluation_return is not None:
        found = f"{result.evaluation_return_mean or math.nan:.1f}"
        missed.append(f"the evaluation is {found} and {stop.evaluation_return:g} was asked for")
    if missed:
        raise StopNotReachedError(
            f"{', '.join(missed)}; the checkpoints are kept in {run_dir}, and "
            f"`policyserve train --resume {run_dir} --stop-timesteps N` goes on"
        )


_STATUS_TEXT = {
    "stop_return": "stop return reached",
    "stop_timesteps": "all steps done",
    "stop_time": "time is up",
    "interrupted": "interrupted",
}


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _default_run_dir(config: TrainingConfig) -> Path:
    env = re.sub(r"[^A-Za-z0-9.-]+", "-", config.env)
    moment = dt.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{env}-{config.algo}-{moment}"
