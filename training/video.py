"""`train --video`: the untrained policy and the best one side by side.

The video is made by `policyserve record`, in a process of its own: this package and those that play
policies know each other by the checkpoints alone.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from training.config import TrainingConfig
from training.env_building import build_env
from training.errors import ConfigError, VideoError
from training.run_directory import BEST, INITIAL, RunDirectory

_SUFFIXES = (".mp4", ".gif")
_PACKAGES = ("PIL", "imageio_ffmpeg")
_MODE = "rgb_array"


def check_video(path: Path, config: TrainingConfig, resumed: RunDirectory | None = None) -> None:
    """Refuse a video that could not be made after training, before it.

    Args:
        path: The video.
        config: Of the run.
        resumed: The run's directory, if it goes on.

    Raises:
        ConfigError: A wrong suffix, no such directory, a missing package, an environment that
            doesn't render, or a resumed run that has not kept its untrained policy.
    """
    if resumed is not None and resumed.linked(INITIAL) is None:
        raise ConfigError(
            f"--video shows the untrained policy too, and {resumed.path} kept none: it was started "
            "without --video; `policyserve record` shows any checkpoint"
        )
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(
            f"--video {path}: the suffix says which kind of video; expected "
            f"{' or '.join(_SUFFIXES)}"
        )
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--video {path} can't be written: {path.parent} is no such directory")
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"--video needs the package {package!r}, which is not installed: "
                "pip install 'policyserve[train]'"
            )
    env = build_env(config.env, config.env_config, config.wrapper_calls())
    modes = env.metadata.get("render_modes") or ()
    env.close()
    if _MODE not in modes:
        found = ", ".join(map(str, modes)) or "none"
        raise ConfigError(
            f"--video: {config.env} has no render mode {_MODE!r}, which a video is made of; its "
            f"metadata names {found}"
        )


def make_video(
    path: Path, run: RunDirectory, config: TrainingConfig, *, trust_checkpoint: bool = False
) -> str:
    """Record an episode of the untrained policy and one of the best.

    Args:
        path: The video.
        run: A run with checkpoints `initial` and `best`; without a best one, the last is shown.
        config: The run's.
        trust_checkpoint: As of `policyserve record`.

    Returns:
        What `policyserve record` says that it wrote, line by line.

    Raises:
        VideoError: A checkpoint is missing, or `record` failed; with its reason.
    """
    initial, best = run.linked(INITIAL), run.linked(BEST) or run.last()
    if initial is None or best is None:
        raise VideoError(f"no video was made: {run.path} has no checkpoint of the untrained policy")
    name = "best" if run.linked(BEST) else "last"
    titles = ("--title", "untrained", "--title", f"{name}: iteration {_iteration(best)}")
    limit = ("--max-steps", str(config.evaluation.max_episode_steps))
    trust = ("--trust-checkpoint",) if trust_checkpoint else ()
    done = run_record(str(initial), str(best), "-o", str(path), *titles, *limit, *trust)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        reason = said[-1].removeprefix("policyserve: error: ")
        raise VideoError(f"no video was made, the run is kept: {reason}")
    return done.stdout.strip()


def run_record(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `policyserve record` with the modules that this process finds.

    Args:
        words: Its arguments.

    Returns:
        How it ended, and what it said.
    """
    # Not `python -m`, which puts the current directory first: a project's own folder `training` or
    # `export` would be taken for ours.
    ours, here = str(Path(__file__).resolve().parents[1]), str(Path.cwd())
    found = [str(entry) for entry in sys.path if entry]
    where = [entry for entry in found if entry != here]
    where += [entry for entry in (ours, here) if entry == ours or entry in found]
    code = f"import sys; sys.path[:] = {where!r}; import policyserve; policyserve.main()"
    return subprocess.run(
        [sys.executable, "-c", code, "record", *words], capture_output=True, text=True, check=False
    )


def _iteration(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("_", 1)[-1])
