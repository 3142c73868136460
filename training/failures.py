"""Whatever is raised in the middle of training to one error with one line for the user."""

from __future__ import annotations

from training.errors import EnvironmentFailedError, TrainingError
from training.run_directory import RunDirectory


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
    where = f"the traceback is in {run.log_file}"
    where += f", the last checkpoint is {kept}" if kept else ", there is no checkpoint yet"
    first = _first_cause(exc)
    text = f"{type(first).__name__}: {first}".splitlines()[0][:300]
    if type(first).__name__ == "ActorDiedError":  # by name: this module needs no Ray
        return TrainingError(f"a process that steps environments died; {where}")
    if _came_from_environment(exc):
        return EnvironmentFailedError(f"environment {env!r} raised {text}; {where}")
    return TrainingError(f"training failed with {text}; {where}")


def _first_cause(exc: BaseException) -> BaseException:
    # RLlib and Ray raise errors of their own, often without a text, from the one that tells.
    while (cause := exc.__cause__ or exc.__context__) is not None:
        exc = cause
    return exc


def _came_from_environment(exc: BaseException) -> bool:
    # RLlib calls the vector environment; whatever is raised below that call is the environment's.
    # From a runner in another process the traceback arrives as text.
    chain: BaseException | None = exc
    while chain is not None:
        traceback = chain.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_globals.get("__name__", "").startswith("gymnasium.vector"):
                return True
            traceback = traceback.tb_next
        chain = chain.__cause__ or chain.__context__
    return "gymnasium/vector" in str(exc)
