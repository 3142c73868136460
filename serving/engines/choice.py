"""`--device auto` and `--engine auto`: the candidates are timed at load, and the fastest is taken.

A GPU is not the faster one for a small network: carrying an observation there and an action back
takes longer than the network on the CPU. Where that turns depends on the network, the machine and
the batch, so it is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

from serving.bundle import ONNX, PT2, TORCHSCRIPT, Bundle
from serving.engines.graph import (
    DeviceName,
    EngineName,
    Graph,
    GraphPolicy,
    cuda_failure,
    load_graph,
)
from serving.errors import PolicyServingError, ServingConfigError
from serving.verification import verify_graph

EngineOption = Literal["onnx", "torchscript", "pt2", "auto"]
DeviceOption = Literal["cpu", "cuda", "auto"]
# Batch size -> median seconds of one batch of every policy, one after the other.
Timing: TypeAlias = Mapping[int, float]

# What decides: a server under load runs batches of about this size.
DECIDING_BATCH_SIZE = 64
# A later candidate has to be this much faster: noise decides nothing, and a tie stays on the CPU.
_MIN_GAIN = 0.1
_FILES: Mapping[EngineName, str] = {"onnx": ONNX, "torchscript": TORCHSCRIPT, "pt2": PT2}
_BUDGET_S = 0.1  # for each policy, candidate and batch size, after the warm-up
_N_CALLS = (3, 50)  # at least and at most


class Candidate(NamedTuple):
    """A runtime on a device."""

    engine: EngineName
    device: DeviceName

    def __str__(self) -> str:
        return f"{self.engine} on {self.device}"


@dataclass(frozen=True)
class EngineChoice:
    """What a server runs its policies in.

    Attributes:
        engine: The runtime.
        device: Where.
        timings: What was measured of each candidate that works here; empty where there was one
            alone.
        reason: One sentence for the log: what was measured, what is taken.
    """

    engine: EngineName
    device: DeviceName
    timings: Mapping[Candidate, Timing]
    reason: str


@dataclass(frozen=True)
class Machine:
    """What the choice depends on beside the bundles.

    Attributes:
        cuda_failure: Why an engine cannot compute on a CUDA device, or None.
        load: Loads a bundle's graph.
        clock: Seconds that pass.
    """

    cuda_failure: Callable[[EngineName], str | None] = cuda_failure
    load: Callable[[Bundle, EngineName, DeviceName], Graph] = load_graph
    clock: Callable[[], float] = time.perf_counter


@dataclass
class _Trial:
    """The candidates' results so far."""

    timings: dict[Candidate, Timing] = field(default_factory=dict)
    failures: dict[Candidate, PolicyServingError] = field(default_factory=dict)

    def add(self, candidate: Candidate, measure: Callable[[], Timing]) -> None:
        try:
            self.timings[candidate] = measure()
        except PolicyServingError as exc:
            self.failures[candidate] = exc


def choose(
    bundles: Sequence[Bundle],
    engine: EngineOption = "onnx",
    device: DeviceOption = "cpu",
    *,
    max_batch_size: int = 256,
    allow_programs: bool = False,
    machine: Machine = Machine(),
) -> EngineChoice:
    """Decide in what the bundles run; where something is `auto`, by timing them.

    Args:
        bundles: Every policy that is served: they run in one engine on one device.
        engine: The runtime; `auto` takes ONNX Runtime and, if `allow_programs`, the others whose
            files every bundle has.
        device: `auto` takes the CPU and, where the engine computes on one, a GPU.
        max_batch_size: The largest batch that will be run.
        allow_programs: Whether the user trusts TorchScript and pt2 files, which are programs.
        machine: What is here; another in tests.

    Raises:
        ServingConfigError: CUDA was asked for and is not there, or not in working order.
        BundleError: A bundle lacks the engine's file, or no candidate acts as RLlib did.
    """
    candidates = _candidates(bundles, engine, device, allow_programs, machine)
    if len(candidates) == 1:
        only = candidates[0]
        is_told = "auto" not in (engine, device)
        reason = f"{only}: {'as configured' if is_told else 'nothing else is here to choose'}"
        return EngineChoice(only.engine, only.device, {}, reason)
    trial = _Trial()
    for candidate in candidates:
        measure = partial(_measure, bundles, candidate, max_batch_size, machine)
        trial.add(candidate, measure)
    if not trial.timings:
        raise trial.failures[candidates[0]]
    chosen = fastest(trial.timings)
    return EngineChoice(chosen.engine, chosen.device, trial.timings, _reason(chosen, trial))


