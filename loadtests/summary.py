"""From recorded requests to figures; `docs/metrics.md` gives unit and formula of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.recording import REJECTED, Recording
from loadtests.server_facts import ServerSamples, machine_facts
from loadtests.steps import Step

# A driver above this share of one core waits for itself, not for the server; likewise a machine
# above this share of all its cores.
LIMIT_PERCENT = 90.0
# A driver that is itself later than this share of the 99th percentile did not measure the server.
_LATENESS_SHARE = 0.25
_UNIMPORTANT_LATENESS_MS = 1.0
# So many values have to lie beyond a percentile before it is stated.
_N_BEYOND = 10
# A slope over less says more about warming up than about memory that leaks.
_MIN_SLOPE_S = 60.0
_WARM_UP_SHARE = 0.2
PERCENTILES = {"p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0, "p999_ms": 99.9}
_WINDOWS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
_MAX_WINDOWS = 100


def summarise(steps: Sequence[Step], described: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a load test.

    Of several steps the one with most right answers per second is told, beside all `steps`; the
    counts of requests and errors are of all.

    Args:
        steps: At least one.
        described: The policy's description.
    """
    told = [step_figures(step) for step in steps]
    figures = dict(max(told, key=lambda each: each["requests_per_s"]))
    for key in ("n_requests", "n_errors", "n_rejected"):
        figures[key] = sum(each[key] for each in told)
    errors: dict[str, int] = {}
    for each in told:
        for name, count in each["errors"].items():
            errors[name] = errors.get(name, 0) + count
    figures["errors"] = errors
    if len(steps) > 1:
        figures["steps"] = told
    figures["policy"] = {key: described.get(key) for key in ("policy", "version", "policy_id")}
    figures["plan"] = asdict(steps[0].plan)
    figures["machine"] = machine_facts()
    return figures


def step_figures(step: Step) -> dict[str, Any]:
    """The figures of one step; durations in milliseconds, rates per second."""
    recording, plan = step.recording, step.plan
    errors = recording.errors()
    n_ok = int(recording.is_ok.sum())
    seconds = recording.duration_s
    latency = percentiles(recording.ok_latency_ms)
    figures: dict[str, Any] = {
        "loop": plan.loop,
        "users": plan.users,
        "rate": plan.rate,
        "requests_per_s": n_ok / seconds,
        "observations_per_s": float(recording.n_observations.sum()) / seconds,
        **latency,
        "n_requests": len(recording.due_s),
        "n_errors": len(recording.due_s) - n_ok,
        "n_rejected": errors.get(REJECTED, 0),
        "errors": errors,
        "duration_s": seconds,
        "groups": _groups(recording),
        **_driver(recording, latency["p99_ms"], is_open=plan.is_open),
        **_server(step.samples, recording),
        "n_episodes": len(recording.returns),
    }
    if len(recording.returns):
        figures["mean_return"] = float(recording.returns.mean())
        figures["std_return"] = float(recording.returns.std())
        figures["mean_length"] = float(recording.lengths.mean())
    return figures


def percentiles(latency_ms: NDArray[np.float64]) -> dict[str, float | None]:
    """Median to 99.9th percentile, and the largest; None for what too few values say."""
    n = len(latency_ms)
    found: dict[str, float | None] = dict.fromkeys((*PERCENTILES, "max_ms"))
    if not n:
        return found
    values = np.percentile(latency_ms, list(PERCENTILES.values())).tolist()
    found |= dict(zip(PERCENTILES, values, strict=True))
    if n * (100.0 - PERCENTILES["p999_ms"]) / 100.0 < _N_BEYOND - 1e-6:
        found["p999_ms"] = None
    return found | {"max_ms": float(latency_ms.max())}


def _groups(recording: Recording) -> dict[str, dict[str, Any]]:
    found = {}
    for number, name in enumerate(recording.groups):
        is_here = recording.group == number
        n = int(is_here.sum())
        is_ok = is_here & recording.is_ok
        if n:
            found[name] = {
                "n_requests": n,
                "n_errors": n - int(is_ok.sum()),
                **percentiles(recording.latency_ms[is_ok]),
            }
    return found


def _driver(recording: Recording, p99_ms: float | None, *, is_open: bool) -> dict[str, Any]:
    late = recording.lateness_ms
    p99_late = float(np.percentile(late, 99.0)) if len(late) else 0.0
    cpu = float(recording.driver["cpu_percent"])
    bound = max(_UNIMPORTANT_LATENESS_MS, _LATENESS_SHARE * (p99_ms or 0.0))
    reason = None
    if cpu > LIMIT_PERCENT:
        reason = f"it used {cpu:.0f} % of a core"
    elif p99_late > bound:
        what = "sending" if is_open else "coming to what was due"
        reason = f"it was itself up to {p99_late:.1f} ms late in {what} (99th percentile)"
    return {
        "driver_cpu_percent": cpu,
        "driver_lateness_p99_ms": p99_late,
        "driver_was_limit": reason is not None,
        "driver_limit_reason": reason,
        "n_connections": recording.driver["n_connections"],
        "n_retries": recording.driver["n_retries"],
    }


