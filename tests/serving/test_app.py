"""The ordinary application: probes, metrics, descriptions, errors and the API's own description."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.checks import CHECKS, load_all_checks

from serving.bundle import read_bundle
from tests.serving.conftest import LiveServer, serving
from tests.serving.numpy_policies import (
    OBSERVATION_SPACES,
    as_json,
    sample,
)

GOOD = {"observation": [0.5, -1.0, 2.0, 3.0]}


def test_a_server_that_runs_is_healthy_and_ready(live_server: LiveServer):
    assert live_server.request("GET", "/healthz").json() == {"status": "ok"}
    assert live_server.request("GET", "/readyz").json() == {"status": "ready"}


def test_a_server_that_is_shutting_down_is_healthy_and_not_ready(bundles: dict[str, Path]):
    with serving({"p": bundles["discrete"]}) as server:
        asyncio.run(server.services.close())
        assert server.request("GET", "/healthz").status == 200
        response = server.request("GET", "/readyz")
        assert (response.status, response.json()["code"]) == (503, "policy_not_ready")
        assert response.headers["retry-after"] == "1"
        response = server.post("p", GOOD)
        assert (response.status, response.json()["code"]) == (503, "policy_not_ready")


def test_what_is_served_is_listed_by_name(live_server: LiveServer, bundles: dict[str, Path]):
    listed = live_server.request("GET", "/v1/policies").json()["policies"]
    assert [entry["policy"] for entry in listed] == ["box", "discrete", "no-critic"]
    for entry in listed:
        detail = live_server.request("GET", f"/v1/policies/{entry['policy']}").json()
        assert detail == entry
        manifest = read_bundle(bundles[entry["policy"]]).manifest
        assert detail["policy_id"] == manifest.policy_id
        assert detail["observation_space"] == manifest.raw["observation_space"]
        assert detail["action_space"] == manifest.raw["action_space"]
        assert detail["environment"] == {"id": "Tiny-v0", "kwargs": {}}
        assert detail["engine"]["name"] == "onnxruntime"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/nothing/here", 404, "not_found"),
        ("GET", "/v1/policies/nobody", 404, "unknown_policy"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("DELETE", "/v1/policies", 405, "method_not_allowed"),
        ("PUT", "/v1/policies/discrete", 405, "method_not_allowed"),
    ],
)
def test_an_error_is_a_problem(live_server: LiveServer, method, path, status, code):
    response = live_server.request(method, path)
    assert response.status == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert set(problem) == {"type", "title", "status", "code", "detail"}
    if status == 405:
        assert response.headers["allow"] == "GET"


def samples(server: LiveServer) -> dict[str, float]:
    """`name{label=value,...}` to value; labels in alphabetical order."""
    response = server.request("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        f"{sample.name}{dict(sorted(sample.labels.items()))}": sample.value
        for family in text_string_to_metric_families(response.body.decode())
        for sample in family.samples
    }


@pytest.fixture
def own_server(bundles: dict[str, Path]) -> Iterator[LiveServer]:
    with serving({"p": bundles["discrete"]}, max_body_bytes=10_000) as server:
        yield server


def test_metrics_count_what_the_client_sent(own_server: LiveServer, bundles: dict[str, Path]):
    for _ in range(3):
        assert own_server.post("p", GOOD).status == 200
    assert own_server.post("p", {"observations": [[0, 0, 0, 0]] * 5}).status == 200
    for _ in range(2):
        assert own_server.post("p", {"observation": [1]}).status == 422
    assert own_server.post("p", b"{").status == 400
    found = samples(own_server)
    policy = {"policy": "p"}

    def requests(code: str) -> float:
        return found[f"policyserve_requests_total{ {'code': code, **policy} }"]

    assert requests("ok") == 4
    assert requests("invalid_observation") == 2
    assert requests("malformed_request") == 1
    assert found[f"policyserve_observations_total{policy}"] == 8
    assert found[f"policyserve_batch_size_sum{policy}"] == 8
    assert found[f"policyserve_batch_size_count{policy}"] == 4
    assert found[f"policyserve_inference_duration_seconds_count{policy}"] == 4
    for outcome, n in (("ok", 4), ("error", 3)):
        labels = {"outcome": outcome, **policy}
        assert found[f"policyserve_request_duration_seconds_count{labels}"] == n
        assert 0 < found[f"policyserve_request_duration_seconds_sum{labels}"] < 7
    assert found[f"policyserve_queue_size{policy}"] == 0
    policy_id = read_bundle(bundles["discrete"]).manifest.policy_id
    info = {"policy": "p", "policy_id": policy_id, "version": "1"}
    assert found[f"policyserve_policy_info{info}"] == 1


@pytest.mark.parametrize(
    ("body", "headers", "code"),
    [
        (b"{}", {"content-type": "text/plain"}, "unsupported_media_type"),
        (b" " * 20_000, {}, "body_too_large"),
    ],
)
def test_every_refusal_of_a_policy_s_request_is_counted(own_server, body, headers, code):
    assert own_server.post("p", body, headers).json()["code"] == code
    assert samples(own_server)[f"policyserve_requests_total{ {'code': code, 'policy': 'p'} }"] == 1


def test_metrics_explain_themselves(live_server: LiveServer):
    families = list(
        text_string_to_metric_families(live_server.request("GET", "/metrics").body.decode())
    )
    ours = [
        family for family in families if re.fullmatch("policyserve_.*(?<!_created)", family.name)
    ]
    assert len(ours) == 9
    assert all(family.documentation for family in ours)


def test_a_name_from_outside_makes_no_new_time_series(own_server: LiveServer):
    before = set(samples(own_server))
    for k in range(5):
        assert own_server.post(f"nobody{k}", GOOD).status == 404
    assert set(samples(own_server)) == before


@pytest.fixture(scope="module")
def api(live_server: LiveServer) -> dict[str, Any]:
    return live_server.request("GET", "/openapi.json").json()


def resolved(schema: Any, api: dict[str, Any]) -> dict[str, Any]:
    """A schema that finds the components it refers to."""
    return {**schema, "components": api["components"]}


def test_every_policy_s_compute_action_is_described(api: dict[str, Any]):
    assert {f"/v1/policies/{name}/compute_action" for name in ("box", "discrete")} <= set(
        api["paths"]
    )
    assert "/v1/policies/{policy}/compute_action" not in api["paths"]
    ids = [
        operation["operationId"] for path in api["paths"].values() for operation in path.values()
    ]
    assert len(ids) == len(set(ids))


def test_every_reference_of_the_description_resolves(api: dict[str, Any]):
    for place in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(api)):
        found = api
        for key in place.split("/"):
            found = found[key]


def request_schema(api: dict[str, Any], name: str) -> dict[str, Any]:
    operation = api["paths"][f"/v1/policies/{name}/compute_action"]["post"]
    return resolved(operation["requestBody"]["content"]["application/json"]["schema"], api)


BODIES = [
    (GOOD, True),
    ({"observations": [[0, 0, 0, 0]] * 2}, True),
    ({**GOOD, "deterministic": False, "seed": 5, "timeout_ms": 10, "outputs": ["value"]}, True),
    ({"observation": [0, 0, 0]}, False),
    ({"observation": [0, 0, 0, 0, 0]}, False),
    ({"observation": [0, 0, 0, "0"]}, False),
    ({"observations": [[0, 0, 0]]}, False),
    ({**GOOD, "seed": -1}, False),
    ({**GOOD, "timeout_ms": 0}, False),
    ({**GOOD, "outputs": ["q"]}, False),
    ({**GOOD, "action_mask": [1, 0, True]}, True),
    ({**GOOD, "action_mask": None}, True),
    ({"observations": [[0, 0, 0, 0]] * 2, "action_mask": [None, [0, 0, 1]]}, True),
    ({**GOOD, "action_mask": [1, 0]}, False),
    ({**GOOD, "action_mask": [1, 2, 0]}, False),
    ({**GOOD, "state": None}, False),
    ({**GOOD, "reward": 1}, False),
    ({**GOOD, "unknown": 1}, False),
]


@pytest.mark.parametrize(("body", "is_valid"), BODIES)
def test_the_described_schema_says_of_a_body_what_the_server_says(
    live_server: LiveServer, api: dict[str, Any], body: Any, is_valid: bool
):
    schema = request_schema(api, "discrete")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == is_valid
    assert (live_server.post("discrete", body).status == 200) == is_valid


@pytest.mark.parametrize(("name", "size"), [("discrete", 4), ("box", 3)])
def test_the_described_example_and_answer_are_right(live_server, api, name: str, size: int):
    operation = api["paths"][f"/v1/policies/{name}/compute_action"]["post"]
    example = operation["requestBody"]["content"]["application/json"]["example"]
    assert example == {"observation": [0.0] * size}
    response = live_server.post(name, example)
    assert response.status == 200
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(response.json(), resolved(schema, api))


def test_the_docs_refer_to_nothing_outside_the_host(live_server: LiveServer):
    page = live_server.request("GET", "/docs")
    assert page.status == 200
    places = re.findall(r"""(?:src|href)=["']([^"']+)""", page.body.decode())
    places += re.findall(r"""url:\s*["']([^"']+)""", page.body.decode())
    assert "/openapi.json" in places
    assert len(places) >= 3
    for place in places:
        path = urljoin("/docs", place)
        assert path.startswith("/")
        assert not path.startswith("//")
        assert live_server.request("GET", path).status == 200


@pytest.fixture(scope="module")
def any_api(any_space: LiveServer) -> dict[str, Any]:
    return any_space.request("GET", "/openapi.json").json()


@pytest.mark.parametrize("name", [*OBSERVATION_SPACES, "full"])
def test_any_space_is_described_with_an_example_that_works(any_space, any_api, name: str):
    operation = any_api["paths"][f"/v1/policies/{name}/compute_action"]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    jsonschema.Draft202012Validator.check_schema(content["schema"])
    example = content["example"]
    space = OBSERVATION_SPACES["dict" if name == "full" else name]
    many = {"observations": [as_json(row) for row in sample(space, 2)]}
    answer = resolved(
        operation["responses"]["200"]["content"]["application/json"]["schema"], any_api
    )
    for body in (example, many):
        jsonschema.validate(body, content["schema"])
        response = any_space.post(name, body)
        assert response.status == 200, response.json()
        jsonschema.validate(response.json(), answer)
        assert ("state" in response.json()) == (name == "full")


ROW = {"z/last": 2, "a.b[0] `c` ~": [0.5, 1.0], "class": {"self": [0, 1], "0": 1}}
STATE = {"total": 1.25, "frames": [[0.5, 1.0, 1.5], [2.0, 2.5, 3.0]]}
MASK = [1, 0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("body", "is_valid"),
    [
        ({"observation": ROW, "state": STATE, "reward": 1.5, "action_mask": MASK}, True),
        ({"observations": [ROW] * 2, "state": [None, STATE], "rewards": [0, 1]}, True),
        ({"observation": ROW, "state": None, "action_mask": None}, True),
        ({"observation": {**ROW, "z/last": 3}}, False),
        ({"observation": {**ROW, "more": 3}}, False),
        ({"observation": {"z/last": 1}}, False),
        ({"observation": ROW, "state": {"total": 1.0}}, False),
        ({"observation": ROW, "state": {**STATE, "total": [1.0]}}, False),
        ({"observation": ROW, "action_mask": MASK[1:]}, False),
        ({"observation": ROW, "reward": None}, False),
    ],
)
def test_the_schema_of_state_mask_and_reward_is_the_server_s(any_space, any_api, body, is_valid):
    schema = request_schema(any_api, "full")
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == is_valid
    assert (any_space.post("full", body).status == 200) == is_valid


@pytest.mark.slow
@pytest.mark.parametrize("which", ["live_server", "any_space"])
def test_generated_requests_get_documented_answers(which: str, request: pytest.FixtureRequest):
    live_server: LiveServer = request.getfixturevalue(which)
    api = live_server.request("GET", "/openapi.json").json()
    # /v2 has its own test, in test_open_inference_openapi.py.
    api["paths"] = {path: each for path, each in api["paths"].items() if path[:3] != "/v2"}
    load_all_checks()
    names = {
        "status_code_conformance",
        "content_type_conformance",
    }
    if which == "live_server":
        # Schemathesis rewrites a Tuple's `prefixItems` and then refuses its own form; answers of
        # every space are checked above.
        names.add("response_schema_conformance")
    checks = [check for check in CHECKS.get_all() if check.__name__ in names]
    assert len(checks) == len(names)
    description = schemathesis.openapi.from_dict(api)
    description.config.base_url = live_server.url
    operations = [result.ok() for result in description.get_all_operations()]
    assert len(operations) == len(api["paths"])
    limits = settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def check(case: Any) -> None:
        response = case.call()
        case.validate_response(response, checks=checks)
        # A generated `timeout_ms` may be too short for anybody.
        assert response.status_code < 500 or response.status_code == 504, response.text

    for operation in operations:
        limits(given(case=operation.as_strategy())(check))()
