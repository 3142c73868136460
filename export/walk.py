"""RLlib's inference path, step for step, on episodes of our own choosing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from export.graph import copied
from export.policy import Checkpoint


@dataclass
class _Step:
    """One step of some episodes on its way through RLlib."""

    episodes: list[Any]
    shared: dict[str, Any]  # what RLlib's two pipelines of one step tell each other
    batch: dict[str, Any]
    output: dict[str, Any]


class Walk:
    """Episodes stepped together as `SingleAgentEnvRunner._sample` steps them.

    Each step: `forward`, then `actions` for as many choices of the action as are wanted, then
    `advance` with the action that was taken.
    """

    def __init__(self, checkpoint: Checkpoint, observations: Iterable[Any]) -> None:
        """Begin one episode per observation.

        Args:
            checkpoint: The policy.
            observations: The first observation of each episode, as the environment gives it.
        """
        self._checkpoint = checkpoint
        self._module = checkpoint.rl_module
        self._agent_id = checkpoint.agent_id
        self.episodes = [self._begin(observation) for observation in observations]
        self._step: _Step | None = None

    def _begin(self, observation: Any) -> Any:
        checkpoint = self._checkpoint
        if self._agent_id is None:
            episode = SingleAgentEpisode(
                observation_space=checkpoint.observation_space,
                action_space=checkpoint.action_space,
            )
            episode.add_env_reset(observation=observation)
            return episode
        several = MultiAgentEpisode(
            agent_to_module_mapping_fn=lambda *_, **__: checkpoint.module_id,
            observation_space=gym.spaces.Dict({self._agent_id: checkpoint.observation_space}),
            action_space=gym.spaces.Dict({self._agent_id: checkpoint.action_space}),
        )
        several.add_env_reset(observations={self._agent_id: observation})
        return several

    def forward(self, *, explore: bool = False) -> dict[str, Any]:
        """RLlib's env-to-module pipeline and the RLModule; the module's output."""
        shared: dict[str, Any] = {}
        batch = self._checkpoint.env_to_module(
            rl_module=self._checkpoint.pipeline_module,
            batch={},
            episodes=self.episodes,
            explore=explore,
            shared_data=shared,
        )
        if self._agent_id is not None:
            batch = batch[self._checkpoint.module_id]
        forward = self._module.forward_exploration if explore else self._module.forward_inference
        output = forward(copied(batch), t=0) if explore else forward(copied(batch))
        self._step = _Step(self.episodes, shared, batch, dict(output))
        return self._step.output

    @property
    def batch(self) -> dict[str, Any]:
        """What the RLModule got in this step."""
        assert self._step is not None
        return self._step.batch

    def actions(
        self, action: Any = None, *, explore: bool = False
    ) -> tuple[list[Any], dict[str, Any]]:
        """RLlib's module-to-env pipeline.

        Args:
            action: Use this action, batched as the module would give it, instead of RLlib's own
                choice.
            explore: Whether RLlib samples where it chooses itself.

        Returns:
            The actions that the environment gets, and every column of the pipeline's answer.
        """
        step = self._step
        assert step is not None
        output = dict(step.output)
        if action is not None:
            output[Columns.ACTIONS] = action
        answer = self._checkpoint.module_to_env(
            rl_module=self._checkpoint.pipeline_module,
            batch=output if self._agent_id is None else {self._checkpoint.module_id: output},
            episodes=step.episodes,
            explore=explore,
            shared_data=dict(step.shared),
        )
        if self._agent_id is not None:
            answer = {
                column: [row[self._agent_id] for row in values]
                for column, values in answer.items()
                if column != Columns.INFOS
            }
        for_env = answer.get(Columns.ACTIONS_FOR_ENV, answer[Columns.ACTIONS])
        return _rows(for_env, len(self.episodes)), answer

    def choose(
        self,
        greedy: Mapping[str, Any],
        sampled: Mapping[str, Any] | None,
        is_sampled: NDArray[np.bool_],
    ) -> dict[str, list[Any]]:
        """Row by row the one or the other answer of `actions`."""
        n = len(self.episodes)
        first = {column: _rows(values, n) for column, values in greedy.items()}
        if sampled is None:
            return first
        second = {column: _rows(values, n) for column, values in sampled.items()}
        return {
            column: [
                second[column][index] if is_sampled[index] else first[column][index]
                for index in range(n)
            ]
            for column in first
            if column in second
        }

    @staticmethod
    def for_env(answer: Mapping[str, Any]) -> list[Any]:
        """The actions that the environment gets."""
        found: list[Any] = answer.get(Columns.ACTIONS_FOR_ENV, answer[Columns.ACTIONS])
        return found

    def advance(
        self, answer: Mapping[str, Any], observations: Sequence[Any], rewards: NDArray[Any]
    ) -> None:
        """Add the step to every episode.

        Args:
            answer: Second part of what `actions` returned: the action that was taken.
            observations: What followed.
            rewards: And for which reward.
        """
        columns = {
            column: _rows(values, len(self.episodes))
            for column, values in answer.items()
            if column not in (Columns.ACTIONS_FOR_ENV,)
        }
        actions = columns.pop(Columns.ACTIONS)
        for index, episode in enumerate(self.episodes):
            extra = {column: values[index] for column, values in columns.items()}
            if self._agent_id is None:
                episode.add_env_step(
                    observation=observations[index],
                    action=actions[index],
                    reward=float(rewards[index]),
                    extra_model_outputs=extra,
                )
            else:
                episode.add_env_step(
                    {self._agent_id: observations[index]},
                    {self._agent_id: actions[index]},
                    {self._agent_id: float(rewards[index])},
                    extra_model_outputs={self._agent_id: extra},
                )


def _rows(values: Any, n: int) -> list[Any]:
    """One entry per episode, from RLlib's list of rows or nested struct of batched arrays."""
    if isinstance(values, list) and len(values) == n:
        return values
    return [tree.map_structure(lambda leaf, i=index: leaf[i], values) for index in range(n)]
