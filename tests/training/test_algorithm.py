"""Imports RLlib, so it runs in a process of its own, where RLlib's warnings are no errors."""

from __future__ import annotations

import pytest

from tests.processes import python

pytestmark = pytest.mark.slow

CHECK = """
from training.algorithm import rllib_config
from training.config_files import load_config
from training.rllib_env import environment_id, evaluation_environment, rllib_environment

def built(*sets):
    flags = {"env": "Pendulum-v1", "seed": 1, "num_env_runners": 2}
    return rllib_config(load_config(flags=flags, sets=sets).complete())

default = built()
assert (default.normalize_actions, default.clip_actions) == (True, False)
assert default.get_rollout_fragment_length(1) == 1024 // (2 * 8)
given = built("normalize_actions=false", "clip_actions=true", "rollout_fragment_length=32")
assert (given.normalize_actions, given.clip_actions) == (False, True)
assert given.get_rollout_fragment_length(1) == 32
assert given.num_env_runners == 2 and given.seed == 1

# This project's rule for fragments is RLlib's own.
import pytest
from training.errors import ConfigError
for fragment in (1, 7, 21, 22, 32, 33, 60, 64, 65, 70, 71, 128, 1024):
    config = built().copy(copy_frozen=False).env_runners(rollout_fragment_length=fragment)
    try:
        config.validate_train_batch_size_vs_rollout_fragment_length()
    except ValueError:
        with pytest.raises(ConfigError):
            built(f"rollout_fragment_length={fragment}")
    else:
        built(f"rollout_fragment_length={fragment}")

# Ray keeps one registry for all trials of a search, and the last to register a name has it.
around = (
    "wrappers=[training.wrappers:SelectComponents]",
    "wrappers=[{training.wrappers:SelectComponents: {components: [0]}}]",
    "evaluation.max_episode_steps=7",
)
configs = [load_config(flags={"env": "CartPole-v1"}, sets=[text]) for text in around]
assert len({rllib_environment(config) for config in configs}) == 3
assert len({evaluation_environment(config) for config in configs}) == 3
assert {environment_id(rllib_environment(config)) for config in configs} == {"CartPole-v1"}
assert rllib_environment(configs[2]) == "CartPole-v1"  # as any RLlib knows it
"""


def test_settings_reach_rllib() -> None:
    done = python("-c", CHECK)
    assert done.returncode == 0, done.stderr[-2000:]
