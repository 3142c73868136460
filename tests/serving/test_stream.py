"""Streams over both carriers: real sockets, and the `websockets` library as the client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import uvicorn
from gymnasium import spaces
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.sync.client import ClientConnection as SyncConnection
from websockets.sync.client import connect

from serving.app import build_app
from serving.compute_action import ComputeActionHandler
from serving.stream import StreamRegistry, StreamSession, StreamSettings
from serving.stream_endpoint import StreamEndpoint
from serving.stream_protocol import StreamProtocol, stream_opener
from tests.bundles import LinearPolicy
from tests.serving.binary_form import columns, floats, pack, unpack
from tests.serving.conftest import LiveServer
from tests.serving.deadline import DEADLINE_S
from tests.serving.numpy_policies import (
    GOES_ON,
    Summing,
    sample,
    services_of,
    summing_policy,
    total_of,
)

VECTOR = spaces.Box(-1, 1, (4,), np.float32)
ACTIONS = spaces.Box(-1e6, 1e6, (1,), np.float32)
PATH = "/v1/policies/sum/stream"


@pytest.fixture(params=["live_server", "ordinary_server"])
def server(request: pytest.FixtureRequest) -> LiveServer:
    """The policies behind the protocol, and behind the ASGI endpoint."""
    found: LiveServer = request.getfixturevalue(request.param)
    return found


def url_of(server: LiveServer, policy: str) -> str:
    return f"ws://{server.host}:{server.port}/v1/policies/{policy}/stream"


@contextlib.contextmanager
def streaming(server: LiveServer, policy: str, **kwargs: Any) -> Any:
    """An open stream whose greeting has been read."""
    with connect(url_of(server, policy), compression=None, open_timeout=DEADLINE_S, **kwargs) as ws:
        greeting = unpack(ws.recv(DEADLINE_S))
        assert greeting["policy"] == policy
        yield ws


def ask(ws: SyncConnection, **request: Any) -> dict[str, Any]:
    ws.send(pack(request))
    answer = ws.recv(DEADLINE_S)
    assert isinstance(answer, bytes)
    found: dict[str, Any] = unpack(answer)
    return found


def test_the_first_frame_tells_what_a_client_has_to_know(server: LiveServer):
    described = server.request("GET", "/v1/policies/discrete").json()
    with connect(url_of(server, "discrete")) as ws:
        assert unpack(ws.recv(DEADLINE_S)) == {
            **{name: described[name] for name in ("policy", "version", "policy_id")},
            **{name: described[name] for name in ("inputs", "answers")},
            "max_observations_per_request": 1024,
        }


def test_every_frame_is_answered_with_the_action_of_the_policy(
    server: LiveServer, discrete: LinearPolicy
):
    rows = discrete.observations(30)
    expected = discrete.answers(rows, np.zeros((30, 3)))
    with streaming(server, "discrete") as ws:
        for row, action in zip(rows, expected["action"], strict=True):
            answer = ask(ws, observation=row.tobytes())
            assert answer["action"] == struct.pack("<q", action)
            assert (answer["policy"], answer["version"]) == ("discrete", 1)
            assert "id" not in answer
        answer = ask(ws, observations=rows.tobytes(), outputs=["value"], id=7)
        assert answer["actions"] == expected["action"].astype("<i8").tobytes()
        value = np.frombuffer(answer["value"], "<f4")
        np.testing.assert_allclose(value, expected["value"], rtol=1e-5)
        assert answer["id"] == 7


def test_answers_come_in_the_order_of_the_frames(server: LiveServer, discrete: LinearPolicy):
    """Plain frames, batches, mistakes and frames with ids take different ways."""
    rows = discrete.observations(400)
    expected = discrete.answers(rows, np.zeros((400, 3)))["action"]
    with streaming(server, "discrete") as ws:
        frames = []
        for index, row in enumerate(rows):
            data = row.tobytes()
            frames.append(
                [
                    {"observation": data},
                    {"observations": data * 2, "id": index},
                    {"observation": data[:-1], "id": index},
                    {"observation": data, "id": str(index)},
                ][index % 4]
            )
        for frame in frames:
            ws.send(pack(frame))
        for index, frame in enumerate(frames):
            answer = unpack(ws.recv(DEADLINE_S))
            action = struct.pack("<q", expected[index])
            assert answer.get("id") == frame.get("id")
            if index % 4 == 1:
                assert answer["actions"] == action * 2
            elif index % 4 == 2:
                assert answer["error"]["code"] == "invalid_observation"
            else:
                assert answer["action"] == action


@pytest.mark.parametrize(
    ("frame", "status", "code", "pointer"),
    [
        (b"", 400, "malformed_request", None),
        (b"\xc1", 400, "malformed_request", None),
        (pack([1]), 422, "invalid_request", ""),
        (
            pack({"observation": floats(1, 2, 3, np.nan)}),
            422,
            "invalid_observation",
            "/observation/3",
        ),
        (pack({"observation": floats(1)}), 422, "invalid_observation", "/observation"),
        (pack({"observations": bytes(16 * 1025)}), 413, "batch_too_large", "/observations"),
        (pack({"observation": bytes(16), "version": 9}), 404, "unknown_policy", "/version"),
        (pack({"observation": bytes(16), "id": -1}), 422, "invalid_request", "/id"),
        ("text", 422, "invalid_request", None),
    ],
)
def test_a_bad_frame_is_answered_and_the_next_one_too(
    server: LiveServer, frame: bytes | str, status: int, code: str, pointer: str | None
):
    with streaming(server, "discrete") as ws:
        ws.send(frame)
        error = unpack(ws.recv(DEADLINE_S))
        assert set(error) == {"error"}
        assert (error["error"]["status"], error["error"]["code"]) == (status, code)
        assert error["error"].get("pointer") == pointer
        assert "action" in ask(ws, observation=bytes(16))


def test_an_error_holds_the_id_of_its_frame(server: LiveServer):
    with streaming(server, "discrete") as ws:
        for request in (
            {"seed": -1},
            {"observation": b""},
            {"version": 9, "observation": bytes(16)},
        ):
            answer = ask(ws, id="a", **request)
            assert set(answer) == {"id", "error"}
            assert answer["id"] == "a"


def test_a_stream_carries_an_episode_s_state(tiny_server: LiveServer, tiny_policies: Any):
    policy = tiny_policies["memory"]
    spec = policy.manifest.inputs[0]
    state: Any = None
    remembered: Any = None
    with streaming(tiny_server, "memory") as ws:
        for step in range(5):
            row = np.full((1, *spec.shape), step / 4, spec.dtype)
            output = policy.compute_actions(row, state=remembered)
            answer = ask(ws, observation=row.tobytes(), **({"state": state} if state else {}))
            assert answer["action"] == np.asarray(output.actions).astype("<i8").tobytes()
            state, remembered = answer["state"], output.state
            assert state == {name: array.tobytes() for name, array in remembered.items()}


def test_an_unknown_policy_is_refused_before_the_upgrade(server: LiveServer):
    with pytest.raises(InvalidStatus) as caught, connect(url_of(server, "nobody")):
        pass
    response = caught.value.response
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert json.loads(bytes(response.body or b""))["code"] == "unknown_policy"


def test_a_plain_get_is_told_that_this_is_a_websocket(server: LiveServer):
    response = server.request("GET", "/v1/policies/discrete/stream")
    assert response.status == 404
    assert "WebSocket" in response.json()["detail"]


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (None, None),
        (["policyserve.v1"], "policyserve.v1"),
        (["v9", "policyserve.v1"], "policyserve.v1"),
        (["v9"], None),
    ],
)
def test_the_subprotocol_is_echoed_where_it_is_offered(
    server: LiveServer, offered: Any, chosen: str | None
):
    with streaming(server, "discrete", subprotocols=offered) as ws:
        assert ws.subprotocol == chosen


def test_nothing_is_compressed(live_server: LiveServer):
    extensions = [ClientPerMessageDeflateFactory()]
    with connect(url_of(live_server, "discrete"), extensions=extensions) as ws:
        assert ws.protocol.extensions == []


def test_a_message_over_the_limit_closes_with_1009(server: LiveServer):
    with streaming(server, "discrete") as ws:
        ws.send(bytes(100_001))
        with pytest.raises(ConnectionClosed) as caught:
            ws.recv(DEADLINE_S)
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1009


def test_a_broken_handshake_is_answered_with_problem_json(live_server: LiveServer):
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    response = live_server.request("GET", "/v1/policies/discrete/stream", headers=headers)
    assert response.status == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert "Sec-WebSocket-Key" in response.json()["detail"]


def test_a_frame_without_a_mask_closes_with_1002(live_server: LiveServer):
    with streaming(live_server, "discrete") as ws:
        ws.socket.sendall(b"\x82\x01x")
        with pytest.raises(ConnectionClosed) as caught:
            ws.recv(DEADLINE_S)
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1002


# --- in one event loop, with the policy and the server's insides in reach ---


class Setup:
    """A summing policy behind one carrier, in this event loop."""

    def __init__(self, services: Any, graph: Summing, registry: StreamRegistry, port: int) -> None:
        self.services = services
        self.graph = graph
        self.registry = registry
        self.port = port

    def connect(self, **kwargs: Any) -> Any:
        url = f"ws://127.0.0.1:{self.port}{PATH}"
        return connect_async(url, compression=None, **kwargs)


def parts(action: spaces.Box = ACTIONS, **settings: Any) -> tuple[Any, Summing, StreamRegistry]:
    policy = summing_policy(VECTOR, action, state=GOES_ON)
    services = services_of({"sum": policy})
    policy.graph.seen.clear()
    return services, policy.graph, StreamRegistry(services, StreamSettings(**settings))


@contextlib.asynccontextmanager
async def by_protocol(**settings: Any) -> AsyncIterator[Setup]:
    services, graph, registry = parts(**settings)
    loop = asyncio.get_running_loop()
    opener = stream_opener(registry)
    server = await loop.create_server(lambda: opener(PATH.encode()), "127.0.0.1", 0)
    try:
        yield Setup(services, graph, registry, server.sockets[0].getsockname()[1])
    finally:
        await registry.drain(0.2)
        server.close()
        await services.close()


@contextlib.asynccontextmanager
async def by_asgi(**settings: Any) -> AsyncIterator[Setup]:
    services, graph, registry = parts(**settings)
    app: Any = build_app(
        services, ComputeActionHandler(services, max_body_bytes=10**6), streams=registry
    )
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started)
        yield Setup(services, graph, registry, listener.getsockname()[1])
    finally:
        await registry.drain(0.2)
        server.should_exit = True
        await task
        await services.close()


async def until(is_true: Callable[[], bool]) -> None:
    """Let the loop turn until something is so."""

    async def turn() -> None:
        while not is_true():
            await asyncio.sleep(1e-3)

    await asyncio.wait_for(turn(), DEADLINE_S)


CARRIERS = pytest.mark.parametrize("carrier", [by_protocol, by_asgi])


async def receive(ws: ClientConnection) -> dict[str, Any]:
    found: dict[str, Any] = unpack(await asyncio.wait_for(ws.recv(), DEADLINE_S))  # type: ignore[arg-type]
    return found


@CARRIERS
def test_draining_answers_what_was_received_and_says_farewell(carrier: Any):
    async def main() -> None:
        rows = sample(VECTOR, 5)
        async with carrier() as setup, setup.connect() as ws:
            await receive(ws)
            for row in rows:
                await ws.send(pack({"observation": columns(VECTOR, [row])}))
            first = await receive(ws)
            draining = asyncio.create_task(setup.registry.drain())
            # The iteration ends at a farewell of 1000 or 1001, and raises at another.
            answers = [first, *[unpack(answer) async for answer in ws]]
            await asyncio.wait_for(draining, DEADLINE_S)
            assert (ws.close_code, ws.close_reason) == (1001, "server is shutting down")
            assert len(setup.registry) == 0
            totals = [np.frombuffer(each["action"], "<f4")[0] for each in answers]
            assert totals == [np.float32(total_of(row) + 0.5) for row in rows[: len(totals)]]

    asyncio.run(main())


def test_an_endpoint_that_drains_answers_before_it_says_farewell():
    """Driven by hand, so that draining begins between a frame and its answer."""

    async def main() -> None:
        _, _, registry = parts()
        sent: list[Any] = []
        frame = {"type": "websocket.receive", "bytes": pack({"observation": bytes(16)})}
        messages = iter([{"type": "websocket.connect"}, frame])

        async def receive() -> Any:
            message = next(messages, None)
            if message is None:
                next(iter(registry._connections)).drain()
                await asyncio.Event().wait()
            return message

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": PATH, "headers": []}
        await asyncio.wait_for(StreamEndpoint(registry)(scope, receive, send), DEADLINE_S)
        kinds = ["websocket.accept", "websocket.send", "websocket.send", "websocket.close"]
        assert [message["type"] for message in sent] == kinds
        assert "action" in unpack(sent[2]["bytes"])
        assert sent[3]["code"] == 1001

    asyncio.run(main())


@CARRIERS
def test_a_draining_server_takes_no_new_stream(carrier: Any):
    async def main() -> None:
        async with carrier() as setup:
            await setup.registry.drain()
            with pytest.raises(InvalidStatus) as caught:
                async with setup.connect():
                    pass
            response = caught.value.response
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert json.loads(bytes(response.body or b""))["code"] == "policy_not_ready"

    asyncio.run(main())


@CARRIERS
def test_a_client_that_has_gone_is_forgotten(carrier: Any):
    async def main() -> None:
        async with carrier() as setup:
            async with setup.connect() as ws:
                await receive(ws)
                assert len(setup.registry) == 1
                ws.transport.abort()
            await until(lambda: len(setup.registry) == 0)

    asyncio.run(main())


@CARRIERS
def test_a_farewell_is_answered(carrier: Any):
    async def main() -> None:
        async with carrier() as setup:
            ws = await setup.connect()
            await receive(ws)
            await ws.close(1000, "bye")
            assert ws.close_code == 1000
            await until(lambda: len(setup.registry) == 0)

    asyncio.run(main())


@CARRIERS
def test_a_ping_is_answered(carrier: Any):
    async def main() -> None:
        async with carrier() as setup, setup.connect() as ws:
            await receive(ws)
            await asyncio.wait_for(await ws.ping(b"still there?"), DEADLINE_S)

    asyncio.run(main())


@CARRIERS
def test_a_client_may_send_a_thousand_frames_before_it_reads(carrier: Any):
    async def main() -> None:
        rows = sample(VECTOR, 1000)
        async with carrier(max_unanswered=16) as setup, setup.connect(max_queue=None) as ws:
            await receive(ws)
            for row in rows:
                await ws.send(pack({"observation": columns(VECTOR, [row])}))
            for row in rows:
                answer = await receive(ws)
                assert np.frombuffer(answer["action"], "<f4")[0] == np.float32(total_of(row) + 0.5)

    asyncio.run(main())


def test_an_idle_client_is_pinged_and_one_that_does_not_answer_is_dropped():
    async def main() -> None:
        async with by_protocol(ping_interval_s=0.05, dead_after_s=0.3) as setup:
            reader, writer = await asyncio.open_connection("127.0.0.1", setup.port)
            writer.write(handshake())
            received = await asyncio.wait_for(reader.read(-1), DEADLINE_S)
            assert b"\x89\x00" in received  # pings
            assert received.endswith(b"\x88\x14\x03\xf3no answer to pings")  # 1011
            writer.close()
            await until(lambda: len(setup.registry) == 0)

    asyncio.run(main())


def test_a_client_that_answers_pings_is_kept():
    async def main() -> None:
        async with (
            by_protocol(ping_interval_s=0.02, dead_after_s=0.2) as setup,
            setup.connect(ping_interval=None) as ws,
        ):
            await receive(ws)
            with pytest.raises(asyncio.TimeoutError):  # longer than it takes to be dropped
                await asyncio.wait_for(ws.recv(), 0.5)
            await ws.send(pack({"observation": bytes(16)}))
            assert "action" in await receive(ws)

    asyncio.run(main())


def handshake() -> bytes:
    return (
        f"GET {PATH} HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).encode()


def test_a_client_that_does_not_read_is_not_read_from():
    n_frames, n_bytes = 400, 65_536

    async def main() -> None:
        action = spaces.Box(-1e6, 1e6, (n_bytes // 4,), np.float32)
        async with by_protocol(action=action, max_unanswered=8) as setup:
            loop = asyncio.get_running_loop()
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", setup.port))
                await loop.sock_sendall(client, handshake())
                body = pack({"observation": bytes(16)})
                frame = b"\x82" + bytes([0x80 + len(body)]) + bytes(4) + body
                await loop.sock_sendall(client, frame * n_frames)
                connection = await only_connection(setup.registry)
                await until(lambda: not connection._transport.is_reading())
                # The buffers between hold less than all answers, so they cannot be finished.
                assert connection._transport.get_write_buffer_size() < 20 * n_bytes
                assert sum(len(each["observation"]) for each in setup.graph.seen) < n_frames
                received = 0
                while received < n_frames * n_bytes:
                    chunk = await asyncio.wait_for(loop.sock_recv(client, 2**20), DEADLINE_S)
                    received += len(chunk)
                assert sum(len(each["observation"]) for each in setup.graph.seen) == n_frames

    asyncio.run(main())


async def only_connection(registry: StreamRegistry) -> Any:
    await until(lambda: len(registry) == 1)
    return next(iter(registry._connections))


# --- the session alone ---


def session_of(setup_parts: Any, sent: list[bytes], **settings: Any) -> StreamSession:
    services, _, registry = setup_parts
    return StreamSession(
        services.require("sum"),
        replace(registry.settings, **settings),
        send=sent.append,
        has_room=lambda: None,
    )


@pytest.mark.parametrize("is_plain", [True, False])
def test_what_a_vanished_client_asked_is_never_computed(is_plain: bool):
    async def main() -> None:
        found = parts()
        sent: list[bytes] = []
        session = session_of(found, sent)
        session.receive(pack({"observation": bytes(16), **({} if is_plain else {"id": 1})}))
        session.leave()
        await found[0].close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert found[1].seen == []
        assert sent == []

    asyncio.run(main())


def test_frames_of_one_turn_are_one_batch():
    async def main() -> None:
        found = parts()
        sent: list[bytes] = []
        sessions = [session_of(found, sent) for _ in range(3)]
        for session in sessions:
            session.receive(pack({"observation": bytes(16)}))
        await until(lambda: len(sent) == 3)
        assert [len(each["observation"]) for each in found[1].seen] == [3]

    asyncio.run(main())


def test_a_failing_engine_is_an_error_frame_and_not_the_end():
    async def main() -> None:
        found = parts()
        sent: list[bytes] = []
        session = session_of(found, sent)
        graph, run = found[1], found[1].run
        graph.run = None  # type: ignore[assignment, method-assign]
        session.receive(pack({"observation": bytes(16)}))
        session.receive(pack({"observation": bytes(16), "id": 4}))
        await until(lambda: len(sent) == 2)
        graph.run = run  # type: ignore[method-assign]
        session.receive(pack({"observation": bytes(16)}))
        await until(lambda: len(sent) == 3)
        frames = [unpack(each) for each in sent]
        assert frames[0]["error"]["code"] == "inference_failed"
        assert (frames[1]["id"], frames[1]["error"]["status"]) == (4, 500)
        assert "action" in frames[2]

    asyncio.run(main())


def test_a_queue_that_is_full_is_an_error_frame():
    async def main() -> None:
        policy = summing_policy(VECTOR, ACTIONS)
        services = services_of({"sum": policy}, max_queue_size=2)
        registry = StreamRegistry(services, StreamSettings())
        sent: list[bytes] = []
        session = session_of((services, policy.graph, registry), sent)
        for index in range(4):
            session.receive(pack({"observation": bytes(16), "id": index}))
        await until(lambda: len(sent) == 4)
        frames = [unpack(each) for each in sent]
        assert [frame["id"] for frame in frames] == [0, 1, 2, 3]
        assert [frame.get("error", {}).get("code") for frame in frames] == [
            None,
            None,
            "overloaded",
            "overloaded",
        ]

    asyncio.run(main())


def test_requests_of_a_stream_are_counted():
    async def main() -> None:
        found = parts()
        sent: list[bytes] = []
        session = session_of(found, sent)
        before = found[0].metrics.exposition().decode()
        session.receive(pack({"observation": bytes(16)}))
        session.receive(pack({"observation": b""}))
        session.receive_text()
        await until(lambda: len(sent) == 3)
        after = found[0].metrics.exposition().decode()
        assert after != before
        assert 'code="invalid_observation"' in after
        assert 'code="invalid_request"' in after

    asyncio.run(main())


def test_a_protocol_is_made_for_streams_alone():
    async def main() -> None:
        _, _, registry = parts()
        opener = stream_opener(registry)
        assert opener(b"/v1/policies/sum/compute_action") is None
        assert opener(b"/other") is None
        assert isinstance(opener(b"/v1/policies/sum/stream?x=1"), StreamProtocol)

    asyncio.run(main())
