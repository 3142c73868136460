"""`make bench-export`: a bundle's graph against the bare network, and how long an export takes.

The bare network is the actor's encoder and head alone, exported by hand with the same weights: what
a user without this product would serve. Everything that is compared runs in one process, on one
thread, in turns; compare ratios, the absolute times are this machine's.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from export.bench_graphs import candidates, compare_times, write_bare_network
from export.checkpoint import load_checkpoint
from export.rllib_process import prepare_rllib
from serving.bundle import TORCHSCRIPT
from training.run_directory import find_checkpoint

_console = Console(highlight=False, soft_wrap=True)
_CELLS = "{median_us:,.1f} ({ratio:.2f})"
# Name -> what `policyserve train` is told; the times do not depend on what was learnt.
_POLICIES: Mapping[str, Sequence[str]] = {
    "MLP 64-64": ("ppo-cartpole",),
    "MLP 64-64, mean-std filter": (
        *("--env", "Pendulum-v1", "--set", "observation_filter=mean_std"),
    ),
    "LSTM 64": ("--env", "CartPole-v1", "--set", "model.use_lstm=true"),
}
_TIMESTEPS = ("--stop-timesteps", "2048")
# The project's own limits: seconds, kilobytes, and times the bare network's time.
LIMITS = {"export_s": 10.0, "load_and_verify_s": 1.0, "size_kb": 100.0, "graph_ratio": 1.5}
# A process with NumPy, ONNX Runtime and protobuf alone; what else it loads is named.
_LOAD = """
import sys, time
from pathlib import Path
from serving.verification import load_verified_policy
load_verified_policy(Path(sys.argv[1]))
heavy = {"ray", "torch", "gymnasium", "pydantic", "fastapi", "onnx"} & set(sys.modules)
assert not heavy, heavy
"""


def bench(
    run_dir: Annotated[
        list[Path] | None,
        typer.Option(help="A run of `train` to measure; repeatable [three are trained]."),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Rows at once.")] = "1,8,64,1024",
    rounds: Annotated[int, typer.Option(help="Turns of each.", min=1)] = 15,
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON report.")] = Path(
        "build/bench-export.json"
    ),
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 where a limit is exceeded.")
    ] = False,
) -> None:
    """Measure bundles and write the report."""
    prepare_rllib()
    torch.set_num_threads(1)
    sizes = [int(part) for part in batch_sizes.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        runs = _trained(Path(scratch)) if not run_dir else {str(path): path for path in run_dir}
        measured = {
            name: measure(path, Path(scratch) / f"bundle{index}", sizes, rounds)
            for index, (name, path) in enumerate(runs.items())
        }
    report = {"machine": _machine(), "limits": LIMITS, "rounds": rounds, "policies": measured}
    for name, entry in measured.items():
        _print(name, entry, sizes)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    _console.print(f"wrote {output}")
    exceeded = [f"{name}: {text}" for name, entry in measured.items() for text in entry["exceeded"]]
    for line in exceeded:
        _console.print(f"limit exceeded: {line}")
    if strict and exceeded:
        raise typer.Exit(1)


def _trained(scratch: Path) -> dict[str, Path]:
    runs = {}
    for index, (name, arguments) in enumerate(_POLICIES.items()):
        _console.print(f"training: {name}")
        runs[name] = scratch / f"run{index}"
        command = ["train", *arguments, *_TIMESTEPS, "--run-dir", str(runs[name]), "--quiet"]
        # A run that stops before its stop return ends with 1; a checkpoint is all that is needed.
        done = _policyserve(*command, allowed=(0, 1))
        if not runs[name].is_dir():
            raise SystemExit(f"bench-export: training failed: {done.stderr}")
    return runs


def _policyserve(
    *arguments: str, allowed: tuple[int, ...] = (0,)
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "policyserve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in allowed:
        raise SystemExit(f"bench-export: {' '.join(command)} failed: {done.stderr}")
    return done


def measure(run_dir: Path, bundle: Path, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Everything about one policy.

    Args:
        run_dir: A run of `train`.
        bundle: Where its bundle is written.
        sizes: Batch sizes.
        rounds: Turns of each candidate.

    Returns:
        `export_s` and `load_and_verify_s` (medians, process start included), `size_kb` without
        TorchScript, `has_memory`, `exceeded` (sentences), and `graphs`: batch size to candidate to
        `median_us` and `ratio`, the median of its ratios to the bare network in the same turn.
    """
    export_s = _median_s(lambda: _policyserve("export", str(run_dir), "-o", str(bundle)), 3)
    load = [sys.executable, "-c", _LOAD, str(bundle)]
    load_s = _median_s(lambda: subprocess.run(load, check=True), 5)
    files = [entry for entry in bundle.iterdir() if entry.name != TORCHSCRIPT]
    checkpoint = load_checkpoint(find_checkpoint(run_dir) if _is_run(run_dir) else run_dir)
    found: dict[str, Any] = {
        "export_s": export_s,
        "load_and_verify_s": load_s,
        "size_kb": sum(entry.stat().st_size for entry in files) / 1000.0,
        "has_memory": bool(checkpoint.rl_module.is_stateful()),
        "graphs": {},
    }
    bare = write_bare_network(checkpoint, bundle.with_suffix(".onnx"))
    for n in sizes:
        calls = candidates(checkpoint, bundle, bare, n)
        found["graphs"][str(n)] = compare_times(calls, rounds)
    found["exceeded"] = _exceeded(found)
    return found


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file()


def _median_s(call: Callable[[], Any], n: int) -> float:
    times = []
    for _ in range(n):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _exceeded(found: Mapping[str, Any]) -> list[str]:
    # Export time and size are promised for policies without memory: episodes are longer than rows.
    promised = ["load_and_verify_s", *([] if found["has_memory"] else ["export_s", "size_kb"])]
    texts = [
        f"{key} is {found[key]:.1f}, the limit is {LIMITS[key]:g}"
        for key in promised
        if found[key] > LIMITS[key]
    ]
    single = found["graphs"].get("1", {})
    for name in ("greedy", "sampled"):
        ratio = single.get(name, {}).get("ratio", 0.0)
        if ratio > LIMITS["graph_ratio"]:
            texts.append(
                f"{name} at B=1 takes {ratio:.2f} times the bare network's time, the limit is "
                f"{LIMITS['graph_ratio']:g}"
            )
    return texts


def _machine() -> dict[str, Any]:
    return {
        "processor": next(_processor_names(), platform.machine()),
        "n_cores": os.cpu_count(),
        "load_1_min": os.getloadavg()[0],
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "ray", "numpy")},
    }


def _processor_names() -> Iterator[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                yield line.partition(":")[2].strip()


def _print(name: str, entry: Mapping[str, Any], sizes: Sequence[int]) -> None:
    table = Table(title=f"{name}: median µs, and times the bare network's", title_justify="left")
    table.add_column("", no_wrap=True)
    for n in sizes:
        table.add_column(f"B={n}", justify="right", no_wrap=True)
    graphs = entry["graphs"]
    for candidate in graphs[str(sizes[0])]:
        cells = [graphs[str(n)].get(candidate) for n in sizes]
        table.add_row(candidate, *(_CELLS.format(**cell) if cell else "" for cell in cells))
    _console.print(table)
    _console.print(
        f"export with its gate {entry['export_s']:.1f} s, load and verify "
        f"{entry['load_and_verify_s']:.2f} s (both with process start); bundle "
        f"{entry['size_kb']:.0f} kB"
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(bench)
    app()
