"""export_policy: a checkpoint to a bundle that exists only if it acts as RLlib does."""

from __future__ import annotations

import datetime as dt
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from export.checkpoint import DEFAULT_MODULE_ID, Checkpoint, load_checkpoint
from export.connectors import action_bounding, check_connectors
from export.errors import UnsupportedPolicyError
from export.formats import OPSET, write_onnx, write_torchscript
from export.graph import DistributionSpec, PolicyGraph, distribution_spec
from export.parity import check_parity, golden_vectors, parity_vectors
from serving.bundle import (
    GOLDEN,
    ONNX,
    TORCHSCRIPT,
    PolicyManifest,
    replacing_bundle,
    write_manifest,
)
from serving.engines.onnx_engine import OnnxGraph
from serving.engines.torchscript_engine import TorchScriptGraph
from serving.spaces import BoxSpace, space_from_gymnasium

Format = Literal["onnx", "torchscript"]


def export_policy(
    source: Path,
    target: Path,
    *,
    formats: Sequence[Format] = ("onnx",),
    trust_checkpoint: bool = False,
    module_id: str = DEFAULT_MODULE_ID,
) -> PolicyManifest:
    """Convert a checkpoint's policy and write it as a bundle if its parity with RLlib holds.

    Args:
        source: A run directory or a checkpoint.
        target: The bundle's directory; an older bundle there is replaced only on success.
        formats: What to write; ONNX is always written, as the manifest and golden vectors
            belong to it.
        trust_checkpoint: Unpickle the checkpoint whoever wrote it.
        module_id: Which RLModule of the checkpoint.

    Raises:
        ExportError: The checkpoint cannot be read, exported or proved; nothing is left behind.
        BundleError: `target` cannot be written or holds something else.
    """
    checkpoint = load_checkpoint(source, trust=trust_checkpoint, module_id=module_id)
    check_connectors(checkpoint.env_to_module, checkpoint.module_to_env)
    observation_space = _observation_space(checkpoint)
    distribution = distribution_spec(checkpoint.rl_module, checkpoint.action_space)
    graph = PolicyGraph(
        checkpoint.rl_module,
        checkpoint.action_space,
        distribution,
        action_bounding(checkpoint.module_to_env),
    )
    graph.eval().requires_grad_(False)
    vectors = parity_vectors(checkpoint, distribution)
    golden = golden_vectors(vectors)
    with replacing_bundle(target) as scratch:
        inputs = write_onnx(graph, scratch / ONNX, observation_space.shape)
        onnx_graph = OnnxGraph(scratch / ONNX, graph.output_names)
        reports = {"onnx": check_parity("ONNX", onnx_graph.run, graph.output_names, vectors)}
        files = [ONNX, GOLDEN]
        if "torchscript" in formats:
            write_torchscript(graph, scratch / TORCHSCRIPT, observation_space.shape)
            script = TorchScriptGraph(scratch / TORCHSCRIPT, graph.output_names)
            reports["torchscript"] = check_parity(
                "TorchScript", script.run, graph.output_names, vectors
            )
            files.append(TORCHSCRIPT)
        np.savez_compressed(scratch / GOLDEN, allow_pickle=False, **golden)
        notes = _warnings(checkpoint, reports["onnx"])
        facts = _facts(checkpoint, observation_space, distribution, graph)
        return write_manifest(
            scratch, {**facts, "inputs": inputs, "parity": reports, "warnings": notes}, files
        )


def _observation_space(checkpoint: Checkpoint) -> BoxSpace:
    space = checkpoint.observation_space
    if (
        not isinstance(space, gym.spaces.Box)
        or len(space.shape) != 1
        or not np.issubdtype(space.dtype, np.floating)
    ):
        raise UnsupportedPolicyError(
            f"the observation space is {space}; this version exports float Box spaces of rank 1"
        )
    converted = space_from_gymnasium(space)
    assert isinstance(converted, BoxSpace)
    return converted


def _facts(
    checkpoint: Checkpoint,
    observation_space: BoxSpace,
    distribution: DistributionSpec,
    graph: PolicyGraph,
) -> dict[str, Any]:
    environment = (
        None
        if checkpoint.env_id is None
        else {"id": checkpoint.env_id, "kwargs": dict(checkpoint.env_config)}
    )
    packages = ("policyserve", "ray", "torch", "onnx", "onnxruntime", "gymnasium", "numpy")
    return {
        "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "algorithm": checkpoint.algorithm,
        "module_id": checkpoint.module_id,
        "environment": environment,
        "observation_space": observation_space.to_json(),
        "action_space": space_from_gymnasium(checkpoint.action_space).to_json(),
        "distribution": distribution.name,
        "noise": {"distribution": distribution.noise, "size": distribution.noise_size},
        "action_bounding": graph.bounding,
        "connectors": {
            "env_to_module": [type(piece).__name__ for piece in checkpoint.env_to_module],
            "module_to_env": [type(piece).__name__ for piece in checkpoint.module_to_env],
        },
        "outputs": list(graph.output_names),
        "opset": OPSET,
        "provenance": {
            **checkpoint.facts,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in packages},
        },
    }


def _warnings(checkpoint: Checkpoint, report: Mapping[str, Any]) -> list[str]:
    notes = []
    if not report["observations"].get("on_policy"):
        notes.append("parity: without real episodes, as the environment does not run here")
    space = checkpoint.action_space
    if isinstance(space, gym.spaces.Discrete) and space.start != 0:
        n, start = int(space.n), int(space.start)
        found, sent = f"{start}..{start + n - 1}", f"0..{n - 1}"
        notes.append(f"the environment's actions are {found}; RLlib and the bundle send {sent}")
    return notes
