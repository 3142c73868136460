"""What the parity gate asks: raw observations, noise, masks and rewards, and RLlib's answers.

Where a policy has no memory the vectors are rows: arrays (N, ...). With memory they are episodes
of `N_STEPS` steps from the initial state: arrays (N, T, ...).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from export.errors import UnsupportedPolicyError
from export.graph import PolicyGraph
from export.gym_spaces import leaf_spaces
from export.policy import Checkpoint
from export.reference import RLlibReference
from export.training_environment import training_environment
from export.walk import Walk
from serving.conforming import conform_observations
from serving.errors import UsageError
from serving.manifest import NoiseSpec
from serving.play_loop import EnvironmentFailedError

logger = logging.getLogger("policyserve.export")

Vectors = dict[str, NDArray[Any]]

_SEED = 20260  # any fixed number: the gate has to be repeatable
_N_SAMPLES = 128
_N_ON_POLICY = 448
_N_GOLDEN_ROWS = 128
_MAX_GOLDEN_BYTES = 32 * 1024 * 1024  # a bundle refuses more than 256 MiB, unpacked
N_STEPS = 12
# What the vectors hold beside inputs and answers.
BESIDE = ("source", "n_without_answer")
_N_SAMPLE_EPISODES = 40
_N_ON_POLICY_EPISODES = 16
# A simulator that takes seconds a step gives fewer observations, instead of holding up the export.
_PLAYING_LIMIT_S = 20.0
# Stand-ins for a missing bound, from usual sizes to where tanh saturates.
_EDGE_VALUES = (0.0, 1.0, -1.0, 10.0, -10.0)


class _Source(Protocol):
    """Where an episode's observations come from."""

    name: str

    def reset(self) -> Any:
        """The first observation."""

    def step(self, action: Any) -> tuple[Any, float]:
        """The next observation and the reward, for the action that the environment got."""


class _Listed:
    """Observations from a list, over and over, with rewards out of a generator."""

    def __init__(self, name: str, observations: Sequence[Any], rng: np.random.Generator) -> None:
        self.name = name
        self._observations = observations
        self._rng = rng
        self._next = 0

    def reset(self) -> Any:
        """The first."""
        return self._take()

    def step(self, action: Any) -> tuple[Any, float]:  # noqa: ARG002 - what comes is fixed
        """The next."""
        return self._take(), float(np.float32(self._rng.normal()))

    def _take(self) -> Any:
        observation = self._observations[self._next % len(self._observations)]
        self._next += 1
        return observation


class _Played:
    """Observations of a real environment; after an episode's end the next one begins.

    An environment that fails, or gives what its space does not hold, is no reason to refuse the
    policy: from then on samples of the space stand for it.
    """

    name = "on_policy"

    def __init__(self, env: Any, seed: int, graph: PolicyGraph, space: gym.Space[Any]) -> None:
        self._env = env
        self._seed = seed
        self._graph = graph
        self._space = space
        self._deadline = time.monotonic() + _PLAYING_LIMIT_S

    @property
    def has_failed(self) -> bool:
        """Whether samples stand for it by now."""
        return self.name != "on_policy"

    def reset(self) -> Any:
        """Reset with the seed, which moves on."""
        self._seed += 1000
        observation, _ = self._attempt(lambda: (self._env.reset(seed=self._seed)[0], 0.0))
        return observation

    def step(self, action: Any) -> tuple[Any, float]:
        """Step the environment."""
        over = False

        def step() -> tuple[Any, Any]:
            nonlocal over
            observation, reward, terminated, truncated, _ = self._env.step(action)
            over = bool(terminated or truncated)
            return observation, reward

        observation, reward = self._attempt(step)
        return (self.reset() if over else observation), reward

    def _attempt(self, call: Callable[[], tuple[Any, Any]]) -> tuple[Any, float]:
        if time.monotonic() > self._deadline and not self.has_failed:
            logger.warning("the environment is slow: the parity check goes on without it")
            self.name = "space_sample"
        if not self.has_failed:
            try:
                observation, reward = call()
                conform_observations([observation], self._graph.observation_space)
                if np.isfinite(float(reward)):
                    return observation, float(reward)
                logger.warning("the environment's reward is %s during the parity check", reward)
            except (Exception, SystemExit) as exc:  # a user's environment can raise anything
                logger.warning("the environment failed during the parity check: %s", exc)
            self.name = "space_sample"
        return self._space.sample(), 0.0


