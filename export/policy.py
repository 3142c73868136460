"""What an RLlib checkpoint holds of one policy, however it was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym


@dataclass(frozen=True)
class Checkpoint:
    """The parts of an RLlib checkpoint that make one policy.

    Attributes:
        path: The checkpoint's directory.
        algorithm: The algorithm's name, such as `PPO`.
        module_id: Which RLModule of the checkpoint this is.
        rl_module: The RLModule, in evaluation mode.
        env_to_module: RLlib's own pipeline from episodes to the module's batch.
        module_to_env: RLlib's own pipeline from the module's output to the environment's action.
        observation_space: What the environment gives (to this agent).
        action_space: What the environment takes (from this agent).
        env_id: The environment's id, where the checkpoint names one.
        env_config: Its keyword arguments.
        wrappers: Import paths and keyword arguments of the wrappers around it, the innermost first.
        facts: Iteration, steps and versions, for the manifest.
        env_class: The environment's class, where the checkpoint holds one instead of an id.
        agent_id: In a multi-agent checkpoint, the agent whose connectors these are.
        agents: In a multi-agent checkpoint, each agent's module.
        members: Of them, the agents that act by this policy.
        pipeline_module: What the pipelines are called with: the module, or the MultiRLModule.
    """

    path: Path
    algorithm: str
    module_id: str
    rl_module: Any
    env_to_module: Any
    module_to_env: Any
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    env_id: str | None
    env_config: Mapping[str, Any]
    wrappers: Sequence[tuple[str, Mapping[str, Any]]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    env_class: type[Any] | None = None
    agent_id: Any = None
    agents: Mapping[Any, str] = field(default_factory=dict)
    members: Sequence[Any] = ()
    pipeline_module: Any = None
