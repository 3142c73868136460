"""The command `demo`: the whole way on CartPole-v1, through the product's own commands."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from loadtests.commands import installed, run, stop
from loadtests.errors import LoadTestError, LoadTestUsageError
from loadtests.plan import Kind, LoadPlan
from loadtests.session import run_loadtest
from loadtests.verdicts import limit_note

_console = Console(highlight=False, soft_wrap=True)
_ENV = "CartPole-v1"
_CONFIG = "ppo-cartpole"
_NAME = "cartpole"
_EPISODES = 20
_GOAL = 475.0  # Gymnasium's reward threshold of CartPole-v1
_LOAD_USERS = 8
_LOAD_S = 5.0
_READY_S = 120.0


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where everything goes; emptied first.")
    ] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of training and of the episodes.", min=0)] = 0,
) -> None:
    """All of it on CartPole-v1: train, export, serve, play, load test, and a table.

    Everything that it starts is stopped at the end, also when a step fails.
    """
    started = time.perf_counter()
    _empty(output)
    run_dir, bundle = output / "run", output / _NAME
    _step("train")
    _policyserve(["train", _CONFIG, "--run-dir", str(run_dir), "--seed", str(seed)])
    _step("export")
    _policyserve(["export", str(run_dir), "-o", str(bundle), "--format", "onnx,torchscript"])
    _step("serve")
    with _server(bundle, output / "serve.log") as url:
        policy_url = f"{url}/v1/policies/{_NAME}"
        print(f"serving at {policy_url}", flush=True)
        _step(f"play {_EPISODES} episodes over HTTP")
        play = ["play", policy_url, "--env", _ENV, "--episodes", str(_EPISODES), "--json"]
        played = json.loads(
            _policyserve([*play, "--seed", str(seed)], capture=True).splitlines()[-1]
        )
        _step(f"load test, {_LOAD_S:.0f} s")
        plan = LoadPlan(policy_url, users=_LOAD_USERS, duration_s=_LOAD_S, kind=Kind.both)
        load = run_loadtest([plan], output / "loadtest")
    result = json.loads((run_dir / "result.json").read_text())
    manifest = json.loads((bundle / "manifest.json").read_text())
    _console.print(_table(result, manifest, played, load, time.perf_counter() - started))
    print(f"everything is in {output}: the run, the bundle, the load test's report")
    if played["mean_return"] < _GOAL:
        raise LoadTestError(
            f"the served policy's mean return is {played['mean_return']:.1f}, expected at least "
            f"{_GOAL:.0f}"
        )


def _empty(output: Path) -> None:
    marker = output / ".policyserve-demo"
    if output.exists() and not marker.exists() and (output.is_file() or any(output.iterdir())):
        raise LoadTestUsageError(f"{output} exists and is no earlier demo; choose another -o")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    marker.touch()


def _step(name: str) -> None:
    _console.print(f"[bold]── {name}[/bold]")
    sys.stdout.flush()


def _policyserve(arguments: Sequence[str], *, capture: bool = False) -> str:
    print(f"$ policyserve {' '.join(arguments)}", flush=True)
    done = run([*installed("policyserve"), *arguments], capture=capture)
    if done.returncode != 0:
        last = (done.stdout.strip().splitlines() or [""])[-1]
        raise LoadTestError(f"`policyserve {arguments[0]}` ended with {done.returncode} {last}")
    return done.stdout


@contextlib.contextmanager
def _server(bundle: Path, log: Path) -> Iterator[str]:
    arguments = ["serve", str(bundle), "--port", "0"]
    print(f"$ policyserve {' '.join(arguments)}", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            [*installed("policyserve"), *arguments], stdout=file, stderr=file, text=True
        )
    try:
        yield _wait_until_ready(process, log)
    finally:
        stop(process)


def _wait_until_ready(process: subprocess.Popen[str], log: Path) -> str:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        match = re.search(r"^ready (http://\S+)$", log.read_text(), flags=re.MULTILINE)
        if match:
            return match[1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            last = (log.read_text().strip().splitlines() or ["no output"])[-1]
            raise LoadTestError(f"`policyserve serve` ended with exit {process.returncode}: {last}")
    raise LoadTestError(f"the server was not ready within {_READY_S:.0f} s; see {log}")


def _table(
    result: dict[str, Any],
    manifest: dict[str, Any],
    played: dict[str, Any],
    load: dict[str, Any],
    total_s: float,
) -> Table:
    size = sum(entry["size_bytes"] for entry in manifest["files"].values())
    without = size - manifest["files"]["policy.torchscript.pt"]["size_bytes"]
    error = max(report["max_error"] for report in manifest["parity"].values())
    rows = {
        "training": f"{result['time_s']:.1f} s, {result['env_steps']:,} steps",
        "return at the stop": f"{result['episode_return_mean']:.1f}",
        "parity error (ONNX, TorchScript)": f"{error:.1g}",
        "bundle": f"{size / 1000:.0f} kB ({without / 1000:.0f} kB without TorchScript)",
        f"served return, {_EPISODES} greedy remote episodes": (
            f"{played['mean_return']:.1f} ± {played['std_return']:.1f}"
        ),
        "step latency over HTTP, one client": (
            f"p50 {played['step_p50_us']:.0f} µs, p99 {played['step_p99_us']:.0f} µs"
        ),
        f"load test, {load['users']} Locust users, {_LOAD_S:.0f} s": (
            f"{load['requests_per_s']:,.0f} requests/s, {load['n_errors']} errors{limit_note(load)}"
        ),
        "the whole demo": f"{total_s:.0f} s",
    }
    table = Table(title=f"{_ENV}, from nothing to served", title_justify="left")
    table.add_column("what")
    table.add_column("figure")
    for key, value in rows.items():
        table.add_row(key, value)
    return table
