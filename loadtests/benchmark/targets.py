"""What `make bench` measures: which servers, under which loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["json", "binary", "stream", "client"]
Style = Literal["plain", "rows", "open_inference"]
Group = Literal["ours", "peer", "bare"]

CONNECTIONS = (1, 16, 64, 256)
_PLAIN = "/compute_action"


@dataclass(frozen=True)
class Load:
    """One way to load a server; every connection is kept and asks again when it has its answer.

    Attributes:
        kind: JSON or msgpack over HTTP, a WebSocket stream, or the Python client.
        connections: How many.
        batch: Observations in a request.
        depth: Requests that a connection has open at a time.
    """

    kind: Kind
    connections: int
    batch: int = 1
    depth: int = 1

    @property
    def key(self) -> str:
        """Its name in results."""
        shape = f" B={self.batch}" if self.kind == "stream" else ""
        return f"{self.kind}{shape} c={self.connections}"


JSON_LOADS = tuple(Load("json", connections) for connections in CONNECTIONS)
# The bare programs are there for the ladder and for the limits.
BARE_LOADS = (JSON_LOADS[0], *JSON_LOADS[2:])
BINARY_LOADS = tuple(Load("binary", connections) for connections in CONNECTIONS)
STREAM_LOADS = (
    Load("stream", 1),
    Load("stream", 16),
    Load("stream", 64),
    Load("stream", 4, batch=256, depth=4),
)
CLIENT_LOAD = Load("client", 1)


@dataclass(frozen=True)
class Target:
    """One server of the comparison.

    Attributes:
        key: Its name for `--only`.
        title: Its row.
        group: Ours, another server product, or a bare program to compare with.
        note: One line on how it is set up.
        command: What starts it; `{python}` is its environment's, `{model}`, `{bundle}` and
            `{checkpoint}` are what it may serve, `{port}`, `{port2}` and `{port3}` are free ports.
        path: Where it answers actions.
        style: How a request is written.
        stream: Where it streams, if it does.
        is_echo: Whether its stream gives back what it gets.
        environment: The virtual environment of its own, by the name of its requirements file;
            None: this one.
        package: The distribution that it is.
        loads: What it is measured under.
    """

    key: str
    title: str
    group: Group
    note: str
    command: tuple[str, ...]
    path: str = _PLAIN
    style: Style = "plain"
    stream: str | None = None
    is_echo: bool = False
    environment: str | None = None
    package: str | None = None
    loads: tuple[Load, ...] = JSON_LOADS


OURS = "policyserve"
OURS_HAPROXY = "policyserve-haproxy"
REPLICA = "replica"
PROTOTYPE = "prototype"
BARE_ASYNCIO = "asyncio"
BARE_ASGI = "uvicorn"
CONSTANT = "constant"
_POLICY = "/v1/policies/cartpole"
_EVERY_LOAD = (*JSON_LOADS, *BINARY_LOADS, *STREAM_LOADS, CLIENT_LOAD)


def _ours(ingress: str, replicas: int) -> Target:
    is_direct = ingress == "direct"
    key = OURS if is_direct else OURS_HAPROXY
    title = "policyserve" if is_direct else "policyserve behind HAProxy"
    listener = "listening on the public port" if is_direct else "behind Serve's HAProxy"
    count = "one replica" if replicas == 1 else f"{replicas} replicas"
    options = ("--port", "{port}", "--ingress", ingress, "--replicas", str(replicas))
    return Target(
        key=key if replicas == 1 else f"{key}-{replicas}",
        title=title if replicas == 1 else f"{title}, {replicas} replicas",
        group="ours",
        note=f"`policyserve serve` on Ray Serve, {count} {listener}",
        command=("{policyserve}", "serve", "{bundle}", "--name", "cartpole", *options),
        path=f"{_POLICY}/compute_action",
        stream=f"{_POLICY}/stream",
        loads=_EVERY_LOAD if replicas == 1 else JSON_LOADS[1:],
    )


def _peer(
    name: str, title: str, note: str, *arguments: str, style: Style = "plain", key: str = ""
) -> Target:
    return Target(
        key=key or name,
        title=title,
        group="peer",
        note=note,
        command=("{python}", f"{{peers}}/{name}_server.py", "{model}", "{port}", *arguments),
        path="/v2/models/policy/infer" if style == "open_inference" else _PLAIN,
        style=style,
        environment=name,
        package={"triton": "nvidia-pytriton"}.get(name, name),
    )


def _ray_peer(key: str, title: str, note: str, file: str, what: str) -> Target:
    command = ("{python}", f"{{peers}}/{file}", what, "{port}")
    return Target(key, title, "peer", note, command, package="ray")


def _bare(key: str, title: str, note: str, *command: str, path: str = _PLAIN) -> Target:
    whole = ("{python}", "-m", *command)
    return Target(key, title, "bare", note, whole, path=path, loads=BARE_LOADS)


PEERS = (
    _ray_peer(
        "ray-rllib",
        "Ray Serve, RLlib tutorial",
        "the RLModule restored in the replica, torch, one request at a time",
        "ray_serve_rllib.py",
        "{checkpoint}",
    ),
    _ray_peer(
        "ray-batch",
        "Ray Serve, `@serve.batch`",
        "FastAPI, `@serve.batch`, ONNX Runtime, Serve's default settings",
        "ray_serve_batch.py",
        "{model}",
    ),
    _peer(
        "mosec",
        "mosec, batches of 64",
        "one worker, dynamic batching with a wait of 1 ms",
        "64",
    ),
    _peer("mosec", "mosec, no batching", "one worker", "1", key="mosec-single"),
    _peer(
        "mlserver",
        "MLServer",
        "custom runtime in the server's process, Open Inference Protocol",
        "{port2}",
        "{port3}",
        style="open_inference",
    ),
    _peer("litserve", "LitServe", "one API server, one worker, no batching (faster here)", "1"),
    _peer(
        "bentoml",
        "BentoML",
        "one worker, adaptive batching (faster here)",
        "64",
        style="rows",
    ),
    _peer(
        "triton",
        "Triton (PyTriton)",
        "Python backend, dynamic batching without delay, Open Inference Protocol",
        "{port2}",
        style="open_inference",
    ),
)
BARE = (
    _bare(
        REPLICA,
        "policyserve's replica, no Ray",
        "the same class in bare uvicorn",
        *("loadtests.ladder.replica", "{bundle}", "{port}"),
        path=f"{_POLICY}/compute_action",
    ),
    _bare(
        PROTOTYPE,
        "bare prototype",
        "a protocol class in uvicorn: parses, computes, answers; checks and counts nothing",
        *("loadtests.ladder.bare_protocol", "{model}", "{port}"),
    ),
    _bare(
        BARE_ASYNCIO,
        "bare asyncio",
        "the same on httptools alone, without uvicorn",
        *("loadtests.ladder.bare_asyncio", "{model}", "{port}", "inference"),
    ),
    _bare(
        CONSTANT,
        "constant reply",
        "httptools, the same bytes for everybody: HTTP alone in Python",
        *("loadtests.ladder.bare_asyncio", "{model}", "{port}", "constant"),
    ),
    Target(
        BARE_ASGI,
        "bare uvicorn, ASGI",
        "bare",
        "a hand-written ASGI application, ONNX Runtime inline; its WebSocket is an echo",
        ("{python}", "-m", "loadtests.ladder.bare_asgi", "{model}", "{port}"),
        stream="/echo",
        is_echo=True,
        loads=(*BARE_LOADS, *STREAM_LOADS),
    ),
)
TARGETS = (
    *(_ours("direct", replicas) for replicas in (1, 2)),
    *(_ours("haproxy", replicas) for replicas in (1, 2)),
    *PEERS,
    *BARE,
)
