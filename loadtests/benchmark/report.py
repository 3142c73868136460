"""The benchmark's results as a page: docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loadtests.benchmark.environments import pinned_version
from loadtests.benchmark.goals import judge
from loadtests.benchmark.ladder_table import ladder_table
from loadtests.benchmark.results import Results, median
from loadtests.benchmark.targets import (
    BARE_ASGI,
    BINARY_LOADS,
    CLIENT_LOAD,
    JSON_LOADS,
    OURS,
    OURS_HAPROXY,
    STREAM_LOADS,
    TARGETS,
    Load,
    Target,
)

_VERDICTS = {True: "met", False: "**missed**", None: "-"}
_DRIVER_MARK = "†"
_GROUPS = {"ours": "this server", "peer": "other servers", "bare": "bare programs"}


def render(results: Results) -> str:
    """The page, Markdown."""
    sections = [
        _head(results),
        _goals(results),
        _section("JSON over HTTP: requests per second", _rates(results)),
        _section("JSON over HTTP: latency, p50 / p99 in ms", _latencies(results)),
        _section("Binary and streams", _other_protocols(results)),
        _section("Where a request's time goes", ladder_table(results)),
        _section("What was measured", _what(results)),
    ]
    return "\n".join(section.rstrip() + "\n" for section in sections if section)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}"


def _head(results: Results) -> str:
    machine, settings = results.machine, results.settings
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    rounds = settings["rounds"]
    turns = "1 round" if rounds == 1 else f"{rounds} interleaved rounds"
    return f"""# Benchmarks

Written by `make bench`; run it again for your machine. One CartPole-v1 policy (64-64 tanh), the
same ONNX graph behind every server, ONNX Runtime with one thread, one observation of four floats a
request unless it says otherwise. {turns} of {settings["duration_s"]:g} s for each
load, in which every server is started for its turn and ended after it; medians, with the lowest
and the highest round. Closed loop: c connections, each asking again when it has its answer. Driver
and server share the machine: compare rows, don't quote them as absolutes. Before every turn the
server's actions are compared with ONNX Runtime's own, and the status of every answer counts.

