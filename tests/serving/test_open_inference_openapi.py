"""The protocol's description: ours in `/openapi.json`, and the specification's own."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS, load_all_checks

from tests.serving.conftest import LiveServer
from tests.serving.numpy_policies import (
    OBSERVATION_SPACES,
)
from tests.serving.open_inference import infer

# The server's, a model's with and without its version, and the repository's.
OPERATIONS = 5 + 2 * 5 + 3


def resolved(schema: Any, api: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "components": api["components"]}


def checked(server: LiveServer, api: dict[str, Any], names: set[str], *, n: int = 12) -> int:
    """Send generated requests; return how many operations there are."""
    load_all_checks()
    checks = [check for check in CHECKS.get_all() if check.__name__ in names]
    assert len(checks) == len(names)
    description = schemathesis.openapi.from_dict(api)
    description.config.base_url = server.url
    limits = settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def check(case: Any) -> None:
        response = case.call()
        case.validate_response(response, checks=checks)
        # A generated `timeout` may be too short for anybody.
        assert response.status_code < 500 or response.status_code in (501, 504), response.text

    operations = [result.ok() for result in description.get_all_operations()]
    for operation in operations:
        limits(given(case=operation.as_strategy())(check))()
    return len(operations)


@pytest.mark.slow
def test_generated_requests_get_documented_answers(live_server: LiveServer):
    api = live_server.request("GET", "/openapi.json").json()
    api["paths"] = {path: each for path, each in api["paths"].items() if path.startswith("/v2")}
    names = {
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    }
    assert checked(live_server, api, names) == OPERATIONS


TEXT = {"type": "string"}
TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape", "data"],
    "properties": {
        "name": TEXT,
        "datatype": TEXT,
        "shape": {"type": "array", "items": {"type": "integer"}},
        "parameters": {"type": "object"},
        "data": {"type": "array", "items": {"type": ["number", "string", "boolean", "array"]}},
    },
}
MODEL = "/v2/models/{MODEL_NAME}/versions/{MODEL_VERSION}"


def specification(model: str) -> dict[str, Any]:
    """The protocol's own paths and bodies, for one model.

    As the specification (kserve/open-inference-protocol d49cc23) states them, but with `{...}` for
    its literal `${...}`, and with the statuses that it leaves open.
    """

    def operation(schema: Any, **more: Any) -> dict[str, Any]:
        error = {"type": "object", "required": ["error"], "properties": {"error": TEXT}}
        responses = {
            status: {"description": "", "content": {"application/json": {"schema": each}}}
            for status, each in (("200", schema), ("400", error), ("default", error))
        }
        return {"responses": responses, **more}

    def parameter(name: str, value: str) -> dict[str, Any]:
        schema = {"type": "string", "enum": [value, "another"]}
        return {"name": name, "in": "path", "required": True, "schema": schema}

    metadata = {"type": "object", "required": ["name", "platform", "inputs", "outputs"]}
    parameters = [parameter("MODEL_NAME", model), parameter("MODEL_VERSION", "1")]
    answer = {
        "type": "object",
        "required": ["model_name", "outputs"],
        "properties": {"outputs": {"type": "array", "items": TENSOR}},
    }
    asked = {"type": "object", "required": ["name"], "properties": {"name": TEXT}}
    body = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": TEXT,
            "parameters": {"type": "object"},
            "inputs": {"type": "array", "items": TENSOR},
            "outputs": {"type": "array", "items": asked},
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Data Plane", "version": "2.0"},
        "paths": {
            "/v2/health/live": {"get": operation({"required": ["live"]})},
            "/v2/health/ready": {"get": operation({"required": ["ready"]})},
            "/v2/": {"get": operation({"required": ["name", "version", "extensions"]})},
            MODEL: {"get": operation(metadata, parameters=parameters)},
            f"{MODEL}/ready": {
                "get": operation({"required": ["name", "ready"]}, parameters=parameters)
            },
            f"{MODEL}/infer": {
                "post": operation(
                    answer,
                    parameters=parameters,
                    requestBody={"content": {"application/json": {"schema": body}}},
                )
            },
        },
    }


def test_the_specification_s_own_description_holds(live_server: LiveServer):
    names = {"content_type_conformance", "response_schema_conformance", "not_a_server_error"}
    assert checked(live_server, specification("discrete"), names, n=30) == 6


@pytest.mark.parametrize("name", [*OBSERVATION_SPACES, "full"])
def test_zeros_or_the_nearest_are_answered_in_the_described_form(any_space, name: str):
    api = any_space.request("GET", "/openapi.json").json()
    operation = api["paths"]["/v2/models/{model}/infer"]["post"]
    body = example_of(any_space, name)
    request_schema = operation["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.validate(body, resolved(request_schema, api))
    response = infer(any_space, body, model=name)
    assert response.status == 200, response.body
    answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(response.json(), resolved(answer, api))


def example_of(server: LiveServer, name: str) -> dict[str, Any]:
    """A row of ones, which every space of the tests has."""
    inputs = server.request("GET", f"/v2/models/{name}").json()["inputs"]
    optional = server.request("GET", f"/v2/models/{name}/config").json()["input"]
    required = {each["name"] for each in optional if not each["optional"]}
    tensors = []
    for each in inputs:
        if each["name"] in required:
            shape = [1, *each["shape"][1:]]
            n = 1
            for size in shape:
                n *= size
            tensors.append({**each, "shape": shape, "data": [1] * n})
    return {"inputs": tensors}


def test_the_described_example_works(live_server: LiveServer):
    api = live_server.request("GET", "/openapi.json").json()
    content = api["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]
    example = content["application/json"]["example"]
    assert infer(live_server, example, model="box").status == 200
