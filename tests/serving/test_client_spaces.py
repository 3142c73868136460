"""Clients of policies with any space, memory, masks and rewards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from serving.client import PolicyClient
from serving.config import ServingConfig
from serving.errors import (
    InvalidObservationError,
    InvalidRequestError,
    UnexpectedAnswerError,
)
from serving.interface import Policy
from serving.stream_client import StreamClient
from tests.serving.clients import json_client, msgpack_client
from tests.serving.conftest import LiveServer, serving_services
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    MEMORY,
    OBSERVATION_SPACES,
    action_of,
    sample,
    services_of,
    summing_policy,
    total_of,
)
from tests.serving.scripted_http import (
    BOX,
    DESCRIPTION,
    DISCRETE,
    OK,
    answer,
)

VECTOR = gym.spaces.Box(-1, 1, (2,), np.float32)


@pytest.fixture(scope="module")
def any_pair() -> Iterator[LiveServer]:
    """Policies named by their spaces, and `memory`, `masked`."""
    policies = {
        f"{observation}.{action}": summing_policy(
            OBSERVATION_SPACES[observation], ACTION_SPACES[action]
        )
        for observation in OBSERVATION_SPACES
        for action in ACTION_SPACES
    }
    policies["memory"] = summing_policy(
        VECTOR, ACTION_SPACES["dict"], state=MEMORY, has_reward=True
    )
    policies["masked"] = summing_policy(VECTOR, gym.spaces.Discrete(3), has_mask=True)
    with serving_services(services_of(policies), ServingConfig()) as server:
        yield server


def nested(rows: list[Any]) -> Any:
    """The batch as Gymnasium nests it."""
    if isinstance(rows[0], dict):
        return {key: nested([row[key] for row in rows]) for key in rows[0]}
    if isinstance(rows[0], tuple):
        return tuple(nested(list(column)) for column in zip(*rows, strict=True))
    return np.stack(rows)


def assert_of_space(found: Any, expected: Any, space: gym.Space[Any]) -> None:
    """An action in the environment's own form."""
    assert space.contains(found)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, each in expected.items():
            assert_of_space(found[key], each, space[key])  # type: ignore[index]
    elif isinstance(expected, tuple):
        for left, right, child in zip(found, expected, space, strict=True):  # type: ignore[call-overload]
            assert_of_space(left, right, child)
    else:
        assert found.dtype == space.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("make", [json_client, msgpack_client, StreamClient])
@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
def test_any_space_is_stepped_as_gymnasium_gives_it(
    any_pair, observation: str, action: str, make: Any
):
    rows = sample(OBSERVATION_SPACES[observation], 3)
    space = ACTION_SPACES[action]
    expected = [action_of(space, total_of(row)) for row in rows]
    with make(any_pair.policy_url(f"{observation}.{action}")) as client:
        assert_of_space(client.compute_action(rows[0]), expected[0], space)
        for observations in (rows, nested(rows)):
            output = client.compute_actions(observations, outputs=["q_values"])
            assert len(output) == 3
            assert output.state is None
            assert output.q_values is not None
            assert output.q_values.shape == (3, 1)
            for found, wanted in zip(output, expected, strict=True):
                assert_of_space(found, wanted, space)


def test_a_remote_policy_of_any_space_is_a_policy(any_pair):
    with PolicyClient(any_pair.policy_url("dict.tuple")) as client:
        assert isinstance(client, Policy)


def test_a_loop_of_steps_carries_state_and_reward(any_pair, any_client):
    rows = [np.array([k / 4, 1.0], np.float32) for k in range(6)]
    remembered = 0.5  # as MEMORY starts
    state, reward = None, None
    space = ACTION_SPACES["dict"]
    with any_client(any_pair.policy_url("memory")) as client:
        for row in rows:
            remembered += total_of(row) + 10 * (reward or 0.0)
            action, state = client.step(row, state, reward)
            assert state["total"] == remembered
            assert (state["frames"].shape, state["frames"].dtype) == ((2, 3), np.float32)
            assert_of_space(
                action, action_of(ACTION_SPACES["dict"], remembered), ACTION_SPACES["dict"]
            )
            reward = 0.25
        # Without the state it starts again.
        again = client.compute_action(rows[0])
        assert again["turn"] == action_of(space, 0.5 + total_of(rows[0]))["turn"]
        kept = client.compute_action(rows[0], state=state)
        assert kept["a/b"][0] == remembered + total_of(rows[0])


def test_the_states_of_many_are_given_back_whole_or_row_by_row(any_pair, any_client):
    rows = np.array([[1, 0], [2, 0], [3, 0]], np.float32)
    with any_client(any_pair.policy_url("memory")) as client:
        first = client.compute_actions(rows)
        np.testing.assert_array_equal(first.state["total"], [1.5, 2.5, 3.5])
        assert first.state["frames"].shape == (3, 2, 3)
        second = client.compute_actions(rows, state=first.state, rewards=[0, 0, 1])
        np.testing.assert_array_equal(second.state["total"], [2.5, 4.5, 16.5])
        row = {name: values[2] for name, values in first.state.items()}
        mixed = client.compute_actions(rows, state=[None, row, None])
        np.testing.assert_array_equal(mixed.state["total"], [1.5, 5.5, 3.5])
        none = client.compute_actions(rows, state=[None] * 3)
        np.testing.assert_array_equal(none.state["total"], first.state["total"])


