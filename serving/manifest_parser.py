"""Reading a manifest: every fact there, of the right kind, and none contradicts another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.errors import ManifestError
from serving.manifest import (
    FileEntry,
    InputSpec,
    NoiseSegment,
    NoiseSpec,
    PolicyManifest,
    StateSpec,
    score_size,
)
from serving.spaces import DiscreteSpace, MultiDiscreteSpace, graph_dtype, leaves, space_from_json

ROLES = ("observation", "state", "reward", "action_mask", "noise")
DISTRIBUTIONS = (
    "categorical",
    "multi_categorical",
    "diag_gaussian",
    "squashed_gaussian",
    "multi",
    "none",
)
NOISES = ("gumbel", "normal")
# What a policy's deterministic action is: RLlib's own, or, for SAC, tanh of the mean.
DETERMINISTIC_ACTIONS = ("rllib", "tanh")
_FURTHER_OUTPUTS = ("action_logp", "sampled_action_logp", "action_dist_inputs", "q_values", "value")


def parse_manifest(raw: Mapping[str, Any], where: Path) -> PolicyManifest:
    """Read the facts of a policy and check that they agree with each other.

    Args:
        raw: The manifest, whose format and checksum have been checked.
        where: What to call it in messages.

    Raises:
        ManifestError: A fact is missing, of the wrong kind, or contradicts another.
    """
    try:
        manifest = PolicyManifest(
            policy_id=str(raw["policy_id"]),
            algorithm=str(raw["algorithm"]),
            module_id=str(raw["module_id"]),
            agents={str(agent): str(module) for agent, module in raw["agents"].items()},
            observation_space=space_from_json(raw["observation_space"]),
            action_space=space_from_json(raw["action_space"]),
            distribution=str(raw["distribution"]),
            noise=NoiseSpec(tuple(_read_segment(value) for value in raw["noise"])),
            inputs=tuple(_read_input(value) for value in raw["inputs"]),
            state={str(name): _read_state(value) for name, value in raw["state"].items()},
            outputs=tuple(str(name) for name in raw["outputs"]),
            tolerance=float(raw["tolerance"]),
            n_golden_rows=int(raw["golden"]["n_rows"]),
            n_golden_steps=int(raw["golden"]["n_steps"]),
            files={
                str(name): FileEntry(str(entry["sha256"]), int(entry["size_bytes"]))
                for name, entry in raw["files"].items()
            },
            environment=raw.get("environment"),
            raw=raw,
        )
        deterministic_action = raw["deterministic_action"]
    except ManifestError as exc:
        raise ManifestError(f"{where}: {exc.message}") from exc
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as exc:
        raise ManifestError(f"{where} is incomplete: {type(exc).__name__} {exc}") from exc
    for sentence in (*_unknown_words(manifest, deterministic_action), *_faults(manifest)):
        raise ManifestError(f"{where}: {sentence}")
    return manifest


def _read_segment(value: Mapping[str, Any]) -> NoiseSegment:
    return NoiseSegment(str(value["distribution"]), int(value["size"]))


def _read_input(value: Mapping[str, Any]) -> InputSpec:
    batch, *shape = (int(size) for size in value["shape"])
    if batch != -1:
        raise ValueError(f"the input {value['name']!r} has the shape {value['shape']}, not [-1, …]")
    return InputSpec(
        name=str(value["name"]),
        role=str(value["role"]),
        dtype=np.dtype(value["dtype"]).name,
        shape=tuple(shape),
    )


def _read_state(value: Mapping[str, Any]) -> StateSpec:
    shape = tuple(int(size) for size in value["shape"])
    dtype = np.dtype(value["dtype"])
    initial = np.asarray(value["initial"], dtype=dtype)
    if dtype.kind not in "fiub" or initial.shape not in ((), shape):
        raise ValueError(f"an initial state of shape {initial.shape} for {dtype} {shape}")
    if not np.isfinite(initial).all():
        raise ValueError("an initial state that is not finite")
    # A view: one number stays one number however large the state.
    return StateSpec(dtype=dtype.name, shape=shape, initial=np.broadcast_to(initial, shape))


def _unknown_words(manifest: PolicyManifest, deterministic_action: Any) -> list[str]:
    words: list[tuple[str, Any, tuple[str, ...]]] = [
        ("distribution", manifest.distribution, DISTRIBUTIONS)
    ]
    words += [("noise", segment.distribution, NOISES) for segment in manifest.noise.segments]
    words.append(("deterministic_action", deterministic_action, DETERMINISTIC_ACTIONS))
    return [
        f"the {what} {word!r} is unknown; this version knows {', '.join(known)}"
        for what, word, known in words
        if word not in known
    ]


def _faults(manifest: PolicyManifest) -> list[str]:
    """Sentences on what contradicts itself."""
    found = []
    if not 0 < manifest.tolerance <= 1:
        found.append(f"tolerance is {manifest.tolerance}, expected a number in (0, 1]")
    if manifest.n_golden_rows < 1 or manifest.n_golden_steps < 1:
        found.append("golden counts no rows or no steps")
    if manifest.n_golden_steps > 1 and not manifest.state:
        found.append("golden counts several steps of a policy without memory")
    return [*found, *_noise_faults(manifest), *_input_faults(manifest), *_output_faults(manifest)]


def _noise_faults(manifest: PolicyManifest) -> list[str]:
    noise = manifest.noise
    if (manifest.distribution == "none") != (not noise.segments):
        return [f"the distribution is {manifest.distribution!r} and the noise {noise.segments}"]
    if any(segment.size < 1 for segment in noise.segments):
        return [f"a noise segment has no columns: {noise.segments}"]
    expected = [
        ("gumbel" if isinstance(leaf, DiscreteSpace | MultiDiscreteSpace) else "normal", size)
        for leaf in leaves(manifest.action_space, "action").values()
        if (size := score_size(leaf))
    ]
    found = [(segment.distribution, segment.size) for segment in noise.segments]
    if found and _joined(found) != _joined(expected):
        return [f"the noise is {found}, and the action space needs {expected}"]
    return []


def _joined(segments: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Neighbours of one distribution as one."""
    joined: list[tuple[str, int]] = []
    for name, size in segments:
        if joined and joined[-1][0] == name:
            joined[-1] = (name, joined[-1][1] + size)
        else:
            joined.append((name, size))
    return joined


