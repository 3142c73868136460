"""Spaces as JSON, and what an observation must look like."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest

from serving.errors import InvalidObservationError, ManifestError
from serving.spaces import (
    BoxSpace,
    DiscreteSpace,
    conform_observations,
    describe_space,
    space_from_gymnasium,
    space_from_json,
)

BOXES = [
    gym.spaces.Box(-1.0, 1.0, (3,), np.float32),
    gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
    gym.spaces.Box(np.array([-4.8, -np.inf]), np.array([4.8, np.inf]), dtype=np.float64),
    gym.spaces.Box(0, 255, (2, 2, 3), np.uint8),
    gym.spaces.Box(np.array([[0.0, -np.inf]]), np.array([[np.inf, 1.0]]), dtype=np.float64),
    gym.spaces.Box(-1.0, 1.0, (), np.float32),
]


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


def test_a_space_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="neither Box nor Discrete"):
        space_from_gymnasium(gym.spaces.MultiBinary(3))


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        {"type": "Tuple"},
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


def test_spaces_are_described_in_one_line():
    assert describe_space(DiscreteSpace(2)) == "Discrete(2)"
    assert describe_space(DiscreteSpace(3, start=1)) == "Discrete(3, start=1)"
    assert describe_space(space_from_gymnasium(BOXES[1])) == "Box(4,) float32"


BOX = space_from_gymnasium(gym.spaces.Box(-1.0, 1.0, (2,), np.float32))


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2], [3, 4]],
        ((1.0, 2.0), (3.0, 4.0)),
        np.array([[1, 2], [3, 4]], dtype=np.int16),
        np.array([[1, 2], [3, 4]], dtype=">f8"),
        np.array([[1, 3], [2, 4]], dtype=np.float32).T,
    ],
)
def test_any_numbers_become_contiguous_float32(values):
    batch = conform_observations(values, BOX)
    assert batch.dtype == np.dtype("float32")
    assert batch.flags.c_contiguous
    np.testing.assert_array_equal(batch, np.array([[1, 2], [3, 4]], np.float32))


def test_values_outside_the_bounds_pass_as_in_rllib():
    assert conform_observations([[100.0, -100.0]], BOX).tolist() == [[100.0, -100.0]]


@pytest.mark.parametrize(
    ("values", "pointer"),
    [
        ([[1.0, float("nan")]], "/observations/0/1"),
        ([[1.0, 2.0], [float("inf"), 2.0]], "/observations/1/0"),
        ([[1.0, 2.0], [3.0, 1e39]], "/observations/1/1"),
        ([[1.0, 2.0], [3.0]], "/observations"),
        ([1.0, 2.0], "/observations"),
        ([[[1.0, 2.0]]], "/observations"),
        ([["1", "2"]], "/observations"),
        ([[None, 1.0]], "/observations"),
        ([[10**400, 1.0]], "/observations"),
        ([[True, False]], "/observations"),
        ([[1j, 2j]], "/observations"),
        ("text", "/observations"),
        (None, "/observations"),
        ({"a": 1}, "/observations"),
        (5, "/observations"),
        ([], "/observations"),
    ],
    ids=str,
)
def test_a_bad_observation_is_refused_with_its_place(values, pointer: str):
    with pytest.raises(InvalidObservationError) as caught:
        conform_observations(values, BOX)
    assert caught.value.details["pointer"] == pointer


def test_the_offending_number_is_named_before_it_was_narrowed():
    with pytest.raises(InvalidObservationError, match=r"1e\+39"):
        conform_observations(np.array([[0.0, 1e39]]), BOX)
