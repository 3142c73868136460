"""Slow, silent, greedy and vanishing clients: each gets its own end, and nobody else notices.

The server is a replica's public server as it is deployed, on a real socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn.config
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.app import build_app
from serving.compute_action import ComputeActionHandler
from serving.engines.graph import GraphPolicy
from serving.hot_protocol import HotProtocol, sweep
from serving.hot_routes import HotRoutes
from serving.public_server import PublicServer, install_in_serve, protocol_class, shared_socket
from serving.service import PolicyServices
from serving.uvicorn_fit import fits
from tests.serving.deadline import DEADLINE_S, wait_until
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    Summing,
    manifest_of,
    services_of,
)
from tests.serving.wire import Caller, Reply, get, path_of, post

pytestmark = pytest.mark.slow

LIMIT = 100_000


class Held(Summing):
    """A slow network that the test can hold up."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.duration_s = 2e-3  # enough to be given a thread when it is timed
        self.began = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def run(self, names: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.began.set()
        assert self.may_go_on.wait(DEADLINE_S)
        threading.Event().wait(self.duration_s)
        return super().run(names, inputs)

    def hold(self) -> None:
        self.duration_s = 0.0
        self.seen.clear()
        self.began.clear()
        self.may_go_on.clear()

    def computed(self) -> list[float]:
        """The first number of every observation so far."""
        return [float(row[0]) for inputs in self.seen for row in inputs["observation"]]


@dataclass
class Running:
    """A public server and what stands behind it."""

    port: int
    services: PolicyServices
    routes: HotRoutes
    graph: Held
    stop: Callable[[], None]
    call: Callable[[Callable[[], object]], object]
    """Has something done on the server's loop."""

    def caller(self, **options: Any) -> Caller:
        return Caller(self.port, **options)

    def ask(self, data: bytes, method: str = "POST") -> Reply:
        with self.caller() as caller:
            return caller.ask(data, method)

    def is_fine(self) -> bool:
        reply = self.ask(post(observation(1)))
        return reply.status == 200 and reply.json()["action"] == answer_to(1)

    def queue_size(self) -> int:
        return self.services.require("slow").batcher.queue_size


def observation(first: float, **beside: Any) -> str:
    return json.dumps({"observation": [first, 0.5, 0.25], **beside})


def answer_to(first: float) -> list[float]:
    """What the policy answers to `observation(first)`, from its own description."""
    total = first + 2 * 0.5 + 3 * 0.25
    return [total, total + 1]


def held_policy() -> tuple[GraphPolicy, Held]:
    spaces = OBSERVATION_SPACES["vector"], ACTION_SPACES["box"]
    manifest = manifest_of(*spaces)
    graph = Held(spaces[1], manifest)
    return GraphPolicy(manifest, graph), graph


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[Running]:
    """A public server with a quick policy `box` and a held-up one `slow`."""
    limits = {
        key: settings.pop(key) for key in ("keep_alive_s", "receive_timeout_s") & settings.keys()
    }
    spaces = OBSERVATION_SPACES["vector"], ACTION_SPACES["box"]
    manifest = manifest_of(*spaces)
    quick = GraphPolicy(manifest, Summing(spaces[1], manifest))
    slow, graph = held_policy()
    services = services_of({"box": quick, "slow": slow}, **settings)
    assert not services.require("slow").batcher.runs_inline
    routes = HotRoutes(services, max_body_bytes=LIMIT, **limits)
    app = build_app(services, ComputeActionHandler(services, max_body_bytes=LIMIT))
    with shared_socket("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        is_ready, is_over = threading.Event(), asyncio.Event()
        loop = uvloop.new_event_loop()

        async def serve() -> None:
            server = PublicServer(app, routes, "127.0.0.1", port)
            await server.start()
            sweeper = asyncio.create_task(sweep(routes, interval_s=0.01))
            is_ready.set()
            await is_over.wait()
            await server.stop()
            sweeper.cancel()
            await services.close()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
        thread.start()
        assert is_ready.wait(DEADLINE_S)

        def stop() -> None:
            loop.call_soon_threadsafe(is_over.set)

        try:
            yield Running(port, services, routes, graph, stop, loop.call_soon_threadsafe)
        finally:
            graph.may_go_on.set()
            stop()
            thread.join(DEADLINE_S)
        assert not thread.is_alive()
        loop.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(receive_timeout_s=0.25) as found:
        yield found


# --- slow clients ---

CHUNK = (
    b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % path_of("box").encode()
)
HALVES = {
    "one byte": b"P",
    "half a request line": b"POST /v1/poli",
    "half a head": post(observation(1))[:90],
    "a head": post(observation(1))[: -len(observation(1))],
    "half a body": post(observation(1))[:-5],
    "half a body, another path": post(observation(1), path="/nothing")[:-5],
    "half a body, the ordinary way": post(observation(1), path=path_of("box") + "?a=b")[:-5],
    "half a chunk": CHUNK + b"20\r\n{",
    "chunks without end": CHUNK + b"1\r\n{\r\n",
    "half a head behind a request": post(observation(1)) + post(observation(1))[:90],
    "half a body behind an ordinary request": get("/healthz") + post(observation(1))[:-5],
}


@pytest.mark.parametrize("name", HALVES)
def test_a_request_that_does_not_arrive_is_refused_and_its_connection_closed(
    server: Running, name: str
):
    with server.caller() as slow:
        slow.send(HALVES[name])
        if "behind" in name:
            assert slow.read().status == 200
        assert server.is_fine()
        if name == "half a body, another path":  # answered before it has arrived
            assert slow.read().status == 404
        reply = slow.read()
        assert (reply.status, reply.json()["status"]) == (408, 408)
        assert reply.headers["connection"] == "close"
        assert slow.is_closed_by_server()


@pytest.mark.parametrize("whole", [post(observation(1)), CHUNK + b"1\r\n \r\n" * 500])
def test_a_byte_now_and_then_is_no_excuse(server: Running, whole: bytes):
    pause = threading.Event()
    n_sent = 0
    with server.caller() as slow:
        while n_sent < len(whole) and not select.select([slow.socket], [], [], 0)[0]:
            slow.send(whole[n_sent : n_sent + 1])
            n_sent += 1
            pause.wait(0.01)
        assert slow.read().status == 408
    # Long before all has arrived; each byte took 10 ms or more, so it was within 5 s of them.
    assert n_sent < min(len(whole), 500)


def test_an_idle_connection_is_closed_and_a_busy_one_is_not():
    pause = threading.Event()
    with running(keep_alive_s=0.9) as server, server.caller() as idle, server.caller() as busy:
        never = server.caller()
        assert idle.ask(post(observation(1))).status == 200
        # uvicorn starts a timer of its own after it.
        assert busy.ask(get("/healthz"), "GET").status == 200
        started = time.monotonic()
        while time.monotonic() - started < 1.5:
            assert busy.ask(post(observation(2))).json()["action"] == answer_to(2)
            pause.wait(0.05)
        with never:
            assert never.is_closed_by_server()
        assert idle.is_closed_by_server()
        assert busy.ask(post(observation(2))).status == 200


def test_a_request_that_takes_longer_than_a_connection_may_be_idle_is_answered():
    pause = threading.Event()
    with running(keep_alive_s=0.5, receive_timeout_s=0.05) as server, server.caller() as caller:
        server.graph.hold()
        caller.send(post(observation(3), "slow"))
        assert server.graph.began.wait(DEADLINE_S)
        pause.wait(0.6)
        server.graph.may_go_on.set()
        assert caller.read().json()["action"] == answer_to(3)
        pause.wait(0.1)  # and only from here on the connection is idle
        assert caller.ask(post(observation(4))).json()["action"] == answer_to(4)
        assert caller.is_closed_by_server()


def test_a_thousand_idle_connections_harm_nobody_and_end_with_the_server():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    try:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(running())
            idle = [stack.enter_context(server.caller()) for _ in range(1000)]
            for caller in idle[::2]:
                caller.send(b"POST /v1")  # half of them have begun
            wait_until(lambda: len(server.routes.connections) == 1000, "all are connected")
            with server.caller() as neighbour:
                for number in range(50):
                    reply = neighbour.ask(post(observation(number)))
                    assert reply.json()["action"] == answer_to(number)
                server.stop()
                assert neighbour.is_closed_by_server()
            assert all(caller.is_closed_by_server() for caller in idle)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_that_come_at_once_do_not_wait_for_each_other():
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running())
        may_go_on = threading.Event()
        server.call(lambda: may_go_on.wait(DEADLINE_S))
        callers = [stack.enter_context(server.caller()) for _ in range(128)]
        for number, caller in enumerate(callers):
            caller.send(post(observation(number)))
        may_go_on.set()
        for number, caller in enumerate(callers):
            assert caller.read().json()["action"] == answer_to(number)
        text = server.ask(get("/metrics"), "GET").body.decode()
        # A turn of the loop that takes one connection answers one request.
        n_batches = re.search(r'batch_size_count\{policy="box"\} (\d+)', text)
        assert n_batches is not None
        assert int(n_batches[1]) <= 32


# --- a client that does not read ---


def connection_of(server: Running, caller: Caller) -> HotProtocol:
    """The server's end of a caller's connection; those of callers before it may still be there."""

    def found() -> list[HotProtocol]:
        own = caller.socket.getsockname()
        return [each for each in list(server.routes.connections) if each.client == own]

    wait_until(lambda: len(found()) == 1, "it is connected")
    return found()[0]


def send_until_stuck(connection: HotProtocol, caller: Caller, data: bytes) -> int:
    """Send until the server cannot write any more; how many bytes it, or a kernel, has taken."""
    caller.socket.setblocking(False)
    n_sent = 0
    while not connection.flow.write_paused:
        if n_sent == len(data):
            wait_until(lambda: connection.flow.write_paused, "the server cannot write")
        elif select.select([], [caller.socket], [], 0.05)[1]:
            n_sent += caller.socket.send(data[n_sent : n_sent + 65536])
    caller.socket.settimeout(DEADLINE_S)
    return n_sent


def test_a_client_that_does_not_read_is_not_read_from_and_gets_all_in_order_later(
    server: Running,
):
    n = 25_000  # whose answers are more than the kernel keeps for a connection
    requests = b"".join(post(observation(number % 977)) for number in range(n))
    n_counted = counts(server, "box").get("ok", 0)
    with server.caller(receive_buffer=4096) as greedy, ThreadPoolExecutor(1) as sender:
        connection = connection_of(server, greedy)
        n_sent = send_until_stuck(connection, greedy, requests)
        wait_until(lambda: connection.flow.read_paused, "it is not read any more")
        assert connection.transport.get_write_buffer_size() < 1_000_000
        assert server.is_fine()
        assert counts(server, "box")["ok"] - n_counted < n
        # However long that was: the rest of a request could not arrive meanwhile.
        pause = threading.Event()
        pause.wait(2 * server.routes.receive_timeout_s)
        rest = sender.submit(greedy.send, requests[n_sent:])
        found = greedy.read_all(re.compile(rb'"action":(\[[^]]*\])'), n)
        assert [json.loads(each) for each in found] == [
            answer_to(number % 977) for number in range(n)
        ]
        rest.result()


def test_nothing_is_read_behind_an_ordinary_answer_that_is_not_read(server: Running):
    with server.caller(receive_buffer=4096) as greedy:
        connection = connection_of(server, greedy)
        n = 0
        while not connection.flow.write_paused:
            before = connection.cycle
            greedy.send(get("/openapi.json"))
            n += 1
            wait_until(
                lambda before=before: (
                    connection.cycle is not before and connection.cycle.response_complete
                ),
                "it is answered",
            )
        wait_until(lambda: connection.flow.read_paused, "it is not read any more")
        greedy.send(post(observation(5)) * 9)
        assert server.is_fine()
        assert connection.flow.read_paused
        for _ in range(n):
            assert greedy.read("GET").status == 200
        for _ in range(9):
            assert greedy.read().json()["action"] == answer_to(5)


def test_a_client_that_never_reads_is_forgotten():
    with running(keep_alive_s=0.1) as server, server.caller(receive_buffer=4096) as greedy:
        connection = connection_of(server, greedy)
        send_until_stuck(connection, greedy, post(observation(1)) * 40_000)
        wait_until(lambda: not server.routes.connections, "the connection is given up")
        assert server.is_fine()


# --- clients that vanish, deadlines, a full queue ---


@pytest.fixture
def held() -> Iterator[Running]:
    with running(max_queue_size=3, max_batch_size=2) as found:
        found.graph.hold()
        yield found


def begin(held: Running, stack: contextlib.ExitStack) -> Caller:
    """A caller whose batch has begun, and does not end."""
    caller = stack.enter_context(held.caller())
    caller.send(post(observation(100), "slow"))
    assert held.graph.began.wait(DEADLINE_S)
    return caller


def wait_for(held: Running, stack: contextlib.ExitStack, *requests: bytes) -> list[Caller]:
    """Callers that wait for the next batch, in this order."""
    callers = []
    for request in requests:
        size = held.queue_size()
        callers.append(stack.enter_context(held.caller()))
        callers[-1].send(request)
        wait_until(lambda size=size: held.queue_size() == size + 1, "it waits")
    return callers


SLOW_WAYS = {
    "plain": lambda first: post(observation(first), "slow"),
    "general": lambda first: post(observation(first, outputs=["action_logp"]), "slow"),
    "ordinary": lambda first: post(observation(first), path=path_of("slow") + "?a=b"),
}


@pytest.mark.parametrize("way", SLOW_WAYS)
def test_what_has_not_begun_is_not_computed_for_a_client_that_vanished(held: Running, way: str):
    with contextlib.ExitStack() as stack:
        running_one = begin(held, stack)
        gone, neighbour = wait_for(held, stack, SLOW_WAYS[way](7), post(observation(8), "slow"))
        gone.vanish()
        wait_until(lambda: len(held.routes.connections) == 2, "the server knows")
        held.graph.may_go_on.set()
        assert running_one.read().json()["action"] == answer_to(100)
        assert neighbour.read().json()["action"] == answer_to(8)
    assert held.graph.computed() == [100, 8]


def test_a_client_that_vanishes_in_its_batch_harms_nobody(held: Running):
    with contextlib.ExitStack() as stack:
        gone = begin(held, stack)
        (neighbour,) = wait_for(held, stack, post(observation(8), "slow"))
        gone.vanish()
        wait_until(lambda: len(held.routes.connections) == 1, "the server knows")
        held.graph.may_go_on.set()
        assert neighbour.read().json()["action"] == answer_to(8)
    assert held.is_fine()


@pytest.mark.parametrize("path", [path_of("slow"), path_of("slow") + "?a=b"])
def test_a_deadline_is_kept_and_nothing_is_computed_after_it(held: Running, path: str):
    with contextlib.ExitStack() as stack:
        first = begin(held, stack)
        durations_s = []
        for _ in range(3):
            started = time.monotonic()
            late = held.ask(post(observation(7, timeout_ms=50), path=path))
            durations_s.append(time.monotonic() - started)
            assert (late.status, late.json()["code"]) == (504, "deadline_exceeded")
        assert 0.05 <= min(durations_s) < 1.0  # the quickest, as the machine may be busy
        held.graph.may_go_on.set()
        assert first.read().status == 200
        assert held.ask(post(observation(9), "slow")).json()["action"] == answer_to(9)
    assert held.graph.computed() == [100, 9]


@pytest.mark.parametrize("way", SLOW_WAYS)
def test_a_full_queue_refuses_and_takes_again(held: Running, way: str):
    with contextlib.ExitStack() as stack:
        callers = [begin(held, stack)]
        callers += wait_for(held, stack, *(SLOW_WAYS[way](number) for number in (1, 2, 3)))
        for _ in range(2):
            refused = held.ask(SLOW_WAYS[way](4))
            assert (refused.status, refused.json()["code"]) == (503, "overloaded")
            assert refused.headers["retry-after"] == "1"
        assert held.is_fine()  # another policy has its own queue
        held.graph.may_go_on.set()
        found = [caller.read().json()["action"] for caller in callers]
        assert found == [answer_to(number) for number in (100, 1, 2, 3)]
        assert held.ask(SLOW_WAYS[way](4)).json()["action"] == answer_to(4)
    assert 4 in held.graph.computed()


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_server_that_stops_answers_what_waits_and_takes_nothing_new(held: Running):
    with contextlib.ExitStack() as stack:
        callers = [begin(held, stack)]
        callers += wait_for(held, stack, *(SLOW_WAYS[way](8) for way in ("plain", "general")))
        callers += wait_for(held, stack, SLOW_WAYS["ordinary"](8))
        idle, half = stack.enter_context(held.caller()), stack.enter_context(held.caller())
        half.send(post(observation(9), "slow")[:-3])
        held.stop()
        wait_until(lambda: is_refused(held.port), "no new connection is taken")
        assert idle.is_closed_by_server()
        assert half.is_closed_by_server()
        callers[0].send(post(observation(10), "slow"))  # nobody will answer it
        held.graph.may_go_on.set()
        for caller, first in zip(callers, (100, 8, 8, 8), strict=True):
            assert caller.read().json()["action"] == answer_to(first)
            assert caller.is_closed_by_server()
    assert sorted(held.graph.computed()) == [8, 8, 8, 100]


# --- counts ---


def counts(server: Running, policy: str) -> dict[str, float]:
    text = server.ask(get("/metrics"), "GET").body.decode()
    found = {
        sample.labels["code"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "policyserve_requests_total" and sample.labels["policy"] == policy
    }
    return {code: value for code, value in found.items() if value}


def test_every_request_is_counted_once_whichever_way_it_went(held: Running):
    with contextlib.ExitStack() as stack:
        callers = [begin(held, stack)]
        callers += wait_for(held, stack, *(SLOW_WAYS[way](1) for way in SLOW_WAYS))
        for way in SLOW_WAYS:
            assert held.ask(SLOW_WAYS[way](4)).status == 503
        held.graph.may_go_on.set()
        assert [caller.read().status for caller in callers] == [200] * 4
        held.graph.hold()
        first = begin(held, stack)
        assert held.ask(post(observation(1, timeout_ms=20), "slow")).status == 504
        (gone,) = wait_for(held, stack, post(observation(6), "slow"))
        gone.vanish()
        wait_until(lambda: gone_is_known(held, 5), "the server knows")
        held.graph.may_go_on.set()
        assert first.read().status == 200
    for path in (path_of("slow"), path_of("slow") + "?a=b"):
        assert held.ask(post("{", path=path)).status == 400
        assert held.ask(post('{"observation":[1]}', path=path)).status == 422
        assert held.ask(post(observation(1) * 2, path=path)).status == 400
        assert held.ask(post(observation(1, outputs=["value"]), path=path)).status == 422
    assert held.ask(post(b" " * (LIMIT + 1), "slow")).status == 413
    assert held.ask(post("", "slow").replace(b"/json", b"/xml")).status == 415
    assert counts(held, "slow") == {
        "ok": 5,
        "overloaded": 3,
        "deadline_exceeded": 1,
        "malformed_request": 4,
        "invalid_observation": 2,
        "invalid_request": 2,
        "body_too_large": 1,
        "unsupported_media_type": 1,
    }


def gone_is_known(server: Running, n_connections: int) -> bool:
    return len(server.routes.connections) == n_connections


# --- ids and dates ---


@pytest.mark.parametrize("path", [path_of("box"), path_of("box") + "?a=b"])
def test_an_answer_has_a_date_and_an_id(server: Running, path: str):
    def id_of(*headers: str) -> str:
        reply = server.ask(post(observation(1), path=path, headers=headers))
        assert reply.status == 200
        assert reply.headers["date"].endswith("GMT")
        return reply.headers["x-request-id"]

    assert id_of("X-Request-ID: mine") == "mine"
    assert id_of("x-request-id: \xe9") == "\xe9"
    assert id_of("x-request-id: " + "a" * 3000) == "a" * 128
    own = {id_of(), id_of(), id_of("x-request-id:"), id_of("x-request-id: ")}
    assert len(own) == 4
    assert "" not in own


# --- a uvicorn that is not what it was ---


def test_this_uvicorn_fits():
    assert fits() is None


def other_arguments(self: Any, body: bytes, more: bool = False) -> None: ...


@pytest.mark.parametrize("name", ["on_body", "shutdown", "_start_asgi_task", "send_400_response"])
def test_a_changed_uvicorn_is_named(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(HttpToolsProtocol, name, other_arguments)
    assert fits() == f"uvicorn's HttpToolsProtocol.{name} takes other arguments"
    monkeypatch.delattr(HttpToolsProtocol, name)
    assert fits() == f"uvicorn's HttpToolsProtocol has no {name}"


def test_where_uvicorn_does_not_fit_the_ordinary_way_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    original = HttpToolsProtocol.on_body

    def on_body(self: Any, body: bytes, *_: Any) -> None:
        original(self, body)

    monkeypatch.setattr(HttpToolsProtocol, "on_body", on_body)
    before = dict(uvicorn.config.HTTP_PROTOCOLS)
    with running() as server:
        assert "no fast lane: uvicorn's HttpToolsProtocol.on_body takes other" in caplog.text
        assert server.is_fine()
        assert not server.routes.connections  # the fast lane has met nobody
        assert protocol_class(server.routes) == "httptools"
        install_in_serve(server.routes)
    assert before == uvicorn.config.HTTP_PROTOCOLS