def _input_faults(manifest: PolicyManifest) -> list[str]:
    space = manifest.observation_space
    expected = [
        InputSpec(name, "observation", graph_dtype(leaf), leaf.shape)
        for name, leaf in leaves(space, "observation").items()
    ]
    if not expected:
        return ["the observation space is empty"]
    expected += [
        InputSpec(f"state/{name}", "state", spec.dtype, spec.shape)
        for name, spec in manifest.state.items()
    ]
    by_role = {spec.role: spec for spec in manifest.inputs}
    if "reward" in by_role:
        expected.append(InputSpec("reward", "reward", "float32", ()))
    if "action_mask" in by_role:
        if not isinstance(manifest.action_space, DiscreteSpace | MultiDiscreteSpace):
            return ["there is an action_mask, but the actions are not Discrete or MultiDiscrete"]
        size = score_size(manifest.action_space)
        expected.append(InputSpec("action_mask", "action_mask", "bool", (size,)))
    if manifest.noise.size:
        expected.append(InputSpec("noise", "noise", "float32", (manifest.noise.size,)))
    for spec in manifest.inputs:
        if spec.role not in ROLES:
            return [f"the input {spec.name!r} has the unknown role {spec.role!r}"]
        if spec not in expected:
            return [f"the input {spec} does not follow from the spaces, the state and the noise"]
        expected.remove(spec)
    return [f"there is no input {spec}" for spec in expected]


def _output_faults(manifest: PolicyManifest) -> list[str]:
    actions = list(leaves(manifest.action_space, "action"))
    if not actions:
        return ["the action space is empty"]
    required = {*actions, *(f"next_state/{name}" for name in manifest.state)}
    if manifest.noise.size:
        required |= {f"sampled_{name}" for name in actions}
    allowed = required | set(_FURTHER_OUTPUTS)
    if manifest.noise.size:
        allowed |= {f"sampled_next_state/{name}" for name in manifest.state}
    elif "sampled_action_logp" in manifest.outputs:
        return ["there is a sampled_action_logp, but no noise to sample with"]
    found = set(manifest.outputs)
    if len(found) < len(manifest.outputs):
        return [f"outputs names one twice: {list(manifest.outputs)}"]
    if unknown := sorted(found - allowed):
        return [f"the outputs {unknown} are not known for this policy"]
    if missing := sorted(required - found):
        return [f"the outputs {missing} are missing"]
    return []
