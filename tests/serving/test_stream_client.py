"""The stream clients against servers that misbehave: what is asked again, and what is raised."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.frames import Frame, Opcode
from websockets.sync.server import ServerConnection

from serving.async_stream_client import AsyncStreamClient
from serving.client import PolicyClient
from serving.errors import (
    BodyTooLargeError,
    ConnectionFailedError,
    DeadlineExceededError,
    InferenceError,
    InvalidObservationError,
    OverloadedError,
    PolicyNotReadyError,
    PolicyServingError,
    UnexpectedAnswerError,
    UnknownPolicyError,
    UsageError,
)
from serving.interface import Policy
from serving.stream_client import StreamClient
from tests.serving.clients import STREAM_CLIENTS, async_stream_client
from tests.serving.deadline import DEADLINE_S
from tests.serving.scripted_stream import (
    DESCRIPTION,
    ScriptedStream,
    answer_all,
    answer_to,
    observation,
    problem,
    scripted_stream,
)


@pytest.fixture
def server() -> Iterator[ScriptedStream]:
    with scripted_stream() as running:
        yield running


@pytest.fixture(params=STREAM_CLIENTS)
def client_class(request: pytest.FixtureRequest) -> Any:
    return STREAM_CLIENTS[request.param]


def answering(n: int, then: Any) -> Any:
    """Answers n requests, then does something else."""

    def handle(connection: ServerConnection) -> None:
        for _ in range(n):
            connection.send(answer_to(connection.recv()))
        then(connection)

    return handle


def break_off(connection: ServerConnection) -> None:
    """As when a machine vanishes: no farewell."""
    linger = struct.pack("ii", 1, 0)
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.socket.shutdown(socket.SHUT_RDWR)


def go_away(connection: ServerConnection) -> None:
    connection.close(1001, "server is shutting down")


def hang(connection: ServerConnection) -> None:
    """Read and say nothing until the client leaves."""
    for _ in connection:
        pass


def patiently(step: Any) -> Any:
    """A step of a client in a hurry, on a machine that may not be: tried until it is in time."""
    for _ in range(100):
        with contextlib.suppress(DeadlineExceededError):
            return step()
    raise AssertionError("no step was in time")


def test_a_frame_holds_raw_bytes_and_only_what_was_asked_for(server, client_class):
    frames = []

    def record(connection: ServerConnection) -> None:
        for frame in connection:
            frames.append(msgpack.unpackb(frame))
            connection.send(answer_to(frame))

    server.script(record)
    with client_class(server.url) as client:
        assert client.compute_action([7, 0.5, 0, 0]) == 7
        client.compute_actions(
            np.stack([observation(1), observation(2)]), deterministic=False, seed=np.int64(3)
        )
    assert frames == [
        {"observation": struct.pack("<4f", 7, 0.5, 0, 0)},
        {
            "observations": struct.pack("<8f", 1, 0, 0, 0, 2, 0, 0, 0),
            "deterministic": False,
            "seed": 3,
        },
    ]


def test_one_connection_is_kept(server, client_class):
    with client_class(server.url) as client:
        assert [client.compute_action(observation(k)) for k in range(20)] == list(range(20))
    assert (server.n_connections, server.n_descriptions) == (1, 1)


def test_the_only_policy_is_found_and_its_stream_asked(server, client_class):
    server.description = {**DESCRIPTION, "policies": [DESCRIPTION]}
    with client_class(server.url.removesuffix("/v1/policies/p")) as client:
        assert client.compute_action(observation(3)) == 3


@pytest.mark.parametrize("end", [go_away, break_off], ids=lambda end: end.__name__)
def test_a_connection_that_ends_between_steps_is_opened_again_at_once(
    server, client_class, pauses, end
):
    server.script(answering(2, end), answer_all)
    with client_class(server.url, max_retries=0) as client:
        assert [client.compute_action(observation(k)) for k in range(5)] == list(range(5))
    assert server.n_connections == 2
    assert pauses == []


@pytest.mark.parametrize("end", [go_away, break_off], ids=lambda end: end.__name__)
def test_a_step_that_was_not_answered_is_asked_again(server, client_class, end):
    def lose(connection: ServerConnection) -> None:
        connection.recv()
        end(connection)

    server.script(answering(1, lose), answer_all)
    with client_class(server.url, max_retries=0) as client:
        assert [client.compute_action(observation(k)) for k in range(3)] == [0, 1, 2]
    assert server.n_connections == 2


@pytest.mark.parametrize("end", [go_away, break_off], ids=lambda end: end.__name__)
def test_a_server_that_never_answers_is_given_up_after_the_retries(server, client_class, end):
    def lose(connection: ServerConnection) -> None:
        connection.recv()
        end(connection)

    server.script(lose)
    with client_class(server.url, max_retries=2, backoff_s=0.0) as client:
        with pytest.raises(ConnectionFailedError, match=r"127\.0\.0\.1"):
            client.compute_action(observation(1))
        assert server.n_connections == 3
        server.script(answer_all)
        assert client.compute_action(observation(4)) == 4


def test_a_server_that_is_not_there_is_a_connection_failure(client_class):
    with socket.socket() as bound:  # bound and not listening: refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1/policies/p"
        with (
            client_class(url, max_retries=1, backoff_s=0.0) as client,
            pytest.raises(ConnectionFailedError),
        ):
            client.compute_action(observation(0))


def test_an_overloaded_server_is_asked_again_after_its_wait(server, client_class):
    def refuse_twice(connection: ServerConnection) -> None:
        refused = []
        for _ in range(2):
            refused.append(connection.recv())
            connection.send(problem("overloaded", 503, retry_after_s=0.01))
        assert refused[0] == refused[1]
        answer_all(connection)

    server.script(refuse_twice)
    with client_class(server.url, backoff_s=0.0) as client:
        started = time.monotonic()
        assert client.compute_action(observation(5)) == 5
        assert time.monotonic() - started >= 0.02
    assert server.n_connections == 1


def test_in_the_end_the_server_s_own_error_is_raised(server, client_class):
    def refuse(connection: ServerConnection) -> None:
        for _ in connection:
            connection.send(problem("overloaded", 503))

    server.script(refuse)
    with (
        client_class(server.url, max_retries=1, backoff_s=0.0) as client,
        pytest.raises(OverloadedError, match="a reason"),
    ):
        client.compute_action(observation(5))


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("invalid_observation", 422, InvalidObservationError),
        ("inference_failed", 500, InferenceError),
        ("deadline_exceeded", 504, DeadlineExceededError),
        ("something_new", 500, PolicyServingError),
    ],
)
def test_an_error_is_raised_as_its_own_class_and_the_stream_stays(
    server, client_class, code: str, status: int, expected: type
):
    def fail_first(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(problem(code, status, pointer="/observation/2"))
        answer_all(connection)

    server.script(fail_first)
    with client_class(server.url) as client:
        with pytest.raises(PolicyServingError, match="a reason") as caught:
            client.compute_action(observation(1))
        assert type(caught.value) is expected
        assert caught.value.details == {"pointer": "/observation/2"}
        assert client.compute_action(observation(2)) == 2
    assert server.n_connections == 1


def test_a_refused_upgrade_is_raised_or_tried_again_as_it_says(server, client_class):
    unknown = b'{"code": "unknown_policy", "detail": "no such policy"}'
    starting = b'{"code": "policy_not_ready", "detail": "loading"}'
    with client_class(server.url, max_retries=1, backoff_s=0.0) as client:
        server.pages = [(404, {}, unknown)]
        with pytest.raises(UnknownPolicyError, match="no such policy"):
            client.compute_action(observation(1))
        server.pages = [(503, {"Retry-After": "0"}, starting)]
        assert client.compute_action(observation(1)) == 1
    assert server.n_connections == 1
    with client_class(server.url, max_retries=1, backoff_s=0.0) as client:
        server.pages = [(503, {}, starting)] * 2
        with pytest.raises(PolicyNotReadyError, match="loading"):
            client.compute_action(observation(1))


def test_a_server_that_hangs_is_given_up_and_its_late_answer_is_nobody_s(server, client_class):
    may_answer = threading.Event()

    def late(connection: ServerConnection) -> None:
        frame = connection.recv()
        may_answer.wait(DEADLINE_S)
        connection.send(answer_to(frame))
        answer_all(connection)

    server.script(late, answer_all)
    with client_class(server.url, timeout_s=0.05) as client:
        with pytest.raises(DeadlineExceededError, match=r"within 0\.05 s"):
            client.compute_action(observation(1))
        may_answer.set()
        assert patiently(lambda: client.compute_action(observation(2))) == 2


def test_a_server_that_only_pings_is_given_up_in_time():
    n_pings = itertools.count()
    pause = threading.Event()

    def ping(connection: ServerConnection) -> None:
        while next(n_pings) < 10_000:
            connection.ping()
            pause.wait(0.005)

    with scripted_stream() as server:
        server.script(ping)
        with StreamClient(server.url, timeout_s=0.1) as client:
            with pytest.raises(DeadlineExceededError):
                client.compute_action(observation(1))
            assert next(n_pings) < 1000  # 5 s of them, or more where the machine is busy


def test_pings_are_answered_and_parts_put_together(server, client_class):
    pongs = []

    def in_parts(connection: ServerConnection) -> None:
        for frame in connection:
            pongs.append(connection.ping())
            answer = answer_to(frame)
            connection.send([answer[:3], answer[3:7], answer[7:]])

    server.script(in_parts)
    with client_class(server.url) as client:
        assert [client.compute_action(observation(k)) for k in range(5)] == list(range(5))
        assert all(pong.wait(DEADLINE_S) for pong in pongs)


def test_a_message_over_the_limit_is_the_caller_s_error(client_class):
    with scripted_stream(max_size=10_000) as server, client_class(server.url) as client:
        assert client.compute_action(observation(1)) == 1
        with pytest.raises(BodyTooLargeError, match="1009"):
            client.compute_actions(np.zeros((10_000, 4), np.float32))
        assert client.compute_action(observation(2)) == 2


@pytest.mark.parametrize(
    "say",
    [
        lambda connection: connection.send("text"),
        lambda connection: connection.send(b"\xc1"),
        lambda connection: connection.send(msgpack.packb([1])),
        lambda connection: connection.send(msgpack.packb({"hello": 1})),
        lambda connection: connection.send(msgpack.packb({"action": b"abc"})),
        lambda connection: connection.send(msgpack.packb({"action": 1})),
        lambda connection: connection.close(1008, "go away"),
    ],
    ids=["text", "no msgpack", "array", "other", "short", "number", "refusal"],
)
def test_what_is_no_answer_is_an_error_of_ours(server, client_class, say):
    def babble(connection: ServerConnection) -> None:
        connection.recv()
        say(connection)
        hang(connection)

    server.script(babble)
    with (
        client_class(server.url, timeout_s=DEADLINE_S, max_retries=0) as client,
        pytest.raises(UnexpectedAnswerError),
    ):
        client.compute_action(observation(1))


def test_an_answer_that_nobody_asked_for_ends_the_connection(server, client_class):
    def say_too_much(connection: ServerConnection) -> None:
        answer = Frame(Opcode.BINARY, answer_to(connection.recv())).serialize(mask=False)
        connection.socket.sendall(answer * 2)
        hang(connection)

    server.script(say_too_much, answer_all)
    with client_class(server.url, max_retries=0, timeout_s=DEADLINE_S) as client:
        with contextlib.suppress(UnexpectedAnswerError):
            assert client.compute_action(observation(1)) == 1
        with contextlib.suppress(UnexpectedAnswerError, ConnectionFailedError):
            assert client.compute_action(observation(2)) == 2
        assert client.compute_action(observation(3)) == 3


PAIRS = {
    "action_space": {"type": "MultiDiscrete", "nvec": [9, 9], "start": [0, 0], "dtype": "int32"},
    "answers": [{"name": "action", "dtype": "int32", "shape": [2]}],
}


def test_another_policy_of_other_spaces_behind_the_address_is_described_again(server, client_class):
    server.script(answering(1, go_away), answer_all)
    with client_class(server.url) as client:
        assert client.compute_action(observation(1)) == 1
        server.description = {**DESCRIPTION, **PAIRS, "policy_id": "ba9876543210"}
        # Written for the one before, whose actions are not these.
        with pytest.raises(UnexpectedAnswerError, match="of other spaces"):
            client.compute_action(observation(2))
        assert client.compute_action(observation(2)).tolist() == [2, 0]
    assert server.n_descriptions == 2


def test_another_policy_of_the_same_spaces_behind_the_address_is_no_matter(server, client_class):
    server.script(answering(1, go_away), answer_all)
    with client_class(server.url) as client:
        assert client.compute_action(observation(1)) == 1
        server.description = {**DESCRIPTION, "policy_id": "ba9876543210"}
        assert client.compute_action(observation(2)) == 2


class TestPipelining:
    """`send` and `receive`, of the client for a loop that waits."""

    def test_answers_come_in_the_order_of_the_questions(self, server):
        with StreamClient(server.url) as client:
            for k in range(50):
                client.send(observation(k))
            client.send_many(np.stack([observation(k) for k in range(3)]))
            # A step in between has its own answer, and takes none of the others'.
            assert client.compute_action(observation(99)) == 99
            assert [client.receive()[0] for _ in range(50)] == list(range(50))
            assert client.receive().actions.tolist() == [0, 1, 2]
            with pytest.raises(UsageError, match="nothing was sent"):
                client.receive()

    def test_an_error_is_one_question_s_own(self, server):
        def fail_third(connection: ServerConnection) -> None:
            for k, frame in enumerate(connection):
                connection.send(problem("inference_failed", 500) if k == 2 else answer_to(frame))

        server.script(fail_third)
        with StreamClient(server.url) as client:
            for k in range(5):
                client.send(observation(k))
            assert [client.receive()[0] for _ in range(2)] == [0, 1]
            with pytest.raises(InferenceError):
                client.receive()
            assert [client.receive()[0] for _ in range(2)] == [3, 4]

    def test_the_refused_are_asked_again_and_keep_their_place(self, server):
        def refuse_some(connection: ServerConnection) -> None:
            for k, frame in enumerate(connection):
                is_refused = k in (0, 2, 3)
                connection.send(problem("overloaded", 503) if is_refused else answer_to(frame))

        server.script(refuse_some)
        with StreamClient(server.url, backoff_s=0.0) as client:
            for k in range(6):
                client.send(observation(k))
            assert [client.receive()[0] for _ in range(6)] == list(range(6))

    @pytest.mark.parametrize("end", [go_away, break_off], ids=lambda end: end.__name__)
    def test_what_a_lost_connection_did_not_answer_is_asked_again(self, server, end):
        server.script(answering(4, end), answer_all)
        with StreamClient(server.url, max_retries=0) as client:
            for k in range(10):
                client.send(observation(k))
            assert [client.receive()[0] for _ in range(10)] == list(range(10))
        assert server.n_connections == 2

    def test_the_message_over_the_limit_is_named_among_many(self):
        with scripted_stream(max_size=10_000) as server, StreamClient(server.url) as client:
            client.send(observation(1))
            client.send_many(np.zeros((10_000, 4), np.float32))
            client.send(observation(2))
            assert client.receive()[0] == 1
            with pytest.raises(BodyTooLargeError):
                client.receive()
            assert client.receive()[0] == 2

    def test_a_server_that_waits_to_be_read_is_read_while_sending(self, server):
        # Answers larger than all buffers of the way: whoever only sends waits for ever.
        def answer_at_length(connection: ServerConnection) -> None:
            for frame in connection:
                answer = msgpack.unpackb(answer_to(frame))
                connection.send(msgpack.packb({**answer, "padding": bytes(2**20)}))

        server.script(answer_at_length)
        rows = np.stack([observation(k) for k in range(20_000)])
        with StreamClient(server.url, timeout_s=DEADLINE_S) as client:
            for _ in range(60):
                client.send_many(rows)
            for _ in range(60):
                assert len(client.receive()) == len(rows)

    @pytest.mark.parametrize("in_flight", [1, 3, 100])
    def test_many_batches_are_asked_a_few_at_a_time(self, server, in_flight: int):
        taken = itertools.count()
        batches = (np.stack([observation(next(taken)), observation(0)]) for _ in range(20))
        with StreamClient(server.url) as client:
            outputs = client.compute_many(batches, in_flight=in_flight)
            assert next(outputs).actions.tolist() == [0, 0]
            assert next(taken) == min(in_flight, 20)
            rest = [output.actions[0] for output in outputs]
        assert len(rest) == 19


def test_an_interrupted_step_leaves_no_answer_behind(server):
    """As Ctrl-C in a notebook, which goes on with the same client."""
    asked, was_interrupted = threading.Event(), threading.Event()

    def slow_first(connection: ServerConnection) -> None:
        connection.recv()
        asked.set()
        hang(connection)

    def raise_once(*_: object) -> None:
        if not was_interrupted.is_set():
            was_interrupted.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        assert asked.wait(DEADLINE_S)
        # Again and again: a signal that comes just before a system call does not end it.
        while not was_interrupted.wait(0.05):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    server.script(slow_first, answer_all)
    # A handler of its own, as a shell starts its background jobs with SIGINT ignored.
    before = signal.signal(signal.SIGINT, raise_once)
    try:
        with StreamClient(server.url, timeout_s=DEADLINE_S) as client, ThreadPoolExecutor(1) as one:
            interrupting = one.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                client.compute_action(observation(1))
            interrupting.result(DEADLINE_S)
            assert client.compute_action(observation(2)) == 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_that_share_a_client_get_their_own_answers(server):
    with StreamClient(server.url) as client, ThreadPoolExecutor(8) as executor:
        found = list(executor.map(client.compute_action, map(observation, range(200))))
    assert found == list(range(200))


def test_a_closed_client_opens_again_when_asked(server):
    client = StreamClient(server.url)
    assert client.compute_action(observation(1)) == 1
    client.close()
    client.close()
    assert client.compute_action(observation(2)) == 2
    client.close()
    assert server.n_connections == 2


class TestManyAtOnce:
    """The client for asyncio, with many steps on their way."""

    def test_each_gets_its_own_answer_over_one_connection(self, server):
        with async_stream_client(server.url, max_in_flight=64) as client:
            found = client.gather("compute_action", [observation(k) for k in range(500)])
        assert found == list(range(500))
        assert (server.n_connections, server.n_descriptions) == (1, 1)

    @pytest.mark.parametrize("end", [go_away, break_off], ids=lambda end: end.__name__)
    def test_those_on_a_lost_connection_are_asked_again(self, server, end):
        server.script(answering(30, end), answering(30, end), answer_all)
        with async_stream_client(server.url, backoff_s=0.0) as client:
            found = client.gather("compute_action", [observation(k) for k in range(200)])
        assert found == list(range(200))
        assert server.n_connections == 3

    def test_the_message_over_the_limit_fails_alone(self):
        with scripted_stream(max_size=10_000) as server, async_stream_client(server.url) as client:
            batches = [np.stack([observation(k)]) for k in range(20)]
            batches[7] = np.zeros((10_000, 4), np.float32)
            found = client.gather("compute_actions", batches)
        assert isinstance(found.pop(7), BodyTooLargeError)
        assert [output.actions[0] for output in found] == [k for k in range(20) if k != 7]

    def test_more_than_may_be_on_their_way_wait(self, server):
        most = 0

        def count(connection: ServerConnection) -> None:
            nonlocal most
            frames: list[Any] = []
            for _ in range(20):
                frames.append(connection.recv())
                with contextlib.suppress(TimeoutError):
                    while True:
                        frames.append(connection.recv(timeout=0.01))
                most = max(most, len(frames))
                for frame in frames:
                    connection.send(answer_to(frame))
                frames.clear()

        server.script(count)
        with async_stream_client(server.url, max_in_flight=5) as client:
            found = client.gather("compute_action", [observation(k) for k in range(20)])
        assert found == list(range(20))
        assert most == 5

    def test_a_step_that_is_given_up_leaves_the_others_theirs(self, server):
        was_asked, may_answer = threading.Event(), threading.Event()

        def late(connection: ServerConnection) -> None:
            frame = connection.recv()
            was_asked.set()
            may_answer.wait(DEADLINE_S)
            connection.send(answer_to(frame))
            answer_all(connection)

        async def main() -> tuple[Any, Any]:
            async with AsyncStreamClient(server.url) as client:
                given_up = asyncio.ensure_future(client.compute_action(observation(1)))
                kept = asyncio.ensure_future(client.compute_action(observation(2)))
                await asyncio.to_thread(was_asked.wait, DEADLINE_S)
                given_up.cancel()
                may_answer.set()
                return given_up, await kept

        server.script(late)
        given_up, kept = asyncio.run(main())
        assert given_up.cancelled()
        assert kept == 2
        assert server.n_connections == 1


def test_clients_of_every_kind_have_the_same_methods():
    for name in ("compute_action", "step", "compute_actions"):
        signatures = {
            str(inspect.signature(getattr(kind, name)))
            for kind in (PolicyClient, StreamClient, AsyncStreamClient)
        }
        assert len(signatures) == 1
        assert getattr(StreamClient, name).__doc__


def test_a_stream_is_a_policy(server):
    with StreamClient(server.url) as client:
        assert isinstance(client, Policy)


def test_a_wrong_argument_is_the_method_s_own_type_error(server, client_class):
    with client_class(server.url) as client, pytest.raises(TypeError, match=r"step\(\).*greedy"):
        client.step(observation(1), greedy=True)
