"""Recorded requests and the figures made of them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from loadtests.alarm import Alarm
from loadtests.recording import OK, REJECTED, Recorder, read_recording
from loadtests.summary import (
    memory_growth,
    percentiles,
    step_figures,
    summarise,
    window_width_s,
    windows,
)
from tests.loadtests.conftest import recording_of, step_of


def test_what_is_recorded_is_read_again(tmp_path: Path) -> None:
    recorder = Recorder()
    step = recorder.group("step")
    recorder.ok(100.5, 0.002, group=step, n_observations=4)
    recorder.failed(101.0, 0.5, REJECTED, group=step)
    recorder.failed(102.0, 0.1, "HTTP 500: inference_failed", group=recorder.group("query"))
    recorder.lateness.append(0.25)
    recorder.returns.append(12.0)
    recorder.save(tmp_path / "r.npz", started=100.0, ended=104.0, cpu_percent=7.0)
    found = read_recording(tmp_path / "r.npz")
    assert found.duration_s == 4.0
    assert found.due_s == pytest.approx([0.5, 1.0, 2.0])
    assert found.latency_ms == pytest.approx([2.0, 500.0, 100.0])
    assert found.is_ok.tolist() == [True, False, False]
    assert found.n_observations.tolist() == [4, 0, 0]
    assert [found.groups[number] for number in found.group] == ["step", "step", "query"]
    assert found.errors() == {REJECTED: 1, "HTTP 500: inference_failed": 1}
    assert found.lateness_ms == pytest.approx([250.0])
    assert found.returns.tolist() == [12.0]
    assert found.driver == {"cpu_percent": 7.0}


def test_a_run_without_requests_can_be_read(tmp_path: Path) -> None:
    Recorder().save(tmp_path / "r.npz", started=1.0, ended=2.0, cpu_percent=0.0)
    assert len(read_recording(tmp_path / "r.npz").due_s) == 0


def test_a_server_cannot_make_up_kinds_of_errors_without_end(tmp_path: Path) -> None:
    recorder = Recorder()
    for number in range(1000):
        recorder.failed(0.0, 0.0, f"made up {number} " + "x" * 1000)
    recorder.save(tmp_path / "r.npz", started=0.0, ended=1.0)
    errors = read_recording(tmp_path / "r.npz").errors()
    assert sum(errors.values()) == 1000
    assert len(errors) < 100
    assert max(map(len, errors)) <= 200
    assert errors["other errors"] > 900


def test_percentiles_are_numpys_and_only_those_that_the_sample_supports() -> None:
    latency = np.arange(1, 10_001, dtype=float)
    found = percentiles(latency)
    assert found["p50_ms"] == pytest.approx(5000.5)
    assert found["p99_ms"] == pytest.approx(np.percentile(latency, 99))
    assert found["p999_ms"] == pytest.approx(np.percentile(latency, 99.9))
    assert found["max_ms"] == 10_000.0
    assert percentiles(latency[:-1])["p999_ms"] is None
    assert percentiles(latency[:0]) == dict.fromkeys(found)


def test_figures_count_right_answers_and_tell_503_apart() -> None:
    outcomes = [OK] * 6 + [REJECTED] * 3 + ["HTTP 500: x"]
    latency = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 900.0, 900.0, 900.0, 900.0]
    recording = recording_of(latency, outcomes=outcomes, duration_s=2.0, returns=(10.0, 20.0))
    found = step_figures(step_of(recording, rate=5.0))
    assert found["requests_per_s"] == 3.0
    assert (found["n_requests"], found["n_errors"], found["n_rejected"]) == (10, 4, 3)
    assert found["p50_ms"] == 3.5  # a fast refusal, or a slow one, is no latency
    assert found["errors"] == {REJECTED: 3, "HTTP 500: x": 1}
    assert (found["mean_return"], found["std_return"], found["n_episodes"]) == (15.0, 5.0, 2)
    assert "mean_return" not in step_figures(step_of(recording_of([1.0])))


@pytest.mark.parametrize(
    ("lateness_ms", "cpu_percent", "latency_ms", "expected"),
    [
        (0.2, 50.0, 1.0, False),
        (0.2, 95.0, 1.0, True),  # no time left
        (0.9, 50.0, 1.0, False),  # late, but by less than a millisecond
        (5.0, 50.0, 6.0, True),  # most of what was measured was the driver itself
        (5.0, 50.0, 500.0, False),  # the server was slow, not the driver
    ],
)
def test_a_slow_driver_is_told_from_a_slow_server(
    lateness_ms: float, cpu_percent: float, latency_ms: float, expected: bool
) -> None:
    recording = recording_of([latency_ms] * 100, lateness_ms=lateness_ms, cpu_percent=cpu_percent)
    assert step_figures(step_of(recording, rate=10.0))["driver_was_limit"] is expected


def test_windows_hold_every_request_once_and_show_where_a_stall_was() -> None:
    latency = np.ones(1000)
    latency[500:510] = np.linspace(100.0, 10.0, 10)  # due 5.0 s to 5.1 s
    outcomes = [OK] * 999 + ["HTTP 500: x"]
    rows = windows(step_of(recording_of(latency.tolist(), outcomes=outcomes, duration_s=10.0)))
    assert len(rows) == 100
    assert sum(row["n_requests"] for row in rows) == 1000
    assert [row["start_s"] for row in rows if row["max_ms"] and row["max_ms"] > 50.0] == [5.0]
    assert sum(row["answers_per_s"] * 0.1 for row in rows) == pytest.approx(999)
    assert rows[-1]["n_errors"] == 1
    assert rows[5]["server_rss_mb"] is None or rows[5]["server_rss_mb"] == 200.0


@pytest.mark.parametrize("duration_s", [0.1, 9.0, 60.0, 3600.0, 86_400.0])
def test_there_are_never_many_windows(duration_s: float) -> None:
    assert 1 <= np.ceil(duration_s / window_width_s(duration_s)) <= 100


def test_memory_that_grows_is_found_with_its_slope() -> None:
    at_s = np.arange(0.0, 600.0, 2.0)
    noise = np.random.default_rng(0).normal(scale=0.05, size=len(at_s))
    rss = 100.0 + at_s * (36.0 / 3600.0) + noise
    rss[at_s < 100.0] += 40.0  # warming up is no growth
    found = memory_growth(at_s, rss.tolist(), 600.0)
    error = found["memory_growth_error_mb_per_h"]
    assert error is not None
    assert 0.0 < error < 1.0
    assert found["memory_growth_mb_per_h"] == pytest.approx(36.0, abs=4.0 * error)
    flat = memory_growth(at_s, (100.0 + noise).tolist(), 600.0)
    assert abs(flat["memory_growth_mb_per_h"] or 0.0) < 4.0 * error
    assert set(memory_growth(at_s[:10], rss[:10].tolist(), 20.0).values()) == {None}


def test_a_sweep_tells_its_fastest_step_and_counts_all() -> None:
    slow = step_of(recording_of([1.0] * 10, duration_s=1.0), users=1)
    fast = step_of(recording_of([2.0] * 50, outcomes=[OK] * 49 + ["x"], duration_s=1.0), users=2)
    found = summarise([slow, fast], {"policy": "p", "version": 3, "policy_id": "abc"})
    assert (found["users"], found["requests_per_s"], found["p50_ms"]) == (2, 49.0, 2.0)
    assert (found["n_requests"], found["n_errors"], found["errors"]) == (60, 1, {"x": 1})
    assert [each["users"] for each in found["steps"]] == [1, 2]
    assert found["policy"]["version"] == 3


def test_an_alarm_rings_in_time_and_never_early() -> None:
    async def ring_often() -> list[float]:
        loop = asyncio.get_running_loop()
        late: list[float] = []
        done = loop.create_future()
        due = time.perf_counter()

        def ring() -> None:
            nonlocal due
            now = time.perf_counter()
            late.append(now - due)
            if len(late) == 50:
                done.set_result(None)
                return
            due = now + 0.0007
            alarm.set(due, now)

        alarm = Alarm(loop, ring)
        assert alarm.is_exact
        alarm.set(due, due)  # past already: rings at once
        await asyncio.wait_for(done, 10.0)
        alarm.close()
        alarm.close()
        return late

    late = asyncio.run(ring_often())
    assert min(late) >= -1e-6
    # An event loop's own timer would be late by half a millisecond on average.
    assert np.percentile(late, 25) < 0.0004
