"""What a connector is inside the graph: tensor code, and the register of who has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import gymnasium as gym
import torch
from numpy.typing import NDArray

Observation: TypeAlias = Any  # nested dicts and tuples of tensors (B, ...), as the space is nested


@dataclass(frozen=True)
class TwinContext:
    """What a twin is built for.

    Attributes:
        observation_space: What reaches this connector, of one agent.
        action_space: The environment's, of one agent.
        agent_id: The agent in a multi-agent checkpoint, else None.
    """

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    agent_id: Any = None


class ConnectorTwin(torch.nn.Module):
    """One env-to-module connector as tensor code. Subclass it and override what applies.

    Attributes:
        reads_reward: Whether `forward` uses the reward of the step before.
        reads_action: Whether `after_action` changes the state.
    """

    reads_reward: ClassVar[bool] = False
    reads_action: ClassVar[bool] = False

    def initial_state(self) -> Mapping[str, NDArray[Any]]:
        """The memory at an episode's start: name to array, without the batch axis."""
        return {}

    def forward(
        self,
        observation: Observation,
        state: dict[str, torch.Tensor],
        reward: torch.Tensor | None,  # noqa: ARG002 - for subclasses
    ) -> tuple[Observation, dict[str, torch.Tensor]]:
        """Transform a batch of observations.

        Args:
            observation: (B, ...) tensors, nested as the space is.
            state: This twin's memory after the step before, (B, ...).
            reward: (B,) of the step before, 0 at an episode's start; None unless `reads_reward`.

        Returns:
            The new observation and the new memory.
        """
        return observation, state

    def after_action(
        self,
        state: dict[str, torch.Tensor],
        action: Any,  # noqa: ARG002 - for subclasses
    ) -> dict[str, torch.Tensor]:
        """The memory once this step's action is known (as the module gave it, not unsquashed)."""
        return state


TwinFactory: TypeAlias = Callable[[Any, TwinContext], ConnectorTwin]

_factories: dict[str, TwinFactory] = {}


def register_twin(connector_class: type[Any] | str, factory: TwinFactory) -> None:
    """Say how a connector is written as tensors.

    Args:
        connector_class: The connector's class, or its full name `module.Class`.
        factory: From the checkpoint's connector object and its context to the twin; raises
            `UnsupportedPolicyError` for settings that it cannot reproduce.
    """
    _factories[class_name(connector_class)] = factory


def find_twin(connector_class: type[Any]) -> TwinFactory | None:
    """The registered factory of a connector's class, or None."""
    return _factories.get(class_name(connector_class))


def class_name(connector_class: type[Any] | str) -> str:
    """`module.Class`."""
    if isinstance(connector_class, str):
        return connector_class
    return f"{connector_class.__module__}.{connector_class.__qualname__}"
