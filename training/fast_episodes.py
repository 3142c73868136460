"""Whole columns of vector steps, and RLlib's episodes filled from them at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from training.fast_policy import Choice
from training.fast_stepping import Array, Results


class Segment(NamedTuple):
    """Consecutive vector steps that one environment spent in one episode.

    Attributes:
        env_index: Which environment.
        episode: The episode that these steps belong to.
        first: The episode's first vector step of this call.
        end: One past its last.
        is_reset: The first of them was no step but the environment's reset.
        terminated: The episode ended by itself with the last of them.
        truncated: It was cut short with the last of them.
    """

    env_index: int
    episode: SingleAgentEpisode
    first: int
    end: int
    is_reset: bool
    terminated: bool = False
    truncated: bool = False


class Segments:
    """Which vector steps of one call belong to which episode, for N environments.

    Args:
        episodes: The runner's own list, each environment's episode of now; the runner replaces an
            episode that has ended.

    Attributes:
        n_resets: How many environments the next vector step resets instead of stepping them.
    """

    def __init__(self, episodes: list[SingleAgentEpisode]) -> None:
        self._episodes = episodes
        self._first = [0] * len(episodes)
        self._is_reset = [not episode.is_reset for episode in episodes]
        self._ended: list[Segment] = []
        self.n_resets = sum(self._is_reset)

    def end(self, now: int, terminateds: Array, truncateds: Array) -> list[int]:
        """Close the segments of the environments whose episodes have ended.

        Args:
            now: Vector steps so far.
            terminateds: (N,) bool, of the newest vector step.
            truncateds: Likewise.

        Returns:
            Those environments' indices.
        """
        indices: list[int] = np.flatnonzero(terminateds | truncateds).tolist()
        for i in indices:
            flags = bool(terminateds[i]), bool(truncateds[i])
            self._ended.append(Segment(*self.ongoing(i, now)[:5], *flags))
            self._first[i], self._is_reset[i] = now, True
        self.n_resets = len(indices)
        return indices

    def ongoing(self, env_index: int, now: int) -> Segment:
        """The steps of an environment's episode of now."""
        first, is_reset = self._first[env_index], self._is_reset[env_index]
        return Segment(env_index, self._episodes[env_index], first, now, is_reset)

    def take_ended(self) -> list[Segment]:
        """The segments that ended, in the order in which they did."""
        return self._ended


class StepColumns:
    """What T vector steps of N environments gave, column by column, step by step.

    Attributes:
        n_steps: Environment steps so far; resets are none.
    """

    def __init__(self) -> None:
        self.n_steps = 0
        self._times_s: list[float] = []
        self._infos: list[Sequence[dict[str, Any]]] = []
        self._lists: dict[str, list[Array]] = {}
        self._arrays: dict[str, Array] = {}

    def __len__(self) -> int:
        return len(self._times_s)

    def add(self, results: Results, choice: Choice, weights_seq_no: Array, *, n_steps: int) -> None:
        """Take one vector step: its results, the actions that led there, and the weights' number.

        Args:
            results: Of the vector step.
            choice: The actions that it took.
            weights_seq_no: (N,) int, RLlib's number of the policy's weights.
            n_steps: How many environments were stepped, not reset.
        """
        observations, rewards, _, _, infos = results
        columns = {
            Columns.OBS: observations,
            Columns.ACTIONS: choice.actions,
            Columns.REWARDS: rewards,
            **choice.columns,
            WEIGHTS_SEQ_NO: weights_seq_no,
        }
        for name, array in columns.items():
            self._lists.setdefault(name, []).append(array)
        self._infos.append(infos)
        self._times_s.append(time.perf_counter())
        self.n_steps += n_steps

    def join(self) -> None:
        """Join the steps: from here on each column is one array with leading axes (T, N)."""
        self._arrays = {name: np.stack(arrays) for name, arrays in self._lists.items()}

    def fill(self, segment: Segment) -> None:
        """Append a segment's steps to its episode, whose data become numpy arrays.

        The same as RLlib's `add_env_reset` and `add_env_step` one by one, then `to_numpy`.
        """
        env, first, end = segment.env_index, segment.first, segment.end
        episode: Any = segment.episode  # RLlib's types miss what it does itself
        if segment.is_reset and first < end:
            observation = self._arrays[Columns.OBS][first, env].copy()
            episode.add_env_reset(observation, self._infos[first][env])
            episode._start_time = self._times_s[first]
            first += 1
        if first == end:
            return
        for name, array in self._arrays.items():
            _extend(_buffer(episode, name), array[first:end, env])
        episode.infos.data.extend(infos[env] or {} for infos in self._infos[first:end])
        episode.t += end - first
        episode._last_step_time = self._times_s[end - 1]
        if episode._start_time is None:
            episode._start_time = self._times_s[first]
        episode.validate()


def continuation(episode: SingleAgentEpisode, *, lookback: int) -> SingleAgentEpisode:
    """The next chunk of an episode that goes on, ready for RLlib's step-by-step appending.

    Args:
        episode: A filled chunk.
        lookback: How many of its steps the next chunk can look back at.
    """
    chunk = episode.cut(len_lookback_buffer=lookback)
    buffers = (chunk.observations, chunk.actions, chunk.rewards)
    for buffer in (*buffers, *chunk.extra_model_outputs.values()):
        buffer.data, buffer.finalized = list(buffer.data), False
    return chunk


def _buffer(episode: SingleAgentEpisode, name: str) -> InfiniteLookbackBuffer:
    if name == Columns.OBS:
        return episode.observations
    if name == Columns.ACTIONS:
        return episode.actions
    if name == Columns.REWARDS:
        return episode.rewards
    return episode.extra_model_outputs.setdefault(name, InfiniteLookbackBuffer([]))


def _extend(buffer: InfiniteLookbackBuffer, new: Array) -> None:
    held: Any = buffer.data
    buffer.data = np.concatenate([np.stack(held), new]) if len(held) else new.copy()
    buffer.finalized = True
