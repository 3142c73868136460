"""Which connectors the graph stands in for, and what the last of them does to an action.

A pipeline with any other piece is refused by name: an unknown piece is arbitrary Python, and
leaving it out would export a policy that acts differently.
"""

from __future__ import annotations

from typing import Any, Literal

from export.errors import UnsupportedPolicyError

# RLlib's own default pieces (`AlgorithmConfig.build_env_to_module_connector`). For a policy
# without memory they only collect the newest observation into a float32 batch.
_ENV_TO_MODULE = (
    "AddObservationsFromEpisodesToBatch",
    "AddTimeDimToBatchAndZeroPad",
    "AddStatesFromEpisodesToBatch",
    "BatchIndividualItems",
    "NumpyToTensor",
)
# `AlgorithmConfig.build_module_to_env_connector`; the graph redoes GetActions and
# NormalizeAndClipActions, the others only move data.
_MODULE_TO_ENV = (
    "GetActions",
    "TensorToNumpy",
    "UnBatchToIndividualItems",
    "RemoveSingleTsTimeRankFromBatch",
    "NormalizeAndClipActions",
    "ListifyDataForVectorEnv",
)

ActionBounding = Literal["none", "unsquash", "clip"]


def check_connectors(env_to_module: Any, module_to_env: Any) -> None:
    """Refuse pipelines that hold a piece without a twin in the graph.

    Raises:
        UnsupportedPolicyError: Names the pieces.
    """
    unknown = [
        type(piece).__name__
        for pipeline, known in ((env_to_module, _ENV_TO_MODULE), (module_to_env, _MODULE_TO_ENV))
        for piece in pipeline.connectors
        if type(piece).__name__ not in known or not type(piece).__module__.startswith("ray.rllib.")
    ]
    if unknown:
        raise UnsupportedPolicyError(
            f"the checkpoint's pipeline holds the connectors {', '.join(unknown)}, which this "
            "version cannot put into the graph; without them the policy would act differently"
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
