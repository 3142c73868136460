"""RLlib runs in processes of its own, where its warnings are no errors."""

from __future__ import annotations

import pytest

from tests.processes import python

pytestmark = pytest.mark.slow

RUN = """
import runpy, sys
from training.ray_environment import set_ray_environment
set_ray_environment()
runpy.run_module("tests.training.fast_checks", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "check",
    [
        "the_same_seed_gives_the_same_episodes",
        "what_is_not_known_goes_rllibs_way",
        "an_ended_episode_is_reported_once_and_whole",
        "the_same_episodes_give_the_same_weights_and_reports",
        "rllib_goes_on_from_a_lean_learners_state",
        "flat_adam_is_adam",
    ],
)
def test_the_lean_loops_do_what_rllib_does(check):
    done = python("-c", RUN, check)
    assert done.returncode == 0, done.stderr[-3000:]
