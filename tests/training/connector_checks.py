"""Run by test_connectors.py in a process of its own, where RLlib's warnings are no errors."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.models.utils import get_filter_config
from ray.rllib.utils.filter import RunningStat

from training.algorithm import rllib_config
from training.config_files import load_config
from training.filter_merging import mend_filter
from training.observations import CONVOLVED_SIZES

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float64)
TWO = spaces.Discrete(2)


def check_that_default_convolutions_are_rllibs() -> None:
    def has_default(size: int) -> bool:
        try:
            get_filter_config((size, size, 3))
        except ValueError:
            return False
        return True

    assert tuple(size for size in range(1, 300) if has_default(size)) == CONVOLVED_SIZES


def check_that_rllib_builds_the_pieces_in_order() -> None:
    def built(observation_space: spaces.Space, *sets: str) -> list[str]:
        config = rllib_config(load_config(flags={"env": "Some-v0"}, sets=sets).complete())
        pipeline = config.build_env_to_module_connector(
            spaces={"__env_single__": (observation_space, TWO)}
        )
        names = [type(piece).__name__ for piece in pipeline.connectors]
        return names[: names.index("AddObservationsFromEpisodesToBatch")]

    assert built(VECTOR) == []
    assert built(TWO, "observation_filter=mean_std") == ["FlattenObservations", "MeanStdFilter"]
    assert built(VECTOR, "prev_actions=1") == ["PrevActionsPrevRewards", "FlattenObservations"]
    image = spaces.Box(0.0, 1.0, (10, 10, 1), np.float32)
    assert built(image, "frame_stack=3") == ["FrameStacking"]


class Observed:
    """A filter of three components, and what it has seen."""

    def __init__(self) -> None:
        self.filter = MeanStdFilter()
        self.filter.input_observation_space = VECTOR
        self.filter.get_state()  # RLlib makes the statistics when they are first asked for

    def see(self, observations: np.ndarray) -> None:
        for observation in observations:
            self.filter._filters[None](observation)

    def moments(self) -> tuple[int, np.ndarray, np.ndarray]:
        stat = RunningStat.from_state(self.filter.get_state()[None]["running_stats"][0])
        return stat.n, stat.mean, stat.std


def check_that_merged_statistics_are_those_of_all_observations() -> None:
    generator = np.random.default_rng(5)
    merging, *runners = Observed(), Observed(), Observed()
    mend_filter(merging.filter)
    unmended = RunningStat((3,))
    seen = []
    for round_ in range(4):
        for index, runner in enumerate(runners):
            # The second runner sees nothing in the second round.
            n = 0 if (round_, index) == (1, 1) else 20 + 30 * index
            new = generator.normal([1e3, -2.0, 0.0], [5.0, 0.01, 100.0], (n, 3)) + round_
            runner.see(new)
            seen.append(new)
        # As RLlib does after each iteration: merge what the runners send, and send it to them.
        states = [runner.filter.get_state() for runner in runners]
        for state in states:
            unmended.update(RunningStat.from_state(state[None]["running_stats"][0]))
        merged = merging.filter.merge_states(states)
        for runner in runners:
            runner.filter.set_state(merged)
        every = np.concatenate(seen)
        for observed in (merging, *runners):
            count, mean, deviation = observed.moments()
            assert count == len(every)
            np.testing.assert_allclose(mean, every.mean(0), rtol=1e-9)
            np.testing.assert_allclose(deviation, every.std(0, ddof=1), rtol=1e-6)  # a float32
    # Once this fails, RLlib merges rightly by itself, and training/filter_merging.py can go.
    assert abs(unmended.mean[0] - every.mean(0)[0]) > 100


if __name__ == "__main__":
    check_that_default_convolutions_are_rllibs()
    check_that_rllib_builds_the_pieces_in_order()
    check_that_merged_statistics_are_those_of_all_observations()
