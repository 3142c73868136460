"""The Open Inference Protocol on real Ray Serve, with third-party clients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from serving.bundle import read_bundle
from serving.environment import free_port
from tests.bundles import LinearPolicy, discrete_policy
from tests.conftest import SharedServers
from tests.processes import READY_S, ROOT, Server, wait_until

pytestmark = pytest.mark.slow

STOP_S = 60.0
NAMES = ("action", "action_logp", "value", "action_dist_inputs")


@pytest.mark.parametrize("ingress", ["direct", "haproxy"])
@pytest.mark.parametrize("name", ["cartpole", "pendulum"])
def test_actions_over_http_are_the_ones_that_rllib_answered(
    ingress: str, name: str, shared_servers: SharedServers, request: pytest.FixtureRequest
) -> None:
    server = shared_servers.running(ingress)
    golden = read_bundle(request.getfixturevalue(f"{name}_bundle")).golden()
    inputs = []
    for key, datatype in (("observation", "FP32"), ("action_mask", "BOOL")):
        if key in golden:
            tensor = triton_http.InferInput(key, list(golden[key].shape), datatype)
            inputs.append(tensor.set_data_from_numpy(golden[key]))
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        assert client.is_server_ready()
        assert client.is_model_ready(name)
        for compression in (None, "gzip"):
            result = client.infer(
                name,
                inputs,
                request_compression_algorithm=compression,
                response_compression_algorithm=compression,
            )
            for key in NAMES:
                np.testing.assert_allclose(result.as_numpy(key), golden[key], rtol=1e-5, atol=1e-5)
        with pytest.raises(InferenceServerException, match="no policy 'nobody'") as info:
            client.infer("nobody", inputs)
        assert info.value.status() == "404"


def test_behind_haproxy_the_inner_ports_are_closed_to_other_machines(
    haproxy_server: Server,
) -> None:
    """Serve opens the gRPC ports of replicas and proxies on every interface by default."""
    listening = {
        connection.laddr
        for process in haproxy_server.family()
        for connection in process.net_connections("tcp")
        # Ray's own processes listen among the ports that the kernel hands out.
        if connection.status == psutil.CONN_LISTEN and 20_000 <= connection.laddr.port < 31_000
    }
    assert {address.ip for address in listening} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert len(listening) >= 4  # HTTP and gRPC, of the replica and of the fallback proxy


@pytest.fixture(scope="module")
def policy() -> LinearPolicy:
    return discrete_policy()


@pytest.fixture(scope="module", params=["direct", "haproxy"])
def grpc_address(
    request: pytest.FixtureRequest,
    policy: LinearPolicy,
    shared_servers: SharedServers,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Serve's gRPC ingress: its own proxy, and HAProxy before the replica.

    Beside another server with HAProxy, whose replica has a gRPC port too.
    """
    shared_servers.running("haproxy")
    root = tmp_path_factory.mktemp("grpc")
    bundle = policy.save(root / "bundle")
    port = free_port("127.0.0.1")
    module = "tests.end_to_end.grpc_app"
    log = root / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(bundle), str(port), request.param],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
    assert process.stdin is not None
    try:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            return "ready\n" in log.read_text()

        wait_until(is_ready, "Serve's start", READY_S)
        address = f"127.0.0.1:{port}"
        with triton_grpc.InferenceServerClient(address) as client:
            wait_until(lambda: _is_ready(client), "the ingress", READY_S)
        yield address
    finally:
        process.stdin.close()
        try:
            process.wait(STOP_S)
        finally:
            process.kill()


def _is_ready(client: Any) -> bool:
    try:
        return bool(client.is_model_ready("p"))
    except InferenceServerException:
        return False


def test_actions_over_serve_s_grpc_are_the_policy_s(
    grpc_address: str, policy: LinearPolicy
) -> None:
    rows = policy.observations(40)
    tensor = triton_grpc.InferInput("observation", [40, 4], "FP32").set_data_from_numpy(rows)
    with triton_grpc.InferenceServerClient(grpc_address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.get_server_metadata().name == "policyserve"
        assert client.get_model_config("p").config.input[1].optional
        assert client.get_model_repository_index().models[0].name == "p"
        result = client.infer("p", [tensor], request_id="7")
        assert result.get_response().id == "7"
        expected = policy.answers(rows, np.zeros((40, 3)))
        for key in NAMES:
            np.testing.assert_allclose(result.as_numpy(key), expected[key], rtol=1e-5, atol=1e-5)
        assert client.get_inference_statistics("p").model_stats[0].inference_count == 40


def test_errors_over_serve_s_grpc_are_codes_and_one_line(grpc_address: str) -> None:
    rows = np.full((1, 4), np.inf, np.float32)
    tensor = triton_grpc.InferInput("observation", [1, 4], "FP32").set_data_from_numpy(rows)
    with triton_grpc.InferenceServerClient(grpc_address) as client:
        for call, code in (
            (lambda: client.infer("p", [tensor]), "INVALID_ARGUMENT"),
            (lambda: client.infer("nobody", [tensor]), "NOT_FOUND"),
            (lambda: client.load_model("p"), "UNIMPLEMENTED"),
        ):
            with pytest.raises(InferenceServerException) as info:
                call()
            assert info.value.status() == f"StatusCode.{code}"
            assert "Traceback" not in str(info.value.message())
            assert len(str(info.value.message()).splitlines()) == 1
