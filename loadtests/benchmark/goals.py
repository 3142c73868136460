"""What policyserve wants to reach, and whether a benchmark found it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loadtests.benchmark.results import Results, median
from loadtests.benchmark.targets import (
    BARE_ASGI,
    BARE_ASYNCIO,
    OURS,
    OURS_HAPROXY,
    PEERS,
    PROTOTYPE,
    STREAM_LOADS,
)

_READY_S = 12.0
_REPLICA_MB = 300.0
_ACTIONS_PER_S = 1e6
_ECHO_RATIO = 1.3
_KEPT = 2 / 3


@dataclass(frozen=True)
class Goal:
    """One thing to reach.

    Attributes:
        name: What is measured.
        wanted: The limit.
        found: The figure, and what it is compared with.
        is_met: None where it could not be measured.
    """

    name: str
    wanted: str
    found: str
    is_met: bool | None


def judge(results: Results) -> list[Goal]:
    """Every goal, in the order of the report."""
    return [
        _fastest_answer(results),
        _rate(results, 16, OURS, 4.0),
        _rate(results, 64, OURS_HAPROXY, 1.2),
        _rate(results, 64, OURS, 2.0),
        _rate(results, 256, OURS_HAPROXY, 1.2),
        _rate(results, 256, OURS, 2.0),
        _tail(results, OURS_HAPROXY),
        _tail(results, OURS),
        _overhead(results, PROTOTYPE, "bare prototype"),
        _overhead(results, BARE_ASYNCIO, "bare asyncio"),
        _stream_latency(results),
        _stream_rate(results),
        _memory(results),
        _start(results),
    ]


_TITLES = {OURS: "direct", OURS_HAPROXY: "behind HAProxy"}


def _missing(name: str, wanted: str) -> Goal:
    return Goal(name, wanted, "not measured", None)


def _best_peer(
    figure: Callable[[str], float | None], *, lowest: bool = False
) -> tuple[float, str, str] | None:
    """The best figure of the other servers, with the server's key and title."""
    found = [(value, each.key, each.title) for each in PEERS if (value := figure(each.key))]
    if not found:
        return None
    return min(found) if lowest else max(found)


def _fastest_answer(results: Results) -> Goal:
    name, wanted = "JSON, c=1: p50", "at most the best peer's"
    ours = results.p50_ms(OURS, "json c=1")
    best = _best_peer(lambda key: results.p50_ms(key, "json c=1"), lowest=True)
    if ours is None or best is None:
        return _missing(name, wanted)
    found = f"{ours * 1e3:.0f} µs against {best[0] * 1e3:.0f} µs ({best[2]})"
    return Goal(name, wanted, found, ours <= best[0])


def _rate(results: Results, connections: int, ours: str, factor: float) -> Goal:
    name = f"JSON, c={connections}: requests/s, {_TITLES[ours]}"
    wanted, load = f"{factor:g} x the best peer", f"json c={connections}"
    rate = results.rate(ours, load)
    best = _best_peer(lambda key: results.rate(key, load))
    if rate is None or best is None:
        return _missing(name, wanted)
    ratio = rate / best[0]
    found = f"{ratio:.1f} x ({rate:,.0f} against {best[0]:,.0f}, {best[2]})"
    return Goal(name, wanted, found, ratio >= factor)


def _tail(results: Results, ours: str) -> Goal:
    name, load = f"JSON, c=256: p99, {_TITLES[ours]}", "json c=256"
    wanted = "below that of the peer with the most requests/s"
    tail = results.p99_ms(ours, load)
    best = _best_peer(lambda key: results.rate(key, load))
    peer_tail = results.p99_ms(best[1], load) if best else None
    if tail is None or best is None or peer_tail is None:
        return _missing(name, wanted)
    found = f"{tail:.1f} ms against {peer_tail:.1f} ms ({best[2]})"
    return Goal(name, wanted, found, tail < peer_tail)


def _overhead(results: Results, bare: str, title: str) -> Goal:
    name = f"JSON, c=64: what checks, metrics, ids and admission leave of the {title}"
    wanted, load = "at least two thirds", "json c=64"
    ours, limit = results.rate(OURS, load), results.rate(bare, load)
    if ours is None or limit is None:
        return _missing(name, wanted)
    found = f"{ours / limit:.0%} ({ours:,.0f} of {limit:,.0f} requests/s)"
    return Goal(name, wanted, found, ours / limit >= _KEPT)


def _stream_latency(results: Results) -> Goal:
    name = "stream, B=1, c=1: p50"
    wanted, load = f"at most {_ECHO_RATIO:g} x an echo in bare uvicorn", STREAM_LOADS[0].key
    ours, echo = results.p50_ms(OURS, load), results.p50_ms(BARE_ASGI, load)
    if ours is None or echo is None:
        return _missing(name, wanted)
    found = f"{ours / echo:.2f} x ({ours * 1e3:.0f} µs against {echo * 1e3:.0f} µs)"
    return Goal(name, wanted, found, ours <= _ECHO_RATIO * echo)


def _stream_rate(results: Results) -> Goal:
    load = STREAM_LOADS[-1]
    name, wanted = f"stream, B={load.batch}", f"over {_ACTIONS_PER_S:,.0f} actions/s"
    rate = results.rate(OURS, load.key)
    if rate is None:
        return _missing(name, wanted)
    actions = rate * load.batch
    return Goal(name, wanted, f"{actions:,.0f} actions/s", actions > _ACTIONS_PER_S)


def _memory(results: Results) -> Goal:
    name, wanted = "memory of a replica", f"under {_REPLICA_MB:g} MB"
    found = median([turn.replica_mib for turn in results.turns.get(OURS, []) if turn.replica_mib])
    if found is None:
        return _missing(name, wanted)
    megabytes = found * 2**20 / 1e6
    return Goal(name, wanted, f"{megabytes:.0f} MB resident", megabytes < _REPLICA_MB)


def _start(results: Results) -> Goal:
    name, wanted = "`policyserve serve` to the first answer", f"under {_READY_S:g} s"
    found = median([turn.start_s for turn in results.turns.get(OURS, []) if turn.start_s])
    if found is None:
        return _missing(name, wanted)
    return Goal(name, wanted, f"{found:.1f} s", found < _READY_S)
