"""`policyserve serve` as users and failures meet it: real Ray Serve, real sockets, real signals."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gymnasium as gym
import httpx
import numpy as np
import psutil
import pytest

from serving.bundle import read_bundle
from serving.client import PolicyClient
from serving.rollout import evaluate_policy
from serving.spaces import space_from_gymnasium
from tests.conftest import SharedServers
from tests.processes import Server, refuse, succeed, wait_until

pytestmark = pytest.mark.slow


def policy_url(server: Server, name: str) -> str:
    return f"{server.url}/v1/policies/{name}"


def port_of(server: Server) -> int:
    port = urlsplit(server.url).port
    assert port is not None
    return port


INGRESSES = ("direct", "haproxy")


@pytest.fixture(params=INGRESSES)
def either_server(request: pytest.FixtureRequest, shared_servers: SharedServers) -> Server:
    return shared_servers.running(request.param)


@pytest.fixture
def client(server: Server) -> Iterator[PolicyClient]:
    with PolicyClient(policy_url(server, "cartpole")) as opened:
        yield opened


def test_the_served_policy_plays_cartpole_perfectly_over_http(client: PolicyClient) -> None:
    env = gym.make("CartPole-v1")
    result = evaluate_policy(client, env, n_episodes=5, seed=100)
    env.close()
    assert result.returns.mean() >= 475


@pytest.mark.parametrize("name", ["cartpole", "pendulum"])
def test_served_actions_are_the_ones_that_rllib_answered(
    server: Server, name: str, request: pytest.FixtureRequest
) -> None:
    golden = read_bundle(request.getfixturevalue(f"{name}_bundle")).golden()
    with PolicyClient(policy_url(server, name)) as client:
        output = client.compute_actions(
            golden["observation"],
            outputs=["value", "action_dist_inputs", "action_logp"],
            action_mask=golden.get("action_mask"),
        )
    np.testing.assert_allclose(output.actions, golden["action"], rtol=1e-5, atol=1e-5)
    for key in ("value", "action_dist_inputs", "action_logp"):
        np.testing.assert_allclose(getattr(output, key), golden[key], rtol=1e-5, atol=1e-5)


def test_one_action_has_the_form_that_the_environment_takes(server: Server) -> None:
    for name, env_id in (("cartpole", "CartPole-v1"), ("pendulum", "Pendulum-v1")):
        env = gym.make(env_id)
        observation, _ = env.reset(seed=0)
        with PolicyClient(policy_url(server, name)) as client:
            assert env.action_space.contains(client.compute_action(observation))
        env.close()


def test_a_seed_repeats_a_sampled_action_and_another_seed_changes_it(server: Server) -> None:
    observation = np.zeros(3, dtype=np.float32)
    with PolicyClient(policy_url(server, "pendulum")) as client:
        first, again, other = (
            client.compute_action(observation, deterministic=False, seed=seed) for seed in (7, 7, 8)
        )
    assert first == again
    assert first != other


def test_64_callers_at_once_get_their_own_answers_in_shared_batches(
    either_server: Server,
) -> None:
    server = either_server
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(64, 3)).astype(np.float32)
    with PolicyClient(policy_url(server, "pendulum")) as client:
        alone = [client.compute_action(observation).tolist() for observation in observations]
    with contextlib.ExitStack() as stack:
        callers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server))))
            for _ in observations
        ]
        # The first round opens all connections to the replica, one by one.
        first = at_once(server, callers, observations)
        batches_before = metric(server, 'policyserve_batch_size_count{policy="pendulum"}')
        second = at_once(server, callers, observations)
    np.testing.assert_allclose(first, alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second, alone, rtol=1e-5, atol=1e-5)
    batches = metric(server, 'policyserve_batch_size_count{policy="pendulum"}') - batches_before
    assert 1 <= batches < 64


def at_once(server: Server, callers: list[socket.socket], observations: np.ndarray) -> list[Any]:
    """The actions for one observation a caller, all asked for at the same time.

    The replica is stopped until every request lies before it, so that the requests meet however
    slowly this process gets to send them.
    """
    (replica,) = server.replicas()
    suspend(replica)
    try:
        for caller, observation in zip(callers, observations, strict=True):
            caller.sendall(raw_request("pendulum", observation))
        wait_until(lambda: n_unread(server) >= len(callers), "every request lies before it")
    finally:
        replica.resume()
    return [read_answer(caller)["action"] for caller in callers]


def suspend(process: psutil.Process) -> None:
    """Stop a process; what its threads had begun when the signal came is over on return."""

    def states() -> set[str]:
        tasks = Path(f"/proc/{process.pid}/task").glob("*/stat")
        return {task.read_text().rpartition(")")[2].split()[0] for task in tasks}

    process.suspend()
    wait_until(lambda: states() == {"T"}, "every thread has stopped")


def listener_of(server: Server) -> psutil.Process:
    """The process that has the public port: HAProxy, or the replica."""

    def haproxies() -> list[psutil.Process]:
        return [child for child in server.family() if child.name() == "haproxy"]

    if not haproxies():
        return server.replicas()[0]
    # One that Ray has replaced lives on until its last connection is closed.
    wait_until(lambda: len(haproxies()) == 1, "one HAProxy is left")
    return haproxies()[0]


def n_unread(server: Server) -> int:
    """Connections to a replica with bytes that the replica has not read."""
    listener = listener_of(server)
    ports = {port_of(server)}
    if listener.name() == "haproxy":
        ports = {
            connection.raddr.port
            for connection in listener.net_connections("tcp")
            if connection.raddr and connection.laddr.port != port_of(server)
        }
    n = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues = line.split()[:5]
        is_established = state == "01"
        n_bytes = int(queues.partition(":")[2], 16)
        n += is_established and n_bytes > 0 and int(local.partition(":")[2], 16) in ports
    return n


def raw_request(policy: str, observation: np.ndarray) -> bytes:
    body = json.dumps({"observation": observation.tolist()}).encode()
    return (
        f"POST /v1/policies/{policy}/compute_action HTTP/1.1\r\nhost: test\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


def read_answer(caller: socket.socket) -> dict[str, Any]:
    caller.settimeout(30.0)
    response = http.client.HTTPResponse(caller)
    response.begin()
    assert response.status == 200
    answer: dict[str, Any] = json.loads(response.read())
    return answer


def metric(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    values = [line.split()[-1] for line in text.splitlines() if line.startswith(name)]
    return float(values[0]) if values else 0.0


GOOD = '{"observation":[0,0,0,0]}'
BAD_REQUESTS = {
    "wrong shape": ('{"observation":[0,0,0]}', 422, "invalid_observation"),
    "wrong type": ('{"observation":[0,0,"0",0]}', 422, "invalid_observation"),
    "NaN": ('{"observation":[0,0,NaN,0]}', 422, "invalid_observation"),
    "out of range": ('{"observation":[0,0,1e999,0]}', 422, "invalid_observation"),
    "empty batch": ('{"observations":[]}', 422, "invalid_request"),
    "too many": (json.dumps({"observations": [[0] * 4] * 1025}), 413, "batch_too_large"),
    "not JSON": ('{"observation":[0,0', 400, "malformed_request"),
    "unknown key": ('{"observation":[0,0,0,0],"sead":1}', 422, "invalid_request"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_gets_its_own_error_and_the_server_goes_on(server: Server, case: str) -> None:
    body, status, code = BAD_REQUESTS[case]
    url = f"{policy_url(server, 'cartpole')}/compute_action"
    headers = {"content-type": "application/json"}
    answer = httpx.post(url, content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert httpx.post(url, content=GOOD, headers=headers).status_code == 200


def test_wrong_content_type_and_unknown_policy_are_refused(server: Server) -> None:
    url = f"{policy_url(server, 'cartpole')}/compute_action"
    wrong = httpx.post(url, content=GOOD, headers={"content-type": "text/csv"})
    assert (wrong.status_code, wrong.json()["code"]) == (415, "unsupported_media_type")
    unknown = httpx.post(f"{policy_url(server, 'nobody')}/compute_action", content=GOOD)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_policy")


def test_the_server_describes_itself(server: Server) -> None:
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/readyz").json() == {"status": "ready"}
    listed = httpx.get(f"{server.url}/v1/policies").json()["policies"]
    assert [entry["policy"] for entry in listed] == ["cartpole", "pendulum"]
    one = httpx.get(policy_url(server, "pendulum")).json()
    space = space_from_gymnasium(gym.make("Pendulum-v1").observation_space)
    assert one["observation_space"] == space.to_json()
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert "/v1/policies/cartpole/compute_action" in paths
    assert httpx.get(f"{server.url}/docs").status_code == 200


def test_the_printed_curl_line_works(server: Server) -> None:
    line = next(
        line for line in server.log.read_text().splitlines() if line.strip().startswith("curl ")
    )
    assert shutil.which("curl"), "curl is needed for this test"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["action"] in (0, 1)


def test_a_replica_that_serves_onnx_has_loaded_neither_torch_nor_rllib(server: Server) -> None:
    (replica,) = server.replicas()
    loaded = {entry.path for entry in replica.memory_maps()}
    assert any("onnxruntime" in path for path in loaded)
    assert not [path for path in loaded if "/torch/" in path or "/rllib/" in path]


def test_the_public_port_is_open_to_this_machine_alone(either_server: Server) -> None:
    listener = listener_of(either_server)
    listening = [
        connection.laddr
        for connection in listener.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    # A replica also has the ports through which Ray's own processes reach it.
    is_haproxy = listener.name() == "haproxy"
    ours = [each for each in listening if is_haproxy or each.port == port_of(either_server)]
    assert ours
    assert {address.ip for address in ours} == {"127.0.0.1"}


def test_act_prints_the_action_or_the_servers_error(server: Server) -> None:
    url = policy_url(server, "cartpole")
    assert succeed("act", url, "--observation", "[0,0,0,0]").strip() in ("0", "1")
    answer = json.loads(succeed("act", url, "--observation", "[0,0,0,0]", "--json"))
    assert answer["policy"] == "cartpole"
    assert "/observation" in refuse("act", url, "--observation", "[0,0,0]", exit_code=1)
    assert "nobody" in refuse(
        "act", policy_url(server, "nobody"), "--observation", "[0]", exit_code=1
    )


def test_play_and_evaluate_step_the_served_policy(server: Server) -> None:
    url = policy_url(server, "cartpole")
    arguments = ("--env", "CartPole-v1", "--episodes", "4", "--json")
    played = json.loads(succeed("play", url, *arguments, "--num-envs", "4").splitlines()[-1])
    evaluated = json.loads(succeed("evaluate", url, *arguments).splitlines()[-1])
    for figures in (played, evaluated):
        assert figures["n_episodes"] == 4
        assert figures["mean_return"] >= 475
    # Episode i has the same seed whichever environment plays it.
    assert played["mean_return"] == evaluated["mean_return"]
    assert "Pendulum-v1" in refuse("play", url, "--env", "Pendulum-v1", exit_code=2)
