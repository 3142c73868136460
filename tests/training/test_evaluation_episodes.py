"""RLlib runs in processes of its own, where its warnings are no errors."""

from __future__ import annotations

import pytest

from tests.processes import python
from tests.training.test_fast_training import RUN

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "check",
    [
        "each_environment_plays_a_share_fixed_beforehand",
        "evaluations_leave_no_trace",
        "recurrent_policies_are_played_with_their_memory",
    ],
)
def test_an_evaluation_plays_whole_episodes_chosen_beforehand(check):
    done = python("-c", RUN, check)
    assert done.returncode == 0, done.stderr[-3000:]
