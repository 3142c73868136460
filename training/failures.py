"""Whatever is raised in the middle of training to one error with one line for the user."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator

from training.errors import EnvironmentFailedError, TrainingError
from training.run_directory import RunDirectory

_NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than allowed here",
}
# Frames below these are the environment's: Gymnasium's vectors, and the lean loops that replace
# their step. By name, also in a traceback that came from another process as text.
_STEPPERS = ("gymnasium.vector", "training.fast_stepping")


def as_training_error(exc: Exception, env: str, run: RunDirectory) -> TrainingError:
    """Name the cause, say whose fault it is and what the run directory still holds.

    Args:
        exc: What was raised.
        env: The environment's id.
        run: The run that it ended.

    Returns:
        EnvironmentFailedError where the environment raised, a TrainingError itself unchanged.
    """
    if isinstance(exc, TrainingError):
        return exc
    kept = run.last()
    last = f"the last checkpoint is {kept}" if kept else "there is no checkpoint yet"
    if full := _no_space(exc):
        go_on = f", then `policyserve train --resume {run.path}`" if kept else ""
        return TrainingError(
            f"{_NO_SPACE[full.errno or 0]}: {full.filename or run.path} can't be written; {last}. "
            f"Make room{go_on}"
        )
    where = f"the traceback is in {run.log_file}, {last}"
    first = _first_cause(exc)
    text = _what_was_raised(first)
    if type(first).__name__ == "ActorDiedError":  # by name: this module needs no Ray
        return TrainingError(f"a process that steps environments died; {where}")
    if _came_from_environment(exc):
        during = " in an evaluation" if _came_from_evaluation(exc) else ""
        return EnvironmentFailedError(f"environment {env!r} raised {text}{during}; {where}")
    return TrainingError(f"training failed with {text}; {where}")


def _chain(exc: BaseException) -> Iterator[BaseException]:
    # RLlib and Ray raise errors of their own, often without a text, from the one that tells.
    following: BaseException | None = exc
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__


def _first_cause(exc: BaseException) -> BaseException:
    *_, first = _chain(exc)
    return first


def _what_was_raised(first: BaseException) -> str:
    text = f"{type(first).__name__}: {first}"
    if type(first).__name__.startswith("RayTaskError"):
        # From another process, where the first cause is the first traceback of its text: frames,
        # which are indented, and then what was raised.
        told = re.split(r"\n\n(?:The above exception|During handling of)", str(first))[0]
        text = re.split(r"\n +[^\n]*\n(?! )", told)[-1].strip() or text
    return text.splitlines()[0][:300]


def _no_space(exc: BaseException) -> OSError | None:
    for each in _chain(exc):
        if isinstance(each, OSError) and each.errno in _NO_SPACE:
            return each
    return None


def _modules(exc: BaseException) -> Iterator[str]:
    for each in _chain(exc):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            yield frame.f_globals.get("__name__", "")


def _came_from_environment(exc: BaseException) -> bool:
    # Whatever is raised below the call that steps the environments is the environment's.
    if any(name.startswith(_STEPPERS) for name in _modules(exc)):
        return True
    return any(name.replace(".", "/") in str(exc) for name in _STEPPERS)


def _came_from_evaluation(exc: BaseException) -> bool:
    return any(name.startswith("training.evaluation") for name in _modules(exc))