Machine: {machine["cpu"]}, {machine["cores"]} cores, {machine["system"]}{commit}; Python
{machine["python"]}, Ray {machine["ray"]}, ONNX Runtime {machine["onnxruntime"]}, uvicorn
{machine["uvicorn"]}; HTTP driver: {machine["driver"]}, one thread.
"""


def _goals(results: Results) -> str:
    rows = [(goal.name, goal.wanted, goal.found, _VERDICTS[goal.is_met]) for goal in judge(results)]
    lines = ["| goal | wanted | found | |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return _section('What was to be reached ("peer": another server product)', "\n".join(lines))


def _rates(results: Results) -> str:
    heads = ["server", *(f"c={load.connections}" for load in JSON_LOADS), "memory", "start"]
    rows = []
    for target in TARGETS:
        cells = [_rate_cell(results, target.key, load) for load in JSON_LOADS]
        rows.append([_title(target), *cells, _memory(results, target), _start(results, target)])
    legend = (
        "Memory: all processes of the server together, MiB. Start: from the command to the first "
        f"right answer. {_DRIVER_MARK}: the driver was the limit, so the server may be faster."
    )
    return f"{table(heads, rows)}\n\n{legend}\n{_failures(results)}"


def _latencies(results: Results) -> str:
    heads = ["server", *(f"c={load.connections}" for load in JSON_LOADS)]
    rows = [
        [_title(target), *(_latency_cell(results, target.key, load) for load in JSON_LOADS)]
        for target in TARGETS
    ]
    return table(heads, rows)


def _other_protocols(results: Results) -> str:
    heads = ["load", "server", "requests/s", "actions/s", "p50 / p99, ms"]
    rows = []
    for load in (*BINARY_LOADS, *STREAM_LOADS, CLIENT_LOAD):
        for key in (OURS, OURS_HAPROXY, BARE_ASGI):
            target = next(each for each in TARGETS if each.key == key)
            if load not in target.loads:
                continue
            title = f"{target.title}: echo" if target.is_echo else target.title
            rate = results.rate(key, load.key)
            actions = "-" if rate is None or target.is_echo else f"{rate * load.batch:,.0f}"
            cells = [_rate_cell(results, key, load), actions, _latency_cell(results, key, load)]
            rows.append([_load_title(load), title, *cells])
    lines = [line.replace("|---|---:|", "|---|---|", 1) for line in table(heads, rows).split("\n")]
    return "\n".join(lines)


def _load_title(load: Load) -> str:
    if load.kind == "client":
        return "Python client, JSON, c=1"
    if load.kind == "binary":
        return f"binary (msgpack), c={load.connections}"
    depth = f", {load.depth} frames open on each" if load.depth > 1 else ""
    return f"stream, B={load.batch}, c={load.connections}{depth}"


def _what(results: Results) -> str:
    lines = []
    for group, title in _GROUPS.items():
        lines += [f"{title[0].upper()}{title[1:]}:", ""]
        lines += [
            f"* {target.title}{_version(results, target)}: {target.note}."
            for target in TARGETS
            if target.group == group
        ]
        lines.append("")
    return "\n".join(lines)


def _version(results: Results, target: Target) -> str:
    if target.package is None:
        return ""
    if target.environment is None:
        return f" ({target.package} {results.machine[target.package]})"
    return f" ({target.package} {pinned_version(target.environment, target.package)})"


def _title(target: Target) -> str:
    return f"**{target.title}**" if target.group == "ours" else target.title


def _rate_cell(results: Results, key: str, load: Load) -> str:
    rates = results.figures(key, load.key, lambda result: result.requests_per_s)
    middle = median(rates)
    if middle is None:
        return "-"
    measurements = results.measurements(key, load.key)
    mark = _DRIVER_MARK if any(each.is_driver_bound for each in measurements) else ""
    spread = f" ({min(rates):,.0f}-{max(rates):,.0f})" if len(rates) > 1 else ""
    n_errors = results.n_errors(key, load.key)
    errors = f", {n_errors:,} errors" if n_errors else ""
    return f"{middle:,.0f}{mark}{spread}{errors}"


def _latency_cell(results: Results, key: str, load: Load) -> str:
    p50, p99 = results.p50_ms(key, load.key), results.p99_ms(key, load.key)
    if p50 is None or p99 is None:
        return "-"
    return f"{_ms(p50)} / {_ms(p99)}"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _memory(results: Results, target: Target) -> str:
    turns = results.turns.get(target.key, [])
    found = median([turn.memory_mib for turn in turns if turn.memory_mib is not None])
    return "-" if found is None else f"{found:,.0f}"


def _start(results: Results, target: Target) -> str:
    turns = results.turns.get(target.key, [])
    found = median([turn.start_s for turn in turns if turn.start_s is not None])
    return "-" if found is None else f"{found:.1f} s"


def _failures(results: Results) -> str:
    """What has no figures, and why; and what was not measured on a quiet machine."""
    lines = []
    for target in TARGETS:
        turns = results.turns.get(target.key, [])
        problem = next((turn.problem for turn in turns if turn.problem), None)
        if problem or not turns:
            lines.append(f"* {target.title}: not measured: {problem or 'not asked for'}")
            continue
        reasons: dict[str, list[str]] = {}
        for load in target.loads:
            reason = results.problem(target.key, load.key)
            if reason:
                reasons.setdefault(reason, []).append(_load_or_json(load))
        for reason, loads in reasons.items():
            lines.append(f"* {target.title}: {'; '.join(loads)}: not measured: {reason}")
    lines += _noise(results)
    return "\n" + "\n".join(lines) if lines else ""


def _noise(results: Results) -> list[str]:
    loud, disturbed = [], []
    for target in TARGETS:
        turns = results.turns.get(target.key, [])
        n_loud = sum(not turn.was_quiet for turn in turns)
        if n_loud:
            loud.append(f"{target.title} ({n_loud} of {len(turns)} rounds)")
        measured = [each for turn in turns for each in turn.loads.values()]
        n_disturbed = sum(each.was_disturbed for each in measured)
        if n_disturbed:
            disturbed.append(f"{target.title} ({n_disturbed} of {len(measured)} measurements)")
    lines = []
    if loud:
        lines.append(f"* The machine was not quiet before: {', '.join(loud)}.")
    if disturbed:
        lines.append(f"* Something else used the machine during: {', '.join(disturbed)}.")
    return lines


def _load_or_json(load: Load) -> str:
    return f"JSON, c={load.connections}" if load.kind == "json" else _load_title(load)
