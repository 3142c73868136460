"""A bundle's manifest in words: the rows of `policyserve inspect`."""

from __future__ import annotations

from collections.abc import Iterator

from serving.manifest import PolicyManifest, StateSpec
from serving.spaces import describe_space


def interface_rows(manifest: PolicyManifest) -> Iterator[tuple[str, str]]:
    """What the policy expects and returns."""
    raw = manifest.raw
    yield "policy id", manifest.policy_id
    yield "algorithm", f"{manifest.algorithm}, module {manifest.module_id}"
    environment = manifest.environment or {"id": "unknown"}
    yield "environment", f"{environment['id']} {environment.get('kwargs') or ''}".strip()
    yield "observation", describe_space(manifest.observation_space)
    action = f"{describe_space(manifest.action_space)}, {manifest.distribution}"
    yield "action", f"{action}, bounding: {raw.get('action_bounding')}"
    yield "deterministic action", str(raw["deterministic_action"])
    for spec in manifest.inputs:
        yield f"input {spec.name}", f"{spec.role}, {spec.dtype} {('B', *spec.shape)}"
    for name, state in manifest.state.items():
        yield f"state {name}", f"{state.dtype} {state.shape}, starts as {_start(state)}"
    segments = [f"{part.distribution} {part.size}" for part in manifest.noise.segments]
    yield "noise", ", ".join(segments) or "none: the policy is deterministic"
    yield "outputs", ", ".join(manifest.outputs)


def _start(state: StateSpec) -> str:
    initial = state.to_json()["initial"]
    return "given values" if isinstance(initial, list) else f"{initial:g}"


def origin_rows(manifest: PolicyManifest) -> Iterator[tuple[str, str]]:
    """Where the policy came from, how it was proved, and what to know of it."""
    raw = manifest.raw
    for agent, module in manifest.agents.items():
        yield f"agent {agent}", f"module {module}"
    yield "created", str(raw.get("created"))
    provenance = raw.get("provenance") or {}
    facts = [f"{key} {value}" for key, value in provenance.items() if not isinstance(value, dict)]
    yield "trained", ", ".join(facts)
    for name, report in (raw.get("parity") or {}).items():
        sizes = ", ".join(map(str, report["batch_sizes"]))
        error = f"largest error {report['max_error']:.1g}"
        counted = f"{report['n_observations']} observations at B = {sizes}"
        yield f"parity ({name})", f"{error} over {counted}; tolerance {report['tolerance']:g}"
    for name, entry in manifest.files.items():
        yield name, f"{entry.size_bytes / 1000:,.1f} kB, SHA-256 {entry.sha256[:16]}…"
    for warning in raw.get("warnings") or ():
        yield "warning", str(warning)
