"""Tiny bundles on disk, and a real HTTP server around them, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from serving.app import build_app
from serving.bundle import read_bundle
from serving.compute_action import ComputeActionHandler
from serving.config import PolicySource, ServingConfig
from serving.engines.graph import GraphPolicy, load_graph
from serving.hot_protocol import bound
from serving.hot_routes import HotRoutes
from serving.service import PolicyServices, load_services
from serving.stream import StreamRegistry, StreamSettings
from serving.stream_protocol import stream_opener
from tests.bundles import LinearPolicy, box_policy, discrete_policy
from tests.serving.clients import CLIENTS, async_json_client, json_client
from tests.serving.deadline import DEADLINE_S, wait_until
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    MEMORY,
    OBSERVATION_SPACES,
    services_of,
    summing_policy,
)
from tests.serving.scripted_http import ScriptedServer
from tests.tiny_policies import TINY_POLICIES


@dataclass(frozen=True)
class Response:
    """An HTTP answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class LiveServer:
    """A server on an ephemeral port of this process."""

    host: str
    port: int
    services: PolicyServices

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def policy_url(self, name: str) -> str:
        return f"{self.url}/v1/policies/{name}"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=DEADLINE_S)
        try:
            connection.request(
                method, path, body, dict(headers or {}), encode_chunked=isinstance(body, Iterator)
            )
            return read_response(connection)
        finally:
            connection.close()

    def post(self, policy: str, body: Any, headers: Mapping[str, str] | None = None) -> Response:
        """POST a body to a policy's compute_action; anything but bytes goes as JSON."""
        data = body if isinstance(body, bytes | Iterator) else json.dumps(body).encode()
        return self.request("POST", f"/v1/policies/{policy}/compute_action", data, headers)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=DEADLINE_S)


def read_response(connection: http.client.HTTPConnection) -> Response:
    response = connection.getresponse()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Response(response.status, headers, response.read())


@contextlib.contextmanager
def serving(
    bundles: Mapping[str, Path],
    *,
    with_fast_lane: bool = True,
    wrap_services: Callable[[PolicyServices], None] | None = None,
    **settings: Any,
) -> Iterator[LiveServer]:
    """Serve bundles under uvicorn in a thread; stopped at the end.

    Args:
        bundles: Policy name to bundle.
        with_fast_lane: Put the fast lane around the application, as in a replica.
        wrap_services: Called with the services before they are served.
        settings: Of `ServingConfig`.
    """
    config = ServingConfig(**settings)
    sources = [PolicySource(name=name, path=path) for name, path in bundles.items()]
    services = load_services(sources, config, "cpu")
    if wrap_services is not None:
        wrap_services(services)
    with serving_services(services, config, with_fast_lane=with_fast_lane) as server:
        yield server


@contextlib.contextmanager
def serving_services(
    services: PolicyServices, config: ServingConfig, *, with_fast_lane: bool = True
) -> Iterator[LiveServer]:
    """Serve what is loaded under uvicorn in a thread; stopped and closed at the end."""
    handler = ComputeActionHandler(services, max_body_bytes=config.max_body_bytes)
    app: Any = build_app(services, handler)
    streams = StreamRegistry(services, StreamSettings(max_message_bytes=config.max_body_bytes))
    routes = HotRoutes(
        services, max_body_bytes=config.max_body_bytes, open_stream=stream_opener(streams)
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=bound(routes) if with_fast_lane else "httptools",
            loop="uvloop",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the server's start")
        yield LiveServer("127.0.0.1", listener.getsockname()[1], services)
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        listener.close()
        asyncio.run(services.close())
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def discrete() -> LinearPolicy:
    return discrete_policy()


@pytest.fixture(scope="session")
def box() -> LinearPolicy:
    return box_policy()


@pytest.fixture(scope="session")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, discrete: LinearPolicy, box: LinearPolicy
) -> dict[str, Path]:
    """Read-only bundles by policy name."""
    root = tmp_path_factory.mktemp("bundles")
    policies = {
        "discrete": discrete,
        "box": box,
        "no-critic": discrete_policy(has_value=False, seed=5),
    }
    return {name: policy.save(root / name) for name, policy in policies.items()}


@pytest.fixture(scope="session")
def live_server(bundles: dict[str, Path]) -> Iterator[LiveServer]:
    """A server with the fast lane, for all tests that leave no trace in it."""
    with serving(bundles, max_body_bytes=100_000) as server:
        yield server


@pytest.fixture(scope="session")
def ordinary_server(bundles: dict[str, Path]) -> Iterator[LiveServer]:
    """The same without the fast lane."""
    with serving(bundles, with_fast_lane=False, max_body_bytes=100_000) as server:
        yield server


@pytest.fixture(scope="session")
def graph_policies(bundles: dict[str, Path]) -> dict[str, GraphPolicy]:
    """The bundles in ONNX Runtime, by policy name."""
    found = {name: read_bundle(path) for name, path in bundles.items()}
    return {
        name: GraphPolicy(bundle.manifest, load_graph(bundle)) for name, bundle in found.items()
    }


@pytest.fixture(scope="session")
def tiny_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read-only bundles of the other spaces and of memory, by name in `TINY_POLICIES`."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: make().save(root / name) for name, make in TINY_POLICIES.items()}


@pytest.fixture(scope="session")
def tiny_policies(tiny_bundles: dict[str, Path]) -> dict[str, GraphPolicy]:
    """Those in ONNX Runtime."""
    found = {name: read_bundle(path) for name, path in tiny_bundles.items()}
    return {
        name: GraphPolicy(bundle.manifest, load_graph(bundle)) for name, bundle in found.items()
    }


@pytest.fixture(scope="session")
def tiny_server(tiny_bundles: dict[str, Path]) -> Iterator[LiveServer]:
    """A server of those."""
    with serving(tiny_bundles) as server:
        yield server


@pytest.fixture(scope="session")
def any_space() -> Iterator[LiveServer]:
    """A policy of every observation and action space; `full` with all that a policy has."""
    actions = [*ACTION_SPACES.values()] * 2
    policies = {
        name: summing_policy(space, action)
        for (name, space), action in zip(OBSERVATION_SPACES.items(), actions, strict=True)
    }
    policies["full"] = summing_policy(
        OBSERVATION_SPACES["dict"],
        ACTION_SPACES["multi-discrete"],
        state=MEMORY,
        has_reward=True,
        has_mask=True,
    )
    with serving_services(services_of(policies), ServingConfig()) as server:
        yield server


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client would have slept."""
    found: list[float] = []
    here = threading.get_ident()
    sleep = time.sleep

    def record(duration_s: float) -> None:
        # Other threads of this process, such as those of libraries, really sleep.
        (found.append if threading.get_ident() == here else sleep)(duration_s)

    monkeypatch.setattr(time, "sleep", record)
    return found


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture(params=[json_client, async_json_client], ids=["sync", "async"])
def client_class(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=CLIENTS)
def any_client(request: pytest.FixtureRequest) -> Any:
    """Every way to ask: for tests against a real server, as a script speaks one language."""
    return CLIENTS[request.param]


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A bundle of the test's own."""
    return Path(shutil.copytree(bundles["discrete"], tmp_path / "bundle"))
