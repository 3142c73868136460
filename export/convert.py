"""export_policy: a checkpoint to a bundle that exists only if it acts as RLlib does."""

from __future__ import annotations

import datetime as dt
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from export.checkpoint import load_checkpoint, load_checkpoints
from export.distributions import DeterministicAction
from export.errors import ParityError
from export.formats import OPSET, export_program, write_onnx, write_pt2, write_torchscript
from export.graph import PolicyGraph
from export.gym_spaces import leaf_spaces
from export.layout import DEFAULT_MODULE_ID
from export.parity import check_parity
from export.policy import Checkpoint
from export.precision import TOLERANCES, Precision
from export.reduced import write_reduced
from export.sampling import check_samples
from export.vectors import Vectors, golden_vectors, parity_vectors
from serving.bundle import (
    GOLDEN,
    ONNX,
    PT2,
    TORCHSCRIPT,
    adding_versions,
    replacing_bundle,
    write_manifest,
)
from serving.engines.onnx_engine import OnnxGraph
from serving.engines.torch_engine import load_pt2, load_torchscript
from serving.errors import BundleError, UsageError
from serving.golden import write_golden
from serving.manifest import PolicyManifest
from serving.parity import TOLERANCE
from serving.verification import load_verified_policy

Format = Literal["onnx", "torchscript", "pt2"]
FORMATS: tuple[Format, ...] = ("onnx", "torchscript", "pt2")


@dataclass(frozen=True)
class ExportOptions:
    """How a policy is written.

    Attributes:
        formats: Beside ONNX, which is always written, as the manifest belongs to it.
        deterministic_action: What a squashed Gaussian's greedy action is: RLlib's (the mean, not
            squashed) or `tanh` (as the SAC paper has it).
        precision: Of the ONNX file's weights; see `export.precision`.
        tolerance: How far float16 and int8 may lie from RLlib; None: the precision's default.
            float32 takes none.
    """

    formats: Sequence[Format] = ("onnx",)
    deterministic_action: DeterministicAction = "rllib"
    precision: Precision = "float32"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.precision != "float32" and {*self.formats} != {"onnx"}:
            raise UsageError(
                f"--precision {self.precision} is for ONNX, and --format asks for "
                f"{', '.join(self.formats)}; export those in float32"
            )
        if self.tolerance is None:
            return
        if self.precision == "float32":
            raise UsageError(
                f"--tolerance is for float16 and int8; float32 is held to {TOLERANCE:g}"
            )
        if not 0.0 < self.tolerance < 1.0:
            raise UsageError(f"--tolerance {self.tolerance:g}: expected a number between 0 and 1")

    @property
    def stated_tolerance(self) -> float:
        """What the ONNX file is held to, at export and at every load."""
        return TOLERANCES[self.precision] if self.tolerance is None else self.tolerance


@dataclass(frozen=True)
class SourceOptions:
    """How a checkpoint is read.

    Attributes:
        trust: Unpickle it whoever wrote it.
        is_safe: Unpickle nothing; the module and connectors are built from `config`.
        config: For `is_safe`: see `export.config_source.read_config`.
        module_id: Only this RLModule.
        agents: Agent to module in a multi-agent checkpoint; None: its own mapping function.
    """

    trust: bool = False
    is_safe: bool = False
    config: str | None = None
    module_id: str | None = None
    agents: Mapping[str, str] | None = None


def export_policy(
    source: Path,
    target: Path,
    *,
    formats: Sequence[Format] = ("onnx",),
    trust_checkpoint: bool = False,
    module_id: str = DEFAULT_MODULE_ID,
    deterministic_action: DeterministicAction = "rllib",
) -> PolicyManifest:
    """Convert one policy of a checkpoint and write it as a bundle if its parity with RLlib holds.

    Args:
        source: A run directory or a checkpoint.
        target: The bundle's directory; an older bundle there is replaced only on success.
        formats: What to write; ONNX is always written, as the manifest and golden vectors
            belong to it.
        trust_checkpoint: Unpickle the checkpoint whoever wrote it.
        module_id: Which RLModule of the checkpoint.
        deterministic_action: See `ExportOptions`.

    Raises:
        ExportError: The checkpoint cannot be read, exported or proved; nothing is left behind.
        BundleError: `target` cannot be written or holds something else.
    """
    checkpoint = load_checkpoint(source, trust=trust_checkpoint, module_id=module_id)
    return write_bundle(checkpoint, target, ExportOptions(formats, deterministic_action))


