"""The replay buffer against a list of steps, and the training step against RLlib's."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.processes import python
from training.fast_replay.priorities import Priorities
from training.fast_replay.transition_buffer import TransitionBuffer, Transitions

GAMMA = 0.5


class Step(NamedTuple):
    number: int
    episode: int
    terminated: bool
    is_last: bool

    @property
    def reward(self) -> float:
        return float(self.number % 7 + 1)


def buffer_of(capacity: int, *, seed: int = 0, alpha: float | None = None) -> TransitionBuffer:
    kinds: Any = {"observation": ((1,), np.float32), "action": ((), np.int64)}
    return TransitionBuffer(capacity, **kinds, seed=seed, alpha=alpha)


def add(buffer: TransitionBuffer, steps: list[Step]) -> None:
    """Step n leads from observation n to observation n + 0.5, by action -n."""
    numbers = np.array([step.number for step in steps], np.float32)
    buffer.add(
        Transitions(
            observations=numbers[:, None],
            actions=-numbers.astype(np.int64),
            rewards=np.array([step.reward for step in steps], np.float32),
            next_observations=numbers[:, None] + 0.5,
            terminateds=np.array([step.terminated for step in steps]),
        ),
        episodes=[step.episode for step in steps],
        ends=[step.is_last for step in steps],
    )


@st.composite
def histories(draw: st.DrawFn) -> list[list[Step]]:
    """Batches of steps of three environments side by side, whose episodes end at any time."""
    n_steps = draw(st.integers(1, 60))
    episodes, n_episodes, steps = [0, 1, 2], 3, []
    for number in range(n_steps):
        env = draw(st.integers(0, 2))
        ending = draw(st.sampled_from(["goes on"] * 4 + ["terminated", "truncated"]))
        steps.append(Step(number, episodes[env], ending == "terminated", ending != "goes on"))
        if ending != "goes on":
            episodes[env], n_episodes = n_episodes, n_episodes + 1
    batches, first = [], 0
    while first < n_steps:
        size = draw(st.integers(1, 9))
        batches.append(steps[first : first + size])
        first += size
    return batches


def check(buffer: TransitionBuffer, steps: list[Step], n_step: int, held: set[int]) -> None:
    """Each draw is what the whole list of steps says; `held` are the numbers still there."""
    drawn = buffer.sample(50, n_step=n_step, gamma=GAMMA)
    items = drawn.transitions
    for i in range(50):
        number = int(items.observations[i, 0])
        assert number in held
        assert items.actions[i] == -number
        episode = [s for s in steps if s.episode == steps[number].episode and s.number >= number]
        spanned = episode[:n_step]
        assert drawn.n_steps[i] == len(spanned)
        assert items.rewards[i] == sum(s.reward * GAMMA**k for k, s in enumerate(spanned))
        assert items.next_observations[i, 0] == spanned[-1].number + 0.5
        assert items.terminateds[i] == spanned[-1].terminated
        assert drawn.weights[i] == 1.0


@settings(deadline=None)
@given(batches=histories(), capacity=st.integers(1, 70), n_step=st.integers(1, 4))
def test_draws_are_those_of_the_whole_list_of_steps(batches, capacity, n_step):
    buffer, steps = buffer_of(capacity), []
    for batch in batches:
        add(buffer, batch)
        steps += batch
        held = {step.number for step in steps[-capacity:]}
        assert len(buffer) == len(held)
        check(buffer, steps, n_step, held)


@settings(deadline=None)
@given(batches=histories(), sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)))
def test_a_restored_buffer_holds_the_same_in_any_capacity(batches, sizes):
    before, after = buffer_of(sizes[0]), buffer_of(sizes[1], seed=1)
    steps = [step for batch in batches for step in batch]
    for batch in batches:
        add(before, batch)
    after.set_state(before.get_state())
    held = {step.number for step in steps[-min(sizes) :]}
    assert len(after) == len(held)
    check(after, steps, 2, held)
    # It goes on: what comes next is of other episodes.
    more = [Step(len(steps) + i, 1000, False, False) for i in range(5)]
    add(after, more)
    steps += more
    check(after, steps, 2, {*sorted(held | {s.number for s in more})[-sizes[1] :]})


def test_a_restored_buffer_draws_by_the_same_priorities():
    before, after = buffer_of(10, seed=3, alpha=0.6), buffer_of(10, seed=4, alpha=0.6)
    add(before, [Step(i, 0, False, False) for i in range(14)])
    before.update_priorities(np.arange(5), np.array([1.0, 2, 3, 4, 5]))
    after.set_state(before.get_state())
    wanted, found = (
        dict(zip(drawn.transitions.observations[:, 0], drawn.weights, strict=True))
        for drawn in (b.sample(400, n_step=1, gamma=GAMMA, beta=0.4) for b in (before, after))
    )
    assert sorted(found) == list(range(4, 14))
    assert found == pytest.approx(wanted)
    assert len(set(found.values())) == 5  # 1 to 5; the others have 1


def test_a_range_of_steps_is_drawn_with_both_ends():
    buffer = buffer_of(500)
    add(buffer, [Step(i, 0, False, False) for i in range(400)])
    drawn = buffer.sample(300, n_step=(2, 4), gamma=GAMMA)
    inside = drawn.transitions.observations[:, 0] < 395
    counts = Counter(drawn.n_steps[inside].tolist())
    assert set(counts) == {2, 3, 4}
    assert min(counts.values()) > 50  # of about 100 each


def test_a_state_of_another_kind_leaves_the_buffer_empty():
    buffer = buffer_of(5)
    buffer.set_state({"episodes": []})
    assert len(buffer) == 0
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1, n_step=1, gamma=GAMMA)


@settings(deadline=None)
@given(
    errors=st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=40),
    uniform=st.lists(st.floats(0, 0.999), min_size=1, max_size=20),
    alpha=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_rows_are_drawn_in_proportion_to_their_priorities(errors, uniform, alpha):
    n_rows = len(errors)
    priorities = Priorities(64, alpha=alpha)
    priorities.add(np.arange(n_rows))
    priorities.update(np.arange(n_rows), np.array(errors))
    shares = np.maximum(errors, 1e-12) ** alpha
    edges = np.cumsum(shares) / shares.sum()
    rows = priorities.draw(np.array(uniform), n_rows=n_rows)
    for row, point in zip(rows, uniform, strict=True):
        low = edges[row - 1] if row else 0.0
        assert low - 1e-9 <= point <= edges[row] + 1e-9
    # Schaul et al. (2016), section 3.4: (1 / (N P(i))) ** beta over the largest of them.
    share = shares / shares.sum()
    expected = (1 / (n_rows * share)) ** 0.4
    found = priorities.weights(rows, n_rows=n_rows, beta=0.4)
    np.testing.assert_allclose(found, (expected / expected.max())[rows], rtol=1e-6)


def test_new_rows_have_the_highest_priority_there_was():
    priorities = Priorities(8, alpha=1.0)
    priorities.add(np.arange(2))
    priorities.update(np.array([0, 1]), np.array([9.0, 1.0]))
    priorities.add(np.array([2]))
    # 9, 1 and 9 of 19: the third begins at 10/19.
    assert priorities.draw(np.array([0.0, 0.5, 10.1 / 19]), n_rows=3).tolist() == [0, 1, 2]


RUN = """
import runpy
from training.ray_environment import set_ray_environment
set_ray_environment()
runpy.run_module("tests.training.replay_checks", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        "dqn_learns_as_rllib",
        "sac_learns_as_rllib",
        "the_same_seed_fills_the_same_buffer",
        "a_long_episode_is_forgotten_and_counted_whole",
        "a_run_repeats_itself_and_resumes",
    ],
)
def test_the_training_step_does_what_rllibs_does(check):
    done = python("-c", RUN, check)
    assert done.returncode == 0, done.stderr[-3000:]
