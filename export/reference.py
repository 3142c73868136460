"""RLlib's own answer: its connector pipelines around its own RLModule, nothing of ours between.

What the exported graph is measured against, and a `Policy` that `evaluate` can play.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from export.checkpoint import Checkpoint
from export.graph import DistributionSpec
from serving.interface import OutputName, PolicyOutput


class RLlibReference:
    """RLlib's inference path, step for step as `SingleAgentEnvRunner._sample` takes it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._module = checkpoint.rl_module
        self._action_dtype: np.dtype[Any] = np.dtype(checkpoint.action_space.dtype or np.float32)

    def answer(
        self,
        observations: NDArray[Any],
        noise: NDArray[np.float32],
        distribution: DistributionSpec,
    ) -> dict[str, NDArray[Any]]:
        """Everything that the graph computes, computed by RLlib.

        RLlib draws its samples itself; here the drawn sample is fixed by `noise` and goes through
        RLlib's log-probability and its module-to-env pipeline like one of its own.

        Args:
            observations: (B, *observation_shape), raw, in the observation space's dtype.
            noise: (B, D) float32.
            distribution: How noise becomes a sample.

        Returns:
            Arrays under the graph's output names.
        """
        step, batch = self._to_module(observations)
        output = self._module.forward_inference(batch)
        inputs = output[Columns.ACTION_DIST_INPUTS]
        dist = self._module.get_inference_action_dist_cls().from_logits(inputs)
        mode = dist.to_deterministic().sample()
        sample = _sample(dist, inputs, torch.from_numpy(noise), distribution)
        answers = {
            "action": self._to_env(step, dict(output)),
            "action_logp": _numpy(dist.logp(mode)),
            "sampled_action": self._to_env(step, {**output, Columns.ACTIONS: sample}),
            "sampled_action_logp": _numpy(dist.logp(sample)),
            "action_dist_inputs": _numpy(inputs),
        }
        if hasattr(self._module, "compute_values"):
            with torch.no_grad():
                answers["value"] = _numpy(self._module.compute_values(batch))
        return answers

    def act(self, observations: NDArray[Any], *, explore: bool) -> NDArray[Any]:
        """The actions that RLlib would send to the environment, (B, *action_shape)."""
        step, batch = self._to_module(observations, explore=explore)
        forward = self._module.forward_exploration if explore else self._module.forward_inference
        output = forward(batch, t=0) if explore else forward(batch)
        return self._to_env(step, dict(output), explore=explore)

    def _to_module(
        self, observations: NDArray[Any], *, explore: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        episodes = []
        for observation in observations:
            episode = SingleAgentEpisode(
                observation_space=self._checkpoint.observation_space,
                action_space=self._checkpoint.action_space,
            )
            episode.add_env_reset(observation=observation)
            episodes.append(episode)
        # What both pipelines of one step get; in `shared_data` the first tells the second how it
        # put the episodes together.
        step = {"rl_module": self._module, "episodes": episodes, "shared_data": {}}
        batch = self._checkpoint.env_to_module(batch={}, explore=explore, **step)
        return step, batch

    def _to_env(
        self, step: dict[str, Any], output: dict[str, Any], *, explore: bool = False
    ) -> NDArray[Any]:
        answer = self._checkpoint.module_to_env(batch=output, explore=explore, **step)
        actions = answer.get(Columns.ACTIONS_FOR_ENV, answer[Columns.ACTIONS])
        # RLlib narrows int64 to int32 on the way; the value is what the environment sees.
        return np.stack([np.asarray(action) for action in actions]).astype(self._action_dtype)


class RLModulePolicy:
    """A checkpoint as a `Policy`, through RLlib's own path."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._reference = RLlibReference(checkpoint)
        self._space: gym.Space[Any] = checkpoint.observation_space

    def compute_actions(
        self,
        observations: NDArray[Any],
        *,
        deterministic: bool = True,
        seed: int | None = None,
        outputs: Collection[OutputName] = (),
    ) -> PolicyOutput:
        """See `serving.interface.Policy`; `outputs` are not available here.

        Raises:
            ValueError: `outputs` were asked for.
        """
        if outputs:
            raise ValueError("a checkpoint answers actions only; export it to ask for outputs")
        if seed is not None:
            torch.manual_seed(seed)
        rows = np.asarray(observations, dtype=self._space.dtype)
        return PolicyOutput(actions=self._reference.act(rows, explore=not deterministic))


def _sample(
    dist: Any, inputs: torch.Tensor, noise: torch.Tensor, distribution: DistributionSpec
) -> torch.Tensor:
    if distribution.name == "categorical":
        return torch.argmax(inputs + noise, dim=-1)
    normal = dist._dist.base_dist if hasattr(dist._dist, "base_dist") else dist._dist
    sample: torch.Tensor = normal.mean + normal.stddev * noise
    return sample


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
