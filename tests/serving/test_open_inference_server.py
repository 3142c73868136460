"""The protocol's health, metadata, configuration, repository and statistics, over HTTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from serving.dialects.open_inference.grpc_messages import METHODS
from serving.dialects.open_inference.model import Parameters
from tests.processes import ROOT
from tests.serving.conftest import LiveServer, serving
from tests.serving.open_inference import assert_error, body_of, infer, tensor

ZEROS = np.zeros((1, 4), np.float32)


@pytest.fixture(scope="module")
def client(live_server: LiveServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"{live_server.host}:{live_server.port}") as found:
        yield found


def test_a_third_party_client_sees_a_server_and_its_models_ready(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("discrete")
    assert client.is_model_ready("discrete", "1")
    assert not client.is_model_ready("nobody")
    assert not client.is_model_ready("discrete", "2")


def test_health_says_it_in_words(live_server: LiveServer):
    for path, said in [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/discrete/ready", {"name": "discrete", "ready": True}),
        ("/v2/models/discrete/versions/1/ready", {"name": "discrete", "ready": True}),
    ]:
        response = live_server.request("GET", path)
        assert (response.status, response.json()) == (200, said)
        assert response.headers["content-type"] == "application/json"


def test_a_server_that_is_shutting_down_is_live_and_not_ready(bundles: dict[str, Path]):
    with serving({"discrete": bundles["discrete"]}, retry_after_s=3) as server:
        asyncio.run(server.services.close())
        assert server.request("GET", "/v2/health/live").status == 200
        response = server.request("GET", "/v2/health/ready")
        assert (response.status, response.json()) == (503, {"ready": False})
        response = server.request("GET", "/v2/models/discrete/ready")
        assert (response.status, response.json()["ready"]) == (503, False)
        response = infer(server, body_of(tensor("observation", ZEROS)))
        assert_error(response, 503, "shutting down")
        assert response.headers["retry-after"] == "3"
        listed = server.request("POST", "/v2/repository/index").json()
        assert [(each["state"], bool(each["reason"])) for each in listed] == [("UNAVAILABLE", True)]
        body = b'{"ready": true}'
        assert server.request("POST", "/v2/repository/index", body).json() == []


def test_the_server_lists_exactly_the_extensions_that_work(client):
    metadata = client.get_server_metadata()
    assert metadata["name"] == "policyserve"
    assert isinstance(metadata["version"], str)
    assert metadata["extensions"] == [
        "binary_tensor_data",
        "model_configuration",
        "parameters",
        "statistics",
    ]


@pytest.mark.parametrize("version", ["", "1"])
def test_a_model_s_metadata_lists_its_tensors(client, version: str):
    metadata = client.get_model_metadata("discrete", version)
    assert metadata["name"] == "discrete"
    assert metadata["versions"] == ["1"]
    assert metadata["platform"] == "onnx_onnxv1"
    assert metadata["inputs"] == [
        {"name": "observation", "datatype": "FP32", "shape": [-1, 4]},
        {"name": "action_mask", "datatype": "BOOL", "shape": [-1, 3]},
    ]
    assert metadata["outputs"] == [
        {"name": "action", "datatype": "INT64", "shape": [-1]},
        {"name": "action_logp", "datatype": "FP32", "shape": [-1]},
        {"name": "value", "datatype": "FP32", "shape": [-1]},
        {"name": "action_dist_inputs", "datatype": "FP32", "shape": [-1, -1]},
    ]
    assert metadata["properties"] == {"optional_inputs": "action_mask"}


def test_a_model_s_configuration_says_what_is_optional(client):
    config = client.get_model_config("discrete")
    assert config["max_batch_size"] == 1024
    assert [(each["name"], each["optional"]) for each in config["input"]] == [
        ("observation", False),
        ("action_mask", True),
    ]
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert config["input"][0]["dims"] == [4]


@pytest.mark.parametrize("what", ["", "/ready", "/config", "/stats"])
@pytest.mark.parametrize("path", ["nobody", "discrete/versions/2", "discrete/versions/x"])
def test_a_model_or_version_that_is_not_served_is_not_found(live_server, path: str, what: str):
    assert_error(live_server.request("GET", f"/v2/models/{path}{what}"), 404, "served here")


def test_models_are_listed(live_server: LiveServer, client):
    expected = ["box", "discrete", "no-critic"]
    assert live_server.request("GET", "/v2/models").json() == {"models": expected}
    index = client.get_model_repository_index()
    assert index == [
        {"name": name, "version": "1", "state": "READY", "reason": ""} for name in expected
    ]


@pytest.mark.parametrize("body", [b"[]", b'{"ready": 1}', b"{", b"\xff"])
def test_a_wrong_index_request_is_refused(live_server: LiveServer, body: bytes):
    assert_error(live_server.request("POST", "/v2/repository/index", body), 400)


def test_models_cannot_be_loaded_or_unloaded_and_the_server_says_so(client):
    for change in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="fixed when the server starts") as info:
            change("discrete")
        assert info.value.status() == "501"
    assert client.is_model_ready("discrete")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/v2", "GET, HEAD"),
        ("POST", "/v2/health/live", "GET, HEAD"),
        ("PUT", "/v2/models/discrete", "GET, HEAD"),
        ("GET", "/v2/models/discrete/infer", "POST"),
        ("GET", "/v2/repository/index", "POST"),
        ("GET", "/v2/repository/models/discrete/load", "POST"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(live_server, method, path, allow):
    response = live_server.request(method, path)
    assert_error(response, 405, method)
    assert response.headers["allow"] == allow


@pytest.mark.parametrize(
    "path",
    [
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models",
        "/v2/models/discrete",
        "/v2/models/discrete/versions/1",
        "/v2/models/discrete/ready",
        "/v2/models/discrete/versions/1/ready",
        "/v2/models/discrete/config",
        "/v2/models/discrete/versions/1/config",
    ],
)
def test_no_documented_path_is_redirected_with_or_without_a_slash(live_server, path: str):
    for each in (path, f"{path}/"):
        assert live_server.request("GET", each).status == 200
    assert live_server.request("HEAD", path).body == b""


@pytest.mark.parametrize("path", ["/v2/nothing", "/v2/models/discrete/generate", "/v2//"])
def test_what_is_not_there_is_not_found_in_the_protocol_s_form(live_server, path: str):
    assert_error(live_server.request("GET", path), 404)


def test_a_path_that_only_begins_alike_is_none_of_the_protocol(live_server: LiveServer):
    response = live_server.request("GET", "/v2x")
    assert (response.status, response.headers["content-type"]) == (404, "application/problem+json")


def test_statistics_count_observations_batches_and_failures(bundles: dict[str, Path]):
    both = {"discrete": bundles["discrete"], "box": bundles["box"]}
    with (
        serving(both) as server,
        triton.InferenceServerClient(f"{server.host}:{server.port}") as client,
    ):
        three = np.zeros((3, 4), np.float32)
        for _ in range(2):
            infer(server, body_of(tensor("observation", three)))
        infer(server, body_of(tensor("nothing", three)))
        (found,) = client.get_inference_statistics("discrete")["model_stats"]
        assert (found["name"], found["version"]) == ("discrete", "1")
        assert found["inference_count"] == 6
        assert found["execution_count"] == 2
        stats = found["inference_stats"]
        assert (stats["success"]["count"], stats["fail"]["count"]) == (2, 1)
        assert stats["success"]["ns"] > stats["compute_infer"]["ns"] > 0
        assert found["last_inference"] > 1_700_000_000_000
        everybody = client.get_inference_statistics()["model_stats"]
        assert [each["name"] for each in everybody] == ["box", "discrete"]
        (again,) = client.get_inference_statistics("discrete", "1")["model_stats"]
        assert again == found


def test_the_documented_client_works(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    text = (ROOT / "docs" / "open-inference.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert code is not None
    with serving({"cartpole": bundles["discrete"]}) as server:
        exec(code[1].replace("127.0.0.1:8000", f"{server.host}:{server.port}"), {})
    assert re.fullmatch(r"\[[012] [012]\]\n", capsys.readouterr().out)


def test_what_the_server_lists_is_documented(live_server: LiveServer):
    text = (ROOT / "docs" / "open-inference.md").read_text()
    for extension in live_server.request("GET", "/v2").json()["extensions"]:
        assert f"`{extension}`" in text
    for method in METHODS:
        assert f"`{method}`" in text
    for parameter in Parameters.__struct_fields__:
        assert f"`{parameter}`" in text
