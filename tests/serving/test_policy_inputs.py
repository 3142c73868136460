"""State, rewards and masks: what is taken, what is refused and where, what stands in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.bundle import read_bundle
from serving.errors import InvalidRequestError
from serving.policy_inputs import PolicyInputs


@pytest.fixture
def inputs(tiny_bundles: dict[str, Path]) -> dict[str, PolicyInputs]:
    return {name: PolicyInputs(read_bundle(path).manifest) for name, path in tiny_bundles.items()}


def state(**changes: Any) -> dict[str, Any]:
    return {"h": [0.0, 1.0], "previous": [1.0, 0.0], **changes}


def test_a_state_is_taken_as_arrays_or_row_by_row(inputs):
    memory = inputs["memory"]
    arrays = {"h": np.array([[0.0, 1.0], [0.25, 0.25]]), "previous": [[1, 0], [0, 0]]}
    for given in (arrays, [state(), None], (state(), None)):
        found = memory.conform_state(given, 2)
        assert list(found) == ["state/h", "state/previous"]
        assert all(array.dtype == np.float32 for array in found.values())
        assert found["state/h"].tolist() == [[0.0, 1.0], [0.25, 0.25]]
        assert found["state/previous"].tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_no_row_with_a_state_is_the_initial_one(inputs):
    found = inputs["memory"].conform_state([None, None, None], 3)
    assert found["state/h"].tolist() == [[0.25, 0.25]] * 3
    assert found["state/previous"].tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize(
    ("values", "pointer", "found"),
    [
        ([state(), state(h=[0.0, float("nan")])], "/state/1/h/1", "nan"),
        ([state(), state(h=[0.0])], "/state/1/h", "shape"),
        ([state(), state(h=None)], "/state/1/h", "shape"),
        ([state(), state(h=["a", "b"])], "/state/1/h", "<U1"),
        ([state(), {"h": [0.0, 1.0]}], "/state/1", r"expected h .Box\(2,\) float32., previous"),
        ([state(), state(c=[1.0])], "/state/1", "'c'"),
        ([state(), 5], "/state/1", "int"),
        ([state()], "/state", "found 1 rows, expected 2"),
        ({"h": np.zeros((2, 2))}, "/state", "previous"),
        ({"h": np.zeros((3, 2)), "previous": np.zeros((2, 2))}, "/state/h", "found 3 rows"),
        ({"h": np.zeros((2, 3)), "previous": np.zeros((2, 2))}, "/state/h", "shape"),
        ({"h": np.full((2, 2), np.inf), "previous": np.zeros((2, 2))}, "/state/0/h/0", "inf"),
        ("state", "/state", "str"),
        (5, "/state", "int"),
    ],
    ids=str,
)
def test_a_state_that_is_not_the_policy_s_is_refused_with_its_place(
    inputs, values: Any, pointer: str, found: str
):
    with pytest.raises(InvalidRequestError, match=found) as caught:
        inputs["memory"].conform_state(values, 2)
    assert caught.value.details["pointer"] == pointer


def test_a_policy_without_memory_takes_no_state_but_an_empty_one(inputs):
    for nothing in ({}, [None, None], [{}, {}]):
        assert inputs["dict"].conform_state(nothing, 2) == {}
    for something in ({"h": [[1.0]]}, [{"h": [1.0]}, None]):
        with pytest.raises(InvalidRequestError, match="no memory"):
            inputs["dict"].conform_state(something, 2)


@pytest.mark.parametrize(
    "values",
    [
        [[1, 0, 1], [1, 1, 1]],
        [[True, False, True], None],
        np.array([[1, 0, 1], [1, 1, 1]], np.int8),
        np.array([[1, 0, 1], [1, 1, 1]], np.bool_),
        [np.array([1, 0, 1], np.int8), None],
    ],
    ids=str,
)
def test_masks_are_taken_as_bools_or_as_zeros_and_ones(inputs, values: Any):
    found = inputs["dict"].conform_masks(values, 2)["action_mask"]
    assert found.dtype == np.bool_
    assert found.tolist() == [[True, False, True], [True, True, True]]


@pytest.mark.parametrize(
    ("values", "pointer", "found"),
    [
        ([[1, 1, 1], [0, 0, 0]], "/action_mask/1", r"none of the actions 0\.\.2"),
        ([[1, 1, 1], [1, 2, 1]], "/action_mask/1/1", "found 2, expected 0, 1"),
        ([[1, 1, 1], [1, 1]], "/action_mask/1", "shape"),
        ([[1, 1, 1], ["yes", "no", "no"]], "/action_mask/1", "<U"),
        ([[1, 1, 1]], "/action_mask", "found 1 rows, expected 2"),
        ([1, 1, 1], "/action_mask/0", "shape"),
        (np.ones((2, 4)), "/action_mask", "shape"),
        (5, "/action_mask", "shape"),
    ],
    ids=str,
)
def test_a_mask_that_does_not_fit_is_refused_with_its_place(
    inputs, values: Any, pointer: str, found: str
):
    with pytest.raises(InvalidRequestError, match=found) as caught:
        inputs["dict"].conform_masks(values, 2)
    assert caught.value.details["pointer"] == pointer


def test_each_component_of_a_multi_discrete_action_needs_an_allowed_value(inputs):
    inputs["image"].conform_masks([[0, 1, 1, 0, 0]], 1)
    with pytest.raises(InvalidRequestError, match=r"none of the actions 0\.\.1"):
        inputs["image"].conform_masks([[0, 0, 1, 1, 1]], 1)
    with pytest.raises(InvalidRequestError, match=r"none of the actions 2\.\.4") as caught:
        inputs["image"].conform_masks([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], 2)
    assert caught.value.details["pointer"] == "/action_mask/1"


@pytest.mark.parametrize("name", ["nested", "q"])
def test_a_policy_that_takes_no_mask_says_so(inputs, name: str):
    with pytest.raises(InvalidRequestError, match="takes no action_mask"):
        inputs[name].conform_masks([[1, 1, 1]], 1)


def test_rewards_are_float32_and_checked_even_where_nobody_reads_them(inputs):
    found = inputs["memory"].conform_rewards([1, 2.5], 2)["reward"]
    assert (found.dtype, found.tolist()) == (np.float32, [1.0, 2.5])
    assert inputs["dict"].conform_rewards([1, 2.5], 2) == {}
    for name in ("memory", "dict"):
        for values, pointer in (
            ([1.0, float("nan")], "/rewards/1"),
            ([1.0], "/rewards"),
            ([[1.0], [2.0]], "/rewards/0"),
            ([1.0, None], "/rewards/1"),
            (3.0, "/rewards"),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                inputs[name].conform_rewards(values, 2)
            assert caught.value.details["pointer"] == pointer


@pytest.mark.parametrize("n", [1, 64, 3, 65, 200])
def test_what_nobody_gives_has_its_default(inputs, n: int):
    observation = np.zeros((n, 2), np.float32)
    found = inputs["memory"].complete({"observation": observation}, n)
    assert found["observation"] is observation
    assert {name: array.dtype.name for name, array in found.items()} == {
        "observation": "float32",
        "state/h": "float32",
        "state/previous": "float32",
        "reward": "float32",
        "action_mask": "bool",
        "noise": "float32",
    }
    np.testing.assert_array_equal(found["state/h"], np.full((n, 2), 0.25))
    np.testing.assert_array_equal(found["reward"], np.zeros(n))
    np.testing.assert_array_equal(found["action_mask"], np.ones((n, 2)))
    np.testing.assert_array_equal(found["noise"], np.zeros((n, 2)))


def test_what_is_given_is_kept(inputs):
    noise = np.ones((1, 2), np.float32)
    assert inputs["memory"].complete({"noise": noise}, 1)["noise"] is noise


def test_noise_repeats_with_its_seed_and_a_policy_without_a_distribution_has_none(inputs):
    one, two = (inputs["nested"].draw_noise(5, seed) for seed in (1, 1))
    assert (one.shape, one.dtype) == ((5, 4), np.float32)
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, inputs["nested"].draw_noise(5, None))
    with pytest.raises(InvalidRequestError, match="no distribution") as caught:
        inputs["q"].draw_noise(1, 0)
    assert caught.value.details["pointer"] == "/deterministic"
