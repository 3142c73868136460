"""The native dialect's requests and answers as JSON schemas, for one policy's own spaces."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from serving.dialects.native import NativeCodec
from serving.manifest import PolicyManifest
from serving.spaces import BoxSpace, DictSpace, Space, TupleSpace

Schema = dict[str, Any]

_REF = "#/components/schemas/"
_ONE_OR_MANY: Schema = {"type": ["number", "array"]}
_STATE = (
    "What the last answer's `state` said; null or left out where an episode starts. "
    "For `observations` a list of one each."
)
_MASK = (
    "1 or true: allowed. For MultiDiscrete one component after the other. "
    "For `observations` a list of one each; null allows all."
)


def request_schema(codec: NativeCodec, manifest: PolicyManifest) -> Schema:
    """The schema of a `compute_action` body, without references."""
    row_types = codec.beside.row_types
    schemas, components = msgspec.json.schema_components(
        [codec.request_type, *row_types.values()], ref_template=_REF + "{name}"
    )
    request: Schema
    request, *rows = (_inlined(schema, components) for schema in schemas)
    request.pop("title", None)
    properties = request["properties"]
    taken = {"reward", "rewards"} if manifest.has_reward else set()
    for name in {"action_mask", "state", "reward", "rewards"} - taken:
        # What this policy refuses is no part of its schema.
        del properties[name]
    for (name, _), row in zip(row_types.items(), rows, strict=True):
        one = {"anyOf": [row, {"type": "null"}]}
        properties[name] = {
            "description": _STATE if name == "state" else _MASK,
            "anyOf": [*one["anyOf"], {"type": "array", "items": one}],
        }
    return request


def _inlined(schema: Any, components: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(components[schema["$ref"].removeprefix(_REF)], components)
        return {key: _inlined(each, components) for key, each in schema.items()}
    if isinstance(schema, list):
        return [_inlined(each, components) for each in schema]
    return schema


def answer_schema(manifest: PolicyManifest) -> Schema:
    """The schema of a 200 answer."""
    action = _action_schema(manifest.action_space)
    properties: Schema = {
        "action": action,
        "actions": {"type": "array", "items": action},
        "action_logp": {"description": "Natural logarithm, in nats.", **_ONE_OR_MANY},
        "value": {"description": "The critic's estimate of the return.", **_ONE_OR_MANY},
        "action_dist_inputs": {"type": "array"},
        "q_values": {"description": "The estimated return of each action.", "type": "array"},
        "policy": {"type": "string"},
        "version": {"type": "integer"},
        "policy_id": {"type": "string"},
    }
    required = ["policy", "version", "policy_id"]
    if manifest.state:
        arrays = {
            name: _array(spec.shape, "number" if np.dtype(spec.dtype).kind == "f" else "integer")
            for name, spec in manifest.state.items()
        }
        state = {"type": "object", "properties": arrays, "required": list(arrays)}
        properties["state"] = {
            "description": "To be sent with the next observation of the same episode.",
            "anyOf": [state, {"type": "array", "items": state}],
        }
        required.append("state")
    return {"type": "object", "properties": properties, "required": required}


def _action_schema(space: Space) -> Schema:
    if isinstance(space, DictSpace):
        children = {key: _action_schema(child) for key, child in space.items()}
        return {"type": "object", "properties": children, "required": list(children)}
    if isinstance(space, TupleSpace):
        entries = [_action_schema(child) for child in space.spaces]
        n = len(entries)
        return {
            "type": "array",
            "prefixItems": entries,
            "items": False,
            "minItems": n,
            "maxItems": n,
        }
    is_float = isinstance(space, BoxSpace) and space.is_float
    return _array(space.shape, "number" if is_float else "integer")


def _array(shape: tuple[int, ...], kind: str) -> Schema:
    schema: Schema = {"type": kind}
    for size in reversed(shape):
        schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
    return schema
