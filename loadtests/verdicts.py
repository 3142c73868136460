"""What a load test says: limits that it broke, and whether it measured the server at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.plan import load_text

# Ten of them lie beyond it.
_N_FOR_P999 = 10_000


@dataclass(frozen=True)
class Limits:
    """What a run has to keep.

    Attributes:
        max_p99_ms: The 99th percentile of the latencies.
        max_error_rate: The share of requests that may fail.
        allow_rejected: Answers of 503 are no errors.
        max_memory_growth_mb_per_h: Of the server, over the run.
    """

    max_p99_ms: float | None = None
    max_error_rate: float = 0.0
    allow_rejected: bool = False
    max_memory_growth_mb_per_h: float | None = None


def broken_limits(summary: Mapping[str, Any], limits: Limits) -> list[str]:
    """A line for each limit that was broken; by how much."""
    return [line for figures, where in _steps(summary) for line in _broken(figures, limits, where)]


def _steps(summary: Mapping[str, Any]) -> Sequence[tuple[Mapping[str, Any], str]]:
    steps = summary.get("steps")
    if not steps:
        return [(summary, "")]
    return [(each, f" at {load_of(each)}") for each in steps]


def load_of(figures: Mapping[str, Any]) -> str:
    """How much load a step was."""
    return load_text(figures["users"], figures["rate"])


def _broken(figures: Mapping[str, Any], limits: Limits, where: str) -> Iterator[str]:
    n, n_errors = figures["n_requests"], figures["n_errors"]
    if n == n_errors:
        yield f"none of {n} requests was answered{where}: {_first_error(figures)}"
        return
    n_counted = n_errors - (figures["n_rejected"] if limits.allow_rejected else 0)
    if n_counted / n > limits.max_error_rate:
        yield (
            f"{n_counted} of {n} requests failed{where} ({n_counted / n:.2%}, the limit is "
            f"{limits.max_error_rate:.2%}): {_first_error(figures)}"
        )
    if limits.max_p99_ms is not None and figures["p99_ms"] > limits.max_p99_ms:
        yield (
            f"the 99th percentile was {figures['p99_ms']:.2f} ms{where}, "
            f"{figures['p99_ms'] / limits.max_p99_ms:.1f} times the limit of "
            f"{limits.max_p99_ms:g} ms"
        )
    growth = figures["memory_growth_mb_per_h"]
    most = limits.max_memory_growth_mb_per_h
    if most is not None and growth is not None and growth > most:
        yield (f"the server's memory grew by {growth:.1f} MB/h{where}, the limit is {most:g} MB/h")


def _first_error(figures: Mapping[str, Any]) -> str:
    return next(iter(figures["errors"]), "no reason given")


def limit_note(figures: Mapping[str, Any]) -> str:
    """What kept the figures from being the server's own, or an empty string."""
    if figures["driver_was_limit"]:
        return " (the driver was the limit: the server can do more)"
    if figures["machine_was_limit"]:
        return " (driver and server filled the machine together: the server alone can do more)"
    return ""


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before believing the figures."""
    found = []
    for figures, where in _steps(summary):
        if figures["driver_was_limit"]:
            busy = (
                f", on a machine that was {figures['machine_cpu_percent']:.0f} % busy"
                if figures["machine_was_limit"]
                else ""
            )
            found.append(
                f"Void{where} as a statement on the server: the driver was the limit, "
                f"{figures['driver_limit_reason']}{busy}. The server can do at least this."
            )
        elif figures["machine_was_limit"]:
            found.append(
                f"Driver and server filled the machine together{where} "
                f"({figures['machine_cpu_percent']:.0f} % of all cores): the server alone can do "
                "more."
            )
    n_answers = [each["n_requests"] - each["n_errors"] for each, _ in _steps(summary)]
    if 0 < min(n_answers) < _N_FOR_P999:
        found.append(
            f"A 99.9th percentile needs {_N_FOR_P999:,} answers: it is not stated for "
            f"{min(n_answers):,}."
        )
    if summary["server_cpu_percent"] is None:
        found.append("The server's CPU and memory are unknown: it is not on this machine.")
    growth, error = summary["memory_growth_mb_per_h"], summary["memory_growth_error_mb_per_h"]
    if growth is not None and error is not None:
        grows = growth > 2.0 * error
        found.append(
            f"The server's memory {'grew' if grows else 'did not measurably grow'}: "
            f"{growth:+.1f} ± {2.0 * error:.1f} MB/h after the first fifth of the run."
        )
    return found