def _server(samples: ServerSamples, recording: Recording) -> dict[str, Any]:
    """What was sampled while the load ran; None where the server is on another machine."""
    at_s = np.array(samples.at_s) - recording.started
    during = (at_s > 0.0) & (at_s <= recording.duration_s + 0.5)
    machine = _mean(samples.machine_cpu_percent, during)
    rss_mb = np.array(samples.rss_mb)[during]
    return {
        "machine_cpu_percent": machine,
        "machine_was_limit": machine is not None and machine > LIMIT_PERCENT,
        "server_cpu_percent": _mean(samples.cpu_percent, during),
        "server_rss_mb": float(np.nanmax(rss_mb)) if np.isfinite(rss_mb).any() else None,
        "server_processes": samples.processes,
        **memory_growth(at_s, samples.rss_mb, recording.duration_s),
    }


def memory_growth(
    at_s: NDArray[np.float64], rss_mb: Sequence[float], duration_s: float
) -> dict[str, float | None]:
    """A straight line through the server's memory after the first fifth of the run.

    Returns:
        `memory_growth_mb_per_h` and the standard error of it; None for a run of less than a
        minute.
    """
    names = ("memory_growth_mb_per_h", "memory_growth_error_mb_per_h")
    is_late = (at_s >= _WARM_UP_SHARE * duration_s) & (at_s <= duration_s)
    is_late &= np.isfinite(np.array(rss_mb, float))
    if duration_s < _MIN_SLOPE_S or is_late.sum() < 10:
        return dict.fromkeys(names)
    hours = at_s[is_late] / 3600.0
    values = np.array(rss_mb)[is_late]
    centred = hours - hours.mean()
    spread = float(centred @ centred)
    slope = float(centred @ values) / spread
    residual = values - values.mean() - slope * centred
    error = float(np.sqrt(residual @ residual / (len(values) - 2) / spread))
    return dict(zip(names, (slope, error), strict=True))


def window_width_s(duration_s: float) -> float:
    """So that a run has at most a hundred windows."""
    fitting = (width for width in _WINDOWS_S if duration_s / width <= _MAX_WINDOWS)
    return next(fitting, _WINDOWS_S[-1])


def windows(step: Step) -> list[dict[str, Any]]:
    """The run in windows of time.

    A request belongs to the window in which it was due, an answer per second to the one in which
    it came. A 99th percentile is stated from a hundred requests on.
    """
    recording, samples = step.recording, step.samples
    width = window_width_s(recording.duration_s)
    n = max(1, int(np.ceil(recording.duration_s / width - 1e-9)))
    due = np.clip((recording.due_s / width).astype(int), 0, n - 1)
    came = recording.due_s + recording.latency_ms / 1e3
    answered = np.clip((came / width).astype(int), 0, n - 1)
    answers = np.bincount(answered[recording.is_ok], minlength=n)
    errors = np.bincount(due[~recording.is_ok], minlength=n)
    order = np.argsort(due[recording.is_ok], kind="stable")
    bounds = np.searchsorted(due[recording.is_ok][order], np.arange(1, n))
    parts = np.split(recording.ok_latency_ms[order], bounds)
    at_s = np.array(samples.at_s) - recording.started
    rows = []
    for index, part in enumerate(parts):
        start, end = index * width, min((index + 1) * width, recording.duration_s)
        found = percentiles(part)
        here = (at_s > start) & (at_s <= end)
        rows.append(
            {
                "start_s": round(start, 3),
                "n_requests": len(part) + int(errors[index]),
                "n_errors": int(errors[index]),
                "answers_per_s": float(answers[index]) / (end - start) if end > start else 0.0,
                "p50_ms": found["p50_ms"],
                "p99_ms": found["p99_ms"] if len(part) >= 100 else None,
                "max_ms": found["max_ms"],
                "server_cpu_percent": _mean(samples.cpu_percent, here),
                "server_rss_mb": _mean(samples.rss_mb, here),
            }
        )
    return rows


def _mean(values: Sequence[float], here: NDArray[np.bool_]) -> float | None:
    found = np.array(values, float)[here]
    found = found[np.isfinite(found)]
    return float(found.mean()) if len(found) else None
