"""The clients: typed errors, when they try again, and how they find their policy."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from serving.client import AsyncPolicyClient, PolicyClient
from serving.errors import (
    BatchTooLargeError,
    BodyTooLargeError,
    CallerError,
    ConnectionFailedError,
    DeadlineExceededError,
    InferenceError,
    InvalidObservationError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PolicyServingError,
    UnavailableError,
    UnknownPolicyError,
    UsageError,
)
from tests.serving.clients import async_json_client, json_client
from tests.serving.conftest import LiveServer, serving
from tests.serving.scripted_http import (
    CLOSE,
    DESCRIPTION,
    HANG,
    OK,
    REQUEST,
    ScriptedServer,
    answer,
    problem,
)


def test_an_action_is_what_the_environment_takes(live_server, discrete, box, any_client):
    with any_client(live_server.policy_url("discrete")) as client:
        observation = discrete.observations(1)[0]
        action = client.compute_action(observation)
        assert isinstance(action, np.int64)
        assert action == discrete.inputs(observation[None]).argmax()
        assert client.compute_action(observation.tolist()) == action
    with any_client(live_server.policy_url("box")) as client:
        observation = box.observations(1)[0]
        action = client.compute_action(observation)
        assert (action.shape, action.dtype) == ((2,), np.float32)
        expected = box.answers(observation[None], np.zeros((1, 2)))["action"][0]
        np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-6)


def test_one_action_and_many_use_the_same_seed_alike(live_server, discrete, any_client):
    observation = discrete.observations(1)
    with any_client(live_server.policy_url("discrete")) as client:
        for seed in range(20):
            arguments = {"deterministic": False, "seed": seed}
            many = client.compute_actions(observation, **arguments).actions
            assert client.compute_action(observation[0], **arguments) == many[0]


def test_a_description_is_the_server_s(live_server, client_class):
    with client_class(live_server.policy_url("box")) as client:
        described = client.describe()
    assert described["policy"] == "box"
    assert described["observation_space"]["shape"] == [3]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda client: client.compute_action([1.0, 2.0]), InvalidObservationError),
        (
            lambda client: client.compute_action(np.zeros((2, 2), np.float32)),
            InvalidObservationError,
        ),
        (lambda client: client.compute_actions(np.zeros((0, 4))), InvalidRequestError),
        (lambda client: client.compute_actions(np.zeros((1025, 4))), BatchTooLargeError),
        (
            lambda client: client.compute_action(np.zeros(4), deterministic=False, seed=-1),
            InvalidRequestError,
        ),
        (lambda client: client.compute_action(np.zeros(4), timeout_ms=0), InvalidRequestError),
    ],
    ids=["length", "shape", "empty", "too many", "seed", "timeout"],
)
def test_a_refusal_is_raised_as_the_server_s_own_class(
    live_server, any_client, pauses, call, expected
):
    with (
        any_client(live_server.policy_url("discrete"), max_retries=3) as client,
        pytest.raises(PolicyServingError) as caught,
    ):
        call(client)
    assert type(caught.value) is expected
    assert "\n" not in caught.value.message
    assert pauses == []  # the same request would fail again


def test_the_place_of_a_fault_arrives(live_server, any_client):
    with any_client(live_server.policy_url("discrete")) as client:
        with pytest.raises(InvalidObservationError) as caught:
            client.compute_actions(np.array([[0, 0, 0, 0], [0, 0, 1e39, 0]]))
        assert caught.value.details["pointer"] == "/observations/1/2"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_json_cannot_say_is_refused_before_it_is_sent(scripted, value):
    scripted.script(answer(200, DESCRIPTION))
    with json_client(scripted.url) as client:
        with pytest.raises(InvalidObservationError) as caught:
            client.compute_action([0.0, value])
        assert caught.value.details["pointer"] == "/observation"
        with pytest.raises(InvalidObservationError):
            client.compute_action(["a", None])
    assert [method for method, _, _ in scripted.requests] == ["GET"]


def test_an_unknown_policy_is_a_typed_error(live_server, any_client):
    with (
        any_client(live_server.policy_url("nobody")) as client,
        pytest.raises(UnknownPolicyError, match="there is box, discrete, no-critic"),
    ):
        client.compute_action(np.zeros(4))


def test_the_only_policy_is_found(bundles: dict[str, Path], any_client):
    with serving({"only": bundles["discrete"]}) as server:
        for url in (server.url, server.url + "/", server.url + "/v1/policies"):
            with any_client(url) as client:
                assert client.describe()["policy"] == "only"


def test_of_several_policies_one_has_to_be_named(live_server, any_client):
    with (
        any_client(live_server.url) as client,
        pytest.raises(UnknownPolicyError, match="box, discrete, no-critic; name one"),
    ):
        client.describe()
    with any_client(live_server.url, policy="box") as client:
        assert client.describe()["policy"] == "box"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "127.0.0.1:8000/v1/policies/p",
        "ftp://localhost/v1/policies/p",
        "http://",
        "http://localhost:port",
        "http://localhost:99999",
        "http://[::1",
        "http://localhost/v1/policies/p/compute_action",
    ],
)
def test_what_is_no_url_of_a_policy_is_a_usage_error(url: str, any_client):
    with pytest.raises(UsageError):
        any_client(url)


@pytest.mark.parametrize("client_class", [PolicyClient, AsyncPolicyClient])
def test_an_unknown_encoding_is_a_usage_error(client_class: Any):
    with pytest.raises(UsageError, match="'yaml', expected json or msgpack"):
        client_class("http://127.0.0.1:1/v1/policies/p", encoding="yaml")


@pytest.mark.parametrize(
    ("encoding", "content_type"), [("json", "application/json"), ("msgpack", "application/msgpack")]
)
def test_both_encodings_travel_under_their_own_name(
    live_server: LiveServer, discrete, monkeypatch, encoding: Any, content_type: str
):
    sent = []
    request = http.client.HTTPConnection.request

    def record(self: Any, method: str, url: str, body: Any = None, headers: Any = None) -> None:
        sent.append((headers.get("content-type"), body))
        request(self, method, url, body, headers)

    monkeypatch.setattr(http.client.HTTPConnection, "request", record)
    observation = np.array([0.5, -1.25, 0.0, 2.0], np.float32)
    with PolicyClient(live_server.policy_url("discrete"), encoding=encoding) as client:
        action = client.compute_action(observation)
    assert action == discrete.inputs(observation[None]).argmax()
    (_, (found_type, body)) = sent
    assert found_type == content_type
    unpack = msgpack.unpackb if encoding == "msgpack" else json.loads
    found = unpack(body)["observation"]
    assert found == (observation.tobytes() if encoding == "msgpack" else observation.tolist())


def test_a_name_and_a_prefix_are_taken_from_the_url(scripted):
    scripted.script(OK)
    with json_client(scripted.url.replace("/v1/policies/p", "/api/v1/policies/a%20b")) as client:
        client.answer(REQUEST)
    assert scripted.requests[0][:2] == ("POST", "/api/v1/policies/a%20b/compute_action")


def test_a_body_holds_only_what_was_asked_for(scripted):
    scripted.script(answer(200, DESCRIPTION), *[answer(200, {"actions": [1]})] * 2)
    with json_client(scripted.url) as client:
        client.compute_actions(np.array([[0.5]], np.float32))
        client.compute_actions(
            np.array([[0.1]], np.float32),
            deterministic=False,
            seed=2,
            outputs={"value"},
            timeout_ms=5,
        )
    bodies = [json.loads(body) for _, _, body in scripted.requests[1:]]
    assert bodies == [
        {"observations": [[0.5]]},
        {
            "observations": [[0.1]],  # the shortest decimal of the float32, not 0.10000000149
            "deterministic": False,
            "seed": 2,
            "timeout_ms": 5,
            "outputs": ["value"],
        },
    ]


@pytest.mark.usefixtures("pauses")
class TestRetries:
    """`client.answer` sends one POST, so a script's steps are its attempts."""

    def call(self, scripted: ScriptedServer, **kwargs: Any) -> Any:
        with json_client(scripted.url, **kwargs) as client:
            return client.answer(REQUEST)

    def test_an_overloaded_server_is_asked_again(self, scripted, pauses):
        scripted.script(*[problem("overloaded", 503)] * 2, OK)
        assert self.call(scripted) == {"action": 1}
        assert len(scripted.requests) == 3
        assert len(set(scripted.requests)) == 1  # the same request each time
        assert len(pauses) == 2

    def test_no_attempt_comes_before_retry_after(self, scripted, pauses):
        scripted.script(problem("overloaded", 503, "Retry-After: 7"), OK)
        self.call(scripted, backoff_s=0.01)
        assert pauses == [7.0]

    def test_a_date_in_retry_after_is_left_alone(self, scripted, pauses):
        date = "Retry-After: Fri, 31 Dec 2027 23:59:59 GMT"
        scripted.script(problem("overloaded", 503, date), OK)
        self.call(scripted, backoff_s=0.01)
        assert 0 <= pauses[0] <= 0.01

    def test_pauses_stay_below_a_doubling_bound_of_two_seconds(self, scripted, pauses):
        scripted.script(*[problem("overloaded", 503)] * 9, OK)
        self.call(scripted, max_retries=9, backoff_s=0.1)
        bounds = [0.1, 0.2, 0.4, 0.8, 1.6, *[2.0] * 4]
        assert all(0 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
        assert len(set(pauses)) == 9  # jittered

    def test_in_the_end_the_server_s_own_error_is_raised(self, scripted):
        scripted.script(*[problem("overloaded", 503, "Retry-After: 0")] * 3)
        with pytest.raises(OverloadedError, match="a reason") as caught:
            self.call(scripted, max_retries=2)
        assert caught.value.details == {"retry_after_s": 0}
        assert len(scripted.requests) == 3

    def test_without_retries_there_is_one_attempt(self, scripted, pauses):
        scripted.script(problem("overloaded", 503))
        with pytest.raises(OverloadedError):
            self.call(scripted, max_retries=0)
        assert pauses == []

    def test_a_proxy_s_bare_503_is_tried_again(self, scripted):
        page = answer(503, b"<html>down</html>", content_type="text/html")
        scripted.script(page, OK)
        assert self.call(scripted) == {"action": 1}
        scripted.script(page)
        with pytest.raises(UnavailableError, match="<html>down"):
            self.call(scripted, max_retries=0)

    @pytest.mark.parametrize(
        ("step", "expected"),
        [
            (problem("invalid_observation", 422), InvalidObservationError),
            (problem("inference_failed", 500), InferenceError),
            (problem("deadline_exceeded", 504), DeadlineExceededError),
            (problem("unknown", 404), NotFoundError),
            (answer(400, b"no"), CallerError),
            (answer(404, {"message": "no Route matched"}), NotFoundError),
            (answer(500, [1, 2]), PolicyServingError),
        ],
        ids=["422", "500", "504", "404", "400", "gateway", "array"],
    )
    def test_what_would_fail_again_is_not_tried_again(self, scripted, step, expected):
        scripted.script(step)
        with pytest.raises(PolicyServingError) as caught:
            self.call(scripted)
        assert type(caught.value) is expected
        assert len(scripted.requests) == 1

    @pytest.mark.parametrize(
        "step",
        [CLOSE, b"SSH-2.0-OpenSSH\r\n", OK[:-3]],
        ids=["nothing", "another protocol", "half a body"],
    )
    def test_a_broken_connection_is_tried_again(self, scripted, pauses, step):
        scripted.script(step, close_after=True)
        scripted.script(OK)
        assert self.call(scripted) == {"action": 1}
        assert len(scripted.requests) == 2
        assert len(pauses) == 1
        scripted.script(step, close_after=True)
        with pytest.raises(ConnectionFailedError, match=r"127\.0\.0\.1"):
            self.call(scripted, max_retries=0)

    def test_a_server_that_is_not_there_is_a_connection_failure(self, pauses):
        with socket.socket() as bound:  # bound and not listening: refused
            bound.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1/policies/p"
            with (
                PolicyClient(url, max_retries=2) as client,
                pytest.raises(ConnectionFailedError, match=url[:20]),
            ):
                client.answer(REQUEST)
        assert len(pauses) == 2

    def test_a_connection_that_the_server_closed_when_idle_is_no_failure(self, scripted, pauses):
        scripted.script(OK, OK, close_after=True)
        with json_client(scripted.url, max_retries=0) as client:
            assert client.answer(REQUEST) == client.answer(REQUEST) == {"action": 1}
        assert scripted.n_connections == 2
        assert pauses == []

    def test_a_connection_is_kept_for_the_next_request(self, scripted):
        scripted.script(*[OK] * 5)
        with json_client(scripted.url) as client:
            for _ in range(5):
                client.answer(REQUEST)
        assert scripted.n_connections == 1

    def test_a_server_that_hangs_is_given_up_after_the_timeout(self, scripted):
        scripted.script(HANG, OK)
        with json_client(scripted.url, timeout_s=0.05) as client:
            with pytest.raises(DeadlineExceededError, match=r"within 0\.05 s"):
                client.answer(REQUEST)
            assert len(scripted.requests) == 1
            # The late answer must not be taken for that of the next request.
            assert client.answer(REQUEST) == {"action": 1}
        assert scripted.n_connections == 2


@pytest.mark.parametrize(
    "step",
    [
        answer(200, b"<html>log in</html>", content_type="text/html"),
        answer(200, b"", content_type="text/html"),
        answer(200, {"unrelated": 1}),
        answer(200, [1]),
        answer(200, {"action": "left"}),
        OK[:20],
    ],
    ids=["a page", "nothing", "another object", "an array", "a word", "half a head"],
)
def test_a_200_that_is_no_answer_is_an_error_of_ours(scripted, client_class, step):
    # As from a captive portal or a wrong server.
    scripted.script(answer(200, DESCRIPTION))
    scripted.script(step, close_after=True)
    with client_class(scripted.url, max_retries=0) as client, pytest.raises(PolicyServingError):
        client.compute_action(np.zeros(4))


def test_a_stranger_s_description_is_an_error_of_ours(scripted, client_class):
    scripted.script(answer(200, {"hello": "world"}))
    with client_class(scripted.url, max_retries=0) as client, pytest.raises(PolicyServingError):
        client.compute_action(np.zeros(4))


def test_a_stranger_s_list_of_policies_is_an_error_of_ours(scripted, client_class):
    scripted.script(answer(200, {"hello": "world"}))
    with (
        client_class(scripted.url.removesuffix("/v1/policies/p"), max_retries=0) as client,
        pytest.raises(PolicyServingError),
    ):
        client.describe()


def test_an_asynchronous_client_tries_again_too(scripted):
    scripted.script(answer(200, DESCRIPTION), problem("overloaded", 503), CLOSE, OK)
    with async_json_client(scripted.url, backoff_s=0.0) as client:
        assert client.compute_action(np.zeros(4)) == 1
    assert len(scripted.requests) == 4


def test_an_asynchronous_client_gives_up_after_its_timeout(scripted):
    scripted.script(HANG)
    with (
        async_json_client(scripted.url, timeout_s=0.05) as client,
        pytest.raises(DeadlineExceededError),
    ):
        client.describe()
    assert len(scripted.requests) == 1


def test_an_asynchronous_client_without_a_server_is_a_connection_failure():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1/policies/p"
        with (
            async_json_client(url, max_retries=1, backoff_s=0.0) as client,
            pytest.raises(ConnectionFailedError),
        ):
            client.describe()


def test_many_at_once_each_get_their_own_answer(live_server: LiveServer, discrete):
    observations = discrete.observations(200)

    async def main() -> list[Any]:
        async with AsyncPolicyClient(
            live_server.policy_url("discrete"), max_connections=16
        ) as client:
            return await asyncio.gather(*(client.compute_action(row) for row in observations))

    expected = discrete.inputs(observations).argmax(axis=1)
    np.testing.assert_array_equal(asyncio.run(main()), expected)


def test_many_first_steps_at_once_ask_for_the_description_once(scripted):
    scripted.script(answer(200, DESCRIPTION))
    scripted.script(*[OK] * 8)
    with async_json_client(scripted.url) as client:
        assert client.gather("compute_action", [np.zeros(4)] * 8) == [1] * 8
    assert [method for method, _, _ in scripted.requests].count("GET") == 1


def test_threads_may_share_a_client(live_server: LiveServer, discrete):
    observations = discrete.observations(100)
    expected = discrete.inputs(observations).argmax(axis=1)
    with (
        PolicyClient(live_server.policy_url("discrete")) as client,
        ThreadPoolExecutor(8) as executor,
    ):
        found = list(executor.map(client.compute_action, observations))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [">f4", ">i4", np.longdouble])
def test_numbers_of_any_byte_order_and_width_are_sent(live_server, any_client, dtype):
    with any_client(live_server.policy_url("discrete")) as client:
        assert client.compute_action(np.zeros(4, dtype)) == client.compute_action(np.zeros(4))


def test_a_body_over_the_limit_is_the_servers_error_and_not_a_broken_connection(live_server):
    observations = np.full((40_000, 4), 0.123456, dtype=np.float32)
    with PolicyClient(live_server.url, policy="discrete", max_retries=0) as client:
        with pytest.raises(BodyTooLargeError):
            client.compute_actions(observations)
        assert client.compute_action(np.zeros(4)) in range(3)


def test_an_answer_is_asked_for_with_any_number_that_json_can_write(live_server):
    with PolicyClient(live_server.url, policy="discrete") as client:
        with pytest.raises(InvalidObservationError):
            client.answer({"observation": [float("nan"), 0, 0, 0]})
        with pytest.raises(InvalidRequestError):
            client.answer({"observation": [0, 0, 0, 0], "seed": 10**30})