def test_masks_are_kept_by_one_and_by_many(any_pair, any_client):
    rows = np.zeros((3, 2), np.float32)
    with any_client(any_pair.policy_url("masked")) as client:
        # Zeros want the first action.
        assert client.compute_action(rows[0]) == 0
        assert client.compute_action(rows[0], action_mask=[0, 0, 1]) == 2
        masks = [[0, 1, 0], None, np.array([False, False, True])]
        np.testing.assert_array_equal(
            client.compute_actions(rows, action_mask=masks).actions, [1, 0, 2]
        )
        masks = np.array([[0, 1, 1]] * 3, np.int8)
        np.testing.assert_array_equal(client.compute_actions(rows, action_mask=masks), [1] * 3)
        with pytest.raises(InvalidRequestError) as caught:
            client.compute_actions(rows, action_mask=np.zeros((3, 3), bool))
        assert caught.value.details["pointer"] == "/action_mask/0"


def test_a_reward_goes_only_to_a_policy_that_reads_it(scripted):
    takes = {**DESCRIPTION, "takes": {"reward": True}}
    for described, expected in ((DESCRIPTION, None), (takes, 1.5)):
        answers = [answer(200, {"action": 1}), answer(200, {"actions": [1]})]
        scripted.script(answer(200, described), *answers)
        with json_client(scripted.url) as client:
            client.step(np.zeros(4), None, 1.5)
            client.compute_actions(np.zeros((1, 4)), rewards=np.array([1.5]))
        one, many = (json.loads(body) for _, _, body in scripted.requests[-2:])
        assert one.get("reward") == expected
        assert many.get("rewards") == (expected and [expected])


@pytest.mark.parametrize(
    ("call", "error", "pointer"),
    [
        (
            lambda client: client.compute_action({"a": [1.0, np.nan], "b~/": 1}),
            InvalidObservationError,
            "/observation/a",
        ),
        (
            lambda client: client.compute_action({"a": [1.0], "b~/": "text"}),
            InvalidObservationError,
            "/observation/b~0~1",
        ),
        (
            lambda client: client.compute_actions([{"a": [1.0]}, {"a": [np.inf]}]),
            InvalidObservationError,
            "/observations/1/a",
        ),
        (
            lambda client: client.compute_actions({"a": np.zeros((2, 1)), "b~/": [1]}),
            InvalidObservationError,
            "/observations",
        ),
        (
            lambda client: client.compute_action({}, state={"h": [np.nan]}),
            InvalidRequestError,
            "/state/h",
        ),
        (
            lambda client: client.compute_actions([{}], state=[{"h": [np.nan]}]),
            InvalidRequestError,
            "/state/0/h",
        ),
        (
            lambda client: client.compute_action({}, reward=np.nan),
            InvalidRequestError,
            "/reward",
        ),
        (
            lambda client: client.compute_actions([{}], rewards=[np.inf]),
            InvalidRequestError,
            "/rewards",
        ),
        (
            lambda client: client.compute_action({}, action_mask=[1, np.nan]),
            InvalidRequestError,
            "/action_mask",
        ),
        (lambda client: client.compute_action({}, state=[1.0]), InvalidRequestError, "/state"),
    ],
)
def test_what_cannot_be_sent_is_refused_with_its_place(scripted, call, error, pointer):
    space = {"type": "Dict", "spaces": {"a": BOX, "b~/": DISCRETE}}
    described = {**DESCRIPTION, "observation_space": space, "takes": {"reward": True}}
    scripted.script(answer(200, described))
    with json_client(scripted.url) as client:
        with pytest.raises(error) as caught:
            call(client)
        assert caught.value.details["pointer"] == pointer
    assert [method for method, _, _ in scripted.requests] == ["GET"]


def test_another_structure_is_named_by_its_place(any_pair, any_client):
    with any_client(any_pair.policy_url("dict.box")) as client:
        for wrong in (np.zeros(3), {"class": 1}, [1.0, 2.0]):
            with pytest.raises(InvalidObservationError) as caught:
                client.compute_action(wrong)
            assert caught.value.details["pointer"].startswith("/observation")


@pytest.mark.parametrize(
    "step",
    [{"action": 1}, {"action": {"turn": 1}}, {"action": {"turn": "x", "grip": 0}}, {"action": [1]}],
)
def test_an_action_of_another_space_is_an_error_of_ours(scripted, client_class, step):
    space = {"type": "Dict", "spaces": {"turn": DISCRETE, "grip": DISCRETE}}
    scripted.script(answer(200, {**DESCRIPTION, "action_space": space}), answer(200, step))
    with (
        client_class(scripted.url, max_retries=0) as client,
        pytest.raises(UnexpectedAnswerError),
    ):
        client.compute_action(np.zeros(4))


def test_an_answer_without_the_described_state_is_an_error_of_ours(scripted, client_class):
    state = {"h": {"dtype": "float32", "shape": [2], "initial": 0}}
    scripted.script(answer(200, {**DESCRIPTION, "state": state}), OK, answer(200, {"actions": [1]}))
    with client_class(scripted.url, max_retries=0) as client:
        with pytest.raises(UnexpectedAnswerError):
            client.step(np.zeros(4))
        with pytest.raises(UnexpectedAnswerError):
            client.compute_actions(np.zeros((1, 4)))
