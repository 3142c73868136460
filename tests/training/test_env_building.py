from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.wrappers import TimeLimit

from training.config_files import load_config
from training.env_building import build_env, is_plain
from training.envs import check_environment
from training.errors import ConfigError, EnvironmentFailedError
from training.wrappers import SelectComponents

HERE = "tests.training.test_env_building"


def heavy_cartpole(length: float = 0.5) -> gymnasium.Env:
    env = CartPoleEnv()
    env.length = length
    return env


def number() -> int:
    return 3


def failing() -> gymnasium.Env:
    raise RuntimeError("no pole")


def refusing(env: gymnasium.Env) -> gymnasium.Env:
    raise RuntimeError(f"no pole in {env}")


def identity(env: gymnasium.Env) -> object:
    return env.observation_space


def test_a_factory_is_called_with_the_environments_arguments():
    env = build_env(f"{HERE}:heavy_cartpole", {"length": 2.0})
    assert env.unwrapped.length == 2.0
    assert env.spec is None


def test_a_class_of_a_package_is_a_factory_too_and_an_id_stays_an_id():
    assert isinstance(
        build_env("gymnasium.envs.classic_control:CartPoleEnv", {"render_mode": None}), CartPoleEnv
    )
    env = build_env("gymnasium.envs.classic_control:CartPole-v1", {})
    assert env.spec is not None
    assert env.spec.max_episode_steps == 500


def test_wrappers_go_around_each_other_in_their_order():
    select = ("training.wrappers:SelectComponents", {"components": [2, 0]})
    limit = ("gymnasium.wrappers:TimeLimit", {"max_episode_steps": 7})
    env = build_env("CartPole-v1", {}, [select, limit])
    assert isinstance(env, TimeLimit)
    assert isinstance(env.env, SelectComponents)
    whole, _ = gymnasium.make("CartPole-v1").reset(seed=3)
    np.testing.assert_array_equal(env.reset(seed=3)[0], whole[[2, 0]])
    lengths = [env.step(env.action_space.sample())[3] for _ in range(7)]
    assert lengths[-1]


def test_only_an_id_without_wrappers_is_plain():
    assert is_plain("CartPole-v1", ())
    assert not is_plain("CartPole-v1", ("a:B",))
    assert not is_plain("package:CartPole-v1", ())


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["wrappers=[training.wrappers:Select]"], "'Select'"),
        (["wrappers=[no_such_module:X]"], "no module 'no_such_module'"),
        ([f"wrappers=['{HERE}:identity']"], "which made a Box, expected a gymnasium.Env"),
        (
            ["wrappers=[{training.wrappers:SelectComponents: {parts: [0]}}]"],
            "SelectComponents, .*'parts'",
        ),
        (["wrappers=[gymnasium.wrappers:TimeLimit]"], r"TimeLimit, .*none.*'max_episode_steps'"),
        ([f"env={HERE}:number"], "which made a int, expected a gymnasium.Env"),
        ([f"env={HERE}:heavy_cartpole", "env_config.weight=3"], "env_config: weight"),
        ([f"env={HERE}:nothing"], "nothing"),
        (["evaluation.env_config.gravity=1"], "evaluation.env_config"),
    ],
)
def test_what_makes_no_environment_is_wrong_usage(sets, expected):
    config = load_config(flags={"env": "CartPole-v1"}, sets=sets)
    with pytest.raises(ConfigError, match=expected):
        check_environment(config)


def test_a_wrapper_that_raises_is_named():
    config = load_config(flags={"env": "CartPole-v1"}, sets=[f"wrappers=['{HERE}:refusing']"])
    with pytest.raises(EnvironmentFailedError, match=f"{HERE}:refusing, which raised .*no pole"):
        check_environment(config)


def test_an_evaluation_has_to_have_the_spaces_of_training():
    config = load_config(
        flags={"env": f"{HERE}:of_size"}, sets=["evaluation.env_config.size=3", "env_config.size=2"]
    )
    with pytest.raises(ConfigError, match=r"shape=\(3,\).*shape=\(2,\)"):
        check_environment(config)


class of_size(CartPoleEnv):  # noqa: N801 - a factory to its user
    def __init__(self, size: int) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-1, 1, (size,))

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return np.zeros(self.observation_space.shape, np.float32), {}


@pytest.mark.parametrize("components", [[0, 4], [-1]])
def test_a_component_that_is_not_there_is_refused(components):
    with pytest.raises(IndexError, match="none of 4"):
        SelectComponents(gymnasium.make("CartPole-v1"), components)


def test_components_of_something_else_than_a_vector_are_refused():
    with pytest.raises(TypeError, match="Discrete"):
        SelectComponents(gymnasium.make("FrozenLake-v1"), [0])
