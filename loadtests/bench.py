"""`make bench`: the same policy behind each server, driven by the same tool, in turns.

Writes docs/benchmarks.md. Each server gets an idle machine: it is started for its turn and ended
after it with everything it started, so what one leaves behind cannot slow the next.
"""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from loadtests.benchmark.http_driver import driver_name
from loadtests.benchmark.policy import prepare_policy
from loadtests.benchmark.report import render
from loadtests.benchmark.results import Results, read_results
from loadtests.benchmark.targets import TARGETS, Target
from loadtests.benchmark.turns import Workshop, take_turn, time_steps
from loadtests.errors import LoadTestError, LoadTestUsageError

_console = Console(highlight=False, soft_wrap=True, markup=False)
_DIRECTORY = Path("build/bench")
_STEPS = "steps"
_QUICK_S = 2.0
_QUIET_S = 20.0


def bench(
    rounds: Annotated[int, typer.Option(help="Turns of each server.", min=1)] = 3,
    duration_s: Annotated[float, typer.Option(help="Seconds of each measurement.", min=1)] = 5.0,
    quick: Annotated[bool, typer.Option("--quick", help="One round of 2 s.")] = False,
    only: Annotated[
        str, typer.Option(help="Measure these again and keep the others' results.", metavar="KEYS")
    ] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run ended.")] = False,
    render_only: Annotated[
        bool, typer.Option("--render", help="Write the report again from results.json.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The report.")] = Path(
        "docs/benchmarks.md"
    ),
) -> None:
    """Measure this server and its peers side by side and write the report.

    KEYS are names of servers, with commas; `--only help` lists them.
    """
    file = _DIRECTORY / "results.json"
    if not render_only:
        rounds, duration_s = (1, _QUICK_S) if quick else (rounds, duration_s)
        chosen = choose(only)
        results = _begin(file, {"rounds": rounds, "duration_s": duration_s}, chosen, resume=resume)
        _measure(results, file, chosen)
    elif not file.is_file():
        raise LoadTestUsageError(f"there is no {file}; run `make bench` first")
    report = render(read_results(file))
    output.write_text(report)
    _console.print(f"wrote {output}")


def choose(only: str) -> list[str]:
    """The keys that `--only` names, in the order in which they are measured.

    Raises:
        LoadTestUsageError: One is unknown.
    """
    known = [_STEPS, *(target.key for target in TARGETS)]
    asked = [part.strip() for part in only.split(",") if part.strip()] or known
    unknown = [key for key in asked if key not in known]
    if unknown:
        raise LoadTestUsageError(f"--only: no server {unknown[0]!r}; there is {', '.join(known)}")
    return [key for key in known if key in asked]


def _begin(
    file: Path, settings: dict[str, float], chosen: Sequence[str], *, resume: bool
) -> Results:
    """New results, or those of an earlier run that are to be kept."""
    everything = len(chosen) == len(TARGETS) + 1
    if not file.is_file() or (everything and not resume):
        return Results(machine(), settings)
    results = read_results(file)
    if results.settings != settings:
        raise LoadTestUsageError(
            f"{file} was measured with {results.settings} and not with {settings}; give the same "
            "options, or measure everything"
        )
    if not resume:
        for key in chosen:
            results.turns.pop(key, None)
        if _STEPS in chosen:
            results.steps.clear()
    return results


def _measure(results: Results, file: Path, chosen: Sequence[str]) -> None:
    began = time.monotonic()
    _DIRECTORY.mkdir(parents=True, exist_ok=True)
    policy = prepare_policy(_DIRECTORY)
    workshop = Workshop(policy, _DIRECTORY, results.settings["duration_s"], _QUIET_S)
    rounds = results.settings["rounds"]
    for number in range(rounds):
        if _STEPS in chosen and len(results.steps) <= number:
            results.steps.append(time_steps(policy))
            results.write(file)
        for target in TARGETS:
            if target.key in chosen and len(results.turns.get(target.key, [])) <= number:
                _console.print(f"round {number + 1} of {rounds}: {target.title}")
                _take_turn(results, target, workshop)
                results.write(file)
    _console.print(f"measured in {(time.monotonic() - began) / 60:.1f} min")


def _take_turn(results: Results, target: Target, workshop: Workshop) -> None:
    turn = take_turn(target, workshop, lambda line: _console.print(f"  {line}"))
    if not turn.was_quiet:
        _console.print("  the machine was not quiet before this turn")
    results.turns.setdefault(target.key, []).append(turn)


def machine() -> dict[str, str]:
    """What a reader has to know of this machine."""
    versions = {name: version(name) for name in ("ray", "onnxruntime", "uvicorn", "numpy")}
    return {
        "cpu": _cpu_name(),
        "cores": str(psutil.cpu_count()),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "driver": driver_name(),
        "commit": _commit(),
        **versions,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(bench)
    # As Ctrl-C does, so that the server under way is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except LoadTestError as exc:
        _console.file.flush()
        print(f"bench: error: {exc.message}", file=sys.stderr)
        sys.exit(exc.exit_code)