def parity_vectors(checkpoint: Checkpoint, graph: PolicyGraph) -> Vectors:
    """Raw inputs, and what RLlib answers to them.

    The observations are edge values, samples of the space, and, where the training environment
    can be built here, those of real episodes, greedy and sampled steps in turn.

    Returns:
        The graph's inputs but its state, by name; RLlib's answers, by the graph's output names;
        `source` (N,) names; `n_without_answer`, how many rows were left out, once per row; and for
        policies with memory `is_sampled` (N, T) bool.

    Raises:
        UnsupportedPolicyError: RLlib itself fails on its own checkpoint.
    """
    reference = RLlibReference(checkpoint, graph)
    rng = np.random.default_rng(_SEED)
    torch.manual_seed(_SEED)  # RLlib samples with torch's global generator
    space = checkpoint.observation_space
    space.seed(_SEED)
    edges = edge_observations(space)
    with _environments(checkpoint) as make:
        try:
            ask = _episodes if graph.has_memory else _rows
            vectors = ask(checkpoint, graph, reference, rng, edges, make)
        except UnsupportedPolicyError:
            raise
        except Exception as exc:  # RLlib raises whatever its connectors and modules raise
            raise UnsupportedPolicyError(
                f"RLlib itself fails to act with this checkpoint: {type(exc).__name__}: {exc}"
            ) from exc
    return _with_numbers(graph, vectors)


def _with_numbers(graph: PolicyGraph, vectors: Vectors) -> Vectors:
    """Leave out rows for which RLlib itself answers no number, and say how many they were.

    Some networks divide by what an edge value makes zero, and a mask of the gate's can forbid all
    that a network with a mask of its own allows. What to answer there nobody can say.
    """
    n = len(vectors["source"])
    is_number = np.ones(n, dtype=np.bool_)
    for name in graph.output_names:
        values = vectors.get(name)
        if values is not None and np.issubdtype(values.dtype, np.floating):
            rows = values.reshape(n, -1)
            is_score = name in ("action_dist_inputs", "q_values")
            is_number &= ~np.isnan(rows).any(axis=1)
            is_number &= is_score | ~np.isinf(rows).any(axis=1)
    if not is_number.any():
        raise UnsupportedPolicyError(
            "RLlib itself answers NaN or infinity for every observation: the network is broken"
        )
    found = {name: values[is_number] for name, values in vectors.items()}
    return {**found, "n_without_answer": np.full(is_number.sum(), n - is_number.sum())}


def _rows(
    checkpoint: Checkpoint,
    graph: PolicyGraph,
    reference: RLlibReference,
    rng: np.random.Generator,
    edges: list[Any],
    make: Callable[[], Any] | None,
) -> Vectors:
    space = checkpoint.observation_space
    parts = {
        "edge": edges,
        "space_sample": [space.sample() for _ in range(_N_SAMPLES)],
        "on_policy": _played_rows(checkpoint, graph, make),
    }
    observations = [observation for part in parts.values() for observation in part]
    source = np.concatenate([np.full(len(part), name) for name, part in parts.items()])
    inputs = _beside(graph, rng, len(observations), source)
    answers = []
    for start in range(0, len(observations), reference.max_batch_size):
        rows = slice(start, start + reference.max_batch_size)
        walk = Walk(checkpoint, observations[rows])
        found, _, _ = reference.answer(walk, inputs["noise"][rows], _mask(inputs, rows))
        answers.append(found)
    vectors: Vectors = {
        name: np.concatenate([part[name] for part in answers]) for name in answers[0]
    }
    conformed = conform_observations(observations, graph.observation_space)
    return {**conformed, **_without_empty(inputs), **vectors, "source": source}


