"""The protocol's paths and bodies as OpenAPI describes them, for the models that are served."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from serving.dialects.open_inference.model import Model, model_of
from serving.dialects.open_inference.tensors import NUMPY_DTYPES
from serving.service import PolicyService, PolicyServices

Schema = dict[str, Any]

_TAG = "open inference protocol"
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_SHAPE: Schema = {"type": "array", "items": {"type": "integer"}}
_STATUSES = {
    400: "The request is wrong.",
    404: "No such model, or version of it.",
    413: "The body is too large, or would be when inflated.",
    415: "A content encoding other than gzip and deflate.",
    500: "The engine failed.",
    501: "Not offered: the served policies are fixed when the server starts.",
    503: "The queue is full or the server not ready; an inference has Retry-After.",
    504: "The parameter `timeout` passed.",
}
_DATATYPE: Schema = {"type": "string", "enum": list(NUMPY_DTYPES)}
_DATA: Schema = {
    "type": "array",
    "description": "All elements in row-major order, in one list or nested as `shape`.",
    "items": {"type": ["number", "boolean", "array"]},
}


def add_paths(api: Schema, services: PolicyServices) -> None:
    """Add the protocol's operations and schemas to an OpenAPI description.

    Args:
        api: The description, whose `paths` and `components` this adds to.
        services: What is served.
    """
    api["components"]["schemas"].update(_schemas())
    api["paths"].update(_server_paths())
    api["paths"].update(_repository_paths())
    listed = list(services)
    for prefix, parameters in (
        ("/v2/models/{model}", [_model_parameter(listed)]),
        ("/v2/models/{model}/versions/{version}", [_model_parameter(listed), _version(listed)]),
    ):
        api["paths"].update(_model_paths(prefix, parameters, listed))


def _model_parameter(services: Iterable[PolicyService]) -> Schema:
    names = [service.name for service in services]
    return _parameter("model", {"type": "string", "enum": names})


def _version(services: Iterable[PolicyService]) -> Schema:
    versions = sorted({str(service.version) for service in services})
    return _parameter("version", {"type": "string", "enum": versions})


def _parameter(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _server_paths() -> Schema:
    return {
        "/v2": {
            "get": _operation("server_metadata", "The server's name and extensions.", "V2Server")
        },
        "/v2/health/live": {"get": _operation("server_live", "Whether it runs.", "V2Live")},
        "/v2/health/ready": {
            "get": _operation("server_ready", "Whether every model serves.", "V2Ready", same=(503,))
        },
        "/v2/models": {"get": _operation("models", "The models' names.", "V2Models")},
        "/v2/models/stats": {
            "get": _operation("statistics", "Every model's statistics.", "V2Statistics")
        },
    }


def _model_paths(prefix: str, parameters: list[Schema], services: list[PolicyService]) -> Schema:
    suffix = "" if len(parameters) == 1 else "_version"

    def get(name: str, summary: str, schema: str, **more: Any) -> Schema:
        operation = _operation(f"{name}{suffix}", summary, schema, errors=(404,), **more)
        return {"get": {**operation, "parameters": parameters}}

    infer = _operation(
        f"model_infer{suffix}",
        "Actions for a batch of observations.",
        "V2InferResponse",
        errors=(400, 404, 413, 415, 500, 503, 504),
    )
    binary: Schema = {"application/octet-stream": {"schema": {}}}
    infer["responses"]["200"]["content"].update(binary)
    body: Schema = {"schema": _reference("V2InferRequest")}
    if services:
        body["example"] = example(model_of(services[0]))
    infer["requestBody"] = {"required": True, "content": {"application/json": body, **binary}}
    return {
        prefix: get("model_metadata", "A model's tensors.", "V2Model"),
        f"{prefix}/ready": get(
            "model_ready", "Whether a model serves.", "V2ModelReady", same=(503,)
        ),
        f"{prefix}/config": get("model_config", "A model's configuration.", "V2Config"),
        f"{prefix}/stats": get("model_statistics", "A model's statistics.", "V2Statistics"),
        f"{prefix}/infer": {"post": {**infer, "parameters": parameters}},
    }


def _repository_paths() -> Schema:
    index = _operation(
        "repository_index", "Every model, its version and state.", "V2Index", errors=(400, 413)
    )
    request: Schema = {"type": "object", "properties": {"ready": {"type": "boolean"}}}
    index["requestBody"] = {"required": False, "content": {"application/json": {"schema": request}}}
    paths: Schema = {"/v2/repository/index": {"post": index}}
    for action in ("load", "unload"):
        change = _operation(f"repository_{action}", "Not offered.", None, errors=(413, 501))
        change["parameters"] = [_parameter("model", _TEXT)]
        paths[f"/v2/repository/models/{{model}}/{action}"] = {"post": change}
    return paths


def _operation(
    name: str,
    summary: str,
    schema: str | None,
    *,
    errors: Iterable[int] = (),
    same: Iterable[int] = (),
) -> Schema:
    """An operation whose answer is `schema`, also with the statuses `same`."""
    responses: Schema = {}
    for status in (200, *same) if schema else ():
        responses[str(status)] = _response(_STATUSES.get(status, "As asked."), str(schema))
    for status in errors:
        responses[str(status)] = _response(_STATUSES[status], "V2Error")
    return {
        "tags": [_TAG],
        "operationId": f"v2_{name}",
        "summary": summary,
        "responses": responses,
    }


def _response(description: str, schema: str) -> Schema:
    content = {"application/json": {"schema": _reference(schema)}}
    return {"description": description, "content": content}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def example(model: Model) -> Schema:
    """A request of one row of zeros, for the action alone."""
    inputs = []
    for spec in model.inputs.values():
        if not spec.is_optional:
            shape = [1, *spec.shape[1:]]
            n = 1
            for size in shape:
                n *= size
            data = [False] * n if spec.datatype == "BOOL" else [0] * n
            tensor = {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": data}
            inputs.append(tensor)
    actions = [name for name in model.outputs if name.partition("/")[0] == "action"]
    return {"inputs": inputs, "outputs": [{"name": name} for name in actions]}


def _object(required: Schema, optional: Schema | None = None) -> Schema:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
    }


def _array(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _schemas() -> Schema:
    duration = _object({"count": _COUNT, "ns": _COUNT})
    parts = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    statistics = {
        **dict.fromkeys(("name", "version"), _TEXT),
        **dict.fromkeys(("last_inference", "inference_count", "execution_count"), _COUNT),
        "inference_stats": _object(dict.fromkeys(parts, duration)),
    }
    tensor = {"name": _TEXT, "datatype": _DATATYPE, "shape": _SHAPE}
    config_tensor = {"name": _TEXT, "data_type": _TEXT, "dims": _SHAPE}
    ready = {"type": "boolean"}
    return {
        "V2Error": _object({"error": _TEXT}),
        "V2Live": _object({"live": {"type": "boolean"}}),
        "V2Ready": _object({"ready": ready}),
        "V2ModelReady": _object({"name": _TEXT, "ready": ready}),
        "V2Server": _object({"name": _TEXT, "version": _TEXT, "extensions": _TEXTS}),
        "V2Models": _object({"models": _TEXTS}),
        "V2Statistics": _object({"model_stats": _array(_object(statistics))}),
        "V2Index": _array(_object(dict.fromkeys(("name", "version", "state", "reason"), _TEXT))),
        "V2Model": _object(
            {
                "name": _TEXT,
                "versions": _TEXTS,
                "platform": _TEXT,
                "inputs": _array(_object(tensor)),
                "outputs": _array(_object(tensor)),
                "properties": {"type": "object", "additionalProperties": _TEXT},
            }
        ),
        "V2Config": _object(
            {
                **dict.fromkeys(("name", "platform", "backend"), _TEXT),
                "max_batch_size": _COUNT,
                "input": _array(_object({**config_tensor, "optional": {"type": "boolean"}})),
                "output": _array(_object(config_tensor)),
            }
        ),
        "V2InferRequest": _request_schema(),
        "V2InferResponse": _object(
            {
                "model_name": _TEXT,
                "model_version": _TEXT,
                "outputs": _array(_object({**tensor, "data": _DATA})),
            },
            {"id": _TEXT},
        ),
    }


def _request_schema() -> Schema:
    parameters: Schema = {
        "type": "object",
        "properties": {
            "deterministic": {
                "type": "boolean",
                "default": True,
                "description": "Most likely actions; false samples.",
            },
            "seed": {**_COUNT, "description": "Makes samples repeatable."},
            "timeout": {**_COUNT, "description": "Microseconds; 0: none."},
            "binary_data_output": {"type": "boolean", "default": False},
        },
    }
    binary: Schema = {"type": "object", "properties": {"binary_data": {"type": "boolean"}}}
    tensor = {"name": _TEXT, "shape": _SHAPE, "datatype": _DATATYPE, "data": _DATA}
    return _object(
        {"inputs": _array(_object(tensor))},
        {
            "id": _TEXT,
            "parameters": parameters,
            "outputs": _array(_object({"name": _TEXT}, {"parameters": binary})),
        },
    )
