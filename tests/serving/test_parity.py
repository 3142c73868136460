"""The comparison: what counts as the same answer, and what as another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serving.manifest import StateSpec
from serving.parity import (
    TOLERANCE,
    action_scales,
    action_scores,
    compare,
    describe_mismatches,
    replay,
    run_in_batches,
)
from serving.spaces import DiscreteSpace, space_from_json

DISCRETE = DiscreteSpace(3)
MULTI = space_from_json(
    {"type": "MultiDiscrete", "nvec": [2, 3], "start": [0, 0], "dtype": "int64"}
)
TUPLE = space_from_json(
    {
        "type": "Tuple",
        "spaces": [
            {"type": "Discrete", "n": 2, "start": 0},
            {"type": "Box", "shape": [2], "dtype": "float32", "low": None, "high": None},
            {"type": "MultiDiscrete", "nvec": [2, 2], "start": [0, 0], "dtype": "int64"},
        ],
    }
)
NEAR, FAR = 0.5 * TOLERANCE, 10 * TOLERANCE


def discrete_scores(scores: Any, **inputs: Any) -> Any:
    expected = {"action_dist_inputs": np.array(scores, np.float32)}
    return action_scores(DISCRETE, {name: np.array(v) for name, v in inputs.items()}, expected)


def compare_actions(expected: Any, found: Any, scores: Any, name: str = "action") -> Any:
    (item,) = compare({name: np.array(expected)}, {name: np.array(found)}, scores=scores)
    return item


def test_where_two_actions_tie_either_is_right():
    scores = discrete_scores([[0.0, 1.0, 1.0 + NEAR], [0.0, 1.0, 1.0 + FAR]])
    same = compare_actions([2, 2], [2, 2], scores)
    tie = compare_actions([2, 2], [1, 2], scores)
    mistake = compare_actions([2, 2], [2, 1], scores)
    assert [item.n_mismatched for item in (same, tie, mistake)] == [0, 0, 1]
    assert mistake.first_mismatch == (1,)


def test_in_a_tie_an_action_that_is_neither_of_the_two_best_is_wrong():
    scores = discrete_scores([[-9.0, 1.0, 1.0]])
    assert compare_actions([2], [0], scores).n_mismatched == 1


@pytest.mark.parametrize("found", [-1, 3, 10**9])
def test_a_number_that_is_no_action_is_wrong(found: int):
    scores = discrete_scores([[1.0, 1.0, 1.0]])
    assert compare_actions([0], [found], scores).n_mismatched == 1


def test_where_rllib_itself_is_not_the_best_nothing_excuses_a_difference():
    scores = discrete_scores([[0.0, 1.0, 1.0]])
    assert compare_actions([0], [1], scores).n_mismatched == 1


def test_ties_of_sampled_actions_are_judged_with_their_noise():
    scores = discrete_scores([[0.0, 1.0, 5.0]], noise=[[6.0, 5.0, 0.0]])  # 6, 6, 5
    found = {"sampled_action": np.array([0]), "action": np.array([1])}
    expected = {"sampled_action": np.array([1]), "action": np.array([2])}
    sampled, greedy = compare(expected, found, scores=scores)
    assert (sampled.n_mismatched, greedy.n_mismatched) == (0, 1)


def test_a_forbidden_action_is_no_tie():
    tied = [[1.0, 1.0, 0.0]]
    assert compare_actions([0], [1], discrete_scores(tied)).n_mismatched == 0
    masked = discrete_scores(tied, action_mask=[[True, False, True]])
    assert compare_actions([0], [1], masked).n_mismatched == 1
    beyond = discrete_scores(tied, action_mask=[[True, False, True]], noise=[[0.0, 9.0, 0.0]])
    assert compare_actions([0], [1], beyond, "sampled_action").n_mismatched == 1


def test_without_scores_integers_have_to_be_equal():
    assert action_scores(DISCRETE, {}, {"action": np.array([1])}) == {}
    assert compare_actions([1, 2], [1, 2], {}).n_mismatched == 0
    assert compare_actions([1, 2], [1, 1], {}).first_mismatch == (1,)


def test_q_values_decide_where_there_is_no_distribution():
    q_values = np.array([[1.0, 1.0, 0.0]], np.float32)
    scores = action_scores(DISCRETE, {}, {"q_values": q_values})
    assert list(scores) == ["action"]
    assert compare_actions([0], [1], scores).n_mismatched == 0
    assert compare_actions([0], [2], scores).n_mismatched == 1


def test_each_component_of_a_multi_discrete_action_is_judged_alone():
    logits = np.array([[1.0, 1.0, 0.0, 2.0, 1.0]] * 4, np.float32)  # a tie, and none
    scores = action_scores(MULTI, {"noise": np.zeros((4, 5))}, {"action_dist_inputs": logits})
    expected = np.array([[0, 1]] * 4)
    found = np.array([[0, 1], [1, 1], [0, 2], [1, 2]])
    item = compare_actions(expected, found, scores)
    assert (item.n_mismatched, item.first_mismatch) == (2, (2,))
    assert compare_actions(expected, found, scores, "sampled_action").n_mismatched == 2


def test_the_scores_of_nested_actions_are_split_in_the_order_of_the_leaves():
    # Discrete(2); Box(2): two means, two log standard deviations; MultiDiscrete([2, 2]).
    inputs = np.array([[1.0, 2.0, 0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0]], np.float32)
    noise = np.array([[10.0, 20.0, -1.0, -2.0, 30.0, 40.0, 50.0, 60.0]], np.float32)
    scores = action_scores(TUPLE, {"noise": noise}, {"action_dist_inputs": inputs})
    found = {name: [part.tolist() for part in parts] for name, parts in scores.items()}
    assert found == {
        "action/0": [[[1.0, 2.0]]],
        "sampled_action/0": [[[11.0, 22.0]]],
        "action/2": [[[5.0, 6.0]], [[7.0, 8.0]]],
        "sampled_action/2": [[[35.0, 46.0]], [[57.0, 68.0]]],
    }


def test_what_follows_from_another_action_that_is_as_good_is_not_compared():
    scores = discrete_scores([[0.0, 1.0, 0.0]] * 2, noise=[[1.0, 0.0, 0.0]] * 2)
    expected = {
        "sampled_action": np.array([0, 0]),
        "sampled_action_logp": np.array([-2.0, -2.0], np.float32),
        "sampled_next_state/previous": np.array([[1.0, 0.0], [1.0, 0.0]], np.float32),
        "action_logp": np.array([-1.0, -1.0], np.float32),
        "value": np.array([0.0, 0.0], np.float32),
    }
    found = {
        "sampled_action": np.array([1, 0]),
        "sampled_action_logp": np.array([-1.0, -2.5], np.float32),
        "sampled_next_state/previous": np.array([[0.0, 1.0], [0.0, 1.0]], np.float32),
        "action_logp": np.array([-2.0, -1.0], np.float32),
        "value": np.array([1.0, 0.0], np.float32),
    }
    items = {item.name: item for item in compare(expected, found, scores=scores)}
    assert list(items) == list(expected)
    assert {name: item.first_mismatch for name, item in items.items()} == {
        "sampled_action": None,
        "sampled_action_logp": (1,),
        "sampled_next_state/previous": (1,),
        "action_logp": (0,),
        "value": (0,),
    }


@pytest.mark.parametrize(
    ("expected", "found", "is_same"),
    [
        (1.0, 1.0 + 1.9e-5, True),
        (1.0, 1.0 + 2.1e-5, False),
        (100.0, 100.001, True),
        (0.0, np.nan, False),
        (np.nan, 0.0, False),
        (np.inf, np.inf, True),
        (-np.inf, -np.inf, True),
        (np.inf, -np.inf, False),
        (-np.inf, 0.0, False),
        (0.0, np.inf, False),
    ],
)
def test_floats_agree_relative_to_one_plus_their_size(expected: float, found: float, is_same: bool):
    (item,) = compare({"value": np.array([expected])}, {"value": np.array([found])}, scores={})
    assert (item.n_mismatched == 0) is is_same


def test_the_tolerance_may_be_wider():
    expected, found = {"value": np.array([1.0])}, {"value": np.array([1.01])}
    for tolerance, n_mismatched in ((1e-5, 1), (1e-2, 0)):
        (item,) = compare(expected, found, scores={}, tolerance=tolerance)
        assert item.n_mismatched == n_mismatched


def test_a_bounded_action_is_held_to_its_own_range():
    space = space_from_json(
        {
            "type": "Box",
            "shape": [3],
            "dtype": "float32",
            "low": [-1000.0, -1.0, None],
            "high": [1000.0, 1.0, 1.0],
        }
    )
    scales = action_scales(space)
    assert {name: values.tolist() for name, values in scales.items()} == {
        "action": [1000.0, 1.0, 0.0],
        "sampled_action": [1000.0, 1.0, 0.0],
    }
    expected = {"action": np.zeros((4, 3)), "value": np.zeros(4)}
    found = {"action": np.zeros((4, 3)), "value": np.array([0.0, 0.0, 0.0, 9e-3])}
    found["action"][[0, 1, 2], [0, 1, 2]] = [9e-3, 9e-3, 9e-3]
    actions, values = compare(expected, found, scores={}, scales=scales)
    assert (actions.n_mismatched, actions.first_mismatch) == (2, (1,))
    assert values.first_mismatch == (3,)


def test_an_answer_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"value has the shape \(2, 1\), expected \(2,\)"):
        compare({"value": np.zeros(2)}, {"value": np.zeros((2, 1))}, scores={})


def test_a_mismatch_is_described_with_both_values():
    expected = {"value": np.array([1.0, 2.0, 3.0], np.float32)}
    found = {"value": np.array([1.0, 2.5, 3.5], np.float32)}
    comparisons = compare(expected, found, scores={})
    assert comparisons[0].max_difference == 0.5
    assert comparisons[0].max_error == pytest.approx(0.5 / 3)
    assert describe_mismatches(comparisons, expected, found) == (
        "value differs in 2 of 3 rows (row 1: RLlib 2., found 2.5)"
    )


def test_a_mismatch_of_a_step_is_described_with_its_step():
    expected = {"action": np.zeros((2, 3, 2), np.float32), "q": np.zeros((2, 3), np.int64)}
    found = {name: values.copy() for name, values in expected.items()}
    found["action"][1, 2, 1] = 1.0
    comparisons = compare(expected, found, scores={}, has_steps=True)
    assert [item.n_compared for item in comparisons] == [6, 6]
    assert describe_mismatches(comparisons, expected, found) == (
        "action differs in 1 of 6 steps (row 1, step 2: RLlib [0. 0.], found [0. 1.])"
    )


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_rows_run_in_batches_come_back_in_order(batch_size: int):
    sizes: list[int] = []

    def run(inputs: Any) -> dict[str, Any]:
        sizes.append(len(inputs["a"]))
        assert len(inputs["a"]) == len(inputs["b"])
        return {"sum": inputs["a"][:, 0] + inputs["b"][:, 0]}

    rows = np.arange(10, dtype=np.float32)[:, None]
    found = run_in_batches(run, {"a": rows, "b": rows * 10}, batch_size)
    np.testing.assert_array_equal(found["sum"], np.arange(10) * 11)
    assert max(sizes) == min(batch_size, 10)
    assert sum(sizes) == 10


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_episodes_are_replayed_from_the_initial_state_along_the_actions_taken(batch_size: int):
    """total counts the observations; bet doubles when greedy and is lost when sampled."""

    def run(names: Any, inputs: Any) -> dict[str, Any]:
        total = inputs["state/total"] + inputs["observation"]
        answers = {
            "action": total + inputs["state/bet"],
            "next_state/total": total,
            "next_state/bet": inputs["state/bet"] * 2,
            "sampled_next_state/bet": inputs["state/bet"] * 0,
        }
        return {name: answers[name] for name in names}

    state = {
        "total": StateSpec("float32", (), np.array(10.0, np.float32)),
        "bet": StateSpec("float32", (), np.array(1.0, np.float32)),
    }
    inputs = {
        "observation": np.array([[1, 2, 3], [0, 0, 0], [5, 5, 5]], np.float32),
        "is_sampled": np.array([[False, False, False], [True, False, False], [False, True, True]]),
    }
    names = ["action", "next_state/total", "next_state/bet", "sampled_next_state/bet"]
    found = replay(run, inputs, state, names, batch_size)
    assert found["state/total"].tolist() == [[10, 11, 13], [10, 10, 10], [10, 15, 20]]
    assert found["state/bet"].tolist() == [[1, 2, 4], [1, 0, 0], [1, 2, 0]]
    assert found["action"].tolist() == [[12, 15, 20], [11, 10, 10], [16, 22, 25]]
    assert state["bet"].initial == 1.0
