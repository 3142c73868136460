"""`python -m serving.bench BUNDLE`: what inference alone takes, without Ray and without HTTP.

Needs NumPy, the engine's runtime, rich and typer, so that it runs on a GPU machine that has no Ray.
For each batch size: the bare runtime on prepared arrays, the same batch through the policy, and as
many callers of one observation each through the batcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from serving.batching import Batcher, BatchItem
from serving.bundle import Bundle, read_bundle
from serving.engines.choice import EngineChoice, choose
from serving.engines.graph import GraphPolicy, load_graph, unmasked
from serving.errors import UsageError
from serving.manifest import greedy_outputs
from serving.verification import verify_graph

BARE, POLICY, BATCHER = "bare runtime", "policy", "batcher"
_COMMAND = "python -m serving.bench"
_MAX_BATCH_SIZE = 65536
_MIN_CALLS = 3  # of each path, however long one takes
_TURN_S = 0.02
_console = Console(highlight=False, soft_wrap=True)


class Engine(str, enum.Enum):
    """The runtimes that a bundle can run in."""

    onnx = "onnx"
    torchscript = "torchscript"
    pt2 = "pt2"


class Device(str, enum.Enum):
    """Where inference runs."""

    cpu = "cpu"
    cuda = "cuda"
    auto = "auto"


@dataclass(frozen=True)
class Measurement:
    """One way of computing batches of one size.

    Attributes:
        batch_size: Observations in a batch; callers at the batcher.
        path: `bare runtime`, `policy` or `batcher`.
        p50_us: Median time of a call, in microseconds; of one caller's wait at the batcher.
        p99_us: Its 99th percentile.
        actions_per_s: Actions computed in a second.
        ratio: `p50_us` by that of the bare runtime at this batch size.
        n_calls: What the figures come from.
    """

    batch_size: int
    path: str
    p50_us: float
    p99_us: float
    actions_per_s: float
    ratio: float
    n_calls: int


def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", metavar="BUNDLE")],
    device: Annotated[
        Device, typer.Option(help="Where to run; auto times the CPU and CUDA, takes the faster.")
    ] = Device.cpu,
    engine: Annotated[
        Engine, typer.Option(help="The runtime. TorchScript and pt2 are programs: trust them.")
    ] = Engine.onnx,
    batch_sizes: Annotated[
        str, typer.Option(help="Observations in a batch, and callers.", metavar="N,N,...")
    ] = "1,8,64,256,1024",
    duration_s: Annotated[
        float, typer.Option(help="Seconds for each measurement.", min=0.001, max=600.0)
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time a bundle's inference alone: the bare runtime, the policy, the batcher."""
    sizes = parse_batch_sizes(batch_sizes)
    found = read_bundle(bundle)
    choice = choose([found], engine.value, device.value, max_batch_size=max(sizes))
    graph = load_graph(found, choice.engine, choice.device)
    verify_graph(found, graph)
    policy = GraphPolicy(found.manifest, graph)
    results = [each for size in sizes for each in measure(policy, size, duration_s)]
    machine = describe_machine(choice)
    if as_json:
        print(json.dumps(_report(found, choice, machine, results)))
        return
    _console.print(_table(found, choice, results))
    _console.print(", ".join(f"{key} {value}" for key, value in machine.items()), markup=False)
    _console.print(choice.reason, markup=False)


def parse_batch_sizes(text: str) -> list[int]:
    """Batch sizes from `1,8,64`, each once and in order.

    Raises:
        UsageError: Something else, or none, or one that is too large.
    """
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1 or sizes[-1] > _MAX_BATCH_SIZE:
        raise UsageError(
            f"--batch-sizes {text!r}: expected numbers 1..{_MAX_BATCH_SIZE} with commas, such as "
            "1,8,64"
        )
    return sizes


def measure(policy: GraphPolicy, n: int, duration_s: float) -> list[Measurement]:
    """Time greedy actions for batches of n: the bare runtime, the policy, the batcher.

    The first two take turns, so that what else the machine does meanwhile strikes both.

    Args:
        policy: What to run.
        n: The batch size, and the number of callers at the batcher.
        duration_s: How long each is measured.
    """
    inputs = policy.inputs.example(n)
    outputs = greedy_outputs(policy.manifest.outputs)
    bare = unmasked(policy.graph).prepare(outputs, policy.inputs.complete(inputs, n))
    calls = {BARE: bare, POLICY: lambda: policy.compute_conformed(inputs)}
    durations = _in_turns(calls, duration_s)
    rates = {path: n * len(values) / values.sum() for path, values in durations.items()}
    durations[BATCHER], rates[BATCHER] = asyncio.run(_at_batcher(policy, n, duration_s))
    reference = float(np.median(durations[BARE]))
    return [
        Measurement(
            batch_size=n,
            path=path,
            p50_us=float(np.median(values)) * 1e6,
            p99_us=float(np.percentile(values, 99)) * 1e6,
            actions_per_s=float(rates[path]),
            ratio=float(np.median(values)) / reference,
            n_calls=len(values),
        )
        for path, values in durations.items()
    ]


