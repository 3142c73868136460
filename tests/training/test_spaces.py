from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from training.config_files import load_config
from training.errors import ConfigError
from training.observations import plan_pieces
from training.spaces import check_spaces

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
TWO = spaces.Discrete(2)


def image(height, width, channels, dtype=np.float32):
    return spaces.Box(0, 1, (height, width, channels), dtype)


def config(*sets):
    return load_config(flags={"env": "Some-v0"}, sets=sets)


def pieces(space, *sets):
    return plan_pieces(config(*sets), space)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (VECTOR, ()),
        (spaces.Box(-1.0, 1.0, (3,), np.float64), ()),
        (image(42, 42, 4), ()),
        # RLlib's networks fail on these as they are, or on their dtype.
        (spaces.Box(-1.0, 1.0, (3,), np.float16), ("flatten",)),
        (spaces.Box(0, 9, (3,), np.int64), ("flatten",)),
        (spaces.Box(0.0, 1.0, (), np.float32), ("flatten",)),
        (spaces.Box(0.0, 1.0, (2, 2), np.float32), ("flatten",)),
        (image(42, 42, 4, np.uint8), ("flatten",)),
        (spaces.Discrete(5), ("flatten",)),
        (spaces.MultiDiscrete([2, 3]), ("flatten",)),
        (spaces.MultiBinary(4), ("flatten",)),
        (spaces.Dict(a=VECTOR), ("flatten",)),
        (spaces.Tuple([VECTOR, spaces.Dict(b=TWO)]), ("flatten",)),
    ],
)
def test_whatever_networks_do_not_take_is_flattened(space, expected):
    assert pieces(space) == expected
    check_spaces(config(), space, TWO)


def test_the_filter_comes_after_whatever_makes_one_array():
    assert pieces(TWO, "observation_filter=mean_std") == ("flatten", "mean_std")
    assert pieces(VECTOR, "observation_filter=mean_std", "prev_rewards=1") == (
        *("prev_actions_prev_rewards", "flatten"),
        "mean_std",
    )
    assert pieces(image(10, 10, 1), "observation_filter=mean_std", "frame_stack=2") == (
        "mean_std",
        "frame_stack",
    )


def test_flattening_is_said_with_its_size():
    # One-hot: 5 numbers for Discrete(5), 2 + 3 for MultiDiscrete([2, 3]), 4 bits, 3 numbers.
    space = spaces.Dict(
        a=spaces.Discrete(5),
        b=spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(4)]),
        c=VECTOR,
    )
    (note,) = check_spaces(config(), space, TWO)
    assert "flattened to 17 float32 values" in note
    # 3 numbers, 2 actions of 2 each, 1 reward.
    (note,) = check_spaces(config("prev_actions=2", "prev_rewards=1"), VECTOR, TWO)
    assert "flattened to 8 float32 values" in note
    (note,) = check_spaces(config(), image(4, 4, 3, np.uint8), TWO)
    assert "48 float32 values" in note
    assert "observation_filter=mean_std" in note


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Discrete(4),
        spaces.Box(-np.inf, np.inf, (2,), np.float64),
        spaces.MultiDiscrete([2, 3]),
        spaces.Dict(a=TWO, b=spaces.Tuple([VECTOR, spaces.MultiDiscrete([2, 3])])),
    ],
)
def test_these_actions_can_be_trained(action_space):
    assert check_spaces(config(), VECTOR, action_space) == []


@pytest.mark.parametrize(
    ("observation_space", "action_space", "named"),
    [
        (spaces.Text(5), TWO, "Text"),
        (spaces.Dict(a=spaces.Tuple([spaces.Text(5)])), TWO, "Text.*at /a/0"),
        (spaces.Dict(a=spaces.Discrete(3, start=1)), TWO, "at /a.*start"),
        (spaces.MultiDiscrete([3, 3], start=[0, 1]), TWO, "start"),
        (spaces.MultiDiscrete([[3, 3], [2, 2]]), TWO, "one axis"),
        (spaces.Dict(), TWO, "no values"),
        (VECTOR, spaces.Dict(), "no values"),
        (VECTOR, spaces.MultiBinary(3), r"MultiBinary.*MultiDiscrete \[2, 2, 2\]"),
        (VECTOR, spaces.Box(0, 9, (3,), np.int64), "int64.*MultiDiscrete"),
        (VECTOR, spaces.Box(0.0, 1.0, (2, 2), np.float32), r"\(2, 2\).*flatten"),
        (VECTOR, spaces.Box(0.0, 1.0, (), np.float32), r"\(\).*flatten"),
        (VECTOR, spaces.Discrete(3, start=1), "start"),
        (VECTOR, spaces.MultiDiscrete([3, 3], start=[0, 1]), "start"),
        (VECTOR, spaces.Tuple([TWO, spaces.MultiBinary(2)]), "at /1"),
        (VECTOR, spaces.Text(5), "Text"),
    ],
)
def test_a_space_that_cannot_be_trained_is_refused_and_named(
    observation_space, action_space, named
):
    with pytest.raises(ConfigError, match=named):
        check_spaces(config(), observation_space, action_space)


@pytest.mark.parametrize(
    ("sets", "observation_space", "action_space", "named"),
    [
        ((), image(12, 12, 3), TWO, r"model\.conv_filters"),
        ((), image(10, 84, 3), TWO, r"model\.conv_filters"),
        ((), image(3, 84, 84), TWO, r"height, width, channels"),
        (("model.conv_filters=[[4,4,2]]",), VECTOR, TWO, "dense layers"),
        (("model.conv_filters=[[4,4,2]]",), image(10, 10, 3, np.uint8), TWO, "float32 images"),
        (("prev_actions=1",), VECTOR, VECTOR, "`prev_actions` needs Discrete"),
        (("prev_rewards=1",), VECTOR, spaces.MultiDiscrete([2]), "`prev_rewards` needs Discrete"),
        (("frame_stack=4",), VECTOR, TWO, "FrameStackObservation"),
        (("frame_stack=4",), image(10, 10, 3), TWO, "height, width, 1"),
        (("frame_stack=4",), image(10, 10, 1, np.uint8), TWO, "float images"),
        (("frame_stack=4", "prev_rewards=1"), image(10, 10, 1), TWO, "one or the other"),
        (("model.use_lstm=true",), VECTOR, spaces.Dict(a=TWO), "num_envs_per_env_runner=1"),
    ],
)
def test_a_setting_that_does_not_fit_the_spaces_is_refused(
    sets, observation_space, action_space, named
):
    with pytest.raises(ConfigError, match=named):
        check_spaces(config(*sets), observation_space, action_space)


@pytest.mark.parametrize(
    ("sets", "observation_space", "action_space"),
    [
        (("model.conv_filters=[[4,4,2]]",), image(12, 12, 3), TWO),
        (("frame_stack=4",), image(10, 10, 1), TWO),
        (("model.use_lstm=true",), VECTOR, spaces.Dict(a=spaces.MultiDiscrete([2]), b=VECTOR)),
        (("model.use_lstm=true", "num_envs_per_env_runner=1"), VECTOR, spaces.Dict(a=TWO)),
    ],
)
def test_a_setting_that_fits_is_accepted(sets, observation_space, action_space):
    assert check_spaces(config(*sets), observation_space, action_space) == []
