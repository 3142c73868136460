"""How `policyserve serve` starts, loses a replica and stops: each test has a server of its own."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from serving.client import PolicyClient
from tests.end_to_end.test_serve import INGRESSES, policy_url, port_of
from tests.processes import READY_S, Server, alive, refuse, serving, wait_until

pytestmark = pytest.mark.slow


def test_a_port_in_use_is_refused_before_anything_starts(cartpole_bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in refuse("serve", cartpole_bundle, "--port", port, exit_code=1)


def test_a_damaged_bundle_is_refused_before_anything_starts(
    cartpole_bundle: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(cartpole_bundle, damaged)
    content = bytearray((damaged / "policy.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "policy.onnx").write_bytes(content)
    assert "policy.onnx" in refuse("serve", damaged, exit_code=1)
    assert "policy.onnx" in refuse("verify", damaged, exit_code=1)
    (damaged / "manifest.json").unlink()
    assert "manifest.json" in refuse("serve", damaged, exit_code=1)


@pytest.mark.parametrize("ingress", INGRESSES)
def test_killing_one_of_two_replicas_loses_no_request_and_ctrl_c_leaves_nothing(
    cartpole_bundle: Path, tmp_path: Path, ingress: str
) -> None:
    log = tmp_path / "serve.log"
    options = ("--port", "0", "--replicas", "2", "--ingress", ingress)
    with serving(cartpole_bundle, *options, log=log) as server:
        family = server.family()
        wait_until(lambda: len(server.replicas()) == 2, "two replicas run")
        n_answered = 0
        n_killed_at = None
        with PolicyClient(policy_url(server, "cartpole")) as client:

            def step() -> bool:
                nonlocal n_answered, n_killed_at
                client.compute_action(np.zeros(4))
                n_answered += 1
                if n_answered == 100:
                    server.replicas()[0].kill()
                    n_killed_at = n_answered
                return n_killed_at is not None and len(server.replicas()) == 2

            # Every call above has to succeed until Serve has started another replica.
            wait_until(step, "a new replica has taken the dead one's place", READY_S)
        family += server.family()
        port = port_of(server)
        assert server.stop(signal.SIGINT) == 0
    wait_until(lambda: not alive(family), "all are gone")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


@pytest.fixture(scope="module")
def lone_server(
    cartpole_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One to be harmed, for the two tests below; the second stops it."""
    log = tmp_path_factory.mktemp("lone") / "serve.log"
    with serving(cartpole_bundle, "--port", "0", log=log) as server:
        yield server


def test_while_the_only_replica_is_replaced_callers_are_told_to_come_again(
    lone_server: Server,
) -> None:
    server = lone_server
    statuses = []

    def status() -> int:
        with httpx.Client(timeout=30.0) as caller:
            answer = caller.post(
                f"{policy_url(server, 'cartpole')}/compute_action",
                json={"observation": [0, 0, 0, 0]},
            )
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["code"] == "policy_not_ready"
        statuses.append(answer.status_code)
        return answer.status_code

    (replica,) = server.replicas()
    replica.kill()
    # For a moment after its death nobody has the port yet.
    wait_until(lambda: not_refused(status) == 503, "the server's own process answers")
    wait_until(lambda: not_refused(status) == 200, "a new replica answers", READY_S)
    assert set(statuses) <= {200, 503}


def not_refused(status: Callable[[], int]) -> int | None:
    try:
        return status()
    except httpx.TransportError:
        return None


def test_an_open_connection_does_not_keep_the_server_from_stopping(lone_server: Server) -> None:
    with socket.create_connection(("127.0.0.1", port_of(lone_server))) as half_a_request:
        half_a_request.sendall(b"POST /v1/policies/cartpole/compute_action HTTP/1.1\r\nhost: x\r\n")
        assert lone_server.stop(signal.SIGINT) == 0


def test_after_sigterm_the_same_port_serves_again_and_a_killed_server_leaves_nothing(
    cartpole_bundle: Path, tmp_path: Path
) -> None:
    with serving(cartpole_bundle, "--port", "0", log=tmp_path / "first.log") as first:
        port = port_of(first)
        assert first.stop(signal.SIGTERM) == 0
    again = ("--port", str(port), "--name", "again")
    with serving(cartpole_bundle, *again, log=tmp_path / "second.log") as second:
        assert port_of(second) == port
        with PolicyClient(second.url) as client:
            assert client.compute_action(np.zeros(4)) in (0, 1)
        family = second.family()
        second.process.kill()
        second.process.wait()
        wait_until(lambda: not alive(family), "a killed server's processes are gone")