def export_policies(
    source: Path, target: Path, reading: SourceOptions, options: ExportOptions
) -> dict[Path, PolicyManifest]:
    """Convert every policy of a checkpoint.

    One policy becomes a bundle at `target`; several (a multi-agent checkpoint) become a policy
    repository there, `target/NAME/VERSION`, where NAME is the module's and VERSION the next one.

    Returns:
        The bundles that were written.

    Raises:
        ExportError: A policy cannot be read, exported or proved; nothing is left behind.
        BundleError: `target` cannot be written or holds something else.
    """
    checkpoints = read_policies(source, reading)
    if len(checkpoints) == 1:
        return {target: write_bundle(checkpoints[0], target, options)}
    with adding_versions(target, _names(checkpoints)) as directories:
        manifests = [
            write_bundle(checkpoint, scratch, options)
            for checkpoint, (scratch, _) in zip(checkpoints, directories, strict=True)
        ]
    return {final: manifest for (_, final), manifest in zip(directories, manifests, strict=True)}


def read_policies(source: Path, reading: SourceOptions) -> list[Checkpoint]:
    """The policies of a checkpoint, read as the options say.

    Raises:
        ExportError: See `load_checkpoints` and `load_safe_checkpoints`.
    """
    if reading.is_safe:
        # Imported here: it needs RLlib at once, which is slow, and few take this way.
        from export.safe_checkpoint import load_safe_checkpoints

        return load_safe_checkpoints(
            source, config=reading.config, module_id=reading.module_id, agents=reading.agents
        )
    return load_checkpoints(
        source, trust=reading.trust, module_id=reading.module_id, agents=reading.agents
    )


