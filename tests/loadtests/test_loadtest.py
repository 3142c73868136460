"""`policyserve loadtest` as a user starts it, against servers in processes of their own."""

from __future__ import annotations

import csv
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests.plan import Arrivals, Kind, LoadPlan, Protocol
from loadtests.session import run_loadtest
from tests.bundles import LinearPolicy
from tests.loadtests.server_process import OwnServer, own_server
from tests.loadtests.test_env_loop import played_by_hand
from tests.processes import Server, refuse, succeed


@pytest.fixture(scope="module")
def cartpole_server(loaded_bundles: dict[str, Path]) -> Iterator[OwnServer]:
    with own_server(loaded_bundles["cartpole"]) as server:
        yield server


def rows_of(output: Path) -> list[dict[str, Any]]:
    with (output / "windows.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_load_test_of_nobody_ends_with_1(tmp_path: Path) -> None:
    line = refuse("loadtest", "http://127.0.0.1:9/v1/policies/x", "-o", tmp_path, exit_code=1)
    assert "127.0.0.1:9" in line


@pytest.mark.slow
def test_a_load_test_leaves_a_report_whose_numbers_agree(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/v1/policies/cartpole"
    output = tmp_path / "report"
    arguments = ("--users", "4", "--duration-s", "4", "--json", "-o", output)
    printed = json.loads(succeed("loadtest", url, *arguments).splitlines()[-1])
    summary = json.loads((output / "summary.json").read_text())
    assert printed == summary
    assert summary["n_errors"] == 0
    assert summary["p50_ms"] <= summary["p95_ms"] <= summary["p99_ms"] <= summary["max_ms"]
    assert summary["requests_per_s"] == pytest.approx(summary["n_requests"] / summary["duration_s"])
    assert {"action query", "env step"} == set(summary["groups"])
    assert sum(int(row["n_requests"]) for row in rows_of(output)) == summary["n_requests"]
    assert "<html" in (output / "report.html").read_text()
    assert summary["n_episodes"] > 0
    assert summary["mean_return"] >= 475
    # The replica is found by the port, and Ray's own processes with it.
    assert any("ServeReplica" in name for name in summary["server_processes"])
    assert "raylet" in summary["server_processes"]
    assert summary["server_cpu_percent"] > 0


@pytest.mark.slow
def test_haproxy_belongs_to_the_server(haproxy_server: Server, tmp_path: Path) -> None:
    url = f"{haproxy_server.url}/v1/policies/pendulum"
    succeed("loadtest", url, "--rate", "50", "--duration-s", "2", "-o", tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())["server_processes"]
    assert any("haproxy" in name.lower() for name in found)
    assert any("ServeReplica" in name for name in found)


@pytest.mark.slow
def test_an_open_loop_keeps_to_its_rate(cartpole_server: OwnServer, tmp_path: Path) -> None:
    arguments = ("--duration-s", "3", "--rate", "100", "--arrivals", "constant")
    succeed("loadtest", cartpole_server.url, *arguments, "-o", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["n_requests"] == 300
    assert summary["requests_per_s"] == pytest.approx(100.0, rel=0.05)
    assert summary["loop"].startswith("open")
    assert "mean_return" not in summary


@pytest.mark.slow
def test_a_stall_of_the_server_shows_in_an_open_loops_tail(
    cartpole_server: OwnServer, tmp_path: Path
) -> None:
    """20 ms in each second hit 2 % of evenly spaced requests: half of those wait above 10 ms."""
    plan = LoadPlan(
        cartpole_server.url, rate=300.0, duration_s=6.0, arrivals=Arrivals.constant, users=4
    )
    with cartpole_server.stalling(0.02, 1.0):
        opened = run_loadtest([plan], tmp_path / "open")
        closed_plan = LoadPlan(cartpole_server.url, users=1, duration_s=6.0)
        closed = run_loadtest([closed_plan], tmp_path / "closed")
    assert opened["n_requests"] == 1800
    assert opened["n_errors"] == closed["n_errors"] == 0
    assert opened["p99_ms"] >= 8.0
    # The median knows nothing of it, and a closed loop meets each stall with one request only.
    assert closed["p50_ms"] < opened["p99_ms"] / 4.0
    latencies = [float(row["max_ms"]) for row in rows_of(tmp_path / "open") if row["max_ms"]]
    assert np.sum(np.array(latencies) >= 15.0) >= 3


@pytest.mark.slow
def test_a_server_that_dies_in_the_load_is_reported(
    loaded_bundles: dict[str, Path], tmp_path: Path
) -> None:
    with own_server(loaded_bundles["cartpole"]) as server:
        plan = LoadPlan(server.url, rate=200.0, duration_s=4.0, users=2)
        killer = threading.Thread(target=kill_in_the_load, args=(server,))
        killer.start()
        try:
            summary = run_loadtest([plan], tmp_path)
        finally:
            killer.join()
    assert 0 < summary["n_errors"] < summary["n_requests"]
    assert any("onnect" in name for name in summary["errors"])
    assert (tmp_path / "report.html").is_file()


def kill_in_the_load(server: OwnServer) -> None:
    """Kill a server when it has answered some of its load."""
    metrics = f"{server.url.partition('/v1/')[0]}/metrics"
    deadline = time.monotonic() + 60.0
    pause = threading.Event()
    while time.monotonic() < deadline:
        text = urllib.request.urlopen(metrics, timeout=10.0).read().decode()
        found = re.search(r'^policyserve_requests_total\{code="ok".* (\S+)$', text, re.MULTILINE)
        if found and float(found[1]) > 500:  # a few hundred are asked before the load
            break
        pause.wait(0.02)
    server.kill()


@pytest.mark.slow
def test_a_full_queue_is_counted_as_rejected(
    loaded_bundles: dict[str, Path], tmp_path: Path
) -> None:
    with own_server(loaded_bundles["cartpole"], max_queue_size=1) as server:
        # More at once than the queue holds, as all have waited for the stopped server.
        options = ("--rate", "200", "--duration-s", "2", "--max-error-rate", "0.0")
        with server.stalling(0.2, 0.5):
            line = refuse("loadtest", server.url, *options, "-o", tmp_path, exit_code=1)
            succeed("loadtest", server.url, *options, "--allow-rejected", "-o", tmp_path / "b")
    assert "rejected" in line
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["n_rejected"] == summary["n_errors"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("protocol", list(Protocol))
@pytest.mark.parametrize("kind", [Kind.env_loops, Kind.vector_env_loops])
def test_locusts_environment_loops_play_the_episodes_of_their_seeds(
    cartpole_server: OwnServer,
    cartpole_like: LinearPolicy,
    protocol: Protocol,
    kind: Kind,
    tmp_path: Path,
) -> None:
    plan = LoadPlan(
        cartpole_server.url, users=1, duration_s=1.5, kind=kind, protocol=protocol, num_envs=3
    )
    summary = run_loadtest([plan], tmp_path)
    assert summary["n_errors"] == 0
    assert summary["n_episodes"] > 0
    by_hand = [played_by_hand(cartpole_like, seed) for seed in range(summary["n_episodes"] + 3)]
    assert min(by_hand) <= summary["mean_return"] <= max(by_hand)
    if kind is Kind.env_loops:
        assert summary["mean_return"] == pytest.approx(np.mean(by_hand[: summary["n_episodes"]]))
    per_request = summary["observations_per_s"] / summary["requests_per_s"]
    assert per_request == pytest.approx(3 if kind is Kind.vector_env_loops else 1)


@pytest.mark.slow
def test_locusts_users_ask_over_a_stream_too(cartpole_server: OwnServer, tmp_path: Path) -> None:
    plan = LoadPlan(
        cartpole_server.url, users=2, duration_s=1.0, kind=Kind.both, protocol=Protocol.ws
    )
    summary = run_loadtest([plan], tmp_path)
    assert summary["n_errors"] == 0
    assert set(summary["groups"]) == {"action query", "stream step"}


@pytest.mark.slow
def test_a_sweep_tells_each_step(cartpole_server: OwnServer, tmp_path: Path) -> None:
    printed = succeed(
        "loadtest", cartpole_server.url, "--sweep", "1,3", "--duration-s", "1", "-o", tmp_path
    )
    assert "3 users" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [each["users"] for each in summary["steps"]] == [1, 3]
    assert summary["n_requests"] == sum(each["n_requests"] for each in summary["steps"])
    assert "Latency against throughput" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_load_test_over_its_limit_ends_with_1(cartpole_server: OwnServer, tmp_path: Path) -> None:
    arguments = ("--users", "1", "--duration-s", "1", "--max-p99-ms", "0.001", "-o", tmp_path)
    line = refuse("loadtest", cartpole_server.url, *arguments, "--json", exit_code=1)
    assert "99th percentile" in line
    assert "Limit broken" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_an_environment_that_cannot_be_stepped_is_refused_before_the_load(
    cartpole_server: OwnServer, tmp_path: Path
) -> None:
    for env_id in ("Nope-v1", "Pendulum-v1"):
        arguments = ("--env", env_id, "-o", tmp_path / "out")
        line = refuse("loadtest", cartpole_server.url, *arguments, exit_code=2)
        assert env_id.split("-")[0] in line
