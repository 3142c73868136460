"""What a policy's answers mean through the protocol, and what load does to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from serving.bundle import read_bundle
from serving.config import ServingConfig
from serving.engines.graph import GraphPolicy, load_graph
from tests.bundles import HIGH, LOW, LinearPolicy
from tests.serving.conftest import LiveServer, serving_services
from tests.serving.deadline import DEADLINE_S, wait_until
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    GOES_ON,
    MEMORY,
    OBSERVATION_SPACES,
    Summing,
    manifest_of,
    services_of,
)
from tests.serving.open_inference import Gated, assert_error, body_of, infer, outputs_of, tensor


def sampled(server: LiveServer, rows: Any, model: str = "discrete", **more: Any) -> dict[str, Any]:
    parameters = {"deterministic": False, **more}
    return outputs_of(
        infer(server, body_of(tensor("observation", rows), parameters=parameters), model=model)
    )


def test_the_most_likely_action_is_the_default_and_repeats(live_server, discrete: LinearPolicy):
    rows = discrete.observations(20)
    body = body_of(tensor("observation", rows))
    expected = discrete.answers(rows, np.zeros((20, 3)))["action"]
    for _ in range(3):
        np.testing.assert_array_equal(outputs_of(infer(live_server, body))["action"], expected)


def test_a_seed_repeats_a_sample_and_another_gives_another(live_server, discrete: LinearPolicy):
    rows = discrete.observations(50)
    first, second, other = (sampled(live_server, rows, seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first["action"], second["action"])
    assert (first["action"] != other["action"]).any()
    unseeded = [sampled(live_server, rows)["action"] for _ in range(2)]
    assert (unseeded[0] != unseeded[1]).any()


def test_a_sample_s_log_probability_is_that_of_its_distribution(live_server, discrete):
    rows = discrete.observations(50)
    found = sampled(live_server, rows, seed=3)
    logits = discrete.inputs(rows)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.log(probabilities[np.arange(50), found["action"]])
    np.testing.assert_allclose(found["action_logp"], expected, rtol=1e-4)


def test_a_masked_action_is_never_chosen(live_server: LiveServer, discrete: LinearPolicy):
    rows = discrete.observations(200)
    masks = np.random.default_rng(4).random((200, 3)) < 0.4
    masks[~masks.any(axis=1), 1] = True
    inputs = tensor("observation", rows), tensor("action_mask", masks)
    for deterministic in (True, False):
        body = body_of(*inputs, parameters={"deterministic": deterministic})
        actions = outputs_of(infer(live_server, body))["action"]
        assert masks[np.arange(200), actions].all()
        assert len(set(actions.tolist())) == 3


def test_box_actions_stay_inside_their_bounds(live_server: LiveServer, box: LinearPolicy):
    rows = 100 * box.observations(100)
    for found in (
        outputs_of(infer(live_server, body_of(tensor("observation", rows)), model="box")),
        sampled(live_server, rows, model="box"),
    ):
        assert (found["action"] >= LOW).all()
        assert (found["action"] <= HIGH).all()


def test_a_policy_without_a_critic_has_no_value_to_ask_for(live_server: LiveServer):
    rows = np.zeros((1, 4), np.float32)
    body = body_of(tensor("observation", rows), outputs=[{"name": "value"}])
    assert_error(infer(live_server, body, model="no-critic"), 400, "'value'", "action_logp")
    body = body_of(tensor("observation", rows))
    assert "value" not in outputs_of(infer(live_server, body, model="no-critic"))


def test_memory_goes_out_and_comes_back_as_tensors():
    manifest = manifest_of(
        OBSERVATION_SPACES["vector"], ACTION_SPACES["box"], state=GOES_ON, has_reward=True
    )
    policy = GraphPolicy(manifest, Summing(ACTION_SPACES["box"], manifest))
    rows = np.array([[1, 0, 0], [0, 1, 0]], np.float32)  # totals 1 and 2
    with serving_services(services_of({"p": policy}), ServingConfig()) as server:
        first = outputs_of(infer(server, body_of(tensor("observation", rows)), model="p"))
        np.testing.assert_array_equal(first["next_state/total"], [1.5, 2.5])
        rewards = np.array([1.0, 0.0], np.float32)
        body = body_of(
            tensor("observation", rows),
            tensor("state/total", first["next_state/total"]),
            tensor("reward", rewards),
        )
        second = outputs_of(infer(server, body, model="p"))
        # the state so far, the row's total, ten times the reward
        np.testing.assert_array_equal(second["next_state/total"], [12.5, 4.5])
        np.testing.assert_array_equal(second["action"], [[12.5, 13.5], [4.5, 5.5]])
        wrong = body_of(
            tensor("observation", rows), tensor("reward", np.array([np.inf, 0], np.float64))
        )
        assert_error(infer(server, json.dumps(wrong).encode(), model="p"), 400, "not JSON")
        metadata = server.request("GET", "/v2/models/p").json()
        assert metadata["properties"] == {"optional_inputs": "state/total,reward"}


def test_a_part_of_the_state_is_refused():
    manifest = manifest_of(OBSERVATION_SPACES["vector"], ACTION_SPACES["box"], state=MEMORY)
    policy = GraphPolicy(manifest, Summing(ACTION_SPACES["box"], manifest))
    with serving_services(services_of({"p": policy}), ServingConfig()) as server:
        body = body_of(
            tensor("observation", np.zeros((1, 3), np.float32)),
            tensor("state/frames", np.zeros((1, 2, 3), np.float32)),
        )
        assert_error(infer(server, body, model="p"), 400, "'state/total' is missing")


@contextlib.contextmanager
def gated(path: Path, **settings: Any) -> Iterator[tuple[LiveServer, Gated]]:
    """A server whose policy computes when the test lets it."""
    bundle = read_bundle(path)
    graph = Gated(load_graph(bundle))
    services = services_of({"discrete": GraphPolicy(bundle.manifest, graph)}, **settings)
    with serving_services(services, ServingConfig(**settings)) as server:
        graph.close_gate()
        try:
            yield server, graph
        finally:
            graph.gate.set()
            # What runs has to end before the event loop does.
            assert infer(server, GOOD).status == 200


ROWS = np.zeros((3, 4), np.float32)
GOOD = body_of(tensor("observation", ROWS), outputs=[{"name": "action"}])


def triton_input(rows: Any) -> triton.InferInput:
    given = triton.InferInput("observation", list(rows.shape), "FP32")
    given.set_data_from_numpy(rows)
    return given


def test_a_full_queue_answers_503_and_recovers(bundles: dict[str, Path]):
    with gated(bundles["discrete"], max_queue_size=4) as (server, graph):

        async def main() -> list[Any]:
            address = f"{server.host}:{server.port}"
            async with triton_aio.InferenceServerClient(address, conn_limit=12) as client:
                asked = (client.infer("discrete", [triton_input(ROWS)]) for _ in range(12))
                open_calls = {asyncio.ensure_future(each) for each in asked}
                calls = list(open_calls)
                while len(open_calls) > 2:
                    _, open_calls = await asyncio.wait(
                        open_calls, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
                    )
                graph.gate.set()
                return await asyncio.gather(*calls, return_exceptions=True)

        results = asyncio.run(main())
        refusals = [each for each in results if isinstance(each, InferenceServerException)]
        assert {each.status() for each in refusals} == {"503"}
        assert "observations are waiting" in refusals[0].message()
        answers = [each for each in results if each not in refusals]
        assert len(answers) in (1, 2)  # the second has a place if the first began before it came
        assert answers[0].as_numpy("action").shape == (3,)
        assert infer(server, GOOD).status == 200


def test_an_overloaded_answer_says_when_to_come_again(bundles: dict[str, Path]):
    with gated(bundles["discrete"], max_queue_size=1, retry_after_s=9) as (server, graph):
        batcher = server.services.require("discrete").batcher
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(infer, server, GOOD) for _ in range(2)]
            wait_until(lambda: batcher.queue_size == 3, "a full queue")
            response = infer(server, GOOD)
            assert_error(response, 503, "waiting")
            assert response.headers["retry-after"] == "9"
            graph.gate.set()
            assert 200 in [each.result(DEADLINE_S).status for each in waiting]


def test_a_timeout_in_microseconds_is_kept(bundles: dict[str, Path]):
    with gated(bundles["discrete"]) as (server, _):
        response = infer(server, {**GOOD, "parameters": {"timeout": 20_000}})
        assert_error(response, 504, "20")
        with triton.InferenceServerClient(f"{server.host}:{server.port}") as client:
            with pytest.raises(InferenceServerException) as info:
                client.infer("discrete", [triton_input(ROWS)], timeout=10_000)
            assert info.value.status() == "504"


def test_requests_that_wait_together_run_together(bundles: dict[str, Path]):
    with gated(bundles["discrete"]) as (server, graph):
        batcher = server.services.require("discrete").batcher

        async def main() -> list[Any]:
            address = f"{server.host}:{server.port}"
            async with triton_aio.InferenceServerClient(address, conn_limit=64) as client:
                given = triton_input(np.zeros((1, 4), np.float32))
                calls = asyncio.gather(*(client.infer("discrete", [given]) for _ in range(64)))
                await asyncio.to_thread(
                    wait_until, lambda: batcher.queue_size >= 32, "a queue of requests"
                )
                graph.gate.set()
                return await asyncio.wait_for(calls, DEADLINE_S)

        assert len(asyncio.run(main())) == 64
        with triton.InferenceServerClient(f"{server.host}:{server.port}") as client:
            (found,) = client.get_inference_statistics("discrete")["model_stats"]
        assert found["inference_count"] == 64
        assert 1 <= found["execution_count"] <= 33


def half_request(server: LiveServer) -> socket.socket:
    connection = server.connect()
    connection.sendall(
        b"POST /v2/models/discrete/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
    )
    return connection


def test_a_half_sent_body_blocks_nobody(live_server: LiveServer):
    slow = [half_request(live_server) for _ in range(20)]
    try:
        assert outputs_of(infer(live_server, GOOD))["action"].shape == (3,)
    finally:
        for connection in slow:
            connection.close()
    assert infer(live_server, GOOD).status == 200


def test_a_client_that_hangs_up_frees_its_place(bundles: dict[str, Path]):
    with gated(bundles["discrete"]) as (server, graph):
        batcher = server.services.require("discrete").batcher
        data = json.dumps(GOOD).encode()
        head = (
            b"POST /v2/models/discrete/infer HTTP/1.1\r\nhost: x\r\n"
            b"content-length: %d\r\n\r\n" % len(data)
        )
        connections = [server.connect() for _ in range(5)]
        connections[0].sendall(head + data)
        wait_until(lambda: graph.n_begun == 1, "a batch of the first caller alone")
        for connection in connections[1:]:
            connection.sendall(head + data)
        wait_until(lambda: batcher.queue_size == 12, "the others' waiting")
        for connection in connections:
            connection.close()
        wait_until(lambda: all(each.is_over for each in batcher._waiting), "their being missed")
        graph.gate.set()
        assert infer(server, GOOD).status == 200
        assert graph.n_rows == 3 + 3  # nobody else's rows were computed


def test_one_caller_s_bad_tensor_does_not_hurt_another(live_server: LiveServer):
    bad = body_of(tensor("observation", np.full((1, 4), 1e300)))

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        bodies = [GOOD, bad] * 10
        return await asyncio.gather(
            *(loop.run_in_executor(None, infer, live_server, body) for body in bodies)
        )

    statuses = [response.status for response in asyncio.run(main())]
    assert statuses == [200, 400] * 10
