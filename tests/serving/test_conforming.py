"""What an observation must look like, for every kind of space, and where it does not."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from serving.conforming import conform_observations
from serving.errors import InvalidObservationError
from serving.spaces import flatten, space_from_gymnasium

BOX = space_from_gymnasium(gym.spaces.Box(-1.0, 1.0, (2,), np.float32))
BYTES = space_from_gymnasium(gym.spaces.Box(0, 255, (2,), np.uint8))
NESTED_GYM = gym.spaces.Dict(
    {
        "mode": gym.spaces.Discrete(3, start=1),
        "position": gym.spaces.Box(-1.0, 1.0, (2,), np.float32),
        "rest": gym.spaces.Tuple([gym.spaces.MultiDiscrete([2, 4]), gym.spaces.MultiBinary(2)]),
    }
)
NESTED = space_from_gymnasium(NESTED_GYM)


def conform(values: Any, space: Any = BOX) -> np.ndarray:
    return conform_observations(values, space)["observation"]


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2], [3, 4]],
        ((1.0, 2.0), (3.0, 4.0)),
        np.array([[1, 2], [3, 4]], dtype=np.int16),
        np.array([[1, 2], [3, 4]], dtype=">f8"),
        np.array([[1, 3], [2, 4]], dtype=np.float32).T,
        [np.array([1, 2]), np.array([3, 4])],
    ],
)
def test_any_numbers_become_contiguous_float32(values):
    batch = conform(values)
    assert batch.dtype == np.dtype("float32")
    assert batch.dtype.isnative
    assert batch.flags.c_contiguous
    np.testing.assert_array_equal(batch, np.array([[1, 2], [3, 4]], np.float32))


def test_values_outside_the_bounds_pass_as_in_rllib():
    assert conform([[100.0, -100.0]]).tolist() == [[100.0, -100.0]]


@pytest.mark.parametrize(
    ("values", "pointer"),
    [
        ([[1.0, float("nan")]], "/observations/0/1"),
        ([[1.0, 2.0], [float("inf"), 2.0]], "/observations/1/0"),
        ([[1.0, 2.0], [3.0, 1e39]], "/observations/1/1"),
        ([[1.0, 2.0], [3.0]], "/observations/1"),
        ([[1.0, 2.0], [3.0, [4.0]]], "/observations/1"),
        ([1.0, 2.0], "/observations/0"),
        ([[[1.0, 2.0]]], "/observations/0"),
        (np.zeros((2, 3)), "/observations"),
        ([["1", "2"]], "/observations/0"),
        ([[1.0, 2.0], [None, 1.0]], "/observations/1"),
        ([[10**400, 1.0]], "/observations/0"),
        ([[True, False]], "/observations/0"),
        ([[1j, 2j]], "/observations/0"),
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
        conform(values)
    assert caught.value.details["pointer"] == pointer


def test_the_offending_number_is_named_before_it_was_narrowed():
    with pytest.raises(InvalidObservationError, match=r"1e\+39"):
        conform(np.array([[0.0, 1e39]]))


def test_float64_stays_float64_and_takes_what_float32_cannot():
    space = space_from_gymnasium(gym.spaces.Box(-1.0, 1.0, (1,), np.float64))
    batch = conform([[1e39], [0.1]], space)
    assert batch.dtype == np.float64
    assert batch.tolist() == [[1e39], [0.1]]


@pytest.mark.parametrize(
    ("space", "values", "dtype"),
    [
        (BYTES, [[0, 255]], "uint8"),
        (BYTES, np.array([[0.0, 255.0]]), "uint8"),
        (BYTES, np.array([[0, 255]], np.int64), "uint8"),
        (gym.spaces.Box(-5, 5, (2,), np.int32), [[-(2**31), 2**31 - 1]], "int32"),
        (gym.spaces.Box(0, 5, (1,), np.uint64), [[2**64 - 1]], "uint64"),
        (gym.spaces.Box(-5, 5, (1,), np.int64), [[-(2**63)]], "int64"),
        (gym.spaces.Discrete(3), [0, 2], "int64"),
        (gym.spaces.Discrete(3), np.array([0.0, 2.0]), "int64"),
        (gym.spaces.Discrete(3, start=-1), [-1, 1], "int64"),
        (gym.spaces.MultiDiscrete([2, 3], start=[0, 5]), [[1, 7]], "int64"),
        (gym.spaces.MultiDiscrete([[2, 3]]), [[[1, 2]]], "int64"),
        (gym.spaces.MultiBinary(2), [[0, 1]], "int8"),
        (gym.spaces.MultiBinary(2), [[False, True]], "int8"),
    ],
    ids=str,
)
def test_integers_come_in_their_own_dtype(space: Any, values: Any, dtype: str):
    plain = space_from_gymnasium(space) if isinstance(space, gym.Space) else space
    batch = conform(values, plain)
    assert batch.dtype == dtype
    np.testing.assert_array_equal(batch, np.asarray(values))


@pytest.mark.parametrize(
    ("space", "values", "pointer", "found"),
    [
        (BYTES, [[0, 1], [0, 256]], "/observations/1/1", "256"),
        (BYTES, [[-1, 0]], "/observations/0/0", "-1"),
        (BYTES, [[0.5, 0]], "/observations/0/0", "0.5"),
        (BYTES, [[float("nan"), 0]], "/observations/0/0", "nan"),
        (BYTES, [[float("inf"), 0]], "/observations/0/0", "inf"),
        (gym.spaces.Box(-5, 5, (1,), np.int64), np.array([[2.0**63]]), "/observations/0/0", "e"),
        (gym.spaces.Box(-5, 5, (1,), np.int8), np.array([[2**64 - 1]]), "/observations/0/0", "184"),
        (gym.spaces.Discrete(3), [0, 3], "/observations/1", "found 3, expected an integer 0..2"),
        (gym.spaces.Discrete(3), [-1], "/observations/0", "-1"),
        (gym.spaces.Discrete(3, start=1), [0], "/observations/0", "an integer 1..3"),
        (gym.spaces.Discrete(3), [1.5], "/observations/0", "1.5"),
        (gym.spaces.Discrete(3), [True], "/observations/0", "bool"),
        (gym.spaces.Discrete(3), [[1]], "/observations/0", "shape"),
        (
            gym.spaces.MultiDiscrete([2, 3], start=[0, 5]),
            [[1, 4]],
            "/observations/0/1",
            "an integer 5..7",
        ),
        (gym.spaces.MultiDiscrete([[2, 3]]), [[[1, 3]]], "/observations/0/0/1", "3"),
        (gym.spaces.MultiBinary(2), [[0, 2]], "/observations/0/1", "2"),
    ],
    ids=str,
)
def test_an_integer_that_the_space_lacks_is_refused(
    space: Any, values: Any, pointer: str, found: str
):
    plain = space_from_gymnasium(space) if isinstance(space, gym.Space) else space
    with pytest.raises(InvalidObservationError, match=found) as caught:
        conform(values, plain)
    assert caught.value.details["pointer"] == pointer


def test_a_nested_batch_and_a_list_of_rows_give_the_same_arrays():
    NESTED_GYM.seed(1)
    samples = [NESTED_GYM.sample() for _ in range(5)]
    batch = gym.vector.utils.concatenate(
        NESTED_GYM, samples, gym.vector.utils.create_empty_array(NESTED_GYM, 5)
    )
    expected = flatten(NESTED, "observation", batch)
    names = ["mode", "position", "rest/0", "rest/1"]
    for values in (batch, samples, tuple(samples)):
        found = conform_observations(values, NESTED)
        assert list(found) == [f"observation/{name}" for name in names]
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name])
            assert array.flags.c_contiguous
        assert [array.dtype.name for array in found.values()] == [
            "int64",
            "float32",
            "int64",
            "int8",
        ]


def test_for_a_tuple_space_a_tuple_is_a_batch_and_a_list_is_rows():
    space = space_from_gymnasium(gym.spaces.Tuple([gym.spaces.Discrete(4), gym.spaces.Discrete(4)]))
    batch = conform_observations(([0, 1], [2, 3]), space)
    rows = conform_observations([[0, 1], [2, 3]], space)
    assert [array.tolist() for array in batch.values()] == [[0, 1], [2, 3]]
    assert [array.tolist() for array in rows.values()] == [[0, 2], [1, 3]]


def row(**changes: Any) -> dict[str, Any]:
    return {"mode": 1, "position": [0.0, 0.0], "rest": ([0, 0], [0, 0]), **changes}


@pytest.mark.parametrize(
    ("bad", "pointer", "found"),
    [
        (row(position=[0.0, float("nan")]), "/observations/1/position/1", "nan"),
        (row(position=[0.0]), "/observations/1/position", "shape"),
        (row(position="here"), "/observations/1/position", "shape"),
        (row(mode=0), "/observations/1/mode", "an integer 1..3"),
        (row(rest=([0, 4], [0, 0])), "/observations/1/rest/0/1", "an integer 0..3"),
        (row(rest=([0, 0],)), "/observations/1/rest", "1 entries"),
        (row(rest={"0": [0, 0]}), "/observations/1/rest", "dict"),
        (row(extra=1), "/observations/1/extra", "'extra'"),
        ({"mode": 1}, "/observations/1", "found no 'position'"),
        (None, "/observations/1", "null"),
        ([1, 2], "/observations/1", "list"),
    ],
    ids=str,
)
def test_a_bad_row_of_a_nested_space_is_refused_with_its_place(bad: Any, pointer: str, found: str):
    with pytest.raises(InvalidObservationError, match=found) as caught:
        conform_observations([row(), bad, row()], NESTED)
    assert caught.value.details["pointer"] == pointer


@pytest.mark.parametrize(
    ("batch", "pointer"),
    [
        (row(mode=[1], position=[[0, 0]], rest=([[0, 0]], [[0, 2]])), "/observations/0/rest/1/1"),
        (row(mode=[1, 1], position=[[0, 0]], rest=([[0, 0]], [[0, 0]])), "/observations"),
        (row(mode=[1], position=np.zeros((1, 3)), rest=([[0, 0]],)), "/observations/position"),
        (row(mode=[1], position=[[0, 0]], rest=None), "/observations/rest"),
        ({}, "/observations"),
        ([], "/observations"),
        (5, "/observations"),
        (np.zeros((2, 4)), "/observations"),
    ],
    ids=str,
)
def test_a_bad_nested_batch_is_refused_with_its_place(batch: Any, pointer: str):
    with pytest.raises(InvalidObservationError) as caught:
        conform_observations(batch, NESTED)
    assert caught.value.details["pointer"] == pointer


def test_a_key_is_escaped_in_the_place():
    space = space_from_gymnasium(gym.spaces.Dict({"a/b": gym.spaces.Discrete(2)}))
    with pytest.raises(InvalidObservationError) as caught:
        conform_observations([{"a/b": 2}], space)
    assert caught.value.details["pointer"] == "/observations/0/a~1b"


def test_an_array_that_fits_is_not_copied():
    image = np.zeros((2, 8, 8, 3), np.uint8)
    space = space_from_gymnasium(gym.spaces.Box(0, 255, (8, 8, 3), np.uint8))
    assert conform(image, space) is image
