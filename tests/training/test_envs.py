from __future__ import annotations

import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from training.envs import check_environment
from training.errors import ConfigError, EnvironmentFailedError

FLOAT_BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)


class SpaceEnv(gymnasium.Env):
    def __init__(self, observation_space, action_space, fails_in_reset=False):
        self.observation_space = observation_space
        self.action_space = action_space
        self.fails_in_reset = fails_in_reset

    def reset(self, *, seed=None, options=None):  # noqa: ARG002
        super().reset(seed=seed)
        if self.fails_in_reset:
            raise RuntimeError("no map loaded")
        return self.observation_space.sample(), {}

    def step(self, action):  # noqa: ARG002
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.fixture
def space_env():
    gymnasium.register("PolicyserveSpaces-v0", entry_point=SpaceEnv)
    yield "PolicyserveSpaces-v0"
    del gymnasium.registry["PolicyserveSpaces-v0"]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1"])
def test_classic_control_can_be_trained(env_id):
    check_environment(env_id, {})


@pytest.mark.parametrize(
    ("env_id", "nearest"),
    [
        ("CartPole-v9", "CartPole-v1"),
        ("cartpole", "CartPole-v1"),
        ("CartPol-v1", "CartPole-v1"),
        ("Acrobat-v1", "Acrobot-v1"),
    ],
)
def test_an_unknown_id_names_the_nearest(env_id, nearest):
    with pytest.raises(ConfigError, match=nearest):
        check_environment(env_id, {})


def test_an_id_like_no_other_says_how_to_name_a_module():
    with pytest.raises(ConfigError, match="module:Qwxyz-v0"):
        check_environment("Qwxyz-v0", {})


def test_a_malformed_id_and_a_missing_module_are_wrong_usage():
    with pytest.raises(ConfigError, match="not an id"):
        check_environment("not an id", {})
    with pytest.raises(ConfigError, match="no_such_module"):
        check_environment("no_such_module:CartPole-v1", {})


@pytest.mark.parametrize(
    ("observation_space", "action_space", "named"),
    [
        (spaces.Discrete(5), spaces.Discrete(2), "Discrete\\(5\\)"),
        (spaces.Dict(a=FLOAT_BOX), spaces.Discrete(2), "Dict"),
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), spaces.Discrete(2), "uint8"),
        (spaces.Box(0, 9, (3,), np.int64), spaces.Discrete(2), "int64"),
        (spaces.Box(0.0, 1.0, (2, 2), np.float32), spaces.Discrete(2), "\\(2, 2\\)"),
        (FLOAT_BOX, spaces.MultiBinary(3), "MultiBinary"),
        (FLOAT_BOX, spaces.MultiDiscrete([2, 3]), "MultiDiscrete"),
        (FLOAT_BOX, spaces.Box(0, 9, (3,), np.int64), "int64"),
        (FLOAT_BOX, spaces.Box(0.0, 1.0, (2, 2), np.float32), "\\(2, 2\\)"),
        (FLOAT_BOX, spaces.Discrete(3, start=1), "start"),
    ],
)
def test_a_space_that_cannot_be_trained_is_refused_and_named(
    space_env, observation_space, action_space, named
):
    with pytest.raises(ConfigError, match=named):
        check_environment(
            space_env, {"observation_space": observation_space, "action_space": action_space}
        )


def test_float_boxes_and_discrete_actions_are_accepted(space_env):
    for action_space in (spaces.Discrete(4), spaces.Box(-np.inf, np.inf, (2,), np.float64)):
        check_environment(space_env, {"observation_space": FLOAT_BOX, "action_space": action_space})


def test_an_argument_that_the_environment_does_not_take_is_wrong_usage():
    with pytest.raises(ConfigError, match="gravitee"):
        check_environment("CartPole-v1", {"gravitee": 3})


def test_an_environment_that_cannot_reset_is_its_own_fault(space_env):
    with pytest.raises(EnvironmentFailedError, match="no map loaded"):
        check_environment(
            space_env,
            {
                "observation_space": FLOAT_BOX,
                "action_space": spaces.Discrete(2),
                "fails_in_reset": True,
            },
        )


def test_checking_an_environment_needs_no_ray():
    # This process may have it already; a fresh one must not get it.
    import subprocess

    code = (
        "import sys, training.envs, training.cli, training.run_directory, training.provenance;"
        "training.envs.check_environment('CartPole-v1', {});"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
