"""The contract of a policy, over every engine and over the wire."""

from __future__ import annotations

import numpy as np
import pytest

from serving.client import PolicyClient
from serving.engines.graph import GraphPolicy
from tests.serving.conftest import LiveServer
from tests.serving.policy_contract import ContractCase, PolicyContract


class TestGraphPolicy(PolicyContract):
    @pytest.fixture(params=["discrete", "box"])
    def case(self, request, discrete, box, graph_policies) -> ContractCase:
        reference = {"discrete": discrete, "box": box}[request.param]
        return ContractCase(graph_policies[request.param], reference)


class TestPolicyClient(PolicyContract):
    @pytest.fixture(params=["discrete", "box"])
    def case(self, request, discrete, box, live_server):
        reference = {"discrete": discrete, "box": box}[request.param]
        with PolicyClient(live_server.policy_url(request.param)) as client:
            yield ContractCase(client, reference)


@pytest.mark.parametrize("name", ["discrete", "box"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_served_policy_is_the_same_function_bit_for_bit(
    name: str,
    deterministic: bool,
    live_server: LiveServer,
    graph_policies: dict[str, GraphPolicy],
):
    width = graph_policies[name].manifest.observation_space.shape[0]
    observations = np.random.default_rng(0).normal(size=(64, width)).astype(np.float32)
    asked = ("action_logp", "value", "action_dist_inputs")
    arguments = {"deterministic": deterministic, "seed": 5, "outputs": asked}
    here = graph_policies[name].compute_actions(observations, **arguments)
    with PolicyClient(live_server.policy_url(name)) as client:
        there = client.compute_actions(observations, **arguments)
    for output in ("actions", *asked):
        np.testing.assert_array_equal(getattr(here, output), getattr(there, output))
