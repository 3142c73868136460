"""The contract of a policy, over every engine and every way over the wire."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from serving.engines.graph import GraphPolicy
from serving.spaces import flatten
from tests.serving.clients import STREAM_CLIENTS, json_client, msgpack_client
from tests.serving.conftest import LiveServer
from tests.serving.policy_contract import (
    ContractCase,
    PolicyContract,
    TinyCase,
    TinyPolicyContract,
)
from tests.tiny_policies import TINY_POLICIES

REMOTE = {"json": json_client, "msgpack": msgpack_client, **STREAM_CLIENTS}


@pytest.fixture(params=REMOTE)
def remote(request: pytest.FixtureRequest) -> Any:
    """What opens a client; a context manager."""
    return REMOTE[request.param]


class TestGraphPolicy(PolicyContract):
    @pytest.fixture(params=["discrete", "box"])
    def case(self, request, discrete, box, graph_policies) -> ContractCase:
        reference = {"discrete": discrete, "box": box}[request.param]
        return ContractCase(graph_policies[request.param], reference)


class TestRemotePolicy(PolicyContract):
    @pytest.fixture(params=["discrete", "box"])
    def case(self, request, discrete, box, live_server, remote) -> Iterator[ContractCase]:
        reference = {"discrete": discrete, "box": box}[request.param]
        with remote(live_server.policy_url(request.param)) as client:
            yield ContractCase(client, reference)


class TestPolicyOnTheOrdinaryPath(PolicyContract):
    """Through ASGI, as behind Serve's own proxy."""

    @pytest.fixture(params=["discrete", "box"])
    def case(self, request, discrete, box, ordinary_server) -> Iterator[ContractCase]:
        reference = {"discrete": discrete, "box": box}[request.param]
        with msgpack_client(ordinary_server.policy_url(request.param)) as client:
            yield ContractCase(client, reference)


class TestTinyGraphPolicy(TinyPolicyContract):
    @pytest.fixture(params=TINY_POLICIES)
    def case(self, request, tiny_policies) -> TinyCase:
        return TinyCase(tiny_policies[request.param], TINY_POLICIES[request.param]())


class TestTinyRemotePolicy(TinyPolicyContract):
    @pytest.fixture(params=TINY_POLICIES)
    def case(self, request, tiny_server, remote) -> Iterator[TinyCase]:
        with remote(tiny_server.policy_url(request.param)) as client:
            yield TinyCase(client, TINY_POLICIES[request.param]())


@pytest.mark.parametrize("name", ["discrete", "box"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_served_policy_is_the_same_function_bit_for_bit(
    name: str,
    deterministic: bool,
    live_server: LiveServer,
    graph_policies: dict[str, GraphPolicy],
    remote: Any,
):
    width = graph_policies[name].manifest.observation_space.shape[0]
    observations = np.random.default_rng(0).normal(size=(64, width)).astype(np.float32)
    asked = ("action_logp", "value", "action_dist_inputs")
    arguments = {"deterministic": deterministic, "seed": 5, "outputs": asked}
    here = graph_policies[name].compute_actions(observations, **arguments)
    with remote(live_server.policy_url(name)) as client:
        there = client.compute_actions(observations, **arguments)
    for output in ("actions", *asked):
        np.testing.assert_array_equal(getattr(here, output), getattr(there, output))


@pytest.mark.parametrize("name", TINY_POLICIES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_episodes_are_the_same_bit_for_bit_however_they_travel(
    name: str,
    deterministic: bool,
    tiny_server: LiveServer,
    tiny_policies: dict[str, GraphPolicy],
    remote: Any,
):
    reference, policy = TINY_POLICIES[name](), tiny_policies[name]
    if not (deterministic or reference.noise_size):
        return
    here = there = None
    with remote(tiny_server.policy_url(name)) as client:
        for step in range(5):
            observations = reference.observations(6, seed=step)
            arguments = {
                "deterministic": deterministic,
                "seed": step,
                "outputs": policy.available_outputs,
                "rewards": np.arange(6) * 0.1 if reference.state else None,
            }
            here = policy.compute_actions(observations, state=here and here.state, **arguments)
            there = client.compute_actions(observations, state=there and there.state, **arguments)
            space = policy.manifest.action_space
            answers = [flatten(space, "", output.actions) for output in (here, there)]
            for one, other in ((here.state or {}, there.state or {}), answers):
                assert one.keys() == other.keys()
                for key in one:
                    assert one[key].dtype == other[key].dtype
                    np.testing.assert_array_equal(one[key], other[key])
                    assert other[key].flags.writeable
            for output in policy.available_outputs:
                np.testing.assert_array_equal(getattr(here, output), getattr(there, output))
