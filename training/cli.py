"""`policyserve train`: arguments to a config and a run directory, and what the user sees."""

from __future__ import annotations

import datetime as dt
import json
import re
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from training.config import StopConfig, TrainingConfig
from training.config_files import dump_config, load_config, shipped_for
from training.errors import (
    ConfigError,
    StopNotReachedError,
    TrainingError,
    UntrustedCheckpointError,
    VideoError,
)
from training.progress import ProgressLine, ProgressRow, return_text
from training.provenance import ensure_key, verify_checkpoint
from training.ray_environment import set_ray_environment
from training.remote_files import is_uri
from training.resuming import checkpoints_to_resume
from training.run_directory import RunDirectory, read_run
from training.run_facts import run_facts
from training.storage import RunStorage, new_local_run, open_storage
from training.terminal import Interrupts, output_to

if TYPE_CHECKING:
    from training.train import TrainingResult


_FIXED = (
    # What a policy is made of, which a resumed run can't change.
    *("env", "env_config", "wrappers", "algo", "model", "normalize_actions", "clip_actions"),
    *("flatten_observations", "observation_filter", "prev_actions", "prev_rewards", "frame_stack"),
    *("algo_config.dueling", "algo_config.num_atoms", "algo_config.twin_q"),
)


class _Job(NamedTuple):
    config: TrainingConfig
    run: RunDirectory
    resume_from: list[Path]
    notes: list[str]
    storage: RunStorage | None = None

    @property
    def place(self) -> str:
        """The run's directory or URI as the user is shown it."""
        return str(_relative(self.run.path) if self.storage is None else self.storage)

    def kept(self) -> AbstractContextManager[None]:
        """What the run is done in, so that it is where the user wants it."""
        return nullcontext() if self.storage is None else self.storage.kept(self.run)


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
        str | None,
        typer.Option(
            metavar="DIR_OR_URI",
            help="Where everything goes, s3://bucket/run for example; runs/ENV-ALGO-TIME if not "
            "given.",
        ),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on from a run's last checkpoint.")
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
    video: Annotated[
        Path | None,
        typer.Option(
            help="At the end record the untrained and the best policy side by side (.mp4, .gif).",
            metavar="FILE",
        ),
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
    try:
        _check(job, video)
    except BaseException:
        if job.storage is not None:  # a copy of it was fetched to be resumed
            shutil.rmtree(job.run.path, ignore_errors=True)
        raise
    if not job.resume_from:
        _create(job)
    interrupts = Interrupts()
    with job.kept():
        with interrupts.noted():
            result = _run(job, interrupts, quiet=quiet, keeps_initial=video is not None)
        try:
            if video is not None and result.status != "interrupted":
                from training.video import make_video

                print(make_video(video, job.run, job.config, trust_checkpoint=trust_checkpoint))
        except VideoError as exc:  # what was trained is reported first
            _report(result, job)
            raise exc from None
    _report(result, job)
    if interrupts.signal_number is not None and result.status == "interrupted":
        raise typer.Exit(128 + interrupts.signal_number)  # as a shell reports an ended command


def _check(job: _Job, video: Path | None) -> None:
    # The environment and Ray are imported once the arguments are known to be right.
    set_ray_environment()  # before an environment's module can import Ray
    from training.envs import check_environment

    job.notes.extend(check_environment(job.config))
    if job.config.num_gpus:
        from training.devices import check_gpus

        check_gpus(job.config.num_gpus)
    if video is not None:
        from training.video import check_video

        check_video(video, job.config, job.run if job.resume_from else None)


def _new_job(
    config_file: str | None, run_dir: str | None, flags: dict[str, Any], sets: list[str]
) -> _Job:
    loaded = load_config(config_file, flags=flags, sets=sets)
    storage = open_storage(run_dir) if run_dir is not None and is_uri(run_dir) else None
    run = new_local_run() if storage else RunDirectory(Path(run_dir or _default_run_dir(loaded)))
    (storage or run).refuse_if_used()
    notes = []
    if loaded.stop.timesteps is None and loaded.stop.time_s is None:
        budget = loaded.complete().stop.timesteps
        notes.append(f"no budget given: {budget:,} steps at most (--stop-timesteps changes it)")
    if config_file is None and (names := shipped_for(loaded.env)):
        notes.append(f"a tuned config comes with policyserve: `policyserve train {names[0]}`")
    return _Job(loaded.complete(), run, [], notes, storage)


def _create(job: _Job) -> None:
    if job.storage is not None:
        job.run.path.mkdir(mode=0o700)  # in a directory that other users share
    job.run.create(run_facts(job.config), dump_config(job.config))


def _resumed_job(
    source: str, flags: dict[str, Any], sets: list[str], trust_checkpoint: bool
) -> _Job:
    if not is_uri(source):
        return _job_of_run(RunDirectory(Path(source)), flags, sets, trust_checkpoint)
    storage = open_storage(source)
    run = storage.fetch()
    try:
        job = _job_of_run(run, flags, sets, trust_checkpoint)
    except TrainingError as exc:
        shutil.rmtree(run.path, ignore_errors=True)
        raise type(exc)(exc.message.replace(str(run.path), str(storage))) from exc
    return job._replace(storage=storage)


def _job_of_run(
    run: RunDirectory, flags: dict[str, Any], sets: list[str], trust_checkpoint: bool
) -> _Job:
    read_run(run.path)
    before = load_config(run.config_file)
    loaded = load_config(run.config_file, flags=flags, sets=sets)
    for name in _FIXED:
        if _setting(loaded, name) != _setting(before, name):
            raise ConfigError(f"a resumed run can't change `{name}`: start a new run")
    checkpoints, notes = checkpoints_to_resume(run, trust=trust_checkpoint)
    if not trust_checkpoint:
        _check_named_code(before, run, checkpoints[0])
    return _Job(loaded.complete(), run, checkpoints, notes)


def _setting(config: TrainingConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _check_named_code(config: TrainingConfig, run: RunDirectory, checkpoint: Path) -> None:
    # What config.yaml names is imported and called, and anybody who may write in the run directory
    # may edit it; the checkpoint's facts are signed.
    facts = verify_checkpoint(checkpoint).facts
    named = {
        "env": config.env,
        "env_config": config.env_config,
        "wrappers": [[path, kwargs] for path, kwargs in config.wrapper_calls()],
        "model.module": config.model.module,
    }
    for name, value in named.items():
        signed = facts.get(name.rpartition(".")[2], value)
        if json.loads(json.dumps(value)) != signed:
            raise UntrustedCheckpointError(
                f"{run.config_file} has `{name}` {value!r}, and the run was trained with "
                f"{signed!r}: the file was edited since. If that was you, give --trust-checkpoint"
            )


def _run(job: _Job, interrupts: Interrupts, *, quiet: bool, keeps_initial: bool) -> TrainingResult:
    with output_to(job.run.log_file) as stdout:
        console = Console(file=stdout, highlight=False)
        for text in _announcement(job):
            console.print(text, markup=False, soft_wrap=True)
        from training import train as training

        def on_progress(row: ProgressRow) -> None:
            line.show(row)
            if job.storage is not None:
                job.storage.copy_if_due(job.run)

        with ProgressLine(console, job.config.stop, quiet=quiet) as line:
            return training.train(
                job.config,
                job.run,
                resume_from=job.resume_from,
                on_progress=on_progress,
                on_note=lambda text: console.print(text, markup=False, soft_wrap=True),
                is_interrupted=interrupts.is_set,
                keeps_initial=keeps_initial,
            )


def _announcement(job: _Job) -> list[str]:
    config = job.config
    verb = "resuming" if job.resume_from else "training"
    where = job.storage or job.run.path
    lines = [f"{verb} {config.env} with {config.algo}, seed {config.seed}, in {where}"]
    lines += job.notes
    try:
        ensure_key()
    except (OSError, RuntimeError) as exc:
        lines.append(f"warning: checkpoints can't be signed, export will ask about them: {exc}")
    return lines


def _report(result: TrainingResult, job: _Job) -> None:
    recent = result.episode_return_mean
    mean = "no episode ended" if recent is None else f"mean return {return_text(recent)}"
    if result.evaluation_return_mean is not None:
        mean += f", evaluation {return_text(result.evaluation_return_mean)},"
    run_dir = job.place
    print(
        f"{_STATUS_TEXT[result.status]}: {mean} after {result.env_steps:,} steps "
        f"in {result.time_s:.1f} s"
    )
    if result.best_checkpoint is not None and result.best_return_mean is not None:
        by = "evaluation" if job.config.evaluation.interval else "mean return"
        best = f"{run_dir}/{result.best_checkpoint}"
        print(f"best checkpoint: {best} ({by} {return_text(result.best_return_mean)})")
    print(f"last checkpoint: {run_dir}/{result.last_checkpoint}")
    if result.status == "interrupted":
        print(f"go on with: policyserve train --resume {run_dir}")
        return
    if result.status != "stop_return":
        _miss(result, job.config.stop, run_dir)
    print(f"next: policyserve export {run_dir} -o BUNDLE")


def _miss(result: TrainingResult, stop: StopConfig, run_dir: str) -> None:
    missed = []
    if stop.episode_return is not None:
        recent = result.episode_return_mean
        found = "no full window of episodes" if recent is None else return_text(recent)
        missed.append(f"the mean return is {found} and {stop.episode_return:g} was asked for")
    if stop.evaluation_return is not None:
        evaluated = result.evaluation_return_mean
        found = "not done" if evaluated is None else return_text(evaluated)
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
