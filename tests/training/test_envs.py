from __future__ import annotations

import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from training.config import PPOTrainingConfig
from training.envs import check_environment
from training.errors import ConfigError, EnvironmentFailedError

FLOAT_BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)


def check(env_id, **env_config):
    return check_environment(PPOTrainingConfig(env=env_id, env_config=env_config))


class SpaceEnv(gymnasium.Env):
    def __init__(self, observation_space, first_observation=None, fails_in_reset=False):
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(2)
        self.first_observation = first_observation
        self.fails_in_reset = fails_in_reset

    def reset(self, *, seed=None, options=None):  # noqa: ARG002
        super().reset(seed=seed)
        if self.fails_in_reset:
            raise RuntimeError("no map loaded")
        if self.first_observation is not None:
            return self.first_observation, {}
        return self.observation_space.sample(), {}

    def step(self, action):  # noqa: ARG002
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.fixture
def space_env():
    gymnasium.register("PolicyserveSpaces-v0", entry_point=SpaceEnv, disable_env_checker=True)
    yield "PolicyserveSpaces-v0"
    del gymnasium.registry["PolicyserveSpaces-v0"]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1"])
def test_classic_control_can_be_trained(env_id):
    assert check(env_id) == []


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
        check(env_id)


def test_an_id_like_no_other_says_how_to_name_a_module():
    with pytest.raises(ConfigError, match="module:Qwxyz-v0"):
        check("Qwxyz-v0")


def test_a_malformed_id_and_a_missing_module_are_wrong_usage():
    with pytest.raises(ConfigError, match="not an id"):
        check("not an id")
    with pytest.raises(ConfigError, match="no_such_module"):
        check("no_such_module:CartPole-v1")


@pytest.mark.parametrize(
    ("space", "observation", "named"),
    [
        (FLOAT_BOX, np.zeros(4, np.float32), r"shape \(3,\), found \(4,\)"),
        (spaces.Dict(a=FLOAT_BOX), {"b": np.zeros(3)}, "Dict.*found {'b'"),
        (spaces.Dict(a=spaces.Dict(b=FLOAT_BOX)), {"a": {"b": np.zeros(2)}}, "at /a/b"),
        (spaces.Dict(a=FLOAT_BOX), np.zeros(3), "Dict.*found array"),
        (spaces.Tuple([FLOAT_BOX, FLOAT_BOX]), (np.zeros(3),), "Tuple"),
        (spaces.Tuple([FLOAT_BOX, spaces.Discrete(3)]), (np.zeros(3), 3), r"Discrete\(3\) at /1"),
        (spaces.MultiDiscrete([2, 3]), np.array([0, 3]), "MultiDiscrete"),
    ],
)
def test_a_first_observation_that_is_not_of_its_space_is_the_environments_fault(
    space_env, space, observation, named
):
    with pytest.raises(EnvironmentFailedError, match=named):
        check(space_env, observation_space=space, first_observation=observation)


def test_first_observations_may_have_another_float_dtype_and_leave_the_bounds(space_env):
    check(space_env, observation_space=FLOAT_BOX, first_observation=np.full(3, 9.0, np.float64))


def test_nested_observations_are_announced_as_flattened(space_env):
    # 3 numbers, and 5 for which of 5.
    space = spaces.Dict(a=FLOAT_BOX, b=spaces.Discrete(5))
    (note,) = check(space_env, observation_space=space)
    assert "8 float32 values" in note


def test_an_argument_that_the_environment_does_not_take_is_wrong_usage():
    with pytest.raises(ConfigError, match="gravitee"):
        check("CartPole-v1", gravitee=3)


def test_an_environment_that_cannot_reset_is_its_own_fault(space_env):
    with pytest.raises(EnvironmentFailedError, match="no map loaded"):
        check(space_env, observation_space=FLOAT_BOX, fails_in_reset=True)


def test_checking_an_environment_needs_no_ray():
    # This process may have it already; a fresh one must not get it.
    import subprocess

    code = (
        "import sys, training.envs, training.cli, training.run_directory, training.provenance;"
        "config = training.config.PPOTrainingConfig(env='CartPole-v1');"
        "training.envs.check_environment(config);"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
