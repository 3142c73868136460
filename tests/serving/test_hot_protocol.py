"""The fast lane: the same answers as the ordinary application, and correct HTTP on a socket."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.compute_action import ComputeActionHandler
from tests.serving.conftest import LiveServer, Response, read_response, serving
from tests.serving.deadline import DEADLINE_S, wait_until

GOOD = {"observation": [0.5, -1.0, 2.0, 3.0]}
BODY = json.dumps(GOOD).encode()
PATH = "/v1/policies/discrete/compute_action"
JSON = {"content-type": "application/json"}
LIMIT = 100_000  # the live servers' max_body_bytes


def chunks(*parts: bytes) -> Iterator[bytes]:
    return iter(parts)


REQUESTS: dict[str, tuple[str, str, Any, dict[str, str]]] = {
    "one": ("POST", PATH, BODY, JSON),
    "many": ("POST", PATH, json.dumps({"observations": [[0, 1, 2, 3]] * 5}).encode(), JSON),
    "sampled": (
        "POST",
        PATH,
        json.dumps({**GOOD, "deterministic": False, "seed": 4}).encode(),
        JSON,
    ),
    "all outputs": (
        "POST",
        PATH,
        json.dumps({**GOOD, "outputs": ["value", "action_logp", "action_dist_inputs"]}).encode(),
        JSON,
    ),
    "box": ("POST", "/v1/policies/box/compute_action", b'{"observation": [1, 2, 3]}', JSON),
    "no content type": ("POST", PATH, BODY, {}),
    "charset": ("POST", PATH, BODY, {"content-type": "application/json; charset=utf-8"}),
    "odd case": ("POST", PATH, BODY, {"content-type": "Application/JSON"}),
    "identity": ("POST", PATH, BODY, {**JSON, "content-encoding": "Identity"}),
    "chunked": ("POST", PATH, [BODY[:7], BODY[7:]], JSON),
    "query": ("POST", PATH + "?a=b", BODY, JSON),
    "form": ("POST", PATH, BODY, {"content-type": "application/x-www-form-urlencoded"}),
    "text": ("POST", PATH, BODY, {"content-type": "text/plain"}),
    "empty content type": ("POST", PATH, BODY, {"content-type": ""}),
    "gzip": ("POST", PATH, BODY, {**JSON, "content-encoding": "gzip"}),
    "malformed": ("POST", PATH, b"{", JSON),
    "empty": ("POST", PATH, b"", JSON),
    "invalid": ("POST", PATH, b'{"observation": [1]}', JSON),
    "unknown policy": ("POST", "/v1/policies/nobody/compute_action", BODY, JSON),
    "escaped name": ("POST", "/v1/policies/%64iscrete/compute_action", BODY, JSON),
    "escaped slash": ("POST", "/v1/policies/a%2Fb/compute_action", BODY, JSON),
    "no name": ("POST", "/v1/policies//compute_action", BODY, JSON),
    "name left out": ("POST", "/v1/policies/compute_action", BODY, JSON),
    "deeper": ("POST", "/v1/policies/a/discrete/compute_action", BODY, JSON),
    "slash at the end": ("POST", PATH + "/", BODY, JSON),
    "other case": ("POST", PATH.upper(), BODY, JSON),
    "too large": ("POST", PATH, b" " * (LIMIT + 1), JSON),
    "too large in chunks": ("POST", PATH, [b" " * 60_000] * 2, JSON),
    "get": ("GET", PATH, None, {}),
    "put": ("PUT", PATH, BODY, JSON),
    "delete": ("DELETE", PATH, None, {}),
    "head": ("HEAD", PATH, None, {}),
    "options": ("OPTIONS", PATH, None, {}),
}


def send(server: LiveServer, name: str) -> Response:
    method, path, body, headers = REQUESTS[name]
    return server.request(method, path, iter(body) if isinstance(body, list) else body, headers)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_answered_as_by_the_ordinary_application(
    live_server: LiveServer, ordinary_server: LiveServer, name: str
):
    fast = send(live_server, name)
    ordinary = send(ordinary_server, name)
    assert fast.status == ordinary.status
    assert fast.body == ordinary.body
    for header in ("content-type", "content-length", "allow", "retry-after"):
        assert fast.headers.get(header) == ordinary.headers.get(header)


EXPECTED = {
    **dict.fromkeys(
        ["one", "many", "box", "no content type", "charset", "odd case", "identity", "query"], 200
    ),
    "chunked": 200,
    "escaped name": 200,
    "form": 415,
    "text": 415,
    "gzip": 415,
    "malformed": 400,
    "empty": 400,
    "invalid": 422,
    "unknown policy": 404,
    "name left out": 405,
    "too large": 413,
    "too large in chunks": 413,
    "get": 405,
    "put": 405,
    "delete": 405,
    "head": 405,
    "options": 405,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_request_has_its_documented_status(live_server: LiveServer, name: str):
    response = send(live_server, name)
    assert response.status == EXPECTED[name]
    if name == "head":
        assert response.body == b""
    elif response.status == 200:
        assert response.headers["content-type"] == "application/json"
    else:
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == response.status
    if response.status == 405 and name != "name left out":
        assert response.headers["allow"] == "POST"


def test_a_policy_may_be_called_compute_action(bundles: dict[str, Path]):
    with serving({"compute_action": bundles["discrete"]}) as server:
        described = server.request("GET", "/v1/policies/compute_action")
        assert (described.status, described.json()["policy"]) == (200, "compute_action")
        assert server.post("compute_action", GOOD).status == 200


def test_an_answer_goes_to_the_right_question(live_server: LiveServer, discrete):
    observations = discrete.observations(50)
    expected = discrete.inputs(observations).argmax(axis=1)
    found = [
        live_server.post("discrete", {"observation": row.tolist()}).json()["action"]
        for row in observations
    ]
    assert found == expected.tolist()


def test_a_request_id_is_echoed(live_server: LiveServer):
    for name in ("one", "invalid", "get", "too large"):
        method, path, body, headers = REQUESTS[name]
        response = live_server.request(method, path, body, {**headers, "X-Request-Id": "abc-7"})
        assert response.headers["x-request-id"] == "abc-7"


def test_a_long_request_id_is_cut(live_server: LiveServer):
    response = live_server.post("discrete", GOOD, {"x-request-id": "a" * 5000})
    assert response.headers["x-request-id"] == "a" * 128


def test_a_request_without_an_id_gets_one_of_its_own(live_server: LiveServer):
    found = {live_server.post("discrete", GOOD).headers["x-request-id"] for _ in range(20)}
    assert len(found) == 20
    assert all(re.fullmatch(r"[0-9a-f-]{8,}", each) for each in found)


def test_a_connection_serves_on_after_errors(live_server: LiveServer):
    connection = http.client.HTTPConnection(live_server.host, live_server.port, timeout=DEADLINE_S)
    connection.connect()
    first_socket = connection.sock
    try:
        for name in ("one", "malformed", "invalid", "text", "unknown policy", "get", "head", "one"):
            method, path, body, headers = REQUESTS[name]
            connection.request(method, path, body, headers)
            assert read_response(connection).status == send(live_server, name).status
            assert connection.sock is first_socket
    finally:
        connection.close()


def raw_request(body: bytes, *, headers: bytes = b"") -> bytes:
    return (
        b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n%s"
        b"content-length: %d\r\n\r\n%s" % (PATH.encode(), headers, len(body), body)
    )


def read_answer(connection: socket.socket) -> bytes:
    """One whole answer with content-length."""
    data = b""
    while True:
        head, found, rest = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if found and length is not None and len(rest) >= int(length[1]):
            return data
        received = connection.recv(65536)
        assert received, "the server closed the connection"
        data += received


def test_a_request_split_at_any_byte_gets_the_same_answer(live_server: LiveServer):
    request = raw_request(b'{"observation":[0.5,-1,2,3]}', headers=b"x-request-id: a\r\n")
    pattern = re.compile(rb"\r\n\r\n(.*)$", re.DOTALL)
    expected = None
    with live_server.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for place in range(1, len(request)):
            connection.sendall(request[:place])
            connection.sendall(request[place:])
            answer = pattern.search(read_answer(connection))[1]
            expected = expected or answer
            assert answer == expected
    assert json.loads(expected)["policy"] == "discrete"


def test_pipelined_requests_are_answered_in_order(live_server: LiveServer, discrete):
    observations = discrete.observations(20)
    expected = discrete.inputs(observations).argmax(axis=1).tolist()
    bodies = [json.dumps({"observation": row.tolist()}).encode() for row in observations]
    with live_server.connect() as connection:
        connection.sendall(b"".join(raw_request(body) for body in bodies))
        received = b""
        while received.count(b'"policy_id"') < len(bodies):
            part = connection.recv(65536)
            assert part
            received += part
    found = [int(value) for value in re.findall(rb'"action":(\d+)', received)]
    assert found == expected


def test_a_body_announced_too_large_is_refused_before_it_is_sent(live_server: LiveServer):
    with live_server.connect() as connection:
        connection.sendall(
            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
            % (PATH.encode(), 10 * LIMIT)
        )
        answer = read_answer(connection)
        assert b" 413 " in answer
        assert b'"code":"body_too_large"' in answer
        assert b"connection: close" in answer.lower()
        assert connection.recv(100) == b""  # closed: the rest of the body would be read as requests


def test_an_endless_chunked_body_is_refused(live_server: LiveServer):
    with live_server.connect() as connection:
        connection.sendall(
            b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % PATH.encode()
        )
        chunk = b"%x\r\n%s\r\n" % (50_000, b" " * 50_000)
        for _ in range(3):
            connection.sendall(chunk)
        assert b" 413 " in read_answer(connection)


def test_a_client_that_leaves_in_mid_body_harms_nobody(live_server: LiveServer):
    for _ in range(5):
        with live_server.connect() as connection:
            connection.sendall(raw_request(BODY)[:-5])
    assert live_server.post("discrete", GOOD).status == 200


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "http.disconnect"}],
        [
            {"type": "http.request", "body": BODY[:9], "more_body": True},
            {"type": "http.disconnect"},
        ],
    ],
    ids=["before its body", "within its body"],
)
def test_nothing_is_computed_or_written_for_a_client_that_left(
    live_server: LiveServer, messages: list[dict[str, Any]]
):
    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError(f"nobody reads {message}")

    handler = ComputeActionHandler(live_server.services, max_body_bytes=LIMIT)
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    asyncio.run(handler(scope, receive, send))
    assert messages == []


def test_a_client_that_leaves_before_its_answer_harms_nobody(live_server: LiveServer):
    for _ in range(5):
        with live_server.connect() as connection:
            connection.sendall(raw_request(BODY))
    assert live_server.post("discrete", GOOD).status == 200


@pytest.mark.parametrize("method", ["plain", "collect", "encode_each", "decode", "encode"])
def test_an_unexpected_failure_is_a_plain_500_and_is_logged(
    bundles: dict[str, Path], caplog, monkeypatch, method: str
):
    def broken(*_: Any, **__: Any) -> bytes:
        raise ZeroDivisionError("a secret of the inside")

    def break_codec(services: Any) -> None:
        service = services.require("discrete")
        # The lane has taken its codec's `plain` by now.
        owner = service.dialects[None].lane if method == "plain" else service.codec
        monkeypatch.setattr(owner, method, broken)

    general = {"outputs": ["value"]} if method in ("decode", "encode") else {}

    with serving({"discrete": bundles["discrete"]}, wrap_services=break_codec) as server:
        response = server.post("discrete", {**GOOD, **general})
        assert response.status == 500
        assert response.headers["content-type"] == "application/problem+json"
        assert b"secret" not in response.body
        assert b"Traceback" not in response.body
        wait_until(lambda: "a secret of the inside" in caplog.text, "the log entry")


def test_an_upgrade_behind_an_unanswered_request_is_refused_after_its_answer(
    live_server: LiveServer,
):
    upgrade = (
        b"GET /v1/policies/discrete/stream HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\n"
        b"upgrade: websocket\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with live_server.connect() as connection:
        connection.sendall(raw_request(BODY) + upgrade)
        received = b""
        while part := connection.recv(65536):
            received += part
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"400"]
