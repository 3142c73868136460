"""RLlib's connector pipelines: which twins stand for them in the graph.

A pipeline with a piece that has no twin is refused by name: an unknown piece is arbitrary Python,
and leaving it out would export a policy that acts differently. A user's own connector gets its
twin with `export.twins.register_twin` (docs/export.md has an example).
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from export.bounds import ActionBounding
from export.errors import UnsupportedPolicyError
from export.rllib_twins import RLLIB_TWINS
from export.twins import ConnectorTwin, TwinContext, TwinFactory, class_name, find_twin

# RLlib's own default pieces (`AlgorithmConfig.build_env_to_module_connector`). They collect the
# newest observation, add the time axis and the state of policies with memory; the graph does the
# latter two itself.
_ENV_TO_MODULE_DEFAULTS = (
    "AddObservationsFromEpisodesToBatch",
    "AddTimeDimToBatchAndZeroPad",
    "AddStatesFromEpisodesToBatch",
    "AgentToModuleMapping",
    "BatchIndividualItems",
    "NumpyToTensor",
)
# `AlgorithmConfig.build_module_to_env_connector`; the graph redoes GetActions and
# NormalizeAndClipActions, the others only move data.
_MODULE_TO_ENV = (
    "GetActions",
    "TensorToNumpy",
    "UnBatchToIndividualItems",
    "ModuleToAgentUnmapping",
    "RemoveSingleTsTimeRankFromBatch",
    "NormalizeAndClipActions",
    "ListifyDataForVectorEnv",
)


def observation_twins(
    env_to_module: Any, action_space: gym.Space[Any], agent_id: Any = None
) -> list[ConnectorTwin]:
    """The twins of a pipeline's connectors, in order.

    Args:
        env_to_module: RLlib's pipeline.
        action_space: The environment's, of one agent.
        agent_id: Whose observations, in a multi-agent pipeline.

    Raises:
        UnsupportedPolicyError: Names every piece without a twin.
    """
    pieces = [piece for piece in env_to_module.connectors if not _is_default(piece)]
    factories = [_factory(type(piece)) for piece in pieces]
    unknown = [
        class_name(type(piece))
        for piece, factory in zip(pieces, factories, strict=True)
        if factory is None
    ]
    if unknown:
        raise UnsupportedPolicyError(
            f"the checkpoint's env-to-module pipeline holds {', '.join(unknown)}, which has no "
            "tensor twin; without it the policy would act differently. Register one with "
            "export.twins.register_twin and name its module with --twins"
        )
    twins = []
    for piece, factory in zip(pieces, factories, strict=True):
        assert factory is not None
        space = piece.input_observation_space
        if agent_id is not None:
            space = space[agent_id]
        context = TwinContext(space, action_space, agent_id)
        twins.append(factory(piece, context))
    return twins


def _factory(connector_class: type[Any]) -> TwinFactory | None:
    # A twin of the user's for one of RLlib's own connectors goes first.
    return find_twin(connector_class) or RLLIB_TWINS.get(class_name(connector_class))


def _is_default(piece: Any) -> bool:
    kind = type(piece)
    return kind.__name__ in _ENV_TO_MODULE_DEFAULTS and kind.__module__.startswith("ray.rllib.")


def check_module_to_env(module_to_env: Any) -> None:
    """Refuse a module-to-env pipeline with a piece that the graph does not redo.

    Raises:
        UnsupportedPolicyError: Names the pieces.
    """
    unknown = [
        class_name(type(piece))
        for piece in module_to_env.connectors
        if type(piece).__name__ not in _MODULE_TO_ENV
        or not type(piece).__module__.startswith("ray.rllib.")
    ]
    if unknown:
        raise UnsupportedPolicyError(
            f"the checkpoint's module-to-env pipeline holds {', '.join(unknown)}, which changes "
            "actions by Python code that the graph cannot hold; without it the policy would act "
            "differently. Do it in the environment, or in the RLModule"
        )


def action_bounding(module_to_env: Any) -> ActionBounding:
    """What RLlib does to a Box action before the environment gets it.

    Source: RLlib `NormalizeAndClipActions.__call__`: unsquash if `normalize_actions`, else clip
    if `clip_actions`, else nothing.
    """
    for piece in module_to_env.connectors:
        if type(piece).__name__ == "NormalizeAndClipActions":
            if piece.normalize_actions:
                return "unsquash"
            return "clip" if piece.clip_actions else "none"
    return "none"


def freeze_filters(env_to_module: Any) -> None:
    """Keep RLlib's own filters from learning while the pipeline serves as the reference.

    `update_stats=True` is what a restored checkpoint has, so each call would move them.
    """
    for piece in env_to_module.connectors:
        if hasattr(piece, "_update_stats"):
            piece._update_stats = False


def filter_fingerprint(env_to_module: Any, agent_id: Any) -> bytes:
    """What the filters know about one agent: it tells agents apart that share a module."""
    parts: list[bytes] = []
    for piece in env_to_module.connectors:
        entry = (getattr(piece, "_filters", None) or {}).get(agent_id)
        if entry is not None and not entry.no_preprocessor:
            stats = entry.running_stats
            parts += [np.asarray(stats.mean).tobytes(), np.asarray(stats.std).tobytes()]
    return b"".join(parts)
