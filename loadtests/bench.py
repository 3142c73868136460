"""`make bench`: the same policy behind each server, driven by the same tool, in turns.

Writes docs/benchmarks.md. Each server gets an idle machine: it is started for its turn and
stopped after it, so what one leaves behind cannot slow the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console

from loadtests.commands import installed, run
from loadtests.driver import DriverResult, drive, driver_name
from loadtests.errors import LoadTestError

_console = Console(highlight=False, soft_wrap=True)
_BODY = b'{"observation":[0.01,0.02,-0.03,0.04]}'
_READY_S = 120.0
_OURS = "policyserve"
_RAY_SERVE = "Ray Serve defaults: FastAPI + @serve.batch"


@dataclass(frozen=True)
class Target:
    """One server of the comparison.

    Attributes:
        name: Its row in the table.
        command: What starts it, with `{bundle}` and `{port}` to fill in.
        path: Where it answers actions.
    """

    name: str
    command: tuple[str, ...]
    path: str


_PEERS = Path(__file__).with_name("peers")
_SERVE = ("serve", "{bundle}", "--port", "{port}", "--name", "cartpole")
TARGETS = (
    Target(
        _OURS,
        (*installed("policyserve"), *_SERVE),
        "/v1/policies/cartpole/compute_action",
    ),
    Target(
        _RAY_SERVE,
        (sys.executable, str(_PEERS / "ray_serve_batch.py"), "{bundle}", "{port}"),
        "/compute_action",
    ),
)


def bench(
    bundle: Annotated[
        Path | None, typer.Option(help="A CartPole-v1 bundle [trained and exported first].")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each server.", min=1)] = 3,
    duration_s: Annotated[float, typer.Option(help="Seconds of each measurement.", min=1)] = 5.0,
    connections: Annotated[str, typer.Option(help="Kept-alive connections.")] = "1,16,64,256",
    output: Annotated[Path, typer.Option("--output", "-o", help="The report.")] = Path(
        "docs/benchmarks.md"
    ),
) -> None:
    """Measure this server and its peers side by side and write the report."""
    loads = [int(part) for part in connections.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        bundle = bundle or _make_bundle(Path(scratch))
        results: dict[str, dict[int, list[DriverResult]]] = {
            target.name: {load: [] for load in loads} for target in TARGETS
        }
        for number in range(rounds):
            for target in TARGETS:
                _console.print(f"round {number + 1} of {rounds}: {target.name}")
                for load, result in _measure(target, bundle, loads, duration_s):
                    results[target.name][load].append(result)
                    _console.print(
                        f"  c={load}: {result.requests_per_s:,.0f} requests/s, p50 "
                        f"{result.p50_ms:.2f} ms, p99 {result.p99_ms:.2f} ms, {result.n_errors} "
                        "errors"
                    )
    report = _report(results, loads, rounds, duration_s)
    output.write_text(report)
    _console.print(report, markup=False)
    _console.print(f"wrote {output}")


def _make_bundle(scratch: Path) -> Path:
    run_dir, bundle = scratch / "run", scratch / "cartpole"
    for arguments in (
        ["train", "ppo-cartpole", "--run-dir", str(run_dir), "--quiet"],
        ["export", str(run_dir), "-o", str(bundle)],
    ):
        done = run([*installed("policyserve"), *arguments])
        if done.returncode != 0:
            raise LoadTestError(f"`policyserve {arguments[0]}` ended with {done.returncode}")
    return bundle


def _measure(
    target: Target, bundle: Path, loads: Sequence[int], duration_s: float
) -> Iterator[tuple[int, DriverResult]]:
    with _running(target, bundle) as origin:
        url = origin + target.path
        answer = _ask(url)
        if "action" not in answer:
            raise LoadTestError(f"{target.name} answered {answer}")
        drive(url, _BODY, connections=max(loads), duration_s=2.0)  # warm-up, not counted
        for load in loads:
            yield load, drive(url, _BODY, connections=load, duration_s=duration_s)


def _ask(url: str) -> dict[str, Any]:
    request = urllib.request.Request(url, _BODY, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30.0) as response:
        answer: dict[str, Any] = json.loads(response.read())
        return answer


@contextlib.contextmanager
def _running(target: Target, bundle: Path) -> Iterator[str]:
    port = _free_port()
    command = [part.format(bundle=bundle, port=port) for part in target.command]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_shell_environment())
        try:
            _wait_until_ready(process, log, target.name)
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop(process)


def _shell_environment() -> dict[str, str]:
    """What a user's shell would have: none of this product's own switches."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "OMP_"))}


def _wait_until_ready(process: subprocess.Popen[bytes], log: Any, name: str) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        log.seek(0)
        text = log.read()
        if "\nready http" in f"\n{text}":
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            raise LoadTestError(f"{name} ended with exit {process.returncode}: {text[-500:]}")
    raise LoadTestError(f"{name} was not ready within {_READY_S:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and everything it started: a leftover would slow the next one's turn."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60.0)
    _, alive = psutil.wait_procs(family, timeout=10.0)
    for child in alive:
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _report(
    results: Mapping[str, Mapping[int, Sequence[DriverResult]]],
    loads: Sequence[int],
    rounds: int,
    duration_s: float,
) -> str:
    names = list(results)
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "onnxruntime", "uvicorn"))
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    cores = f"{_cpu_name()}, {psutil.cpu_count()} cores, {system}"
    text = f"""# Benchmarks

Made by `make bench`; run it again for your machine. One CartPole-v1 policy (64-64 tanh, ONNX
Runtime, one thread), one observation as JSON per request, one replica, through the public port.
{rounds} interleaved rounds of {duration_s:g} s for each load; medians. The driver runs on the same
machine: compare rows, don't quote them as absolutes.

Machine: {cores}; Python {platform.python_version()}, {versions}; driver: {driver_name()}.
"""
    heads = " | ".join(f"c={load}: requests/s | p50 | p99" for load in loads)
    lines = [text, f"| server | {heads} |", "|---|" + "---|---|---|" * len(loads)]
    for name in names:
        cells = [cell for load in loads for cell in _cells(results[name][load])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"Requests per second of {_OURS}, as a multiple of {_RAY_SERVE}:", ""]
    for load in loads:
        ratio = _median_rate(results[_OURS][load]) / _median_rate(results[_RAY_SERVE][load])
        lines.append(f"* c={load}: {ratio:.1f}")
    return "\n".join(lines) + "\n"


def _cells(results: Sequence[DriverResult]) -> list[str]:
    errors = sum(result.n_errors for result in results)
    note = f" ({errors} errors)" if errors else ""
    return [
        f"{_median_rate(results):,.0f}{note}",
        f"{statistics.median(result.p50_ms for result in results):.2f} ms",
        f"{statistics.median(result.p99_ms for result in results):.2f} ms",
    ]


def _median_rate(results: Sequence[DriverResult]) -> float:
    return statistics.median(result.requests_per_s for result in results)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(bench)
    try:
        app()
    except LoadTestError as exc:
        sys.exit(f"bench: error: {exc.message}")
