"""Where each microsecond goes, from the bare ONNX Runtime call up to the Python client."""

from __future__ import annotations

from loadtests.benchmark.results import Results
from loadtests.benchmark.targets import (
    BARE_ASGI,
    BARE_ASYNCIO,
    CLIENT_LOAD,
    CONSTANT,
    JSON_LOADS,
    OURS,
    OURS_HAPROXY,
    PROTOTYPE,
    REPLICA,
)

_ONE, _MANY = 1, 64
# As `loadtests.ladder.in_process` names them; it is not imported, as it loads ONNX Runtime.
_STEPS = {
    "ONNX Runtime's call alone": "ONNX Runtime's call",
    "GraphPolicy.compute_conformed": "the policy: defaults, outputs, errors",
    "+ Batcher": "+ the batcher: queue, admission, deadlines",
    "+ JSON, checks, metrics: bytes to bytes": "+ JSON, checks and metrics: bytes to bytes",
}
_SERVERS = {
    REPLICA: "+ HTTP in bare uvicorn: the replica without Ray",
    OURS: "+ Ray Serve around it: the public port",
    OURS_HAPROXY: "+ HAProxy",
}
_BESIDE = {
    CONSTANT: "for comparison: a constant reply, HTTP alone",
    BARE_ASYNCIO: "for comparison: bare asyncio, nothing checked or counted",
    PROTOTYPE: "for comparison: bare prototype in uvicorn",
    BARE_ASGI: "for comparison: bare uvicorn, ASGI",
}


def ladder_table(results: Results) -> str:
    """A row a step: one request alone, and one of many under load."""
    one, many = JSON_LOADS[0].key, JSON_LOADS[2].key
    rows = []
    for step, title in _STEPS.items():
        alone, batch = results.step_us(step, _ONE), results.step_us(step, _MANY)
        rows.append((title, alone, None if batch is None else batch / _MANY))
    for key, title in _SERVERS.items():
        rows.append((title, _p50_us(results, key, one), _cost_us(results, key, many)))
    rows.append(("+ the Python client", _p50_us(results, OURS, CLIENT_LOAD.key), None))
    for key, title in _BESIDE.items():
        rows.append((title, _p50_us(results, key, one), _cost_us(results, key, many)))
    lines = ["| step | one request alone, µs | per request at 64 together, µs |", "|---|---:|---:|"]
    lines += [f"| {title} | {_us(alone)} | {_us(each)} |" for title, alone, each in rows]
    return "\n".join(lines) + "\n\n" + _LEGEND


_LEGEND = """Each row holds the rows above it, up to HAProxy; the client's row is measured on the
public port without HAProxy. Up to "bytes to bytes" the steps are timed inside one process, without
a socket: one request, and a batch of 64 divided by 64. From there on "alone" is p50 at c=1, with
the driver's own time and the machine's loopback, and "together" is what one answer takes of the
clock at c=64."""


def _p50_us(results: Results, key: str, load: str) -> float | None:
    value = results.p50_ms(key, load)
    return None if value is None else value * 1e3


def _cost_us(results: Results, key: str, load: str) -> float | None:
    rate = results.rate(key, load)
    return 1e6 / rate if rate else None


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
