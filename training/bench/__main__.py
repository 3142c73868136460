"""`python -m training.bench`: measure, print the tables, write docs/training-benchmarks.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from training.bench.peer_environment import peer_python, pinned
from training.bench.results import Results, markdown, tables
from training.errors import TrainingError

ROOT = Path(__file__).parents[2]
_DRIVERS = Path(__file__).parent
_console = Console(highlight=False, soft_wrap=True)


def bench(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the speed, in turns.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the time to a solved task.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One round, one seed, few steps.")] = False,
    output: Annotated[Path, typer.Option(help="The page to write.")] = (
        ROOT / "docs" / "training-benchmarks.md"
    ),
    build: Annotated[Path, typer.Option(help="For the peer and the figures.")] = ROOT / "build",
) -> None:
    """Compare training with plain RLlib and Stable-Baselines3, side by side."""
    if quick:
        rounds, seeds = 1, 1
    peer = _peer(build)
    commands = {
        "ours": (sys.executable, "-m", "training.bench.rllib_driver", "ours"),
        "rllib": (sys.executable, "-m", "training.bench.rllib_driver", "rllib"),
        "sb3": (str(peer), str(_DRIVERS / "sb3_driver.py")),
    }
    results = Results(_facts())
    for seed in range(1, rounds + 1):
        for name, command in commands.items():
            amount = "5" if quick else "25"
            found = _measure(*command, "speed", str(seed), amount)
            results.speeds.setdefault(name, []).append(found)
            _say(f"round {seed}: {name} {found}")
    for seed in range(1, seeds + 1):
        for name in ("ours", "sb3"):
            found = _measure(*commands[name], "solve", str(seed), "100000")
            results.solved.setdefault(name, []).append(found)
            _say(f"seed {seed}: {name} {found}")
        results.commands_s.append(_time_command(seed))
        _say(f"seed {seed}: the command took {results.commands_s[-1]:.1f} s")
    results.facts["load_after"] = f"{os.getloadavg()[0]:.1f}"
    for title, (heading, *rows) in tables(results):
        table = Table(*heading, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        _console.print(table)
    figures = build / "bench-training.json"
    figures.write_text(json.dumps(asdict(results), indent=2), encoding="utf-8")
    # A quick look is not what the page should show.
    page = build / "training-benchmarks-quick.md" if quick else output
    page.write_text(markdown(results), encoding="utf-8")
    _console.print(f"written: {page}, {figures}")


def _peer(build: Path) -> Path:
    try:
        return peer_python(build / "bench-training" / "sb3")
    except TrainingError as exc:
        print(f"bench-training: error: {exc.message}", file=sys.stderr)
        raise typer.Exit(1) from exc


def _measure(*command: str) -> dict[str, Any]:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=_environment()
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "nothing on stderr").splitlines()[-1]
        print(f"bench-training: error: {' '.join(command)} failed: {last}", file=sys.stderr)
        raise typer.Exit(1)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _time_command(seed: int) -> float:
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        command: Sequence[str] = (sys.executable, "-m", "policyserve", "train", "ppo-cartpole")
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--quiet", "--seed", str(seed), "--run-dir", str(run_dir)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=_environment(),
        )
        duration_s = time.perf_counter() - started
    if done.returncode != 0:
        print(f"bench-training: error: {done.stderr.strip()}", file=sys.stderr)
        raise typer.Exit(1)
    return duration_s


def _environment() -> dict[str, str]:
    # What `policyserve train` sets for itself, and so what the peer gets too.
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _facts() -> dict[str, Any]:
    ours = {name: version(name) for name in ("ray", "torch", "gymnasium", "numpy")}
    ours["stable-baselines3"] = pinned("stable-baselines3")
    return {
        "cpu": _cpu(),
        "n_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {number}" for name, number in ours.items()),
        "load_before": f"{os.getloadavg()[0]:.1f}",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _say(text: str) -> None:
    _console.print(text, style="dim")


if __name__ == "__main__":
    typer.run(bench)