def _names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Names for URLs: the module's, with the first agent's where several share the module."""
    modules = [checkpoint.module_id for checkpoint in checkpoints]
    return [
        re.sub(
            r"[^A-Za-z0-9._-]",
            "_",
            checkpoint.module_id
            if modules.count(checkpoint.module_id) == 1
            else f"{checkpoint.module_id}.{checkpoint.members[0]}",
        )
        for checkpoint in checkpoints
    ]


def prepare(
    checkpoint: Checkpoint, options: ExportOptions = ExportOptions()
) -> tuple[PolicyGraph, Vectors]:
    """The graph, and what it will be measured by.

    Raises:
        UnsupportedPolicyError: Names the part that cannot be exported.
    """
    chosen = options or ExportOptions()
    graph = PolicyGraph(checkpoint, deterministic_action=chosen.deterministic_action)
    return graph, parity_vectors(checkpoint, graph)


def write_bundle(checkpoint: Checkpoint, target: Path, options: ExportOptions) -> PolicyManifest:
    """Export a checkpoint that has been read.

    Raises:
        ExportError: It cannot be exported or proved; nothing is left behind.
        BundleError: `target` cannot be written or holds something else.
    """
    graph, vectors = prepare(checkpoint, options)
    program = export_program(graph)
    names = [spec.name for spec in graph.inputs]
    writers: dict[Format, tuple[str, Callable[[Path], Any], Callable[[Path], Any]]] = {
        "onnx": (
            ONNX,
            lambda path: write_onnx(program, graph, path),
            lambda path: OnnxGraph(path, graph.output_names),
        ),
        "torchscript": (
            TORCHSCRIPT,
            lambda path: write_torchscript(graph, path),
            lambda path: load_torchscript(path, names, graph.output_names),
        ),
        "pt2": (
            PT2,
            lambda path: write_pt2(program, path),
            lambda path: load_pt2(path, names, graph.output_names),
        ),
    }
    with replacing_bundle(target) as scratch:
        reports: dict[str, Any] = {}
        files = []
        for name in (chosen for chosen in FORMATS if chosen in {"onnx", *options.formats}):
            file, write, load = writers[name]
            write(scratch / file)
            run = load(scratch / file).run
            reports[name] = check_parity(file, run, graph, vectors)
            if name == "onnx":
                reports[name]["sampling"] = check_samples(file, checkpoint, run, graph)
            files.append(file)
        golden = golden_vectors(vectors)
        write_golden(scratch / GOLDEN, golden)
        facts = {
            **_facts(checkpoint, graph, options),
            "golden": _golden_facts(golden, graph),
            "parity": reports,
            "warnings": _warnings(checkpoint, graph, reports["onnx"]),
        }
        if options.precision == "float32":
            manifest = write_manifest(scratch, facts, [*files, GOLDEN])
        else:
            manifest = write_reduced(
                scratch,
                facts,
                [*files, GOLDEN],
                checkpoint=checkpoint,
                graph=graph,
                vectors=vectors,
                precision=options.precision,
                tolerance=options.stated_tolerance,
            )
        _read_back(scratch)
        return manifest


def _read_back(bundle: Path) -> None:
    """What is about to take its place has to be what a server would load."""
    try:
        load_verified_policy(bundle)
    except BundleError as exc:
        raise ParityError(
            f"the bundle does not load as it was written: {exc.message}; no bundle was written"
        ) from exc


def _golden_facts(golden: Vectors, graph: PolicyGraph) -> dict[str, int]:
    rows = golden[graph.inputs[0].name]
    return {"n_rows": len(rows), "n_steps": rows.shape[1] if graph.has_memory else 1}


def _facts(checkpoint: Checkpoint, graph: PolicyGraph, options: ExportOptions) -> dict[str, Any]:
    environment = (
        None
        if checkpoint.env_id is None
        else {
            "id": checkpoint.env_id,
            "kwargs": _plain_arguments(checkpoint) or {},
            "wrappers": [list(wrapper) for wrapper in checkpoint.wrappers],
        }
    )
    packages = ("policyserve", "ray", "torch", "onnx", "onnxruntime", "gymnasium", "numpy")
    noise = graph.distribution.noise if graph.distribution else ()
    return {
        "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "algorithm": checkpoint.algorithm,
        "module_id": checkpoint.module_id,
        "module_class": type(checkpoint.rl_module).__name__,
        "agents": {str(agent): owner for agent, owner in checkpoint.agents.items()},
        "acts_for": [str(agent) for agent in checkpoint.members],
        "environment": environment,
        "observation_space": graph.observation_space.to_json(),
        "action_space": graph.action_space.to_json(),
        "distribution": graph.distribution_name,
        "deterministic_action": options.deterministic_action,
        "noise": [segment.to_json() for segment in noise],
        "action_bounding": graph.bounding,
        "connectors": {
            "env_to_module": [
                type(piece).__name__ for piece in checkpoint.env_to_module.connectors
            ],
            "module_to_env": [
                type(piece).__name__ for piece in checkpoint.module_to_env.connectors
            ],
        },
        "inputs": [spec.to_json() for spec in graph.inputs],
        "outputs": list(graph.output_names),
        "state": {name: spec.to_json() for name, spec in graph.state.items()},
        "precision": "float32",
        "tolerance": TOLERANCE,
        "opset": OPSET,
        "provenance": {
            **checkpoint.facts,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in packages},
        },
    }


def _warnings(checkpoint: Checkpoint, graph: PolicyGraph, report: Mapping[str, Any]) -> list[str]:
    notes = []
    if not report["observations"].get("on_policy"):
        notes.append("parity: without real episodes, as the environment does not run here")
    if n_without := report["n_without_answer"]:
        notes.append(
            f"RLlib itself answers no number for {n_without} of the gate's observations; they were "
            "left out"
        )
    notes += [
        f"the environment's actions are {space}, RLlib and the bundle send from 0"
        for space in leaf_spaces(checkpoint.action_space)
        if np.any(np.asarray(getattr(space, "start", 0)) != 0)
    ]
    if graph.distribution_name == "squashed_gaussian" and graph.deterministic_action == "rllib":
        notes.append(
            "deterministic actions are RLlib's: the mean without tanh; export with "
            "--deterministic-action tanh for the action of the SAC paper"
        )
    if _plain_arguments(checkpoint) is None:
        notes.append("the environment's arguments are left out: they are no plain data")
    return notes


def _plain_arguments(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The environment's arguments, or None if a manifest cannot hold them."""
    arguments = dict(checkpoint.env_config)
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return arguments
