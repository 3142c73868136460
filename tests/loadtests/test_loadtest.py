"""`policyserve loadtest` against a real server; Locust in its own process."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from loadtests.bench import TARGETS
from loadtests.cli import check_limits, limit_note
from loadtests.driver import drive
from loadtests.errors import LoadTestError
from tests.processes import Server, refuse, succeed

SUMMARY = {
    "n_requests": 100,
    "n_errors": 2,
    "errors": {"HTTP 503: overloaded": 2},
    "p99_ms": 7.0,
    "driver_was_limit": False,
    "machine_was_limit": False,
}


def test_too_many_errors_and_a_slow_tail_break_the_limits() -> None:
    check_limits(SUMMARY, max_p99_ms=8.0, max_error_rate=0.02)
    with pytest.raises(LoadTestError, match="HTTP 503: overloaded"):
        check_limits(SUMMARY, max_p99_ms=None, max_error_rate=0.01)
    with pytest.raises(LoadTestError, match=r"7\.00 ms"):
        check_limits(SUMMARY, max_p99_ms=6.0, max_error_rate=1.0)
    with pytest.raises(LoadTestError, match="none of 2"):
        check_limits({**SUMMARY, "n_requests": 2}, max_p99_ms=None, max_error_rate=1.0)


def test_a_run_whose_driver_was_the_limit_says_so() -> None:
    assert limit_note(SUMMARY) == ""
    assert "driver" in limit_note({**SUMMARY, "driver_was_limit": True})
    assert "machine" in limit_note({**SUMMARY, "machine_was_limit": True})


def test_the_benchmark_compares_with_ray_serves_defaults() -> None:
    assert next(target.name for target in TARGETS) == "policyserve"
    assert any("ray_serve_batch.py" in part for target in TARGETS for part in target.command)


@pytest.mark.slow
def test_a_load_test_leaves_a_report_whose_numbers_agree(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/v1/policies/cartpole"
    output = tmp_path / "report"
    arguments = ("--users", "4", "--duration-s", "4", "--json", "-o", output)
    printed = json.loads(succeed("loadtest", url, *arguments).splitlines()[-1])
    summary = json.loads((output / "summary.json").read_text())
    assert printed == summary
    assert summary["n_errors"] == 0
    assert summary["p50_ms"] <= summary["p95_ms"] <= summary["p99_ms"]
    assert summary["requests_per_s"] == pytest.approx(summary["n_requests"] / summary["duration_s"])
    with (output / "stats.csv").open() as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    assert {"action query", "env step"} <= set(rows)
    # Locust's own count may miss the requests under way when it stopped.
    assert int(rows["Aggregated"]["Request Count"]) == pytest.approx(summary["n_requests"], abs=8)
    assert "<html" in (output / "report.html").read_text()
    assert summary["n_episodes"] > 0
    assert summary["mean_return"] >= 475


@pytest.mark.slow
def test_a_paced_load_test_keeps_to_its_rate(server: Server, tmp_path: Path) -> None:
    arguments = ("--users", "2", "--duration-s", "4", "--rate", "50", "--kind", "queries")
    succeed("loadtest", f"{server.url}/v1/policies/pendulum", *arguments, "-o", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 30 <= summary["requests_per_s"] <= 55
    assert "mean_return" not in summary


@pytest.mark.slow
def test_a_load_test_over_its_limit_ends_with_1(server: Server, tmp_path: Path) -> None:
    arguments = ("--users", "1", "--duration-s", "1", "--max-p99-ms", "0.001", "-o", tmp_path)
    line = refuse(
        "loadtest", f"{server.url}/v1/policies/cartpole", *arguments, "--json", exit_code=1
    )
    assert "99th percentile" in line


def test_a_load_test_of_nobody_ends_with_1(tmp_path: Path) -> None:
    line = refuse("loadtest", "http://127.0.0.1:9/v1/policies/x", "-o", tmp_path, exit_code=1)
    assert "127.0.0.1:9" in line


@pytest.mark.slow
def test_the_built_in_driver_counts_what_the_server_answered(server: Server, monkeypatch) -> None:
    monkeypatch.setattr("loadtests.driver.driver_name", lambda: "asyncio")
    url = f"{server.url}/v1/policies/cartpole/compute_action"
    good = drive(url, b'{"observation":[0,0,0,0]}', connections=4, duration_s=1.0)
    assert good.n_errors == 0
    assert good.requests_per_s > 0
    assert good.p50_ms <= good.p99_ms
    bad = drive(url, b"{}", connections=2, duration_s=0.5)
    assert bad.requests_per_s == 0
    assert bad.n_errors > 0


@pytest.mark.slow
def test_an_environment_that_cannot_be_stepped_is_refused_before_the_load(
    server: Server, tmp_path: Path
) -> None:
    url = f"{server.url}/v1/policies/cartpole"
    for env_id in ("Nope-v1", "Pendulum-v1"):
        line = refuse("loadtest", url, "--env", env_id, "-o", tmp_path / "out", exit_code=2)
        assert env_id.split("-")[0] in line