def _played_rows(
    checkpoint: Checkpoint, graph: PolicyGraph, make: Callable[[], Any] | None
) -> list[Any]:
    """Observations of episodes played by RLlib, one environment at a time."""
    if make is None:
        return []
    found: list[Any] = []
    source = _Played(make(), _SEED, graph, checkpoint.observation_space)
    observation = source.reset()
    while len(found) < _N_ON_POLICY and not source.has_failed:
        found.append(observation)
        walk = Walk(checkpoint, [observation])
        # Alternate greedy and sampled steps: greedy alone can stay in one place.
        explore = len(found) % 2 == 0
        try:
            walk.forward(explore=explore)
            (action,), _ = walk.actions(explore=explore)
        except Exception as exc:  # RLlib cannot sample from logits that are no numbers
            logger.warning("RLlib failed on an observation of the environment: %s", exc)
            break
        observation, _ = source.step(action)
    return found


def _episodes(
    checkpoint: Checkpoint,
    graph: PolicyGraph,
    reference: RLlibReference,
    rng: np.random.Generator,
    edges: list[Any],
    make: Callable[[], Any] | None,
) -> Vectors:
    space = checkpoint.observation_space
    sources: list[_Source] = [
        _Listed("edge", edges[first:] + edges[:first], rng) for first in range(len(edges))
    ]
    sources += [
        _Listed("space_sample", [space.sample() for _ in range(N_STEPS)], rng)
        for _ in range(_N_SAMPLE_EPISODES)
    ]
    if make is not None:
        sources += [
            _Played(make(), _SEED + index, graph, space) for index in range(_N_ON_POLICY_EPISODES)
        ]
    parts = [
        _walk(checkpoint, graph, reference, rng, sources[start : start + reference.max_batch_size])
        for start in range(0, len(sources), reference.max_batch_size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _walk(
    checkpoint: Checkpoint,
    graph: PolicyGraph,
    reference: RLlibReference,
    rng: np.random.Generator,
    sources: Sequence[_Source],
) -> Vectors:
    """Step one episode per source together; arrays (N, T, ...)."""
    n = len(sources)
    observations = [source.reset() for source in sources]
    rewards = np.zeros(n, dtype=np.float32)
    walk = Walk(checkpoint, observations)
    steps: list[Vectors] = []
    for _ in range(N_STEPS):
        conformed = conform_observations(list(observations), graph.observation_space)
        names = np.array([source.name for source in sources])
        inputs = _beside(graph, rng, n, names)
        answers, greedy, sampled = reference.answer(
            walk, inputs["noise"], _mask(inputs, slice(None))
        )
        is_sampled = rng.random(n) < 0.5 if sampled is not None else np.zeros(n, dtype=np.bool_)
        step = {**conformed, **_without_empty(inputs), **answers, "is_sampled": is_sampled}
        if graph.reads_reward:
            step["reward"] = rewards
        steps.append(step)
        taken = walk.choose(greedy, sampled, is_sampled)
        results = [
            source.step(action) for source, action in zip(sources, walk.for_env(taken), strict=True)
        ]
        observations = [observation for observation, _ in results]
        rewards = np.array([reward for _, reward in results], dtype=np.float32)
        walk.advance(taken, observations, rewards)
    vectors = {name: np.stack([step[name] for step in steps], axis=1) for name in steps[0]}
    return {**vectors, "source": np.array([source.name for source in sources])}


def _beside(graph: PolicyGraph, rng: np.random.Generator, n: int, source: NDArray[Any]) -> Vectors:
    """Noise, and masks on every second sample of the space."""
    distribution = graph.distribution
    noise = NoiseSpec(distribution.noise if distribution else ()).draw(rng, n)
    found: Vectors = {"noise": noise}
    if graph.mask_size:
        mask = rng.random((n, graph.mask_size)) < 0.5
        sizes = graph.mask_sizes
        starts = np.cumsum([0, *sizes[:-1]])
        for start, size in zip(starts, sizes, strict=True):
            mask[np.arange(n), start + rng.integers(size, size=n)] = True  # one stays allowed
        mask[(source != "space_sample") | (np.arange(n) % 2 == 0)] = True
        found["action_mask"] = mask
    return found


def _mask(inputs: Vectors, rows: slice) -> NDArray[np.bool_] | None:
    mask = inputs.get("action_mask")
    return None if mask is None or mask[rows].all() else mask[rows]


def _without_empty(inputs: Vectors) -> Vectors:
    return {name: values for name, values in inputs.items() if values.shape[-1]}


def edge_observations(space: gym.Space[Any]) -> list[Any]:
    """Every leaf at once at its low end, its high end, and values in between."""
    return [_with_leaves(space, index) for index in range(len(_EDGE_VALUES) + 2)]


def _with_leaves(space: gym.Space[Any], index: int) -> Any:
    if isinstance(space, gym.spaces.Dict):
        return {key: _with_leaves(child, index) for key, child in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(_with_leaves(child, index) for child in space.spaces)
    if isinstance(space, gym.spaces.Discrete):
        return np.int64(int(space.start) + (0 if index % 2 else int(space.n) - 1))
    if isinstance(space, gym.spaces.MultiDiscrete):
        start = np.asarray(getattr(space, "start", 0), dtype=np.int64)
        value = start + (np.zeros_like(space.nvec) if index % 2 else space.nvec - 1)
        return value.astype(space.dtype)
    if isinstance(space, gym.spaces.MultiBinary):
        return np.full(space.shape, index % 2, dtype=space.dtype)
    assert isinstance(space, gym.spaces.Box)  # the graph has refused every other
    if index < len(_EDGE_VALUES):
        value = np.full(space.shape, _EDGE_VALUES[index])
    else:
        bound = np.asarray((space.low, space.high)[index - len(_EDGE_VALUES)], dtype=np.float64)
        value = np.where(np.abs(bound) < 1e6, bound, np.sign(bound) * 10.0)
    return np.clip(value, space.low, space.high).astype(space.dtype)


@contextlib.contextmanager
def _environments(checkpoint: Checkpoint) -> Iterator[Callable[[], Any] | None]:
    """A function that makes the training environment, or None where it cannot be made here."""
    made: list[Any] = []

    build = training_environment(checkpoint)

    def make() -> Any:
        assert build is not None
        made.append(build())
        return made[-1]

    try:
        yield make if build is not None and _is_made(checkpoint, make) else None
    finally:
        for env in made:
            with contextlib.suppress(Exception):  # a user's environment can raise anything
                env.close()


def _is_made(checkpoint: Checkpoint, make: Callable[[], Any]) -> bool:
    try:
        env = make()
    except (UsageError, EnvironmentFailedError):
        return False  # an environment that only the trainer had: the report counts none
    except (Exception, SystemExit) as exc:  # a user's class can raise anything
        logger.warning("the environment cannot be made for the parity check: %s", exc)
        return False
    n_leaves = [len(leaf_spaces(each.observation_space)) for each in (env, checkpoint)]
    return n_leaves[0] == n_leaves[1]


def golden_vectors(vectors: Vectors) -> Vectors:
    """What travels in the bundle: all edge cases, and an even choice of the others."""
    n = len(vectors["source"])
    edges = np.flatnonzero(vectors["source"] == "edge")
    others = np.setdiff1d(np.arange(n), edges)
    # Episodes are longer than rows, so fewer of them.
    wanted = _N_GOLDEN_ROWS if "is_sampled" not in vectors else _N_GOLDEN_ROWS // N_STEPS + 1
    step = max(1, len(others) // wanted)
    rows = np.concatenate([edges, others[::step][:wanted]])
    size_bytes = sum(values[:1].nbytes for values in vectors.values())
    rows = rows[: max(1, _MAX_GOLDEN_BYTES // size_bytes)]
    return {name: values[rows] for name, values in vectors.items() if name not in BESIDE}