def _in_turns(calls: Mapping[str, Callable[[], object]], duration_s: float) -> dict[str, Any]:
    """Seconds of each call, by name; every name gets `duration_s`."""
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # a size that comes for the first time is slower
    while any(_needs_more(values, duration_s) for values in durations.values()):
        for name, call in calls.items():
            _turn(call, durations[name], min(_TURN_S, duration_s))
    return {name: np.array(values) for name, values in durations.items()}


def _needs_more(values: Sequence[float], duration_s: float) -> bool:
    return len(values) < _MIN_CALLS or sum(values) < duration_s


def _turn(call: Callable[[], object], durations: list[float], turn_s: float) -> None:
    begin = last = time.perf_counter()
    while last - begin < turn_s:
        started = time.perf_counter()
        call()
        last = time.perf_counter()
        durations.append(last - started)


async def _at_batcher(policy: GraphPolicy, n: int, duration_s: float) -> tuple[Any, float]:
    """The wait of each call of n callers in seconds, and their actions in a second."""
    batcher = Batcher(policy, max_batch_size=n, max_queue_size=n)
    batcher.calibrate()
    item = BatchItem(policy.inputs.example(1), 1)
    waits: list[float] = []

    async def call_again_and_again(until: float, n_calls: int) -> None:
        while n_calls > 0 or time.perf_counter() < until:
            started = time.perf_counter()
            await batcher.compute(item)
            waits.append(time.perf_counter() - started)
            n_calls -= 1

    try:
        await asyncio.gather(*(call_again_and_again(0.0, 1) for _ in range(n)))
        waits.clear()
        begin = time.perf_counter()
        tasks = (call_again_and_again(begin + duration_s, _MIN_CALLS) for _ in range(n))
        await asyncio.gather(*tasks)
        return np.array(waits), len(waits) / (time.perf_counter() - begin)
    finally:
        await batcher.close()


def describe_machine(choice: EngineChoice) -> dict[str, Any]:
    """What the figures depend on: processor, GPU where one is used, versions, load."""
    gpu = next(_gpu_names(), "a GPU") if choice.device == "cuda" else None
    packages = ("onnxruntime", "onnxruntime-gpu") if choice.engine == "onnx" else ("torch",)
    return {
        "processor": next(_processor_names(), platform.machine()),
        "cores": os.cpu_count(),
        **({"GPU": gpu} if gpu else {}),
        "load": round(os.getloadavg()[0], 2),
        "Python": platform.python_version(),
        **dict(_versions((*packages, "numpy"))),
    }


def _versions(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def _processor_names() -> Iterator[str]:
    yield from _values(Path("/proc/cpuinfo"), "model name")


def _gpu_names() -> Iterator[str]:
    for path in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        yield from _values(path, "Model")


def _values(path: Path, key: str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                yield value.strip()


def _report(
    bundle: Bundle, choice: EngineChoice, machine: Mapping[str, Any], results: Sequence[Measurement]
) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "policy_id": bundle.manifest.policy_id,
        "engine": choice.engine,
        "device": choice.device,
        "reason": choice.reason,
        "machine": dict(machine),
        "results": [asdict(each) for each in results],
    }


def _table(bundle: Bundle, choice: EngineChoice, results: Sequence[Measurement]) -> Table:
    title = f"{bundle.path.resolve().name} ({bundle.manifest.policy_id}), {choice.engine} on "
    table = Table(title=title + choice.device, title_justify="left")
    for name in ("B", "", "p50 µs", "p99 µs", "actions/s", "x bare"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for index, each in enumerate(results):
        is_last = index + 1 == len(results) or results[index + 1].batch_size != each.batch_size
        table.add_row(
            str(each.batch_size) if each.path == BARE else "",
            each.path,
            f"{each.p50_us:,.1f}",
            f"{each.p99_us:,.1f}",
            f"{each.actions_per_s:,.0f}",
            f"{each.ratio:.2f}",
            end_section=is_last,
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 done, 1 it failed, 2 wrong usage; one line for the user on an error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="--debug shows the traceback of an error.",
    )(bench)
    try:
        # Not standalone: its usage errors are boxes of several lines.
        status = app(
            args=[each for each in given if each != "--debug"],
            prog_name=_COMMAND,
            standalone_mode=False,
        )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as exc:  # the process's outermost edge
        if debug:
            traceback.print_exc()
        return _fail(exc)
    return status if isinstance(status, int) else 0


def _fail(exc: Exception) -> int:
    format_message = getattr(exc, "format_message", None)  # typer's own errors are usage errors
    if format_message is not None:
        message, status = f"{format_message()} (see `{_COMMAND} --help`)", 2
    elif hasattr(exc, "exit_code"):
        message, status = str(getattr(exc, "message", exc)), int(exc.exit_code)
    else:
        message, status = f"unexpected {type(exc).__name__}: {exc} (--debug shows where)", 1
    print(f"serving.bench: error: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
