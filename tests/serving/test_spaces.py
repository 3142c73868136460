"""Spaces as JSON and as the arrays of a batch."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest

from serving.errors import ManifestError
from serving.spaces import (
    BoxSpace,
    DiscreteSpace,
    batch_size,
    describe_space,
    flatten,
    graph_dtype,
    leaves,
    rows,
    space_from_gymnasium,
    space_from_json,
    take,
    unflatten,
)

BOXES = [
    gym.spaces.Box(-1.0, 1.0, (3,), np.float32),
    gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
    gym.spaces.Box(np.array([-4.8, -np.inf]), np.array([4.8, np.inf]), dtype=np.float64),
    gym.spaces.Box(0, 255, (2, 2, 3), np.uint8),
    gym.spaces.Box(np.array([[0.0, -np.inf]]), np.array([[np.inf, 1.0]]), dtype=np.float64),
    gym.spaces.Box(-1.0, 1.0, (), np.float32),
]
MULTI = [
    (gym.spaces.MultiDiscrete([2, 3]), "MultiDiscrete([2, 3])"),
    (
        gym.spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [2, -3]]),
        "MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [2, -3]])",
    ),
    (gym.spaces.MultiDiscrete([2, 3], dtype=np.int32), "MultiDiscrete([2, 3])"),
    (gym.spaces.MultiBinary(4), "MultiBinary(4)"),
    (gym.spaces.MultiBinary((2, 3)), "MultiBinary((2, 3))"),
]
NESTED = gym.spaces.Dict(
    {
        "z": gym.spaces.Tuple(
            [gym.spaces.Discrete(3), gym.spaces.Dict({"x": gym.spaces.MultiBinary(2)})]
        ),
        "a/b~c": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
    }
)


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_a_box_survives_json(box: gym.spaces.Box):
    text = json.dumps(space_from_gymnasium(box).to_json(), allow_nan=False)
    space = space_from_json(json.loads(text))
    assert isinstance(space, BoxSpace)
    assert (space.shape, space.dtype) == (box.shape, box.dtype.name)
    np.testing.assert_array_equal(np.isfinite(space.low), box.bounded_below)
    np.testing.assert_array_equal(np.isfinite(space.high), box.bounded_above)
    np.testing.assert_array_equal(space.low[box.bounded_below], box.low[box.bounded_below])
    np.testing.assert_array_equal(space.high[box.bounded_above], box.high[box.bounded_above])


@pytest.mark.parametrize("discrete", [gym.spaces.Discrete(2), gym.spaces.Discrete(5, start=-2)])
def test_a_discrete_space_survives_json(discrete: gym.spaces.Discrete):
    space = space_from_json(json.loads(json.dumps(space_from_gymnasium(discrete).to_json())))
    assert space == DiscreteSpace(int(discrete.n), int(discrete.start))


@pytest.mark.parametrize(("space", "description"), MULTI, ids=str)
def test_multi_discrete_and_multi_binary_survive_json(space: gym.Space, description: str):
    found = space_from_json(json.loads(json.dumps(space_from_gymnasium(space).to_json())))
    assert (found.shape, np.dtype(found.dtype)) == (space.shape, space.dtype)
    assert describe_space(found) == description
    if isinstance(space, gym.spaces.MultiDiscrete):
        np.testing.assert_array_equal(found.nvec, space.nvec)
        np.testing.assert_array_equal(found.start, space.start)


def test_a_nested_space_survives_json():
    once = json.dumps(space_from_gymnasium(NESTED).to_json())
    assert json.dumps(space_from_json(json.loads(once)).to_json()) == once
    assert json.loads(once)["spaces"]["z"]["spaces"][1]["spaces"]["x"] == {
        "type": "MultiBinary",
        "shape": [2],
    }


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Text(3),
        gym.spaces.Dict({"word": gym.spaces.Text(3)}),
        gym.spaces.Tuple([gym.spaces.Sequence(gym.spaces.Discrete(2))]),
        gym.spaces.Dict({1: gym.spaces.Discrete(2)}),
    ],
    ids=str,
)
def test_a_space_that_no_policy_takes_is_refused(space: gym.Space):
    with pytest.raises(TypeError, match="is none of Box, Discrete"):
        space_from_gymnasium(space)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        {"type": "Tuple"},
        {"type": "Text"},
        {"type": "Tuple", "spaces": 5},
        {"type": "Tuple", "spaces": [{"type": "Text"}]},
        {"type": "Dict", "spaces": []},
        {"type": "MultiBinary", "shape": [-1]},
        {"type": "MultiBinary"},
        {"type": "MultiDiscrete", "nvec": [], "start": [], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [0], "start": [0], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [2, 3], "start": [0], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [[2], [2, 3]], "start": [0], "dtype": "int64"},
        {"type": "Discrete", "n": 0, "start": 0},
        {"type": "Discrete", "n": 3, "start": 2**63},
        {"type": "Box", "shape": [10**12], "dtype": "float32", "low": None, "high": None},
        {"type": "Box", "shape": [2], "dtype": "object", "low": None, "high": None},
        {"type": "Discrete"},
        {"type": "Discrete", "n": "many"},
        {"type": "Discrete", "n": float("inf")},
        {"type": "Box", "shape": [2], "dtype": "float32", "low": None},
        {"type": "Box", "shape": [2], "dtype": "nonsense", "low": None, "high": None},
        {"type": "Box", "shape": [2], "dtype": "float32", "low": [1, 2, 3], "high": None},
        {"type": "Box", "shape": [-2], "dtype": "float32", "low": None, "high": None},
        {"type": "Box", "shape": 2, "dtype": "float32", "low": None, "high": None},
        {"type": "Box", "shape": [float("inf")], "dtype": "float32", "low": None, "high": None},
        {"type": "Box", "shape": [2], "dtype": "float32", "low": {"a": 1}, "high": None},
    ],
    ids=str,
)
def test_unreadable_json_is_a_manifest_error(value):
    with pytest.raises(ManifestError):
        space_from_json(value)


def test_a_space_nested_without_end_is_a_manifest_error():
    value: dict = {"type": "Discrete", "n": 2, "start": 0}
    for _ in range(5000):
        value = {"type": "Tuple", "spaces": [value]}
    with pytest.raises(ManifestError):
        space_from_json(value)


def test_one_bound_of_a_huge_box_takes_no_memory():
    value = {"type": "Box", "shape": [2**31], "dtype": "uint8", "low": 0, "high": 255}
    assert space_from_json(value).shape == (2**31,)


def test_spaces_are_described_in_one_line():
    assert describe_space(DiscreteSpace(2)) == "Discrete(2)"
    assert describe_space(DiscreteSpace(3, start=1)) == "Discrete(3, start=1)"
    assert describe_space(space_from_gymnasium(BOXES[1])) == "Box(4,) float32"
    assert describe_space(space_from_gymnasium(NESTED)) == (
        "Dict(a/b~c: Box(8, 8, 3) uint8, z: Tuple(Discrete(3), Dict(x: MultiBinary(2))))"
    )


def test_leaves_are_named_by_json_pointers_in_the_order_of_the_keys():
    space = space_from_gymnasium(NESTED)
    names = ["observation/a~1b~0c", "observation/z/0", "observation/z/1/x"]
    assert list(leaves(space, "observation")) == names
    assert list(leaves(DiscreteSpace(2), "action")) == ["action"]


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        (gym.spaces.Box(0, 1, (1,), np.float16), "float32"),
        (gym.spaces.Box(0, 1, (1,), np.float32), "float32"),
        (gym.spaces.Box(0, 1, (1,), np.float64), "float64"),
        (gym.spaces.Box(0, 1, (1,), np.uint8), "uint8"),
        (gym.spaces.Box(0, 1, (1,), np.int32), "int32"),
        (gym.spaces.Discrete(2), "int64"),
        (gym.spaces.MultiDiscrete([2], dtype=np.int32), "int64"),
        (gym.spaces.MultiBinary(2), "int8"),
    ],
    ids=str,
)
def test_the_graph_s_dtype_of_each_kind_of_leaf(space: gym.Space, dtype: str):
    assert graph_dtype(space_from_gymnasium(space)) == dtype


def test_a_nested_batch_is_flattened_and_put_together_as_gymnasium_nests_it():
    space = space_from_gymnasium(NESTED)
    NESTED.seed(0)
    batched = gym.vector.utils.batch_space(NESTED, 4)
    batch = gym.vector.utils.concatenate(
        NESTED, [NESTED.sample() for _ in range(4)], gym.vector.utils.create_empty_array(NESTED, 4)
    )
    arrays = flatten(space, "observation", batch)
    assert [(name, array.shape) for name, array in arrays.items()] == [
        ("observation/a~1b~0c", (4, 8, 8, 3)),
        ("observation/z/0", (4,)),
        ("observation/z/1/x", (4, 2)),
    ]
    again = unflatten(space, "observation", arrays)
    assert again in batched
    for one, other in zip(
        flatten(space, "", again).values(), flatten(space, "", batch).values(), strict=True
    ):
        assert one is other


def test_rows_of_a_nested_batch_are_elements_of_the_space():
    space = space_from_gymnasium(NESTED)
    arrays = {
        "o/a~1b~0c": np.zeros((3, 8, 8, 3), np.uint8),
        "o/z/0": np.array([0, 1, 2]),
        "o/z/1/x": np.array([[0, 0], [0, 1], [1, 1]], np.int8),
    }
    batch = unflatten(space, "o", arrays)
    found = rows(space, batch)
    assert batch_size(batch) == len(found) == 3
    assert all(row in NESTED for row in found)
    assert [row["z"][0] for row in found] == [0, 1, 2]
    part = take(batch, slice(1, 3))
    assert batch_size(part) == 2
    assert part["z"][1]["x"].tolist() == [[0, 1], [1, 1]]
