"""The driver's loops against real servers: what is sent, and what is counted."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from loadtests.driver import run_driver
from loadtests.open_loop import arrivals
from loadtests.plan import Arrivals, LoadPlan, Protocol, plan_from_json
from loadtests.recording import REJECTED, Recording, read_recording
from serving.errors import PolicyServingError
from tests.loadtests.meddler import Meddle, meddling, problem
from tests.serving.conftest import LiveServer

N_QUESTIONS = 16


def load(plan: LoadPlan, scratch: Path) -> Recording:
    run_driver(plan, scratch / "recording.npz", n_questions=N_QUESTIONS)
    return read_recording(scratch / "recording.npz")


def test_constant_arrivals_are_evenly_spaced() -> None:
    plan = LoadPlan("", rate=200.0, duration_s=2.0, arrivals=Arrivals.constant)
    assert list(arrivals(plan)) == pytest.approx(np.arange(400) / 200.0)


def test_poisson_arrivals_have_the_rate_and_no_memory() -> None:
    plan = LoadPlan("", rate=1000.0, duration_s=100.0, seed=3)
    at_s = np.array(list(arrivals(plan)))
    gaps = np.diff(at_s)
    # Of an exponential distribution mean and standard deviation are equal; five standard errors.
    assert len(at_s) == pytest.approx(100_000, abs=5 * np.sqrt(100_000))
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert (gaps > 0).all()
    assert list(arrivals(plan)) == at_s.tolist()
    other = LoadPlan("", rate=1000.0, duration_s=100.0, seed=4)
    assert next(arrivals(other)) != at_s[0]


def test_a_plan_survives_the_way_to_the_drivers_process() -> None:
    plan = LoadPlan("http://x", rate=5.0, arrivals=Arrivals.constant, protocol=Protocol.ws)
    assert plan_from_json(plan.to_json()) == plan


@pytest.mark.parametrize("protocol", list(Protocol))
def test_an_open_loop_sends_every_request_that_is_due(
    loaded: LiveServer, protocol: Protocol, tmp_path: Path
) -> None:
    plan = LoadPlan(
        loaded.policy_url("cartpole"),
        rate=200.0,
        duration_s=0.5,
        arrivals=Arrivals.constant,
        protocol=protocol,
        users=2,
    )
    found = load(plan, tmp_path)
    assert found.errors() == {}
    assert np.sort(found.due_s) == pytest.approx(np.arange(100) / 200.0, abs=1e-6)
    assert (found.latency_ms > 0.0).all()
    assert found.duration_s >= 0.5


@pytest.mark.parametrize("protocol", list(Protocol))
@pytest.mark.parametrize("policy", ["cartpole", "box", "dict", "nested", "memory", "image"])
def test_a_closed_loop_checks_the_answers_of_any_policy(
    loaded: LiveServer, protocol: Protocol, policy: str, tmp_path: Path
) -> None:
    plan = LoadPlan(loaded.policy_url(policy), users=3, duration_s=0.1, protocol=protocol)
    found = load(plan, tmp_path)
    assert found.errors() == {}
    assert found.driver["n_connections"] == 3
    # One request at a time on each connection: three users never wait longer than the run.
    assert found.latency_ms.sum() / 1e3 <= 3.1 * found.duration_s
    assert len(found.due_s) > 3


def test_a_batch_counts_as_one_request_and_many_observations(
    loaded: LiveServer, tmp_path: Path
) -> None:
    plan = LoadPlan(loaded.policy_url("box"), users=1, duration_s=0.2, batch_size=5)
    found = load(plan, tmp_path)
    assert found.errors() == {}
    assert found.n_observations.tolist() == [5] * len(found.due_s)


def another_action(status: int, body: bytes) -> tuple[int, bytes]:
    answer = json.loads(body)
    return status, json.dumps({**answer, "action": 1 - answer["action"]}).encode()


def another_policy(status: int, body: bytes) -> tuple[int, bytes]:
    return status, json.dumps({**json.loads(body), "policy_id": "ffffffffffff"}).encode()


@pytest.mark.parametrize(
    ("meddle", "expected"),
    [
        (another_action, "another action than when it was asked alone"),
        (another_policy, "answered by the policy ffffffffffff"),
        (lambda *_: (200, b"hello"), "the answer cannot be read"),
        (lambda *_: (200, b"{}"), "answered by the policy None"),
        (lambda *_: problem(503, "overloaded"), REJECTED),
        (lambda *_: problem(500, "inference_failed"), "HTTP 500: inference_failed"),
        (lambda *_: (502, b"<html>"), "HTTP 502: b'<html>'"),
        (lambda *_: None, "the server closed the connection"),
    ],
)
def test_what_is_no_right_answer_is_counted_by_kind(
    loaded: LiveServer, meddle: Meddle, expected: str, tmp_path: Path
) -> None:
    with meddling(loaded.port, meddle, n_honest=N_QUESTIONS + 5) as meddler:
        plan = LoadPlan(meddler.url("cartpole"), users=2, duration_s=0.15, rate=200.0)
        found = load(plan, tmp_path)
    assert list(found.errors()) == [expected]
    assert found.is_ok.sum() == 5
    assert found.errors()[expected] == len(found.due_s) - 5


def test_users_whose_connections_are_closed_come_again(loaded: LiveServer, tmp_path: Path) -> None:
    with meddling(loaded.port, lambda *_: None, n_honest=N_QUESTIONS + 5) as meddler:
        found = load(LoadPlan(meddler.url("cartpole"), users=2, duration_s=0.3), tmp_path)
    assert list(found.errors()) == ["the server closed the connection"]
    assert found.is_ok.sum() == 5
    assert len(found.due_s) > 5 + 2


def test_an_answer_that_is_written_otherwise_is_right_too(
    loaded: LiveServer, tmp_path: Path
) -> None:
    def spread(status: int, body: bytes) -> tuple[int, bytes]:
        return status, json.dumps(json.loads(body), indent=4).encode()

    with meddling(loaded.port, spread, n_honest=N_QUESTIONS) as meddler:
        found = load(LoadPlan(meddler.url("box"), users=2, duration_s=0.2), tmp_path)
    assert found.errors() == {}
    assert len(found.due_s) > 2


def test_what_waits_for_a_connection_waits_in_its_latency(
    loaded: LiveServer, tmp_path: Path
) -> None:
    """One connection and answers that take 50 ms: ten requests due at once wait up to 0.5 s."""
    pause = threading.Event()

    def slow(status: int, body: bytes) -> tuple[int, bytes]:
        pause.wait(0.05)
        return status, body

    with meddling(loaded.port, slow, n_honest=N_QUESTIONS) as meddler:
        plan = LoadPlan(
            meddler.url("cartpole"),
            rate=1000.0,
            duration_s=0.01,
            arrivals=Arrivals.constant,
            users=1,
            max_connections=1,
        )
        found = load(plan, tmp_path)
    assert found.errors() == {}
    assert found.driver["n_connections"] == 1
    expected = 50.0 * np.arange(1, 11) - np.arange(10)
    assert (np.sort(found.latency_ms) >= np.sort(expected)).all()


def test_an_open_loop_opens_connections_while_all_are_busy(
    loaded: LiveServer, tmp_path: Path
) -> None:
    pause = threading.Event()

    def slow(status: int, body: bytes) -> tuple[int, bytes]:
        pause.wait(0.2)
        return status, body

    with meddling(loaded.port, slow, n_honest=N_QUESTIONS) as meddler:
        plan = LoadPlan(meddler.url("cartpole"), rate=100.0, duration_s=0.4, users=1)
        found = load(plan, tmp_path)
    assert found.errors() == {}
    # A hundred requests per second that take 0.2 s each are twenty at a time.
    assert 15 <= found.driver["n_connections"] <= 60
    # Served side by side: ten times 0.2 s one after the other would be far more.
    assert np.median(found.latency_ms) < 1000.0


def test_a_server_that_does_not_answer_is_given_up(loaded: LiveServer, tmp_path: Path) -> None:
    stop = threading.Event()

    def hang(*_: object) -> None:
        stop.wait(5.0)

    with meddling(loaded.port, hang, n_honest=N_QUESTIONS) as meddler:
        plan = LoadPlan(
            meddler.url("cartpole"),
            rate=20.0,
            duration_s=0.5,
            users=1,
            max_connections=1,
            timeout_s=0.3,
            arrivals=Arrivals.constant,
        )
        try:
            found = load(plan, tmp_path)
        finally:
            stop.set()
    assert set(found.errors()) == {"no answer within 0.3 s", "no connection was free in time"}
    assert sum(found.errors().values()) == 10


def test_nobody_at_the_port_ends_the_driver_with_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    plan = LoadPlan(f"http://127.0.0.1:{port}/v1/policies/x", timeout_s=1.0)
    with pytest.raises(PolicyServingError, match=str(port)):
        load(plan, tmp_path)
