"""Connectors as users write them."""

from __future__ import annotations

from typing import Any

from ray.rllib.connectors.connector_v2 import ConnectorV2


class Halve(ConnectorV2):
    """Halves every observation, in the episode, as RLlib's own connectors do."""

    def __call__(self, *, episodes: list[Any], batch: dict[str, Any], **_: Any) -> Any:
        for episode in self.single_agent_episode_iterator(episodes):
            halved = episode.get_observations(-1) * 0.5
            episode.set_observations(at_indices=-1, new_data=halved)
        return batch
