"""Real bundles of every kind over real HTTP: what comes back is what NumPy says."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from serving.client import PolicyClient
from serving.spaces import flatten, space_from_json
from tests.bundles import discrete_policy
from tests.serving.conftest import LiveServer, serving
from tests.tiny_policies import TINY_POLICIES, TinyPolicy, memory_policy

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def divide_by_norm(model: onnx.ModelProto) -> None:
    """Multiply a row by norm / norm: itself, but NaN where it is all zeros."""
    nodes = list(model.graph.node)
    for node in nodes[1:]:
        node.input[:] = ["checked" if name == "rows" else name for name in node.input]
    added = [
        helper.make_node("ReduceL2", ["rows", "last"], ["norm"], keepdims=1),
        helper.make_node("Div", ["norm", "norm"], ["one"]),
        helper.make_node("Mul", ["rows", "one"], ["checked"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend([nodes[0], *added, *nodes[1:]])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root: Path = tmp_path_factory.mktemp("tiny")
    bundles = {name: make().save(root / name) for name, make in TINY_POLICIES.items()}
    bundles["direction"] = discrete_policy().save(root / "direction", damage_model=divide_by_norm)
    with serving(bundles) as running:
        yield running


@pytest.mark.parametrize("name", [name for name in TINY_POLICIES if name != "memory"])
def test_a_served_bundle_answers_as_its_twin(server: LiveServer, name: str):
    policy = TINY_POLICIES[name]()
    inputs = policy.observation_arrays(9, seed=1)
    for spec, (_, shape) in policy.inputs.items():
        if spec == "action_mask":
            inputs[spec] = np.ones((9, shape[1]), np.bool_)
            inputs[spec][::2, 0] = False
        elif spec == "noise":
            inputs[spec] = np.zeros((9, shape[1]), np.float32)
    expected = policy.answers(inputs)
    scores = [each for each in ("action_logp", "value", "q_values") if each in policy.outputs]
    with PolicyClient(server.policy_url(name)) as client:
        output = client.compute_actions(
            policy.observations(9, seed=1), outputs=scores, action_mask=inputs.get("action_mask")
        )
        space = space_from_json(client.describe()["action_space"])
    for action, values in flatten(space, "action", output.actions).items():
        np.testing.assert_allclose(values, expected[action], **CLOSE)
    for each in scores:
        np.testing.assert_allclose(getattr(output, each), expected[each], **CLOSE)


@pytest.fixture(scope="module")
def episodes() -> tuple[TinyPolicy, dict[str, Any], dict[str, Any]]:
    """A policy with memory, 8 episodes of 12 steps, and what it does in them when greedy."""
    policy = memory_policy()
    flat = policy.random_inputs(np.random.default_rng(4), 8 * 12)
    inputs = {name: values.reshape(8, 12, *values.shape[1:]) for name, values in flat.items()}
    inputs["reward"][:, 0] = 0.0
    inputs["is_sampled"] = np.zeros((8, 12), np.bool_)
    return policy, inputs, policy.play(inputs)


def test_episodes_played_together_are_those_of_the_twin(server: LiveServer, episodes: Any):
    policy, inputs, expected = episodes
    state = None
    with PolicyClient(server.policy_url("memory")) as client:
        for step in range(12):
            output = client.compute_actions(
                inputs["observation"][:, step],
                state=state,
                rewards=inputs["reward"][:, step],
                action_mask=inputs["action_mask"][:, step],
            )
            state = output.state
            np.testing.assert_array_equal(output.actions, expected["action"][:, step])
            for name in policy.state:
                np.testing.assert_allclose(
                    state[name], expected[f"next_state/{name}"][:, step], **CLOSE
                )


def test_callers_that_meet_in_batches_each_play_their_own_episode(server: LiveServer, episodes):
    _, inputs, expected = episodes

    def play(index: int) -> list[int]:
        state = reward = None
        actions = []
        with PolicyClient(server.policy_url("memory")) as client:
            for step in range(12):
                action, state = client.step(
                    inputs["observation"][index, step],
                    state,
                    reward,
                    action_mask=inputs["action_mask"][index, step],
                )
                reward = inputs["reward"][index, step + 1] if step < 11 else None
                actions.append(int(action))
        return actions

    with ThreadPoolExecutor(8) as executor:
        for _ in range(5):
            assert list(executor.map(play, range(8))) == expected["action"].tolist()


def test_a_sampled_action_is_remembered_as_the_one_that_was_taken(server: LiveServer):
    row = np.zeros(2, np.float32)
    seen = set()
    with PolicyClient(server.policy_url("memory")) as client:
        for seed in range(30):
            action, state = client.step(row, deterministic=False, seed=seed)
            np.testing.assert_array_equal(state["previous"], np.eye(2)[action])
            seen.add(int(action))
    assert seen == {0, 1}


def test_a_policy_of_q_values_refuses_to_sample(server: LiveServer):
    body = {"observation": [0, 0, 0], "deterministic": False}
    response = server.post("q", body)
    assert (response.status, response.json()["pointer"]) == (422, "/deterministic")
    fine = server.post("q", {"observation": [0, 0, 0], "outputs": ["q_values"]}).json()
    assert fine["action"] == int(np.argmax(fine["q_values"]))


@pytest.mark.parametrize(
    "asked",
    [
        {"action_mask": [0, 1, 1]},
        {"action_mask": [0, 1, 1], "deterministic": False},
        {"outputs": ["action_logp"]},
        {"outputs": ["value"], "deterministic": False},
        {"outputs": ["action_dist_inputs"]},
    ],
    ids=str,
)
def test_a_network_that_answers_nan_is_an_error_for_that_observation(server: LiveServer, asked):
    response = server.post("direction", {"observation": [0, 0, 0, 0], **asked})
    assert (response.status, response.json()["code"]) == (500, "inference_failed")
    assert server.post("direction", {"observation": [1, 0, 0, 0], **asked}).status == 200
