"""What a benchmark found, in memory and as `results.json`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Above this share of a core the driver waits for itself, if the server has time left.
DRIVER_BUSY = 0.93
SERVER_BUSY = 0.90
# Above this many cores somebody else took part in the measurement.
OTHERS_BUSY = 0.2


@dataclass(frozen=True)
class DriverResult:
    """What a driver counted.

    Attributes:
        requests_per_s: Good answers per second.
        p50_ms: Median latency; None without an answer.
        p99_ms: 99th percentile.
        n_errors: Other answers, and broken connections.
    """

    requests_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    n_errors: int


@dataclass(frozen=True)
class Measurement:
    """One load on one server, in one round.

    Attributes:
        result: What the driver counted; None where it could not be driven.
        driver_cores: The driver's CPU time by the time that passed.
        server_cores: The same of the server's busiest process.
        other_cores: The same of what is neither of them.
        problem: Why there is no result.
    """

    result: DriverResult | None
    driver_cores: float = 0.0
    server_cores: float = 0.0
    other_cores: float = 0.0
    problem: str | None = None

    @property
    def is_driver_bound(self) -> bool:
        """Whether the driver was the limit, so that the server may be faster than this."""
        return self.driver_cores > DRIVER_BUSY and self.server_cores < SERVER_BUSY

    @property
    def was_disturbed(self) -> bool:
        """Whether somebody else used the machine meanwhile."""
        return self.other_cores > OTHERS_BUSY


@dataclass
class Turn:
    """One server in one round.

    Attributes:
        loads: Measurements by the key of the load.
        start_s: From the command to the first right answer.
        memory_mib: Of all its processes together, shared pages counted once.
        replica_mib: Resident memory of one replica of ours.
        was_quiet: Whether the machine was idle before it started.
        problem: Why it could not be measured.
    """

    loads: dict[str, Measurement] = field(default_factory=dict)
    start_s: float | None = None
    memory_mib: float | None = None
    replica_mib: float | None = None
    was_quiet: bool = True
    problem: str | None = None


@dataclass
class Results:
    """Everything that the report is made of.

    Attributes:
        machine: What it was measured on.
        settings: Rounds and durations.
        turns: By the key of the target, one a round.
        steps: Microseconds by step and batch size, one a round.
    """

    machine: dict[str, str]
    settings: dict[str, Any]
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    steps: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write `results.json`, whole or not at all."""
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(self), indent=1) + "\n")
        scratch.replace(path)

    def measurements(self, target: str, load: str) -> list[Measurement]:
        """The measurements of one load on one target that gave a result."""
        found = [turn.loads.get(load) for turn in self.turns.get(target, [])]
        return [each for each in found if each is not None and each.result is not None]

    def figures(
        self, target: str, load: str, figure: Callable[[DriverResult], float | None]
    ) -> list[float]:
        """One figure of each round."""
        values = [figure(each.result) for each in self.measurements(target, load) if each.result]
        return [value for value in values if value is not None]

    def rate(self, target: str, load: str) -> float | None:
        """Median requests per second."""
        return median(self.figures(target, load, lambda result: result.requests_per_s))

    def p50_ms(self, target: str, load: str) -> float | None:
        """Median of the rounds' medians."""
        return median(self.figures(target, load, lambda result: result.p50_ms))

    def p99_ms(self, target: str, load: str) -> float | None:
        """Median of the rounds' 99th percentiles."""
        return median(self.figures(target, load, lambda result: result.p99_ms))

    def n_errors(self, target: str, load: str) -> int:
        """Errors of all rounds together."""
        return sum(each.result.n_errors for each in self.measurements(target, load) if each.result)

    def problem(self, target: str, load: str | None = None) -> str | None:
        """Why a target, or one load on it, has no figures in a round."""
        for turn in self.turns.get(target, []):
            if turn.problem:
                return turn.problem
            measurement = turn.loads.get(load) if load else None
            if measurement is not None and measurement.problem:
                return measurement.problem
        return None

    def step_us(self, step: str, size: int) -> float | None:
        """Median microseconds of a step in the process."""
        return median([each[step][str(size)] for each in self.steps if step in each])


def read_results(path: Path) -> Results:
    """Read `results.json`."""
    found = json.loads(path.read_text())
    turns = {
        key: [_turn(turn) for turn in each_target] for key, each_target in found["turns"].items()
    }
    return Results(found["machine"], found["settings"], turns, found["steps"])


def _turn(found: dict[str, Any]) -> Turn:
    loads = {}
    for key, each in found.pop("loads").items():
        result = each.pop("result")
        loads[key] = Measurement(result=DriverResult(**result) if result else None, **each)
    return Turn(loads=loads, **found)


def median(values: list[float]) -> float | None:
    """The median, or None of nothing."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else None
