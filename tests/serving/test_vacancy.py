"""The public port while no replica listens on it."""

from __future__ import annotations

import http.client
import socket

import pytest

from serving.public_server import shared_socket
from serving.vacancy import held
from tests.serving.deadline import DEADLINE_S, wait_until


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int) -> tuple[int, dict[str, str], bytes] | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request("POST", "/v1/policies/p/compute_action", b"{}")
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    except (ConnectionError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def replica(port: int) -> socket.socket:
    listener = shared_socket("127.0.0.1", port)
    listener.listen()
    return listener


def accepts(listener: socket.socket, port: int) -> bool:
    """Whether a new connection reaches this listener."""
    listener.settimeout(0.05)
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S):
        try:
            listener.accept()[0].close()
        except TimeoutError:
            return False
        return True


def test_nobody_answers_before_the_first_replica_and_nobody_else_gets_the_port(port: int):
    with held("127.0.0.1", port):
        assert ask(port) is None
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))


def test_the_first_replica_is_noticed_long_before_the_next_look(port: int):
    """Else nobody would stand in for one that dies soon after the start."""
    with held("127.0.0.1", port, look_s=10 * DEADLINE_S) as was_served:
        assert not was_served.is_set()
        with replica(port):
            assert was_served.wait(DEADLINE_S)


def test_between_two_replicas_callers_are_told_to_come_again(port: int):
    with held("127.0.0.1", port, look_s=0.05) as was_served:
        first = replica(port)
        wait_until(lambda: accepts(first, port), "the first replica gets the callers")
        assert was_served.wait(DEADLINE_S)
        first.close()
        wait_until(lambda: ask(port) is not None, "somebody answers")
        status, headers, body = ask(port) or (0, {}, b"")
        assert (status, headers["retry-after"]) == (503, "1")
        assert b'"policy_not_ready"' in body
        second = replica(port)
        wait_until(lambda: all(accepts(second, port) for _ in range(20)), "only the second does")
        second.close()


def test_after_the_block_the_port_is_free(port: int):
    with held("127.0.0.1", port):
        pass
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
