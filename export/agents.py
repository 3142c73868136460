"""The policies of a multi-agent checkpoint, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium as gym

from export.connectors import filter_fingerprint
from export.errors import CheckpointError
from export.policy import Checkpoint


def split_agents(
    base: Checkpoint,
    modules: Any,
    config: Any,
    module_id: str | None,
    agents: Mapping[str, str] | None,
) -> list[Checkpoint]:
    """One policy for each module of a multi-agent checkpoint.

    Agents of one module whose observations go through filters of their own are split further.
    """
    table = _agent_table(base, modules, config, agents)
    groups: dict[tuple[str, bytes], list[Any]] = {}
    for agent_id, owner in table.items():
        if module_id is None or owner == module_id:
            key = (owner, filter_fingerprint(base.env_to_module, agent_id))
            groups.setdefault(key, []).append(agent_id)
    if not groups:
        raise CheckpointError(
            f"no agent acts by the RLModule {module_id!r}; agents and their modules: "
            + ", ".join(f"{agent} -> {owner}" for agent, owner in table.items())
        )
    return [
        replace(
            base,
            module_id=owner,
            rl_module=modules[owner],
            pipeline_module=modules,
            observation_space=_of_agent(base.observation_space, members[0]),
            action_space=_of_agent(base.action_space, members[0]),
            agent_id=members[0],
            agents=table,
            members=tuple(members),
        )
        for (owner, _), members in groups.items()
    ]


def _agent_table(
    base: Checkpoint, modules: Any, config: Any, agents: Mapping[str, str] | None
) -> dict[Any, str]:
    space = base.observation_space
    if not isinstance(space, gym.spaces.Dict):
        raise CheckpointError(
            f"a multi-agent checkpoint whose observation space is {space}; expected a Dict by agent"
        )
    if agents is not None:
        # Agents need not be named by strings; on the command line they are.
        own = {str(agent_id): agent_id for agent_id in space}
        table: dict[Any, str] = {own.get(name, name): owner for name, owner in agents.items()}
    else:
        try:
            asked = [
                {agent_id: str(config.policy_mapping_fn(agent_id, None)) for agent_id in space}
                for _ in range(8)
            ]
        except Exception as exc:  # the user's own function, written for real episodes
            raise CheckpointError(
                f"the checkpoint's policy_mapping_fn fails without an episode ({exc}); say which "
                "agent acts by which module with --agent AGENT=MODULE"
            ) from exc
        table = asked[0]
        if any(other != table for other in asked):
            raise CheckpointError(
                "the checkpoint's policy_mapping_fn draws an agent's module by chance; say which "
                "agent acts by which module with --agent AGENT=MODULE"
            )
    for agent_id, owner in table.items():
        if agent_id not in space.spaces or owner not in modules:
            raise CheckpointError(
                f"agent {agent_id!r} by module {owner!r}: the checkpoint has the agents "
                f"{', '.join(map(str, space))} and the modules {', '.join(modules.keys())}"
            )
    return table


def _of_agent(space: Any, agent_id: Any) -> gym.Space[Any]:
    found: gym.Space[Any] = space[agent_id]
    return found
