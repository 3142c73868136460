"""RLlib's environment runner with a lean loop for the pipelines that it knows.

RLlib 2.60 hands every vector step through two pipelines of connectors, which turn arrays into lists
of single items and back, and appends every step to every episode object; that costs more than the
environment and the network together. Where the pipelines are RLlib's defaults, `FastEnvRunner`
collects whole columns and fills the episodes once per call. It draws the same random numbers in the
same order, so that a seed gives the same episodes, bit by bit; a test compares the two.

Anything else (recurrent policies, connectors of one's own, callbacks for each step) goes RLlib's
own way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.columns import Columns
from ray.rllib.env.env_runner import NUM_ENV_STEP_FAILURES_LIFETIME
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import ENV_STEP_TIMER, RLMODULE_INFERENCE_TIMER

from training.fast_episodes import Segment, Segments, StepColumns, continuation
from training.fast_policy import LeanPolicy
from training.fast_stepping import Array, Results, vector_step

logger = logging.getLogger("policyserve.training")

_ENV_TO_MODULE = [
    "AddObservationsFromEpisodesToBatch",
    "AddTimeDimToBatchAndZeroPad",
    "AddStatesFromEpisodesToBatch",
    "BatchIndividualItems",
    "NumpyToTensor",
]
_MODULE_TO_ENV = [
    "GetActions",
    "TensorToNumpy",
    "UnBatchToIndividualItems",
    "RemoveSingleTsTimeRankFromBatch",
    "NormalizeAndClipActions",
    "ListifyDataForVectorEnv",
]
# Called at each step or in the middle of a vector step, where the lean loop has no episodes yet.
_STEPWISE = ("on_episode_created", "on_episode_start", "on_episode_step")


class FastEnvRunner(SingleAgentEnvRunner):
    """RLlib's runner of single-agent environments, with the lean loop where it is known to fit.

    Attributes:
        why_not_lean: What the lean loop does not know; None where it is used.
    """

    # RLlib types these as optional; whatever the lean loop looks at is there.
    env: Any
    module: Any
    _cached_to_module: Any
    _ongoing_episodes: list[Any]
    _new_episode: Any
    _increase_sampled_metrics: Any

    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.why_not_lean = _why_not_lean(self)
        if self.env is not None and self.why_not_lean:
            logger.info("environments are stepped RLlib's own way: %s", self.why_not_lean)

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function with this runner; what it raises is raised where the call came from.

        RLlib's own ends this process instead, and then nobody is told why.
        """
        return func(self, *args, **kwargs)

    def make_env(self) -> None:
        """Build the environments RLlib's way, and find the quickest way to step them."""
        super().make_env()
        self._step_vector: Callable[[Array], Results] = vector_step(self.env)

    def lean_policy(self) -> LeanPolicy:
        """The module and its default pipelines in short; for a runner whose loop is lean."""
        return LeanPolicy(
            self.module,
            self.env.single_action_space,
            device=self._device,
            normalize_actions=self.config.normalize_actions,
            clip_actions=self.config.clip_actions,
        )

    def _sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[SingleAgentEpisode]:
        if not num_timesteps or random_actions or self.why_not_lean:
            episodes: list[SingleAgentEpisode] = super()._sample(
                num_timesteps=num_timesteps,
                num_episodes=num_episodes,
                explore=explore,
                random_actions=random_actions,
                force_reset=force_reset,
            )
            return episodes
        if force_reset or self._needs_initial_reset:
            self._reset_envs_and_episodes(explore)
        return self._sample_lean(num_timesteps, explore)

    def _sample_lean(self, num_timesteps: int, explore: bool) -> list[SingleAgentEpisode]:
        columns = StepColumns()
        was_training = self.module.training
        self.module.eval()
        try:
            self._collect(columns, num_timesteps, explore)
        finally:
            self.module.train(was_training)
        columns.join()
        done = [self._end(columns, segment) for segment in self._segments.take_ended()]
        self._done_episodes_for_metrics.extend(done)
        chunks = [self._cut(columns, i) for i in range(self.num_envs)]
        self._log_env_steps(metric=self._metrics_num_env_steps_sampled, num_steps=columns.n_steps)
        self._increase_sampled_metrics(columns.n_steps, len(done))
        return done + [chunk for chunk in chunks if chunk is not None]

    def _collect(self, columns: StepColumns, num_timesteps: int, explore: bool) -> None:
        policy = self.lean_policy()
        observations = self._cached_to_module[Columns.OBS]
        weights_seq_no = np.full(self.num_envs, self._weights_seq_no)
        self._segments = Segments(self._ongoing_episodes)
        inference_s = stepping_s = 0.0
        while columns.n_steps < num_timesteps:
            started = time.perf_counter()
            t = self._global_steps(columns.n_steps)
            choice = policy.choose(observations, explore=explore, t=t)
            chosen = time.perf_counter()
            results = self._step(choice.actions_for_env)
            stepping_s += time.perf_counter() - chosen
            inference_s += chosen - started
            n_steps = self.num_envs - self._segments.n_resets
            columns.add(results, choice, weights_seq_no, n_steps=n_steps)
            _, _, terminateds, truncateds, _ = results
            for i in self._segments.end(len(columns), terminateds, truncateds):
                self._new_episode(i, self._ongoing_episodes)
            observations = policy.to_tensor(results[0])
        self._cached_to_module = {Columns.OBS: observations}
        self.metrics.log_value(RLMODULE_INFERENCE_TIMER, inference_s / len(columns))
        self.metrics.log_value(ENV_STEP_TIMER, stepping_s / len(columns))

    def _global_steps(self, n_steps: int) -> int:
        # RLlib's estimate of the steps over all runners, which exploration schedules depend on.
        n_runners = self.config.num_env_runners or 1
        lifetime: int = self.num_env_steps_sampled_lifetime
        return (lifetime // n_runners + n_steps) * n_runners

    def _step(self, actions: Array) -> Results:
        try:
            return self._step_vector(actions)
        except Exception as exc:
            self.metrics.log_value(NUM_ENV_STEP_FAILURES_LIFETIME, 1, reduce="lifetime_sum")
            logger.exception("an environment failed in step()")
            raise RuntimeError("an environment failed in step()") from exc  # as RLlib does

    def _end(self, columns: StepColumns, segment: Segment) -> SingleAgentEpisode:
        episode = segment.episode
        columns.fill(segment)
        episode.is_terminated, episode.is_truncated = segment.terminated, segment.truncated
        in_its_place: Any = {segment.env_index: episode}
        self._make_on_episode_callback("on_episode_end", segment.env_index, in_its_place)
        return episode

    def _cut(self, columns: StepColumns, env_index: int) -> SingleAgentEpisode | None:
        # The chunk to hand out of an episode that goes on; None where it has no step yet.
        episode: SingleAgentEpisode = self._ongoing_episodes[env_index]
        columns.fill(self._segments.ongoing(env_index, len(columns)))
        if episode.t == 0:
            return None
        lookback = self.config.episode_lookback_horizon
        self._ongoing_episodes[env_index] = continuation(episode, lookback=lookback)
        self._ongoing_episodes_for_metrics[episode.id_].append(episode)
        return episode


def _why_not_lean(runner: Any) -> str | None:
    # RLlib's internals are looked at here, once; a newer RLlib with other ones runs its own loop.
    if runner.env is None or runner.module is None:
        return "no environment or no module here"
    config = runner.config
    space = runner.env.single_action_space
    reasons = {
        "a policy with memory": runner.module.is_stateful(),
        "a framework other than torch": config.framework_str != "torch",
        "connectors before the module": _names(runner._env_to_module) != _ENV_TO_MODULE,
        "connectors behind the module": _names(runner._module_to_env) != _MODULE_TO_ENV,
        "observations that are no array": not isinstance(
            runner.env.single_observation_space, spaces.Box
        ),
        "actions that are no array": not isinstance(
            space, (spaces.Discrete, spaces.MultiDiscrete, spaces.Box)
        ),
        "callbacks at each step": _has_stepwise_callbacks(runner),
        "environments that are restarted": config.restart_failed_sub_environments,
        "episodes kept as lists": not runner.episodes_to_numpy,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _names(pipeline: Any) -> list[str]:
    return [type(piece).__name__ for piece in pipeline.connectors]


def _has_stepwise_callbacks(runner: Any) -> bool:
    own = (*_STEPWISE, "on_episode_end")  # a class's on_episode_end may look at the environment
    return any(getattr(runner.config, f"callbacks_{name}") for name in _STEPWISE) or any(
        getattr(type(callbacks), name) is not getattr(RLlibCallback, name)
        for callbacks in runner._callbacks
        for name in own
    )