def fastest(timings: Mapping[Candidate, Timing]) -> Candidate:
    """The candidate that is fastest at the deciding batch size.

    A later one is taken only if it is a tenth faster than the best before it.

    Args:
        timings: In order of preference: the CPU and ONNX Runtime first.
    """
    candidates = list(timings)
    best = candidates[0]
    for candidate in candidates[1:]:
        if _deciding(timings[candidate]) < _deciding(timings[best]) * (1.0 - _MIN_GAIN):
            best = candidate
    return best


def _candidates(
    bundles: Sequence[Bundle],
    engine: EngineOption,
    device: DeviceOption,
    allow_programs: bool,
    machine: Machine,
) -> list[Candidate]:
    """In order of preference; never empty."""
    engines = _engines(bundles, allow_programs) if engine == "auto" else [engine]
    found = []
    failures: dict[EngineName, str | None] = {}
    if device != "cuda":
        found += [Candidate(name, "cpu") for name in engines]
    if device != "cpu":
        failures = {name: _cuda_failure(name, engine != "auto", machine) for name in engines}
        found += [Candidate(name, "cuda") for name in engines if failures[name] is None]
    if not found:
        reasons = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
        raise ServingConfigError(
            f"--device cuda: no CUDA device can be used on this machine ({reasons}); use --device "
            "cpu or --device auto"
        )
    return found


def _cuda_failure(name: EngineName, is_told: bool, machine: Machine) -> str | None:
    try:
        return machine.cuda_failure(name)
    except ServingConfigError as exc:
        if is_told:
            raise
        return exc.message  # not installed: one candidate less, and loading it on the CPU says why


def _engines(bundles: Sequence[Bundle], allow_programs: bool) -> list[EngineName]:
    if not allow_programs:
        return ["onnx"]
    return [
        name
        for name, file in _FILES.items()
        if all(file in bundle.manifest.files for bundle in bundles)
    ]


def _measure(
    bundles: Sequence[Bundle], candidate: Candidate, max_batch_size: int, machine: Machine
) -> Timing:
    """Time what acts as RLlib did; what does not is no candidate, however fast."""
    sizes = sorted({1, min(DECIDING_BATCH_SIZE, max_batch_size), max_batch_size})
    total = dict.fromkeys(sizes, 0.0)
    for bundle in bundles:
        graph = machine.load(bundle, *candidate)
        verify_graph(bundle, graph)
        policy = GraphPolicy(bundle.manifest, graph)
        for n in sizes:
            total[n] += _median_s(policy, n, machine.clock)
    return total


def _median_s(policy: GraphPolicy, n: int, clock: Callable[[], float]) -> float:
    inputs = policy.inputs.example(n)
    # A runtime allocates, and a GPU's library looks for its algorithms, when a size comes first.
    for _ in range(2):
        policy.compute_conformed(inputs)
    durations: list[float] = []
    least, most = _N_CALLS
    while len(durations) < least or (len(durations) < most and sum(durations) < _BUDGET_S):
        started = clock()
        policy.compute_conformed(inputs)
        durations.append(clock() - started)
    return statistics.median(durations)


def _deciding(timing: Timing) -> float:
    return timing[max(n for n in timing if n <= DECIDING_BATCH_SIZE)]


def _reason(chosen: Candidate, trial: _Trial) -> str:
    measured = [
        ", ".join(f"{seconds * 1e6:,.0f} µs at B={n}" for n, seconds in timing.items())
        for timing in trial.timings.values()
    ]
    texts = [f"{candidate} {text}" for candidate, text in zip(trial.timings, measured, strict=True)]
    texts += [
        f"{candidate} does not work: {error.message}" for candidate, error in trial.failures.items()
    ]
    size = max(n for n in trial.timings[chosen] if n <= DECIDING_BATCH_SIZE)
    return f"{chosen}, the fastest at B={size}: {'; '.join(texts)}"
