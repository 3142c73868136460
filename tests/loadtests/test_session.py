"""What cannot be loaded is refused before the load, with one clear sentence."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import pytest

from loadtests.cli import loadtest
from loadtests.errors import LoadTestError, LoadTestUsageError
from loadtests.plan import Kind, LoadPlan, Protocol
from loadtests.session import run_loadtest
from serving.errors import PolicyServingError
from tests.loadtests.meddler import meddling
from tests.serving.conftest import LiveServer


def refuse(plan: LoadPlan, output: Path) -> str:
    with pytest.raises((LoadTestError, PolicyServingError)) as caught:
        run_loadtest([plan], output)
    return caught.value.message


def test_nobody_at_the_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    message = refuse(LoadPlan(f"http://127.0.0.1:{port}/v1/policies/x"), tmp_path / "out")
    assert f"127.0.0.1:{port}" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("url", ["cartpole", "ftp://x/y", "http://127.0.0.1:99999/v1/policies/x"])
def test_no_url(url: str, tmp_path: Path) -> None:
    assert url in refuse(LoadPlan(url), tmp_path)


def test_a_page_that_is_no_policy(loaded: LiveServer, tmp_path: Path) -> None:
    """A server of several policies has to be told which."""
    assert "cartpole" in refuse(LoadPlan(loaded.url), tmp_path)


def test_an_unknown_policy(loaded: LiveServer, tmp_path: Path) -> None:
    assert "nobody" in refuse(LoadPlan(loaded.policy_url("nobody")), tmp_path)


def test_another_web_server(loaded: LiveServer, tmp_path: Path) -> None:
    with meddling(loaded.port, lambda *_: (200, b"<html>"), n_honest=0) as meddler:
        assert refuse(LoadPlan(meddler.url("cartpole")), tmp_path)


def test_a_file_where_the_report_should_go(loaded: LiveServer, tmp_path: Path) -> None:
    plan = LoadPlan(loaded.policy_url("cartpole"))
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert str(output) in refuse(plan, output)


@pytest.mark.parametrize("kind", [Kind.env_loops, Kind.vector_env_loops, Kind.both])
def test_a_policy_without_an_environment(loaded: LiveServer, kind: Kind, tmp_path: Path) -> None:
    plan = LoadPlan(loaded.policy_url("box"), kind=kind)
    assert "--env" in refuse(plan, tmp_path)
    assert "Nope" in refuse(dataclasses.replace(plan, env="Nope-v1"), tmp_path)
    assert "CartPole-v1" in refuse(dataclasses.replace(plan, env="CartPole-v1"), tmp_path)


def test_an_environments_loop_has_no_rate(loaded: LiveServer, tmp_path: Path) -> None:
    plan = LoadPlan(loaded.policy_url("cartpole"), kind=Kind.env_loops, rate=5.0)
    assert "closed" in refuse(plan, tmp_path)


def test_a_stream_of_a_server_that_has_none(loaded: LiveServer, tmp_path: Path) -> None:
    """A proxy that knows no WebSocket, as many do not."""
    with meddling(loaded.port, lambda *answer: answer, n_honest=1000) as meddler:
        plan = LoadPlan(meddler.url("cartpole"), protocol=Protocol.ws, timeout_s=2.0)
        message = refuse(plan, tmp_path)
    assert "stream" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sweep": "1,two"}, "--sweep '1,two'"),
        ({"sweep": ""}, "--sweep"),
        ({"sweep": "0,1"}, "--sweep"),
        ({"sweep_rates": "5,-1"}, "--sweep-rates"),
        ({"sweep_rates": "nan"}, "--sweep-rates"),
        ({"sweep": "1,2", "rate": 5.0}, "one of them"),
        ({"sweep_rates": "1,2", "rate": 5.0}, "one of them"),
        ({"sweep": "1", "sweep_rates": "1"}, "one of them"),
    ],
)
def test_steps_that_cannot_be(options: dict[str, object], expected: str, tmp_path: Path) -> None:
    with pytest.raises(LoadTestUsageError, match=expected):
        loadtest("http://127.0.0.1:9/v1/policies/x", tmp_path, **options)  # type: ignore[arg-type]


def test_an_earlier_report_is_not_left_when_a_load_fails(
    loaded: LiveServer, tmp_path: Path
) -> None:
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "mine.txt").touch()
    # Refuses everything after the look around: the driver cannot even ask its questions.
    with meddling(loaded.port, lambda *_: (500, b"{}"), n_honest=1) as meddler:
        refuse(LoadPlan(meddler.url("cartpole"), users=1, duration_s=0.1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
