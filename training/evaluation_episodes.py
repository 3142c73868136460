"""Whole episodes of a policy, chosen before they are played.

RLlib's `sample(num_episodes=N)` on N environments side by side takes the first episodes to end, and
those are the short ones: a policy that falls half of the time looks as if it fell nearly always.
Here each environment plays a share that is fixed beforehand, however long its episodes take.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from training.episodes import PlayedEpisode

# Vector steps between two looks at what has ended.
_STEPS_PER_LOOK = 64


def play_episodes(
    runner: SingleAgentEnvRunner,
    *,
    n_episodes: int,
    deterministic: bool = True,
    seed: int | None = None,
) -> list[PlayedEpisode]:
    """Play whole episodes with a runner's policy, connectors and environments.

    Of N environments each plays n_episodes // N, and the first n_episodes % N play one more. Every
    pipeline that RLlib runs is run, recurrent policies included. Statistics of observations are
    used and not changed; the process's random number generators are left as they were found.

    Args:
        runner: A runner kept for evaluation: its environments are reset, and its metrics dropped.
        n_episodes: How many episodes, 1 or more.
        deterministic: Take the most likely actions instead of sampling.
        seed: Of the environments' resets (environment i gets seed + i) and of the sampled actions;
            None goes on from where the environments' own generators are.

    Returns:
        The episodes, environment by environment, each environment's in the order played.
    """
    shares = [n_episodes // runner.num_envs] * runner.num_envs
    for i in range(n_episodes % runner.num_envs):
        shares[i] += 1
    with ExitStack() as stack:
        stack.enter_context(_own_random_numbers(seed))
        stack.enter_context(_frozen_filters(runner))
        env_of_episode = stack.enter_context(_noted_environments(runner))
        stack.callback(_forget, runner, runner._seed)
        runner._seed, runner._needs_initial_reset = seed, True
        return _play(runner, shares, env_of_episode, explore=not deterministic)


def _play(
    runner: SingleAgentEnvRunner,
    shares: list[int],
    env_of_episode: dict[str, int],
    *,
    explore: bool,
) -> list[PlayedEpisode]:
    played: list[list[PlayedEpisode]] = [[] for _ in shares]
    unfinished: dict[str, list[Any]] = {}
    while any(len(done) < share for done, share in zip(played, shares, strict=True)):
        n_steps = _STEPS_PER_LOOK * runner.num_envs
        for chunk in runner._sample(num_timesteps=n_steps, explore=explore):
            chunks = unfinished.setdefault(chunk.id_, [])
            chunks.append((len(chunk), float(chunk.get_return())))
            if chunk.is_done:
                lengths, returns = zip(*unfinished.pop(chunk.id_), strict=True)
                ending = bool(chunk.is_terminated), bool(chunk.is_truncated)
                episode = PlayedEpisode(sum(returns), sum(lengths), *ending)
                played[env_of_episode[chunk.id_]].append(episode)
    return [episode for done, share in zip(played, shares, strict=True) for episode in done[:share]]


def _forget(runner: SingleAgentEnvRunner, seed: int | None) -> None:
    # The next call resets the environments again, and nothing of these episodes is reported.
    runner._seed, runner._needs_initial_reset = seed, True
    runner._ongoing_episodes_for_metrics.clear()
    runner._done_episodes_for_metrics.clear()
    runner.get_metrics()


@contextmanager
def _noted_environments(runner: Any) -> Iterator[dict[str, int]]:
    # RLlib's episodes don't say which environment they are from; the runner starts each one here.
    env_of_episode: dict[str, int] = {}
    start = runner._new_episode

    def note(env_index: int, episodes: Any = None) -> None:
        start(env_index, episodes)
        new = (runner._ongoing_episodes if episodes is None else episodes)[env_index]
        env_of_episode[new.id_] = env_index

    runner._new_episode = note
    try:
        yield env_of_episode
    finally:
        del runner._new_episode


@contextmanager
def _frozen_filters(runner: Any) -> Iterator[None]:
    filters = [
        piece for piece in runner._env_to_module.connectors if isinstance(piece, MeanStdFilter)
    ]
    before = [piece._update_stats for piece in filters]
    for piece in filters:
        piece._update_stats = False
    try:
        yield
    finally:
        for piece, updates in zip(filters, before, strict=True):
            piece._update_stats = updates


@contextmanager
def _own_random_numbers(seed: int | None) -> Iterator[None]:
    # Modules and environments may draw from any of the three.
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
