"""The commands `inspect`, `verify`, `serve`, `act` and `play`."""

from __future__ import annotations

import dataclasses
import enum
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from serving.bundle import Bundle, read_bundle
from serving.errors import UsageError
from serving.inspection import interface_rows, origin_rows
from serving.options import (
    ActionMaskOption,
    EnvConfigOption,
    EnvOption,
    SeedOption,
    StochasticOption,
    WrapperOption,
)
from serving.spaces import describe_space

if TYPE_CHECKING:  # pydantic is not needed by the commands that only ask
    from serving.config import PolicySource, ServingConfig
    from serving.environments import NamedEnvironment

_console = Console(highlight=False, soft_wrap=True)


class Engine(str, enum.Enum):
    """The runtimes that a bundle can run in."""

    onnx = "onnx"
    torchscript = "torchscript"
    pt2 = "pt2"
    auto = "auto"


class Device(str, enum.Enum):
    """Where inference runs."""

    cpu = "cpu"
    cuda = "cuda"
    auto = "auto"


class Ingress(str, enum.Enum):
    """Who listens on the public port."""

    direct = "direct"
    haproxy = "haproxy"


class Protocol(str, enum.Enum):
    """How a client speaks to the server."""

    http = "http"
    ws = "ws"


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", metavar="BUNDLE")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """What a policy expects and returns, where it came from, and its parity report."""
    found = read_bundle(bundle)
    if as_json:
        print(json.dumps(dict(found.manifest.raw)))
        return
    _console.print(_bundle_table(found))


def _bundle_table(bundle: Bundle) -> Table:
    table = Table(title=str(bundle.path), show_header=False, title_justify="left")
    for key, value in (*interface_rows(bundle.manifest), *origin_rows(bundle.manifest)):
        table.add_row(key, value)
    return table


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", metavar="BUNDLE")],
    engine: Annotated[
        Engine,
        typer.Option(
            help="The runtime to replay in. TorchScript and pt2 are programs: trust them."
        ),
    ] = Engine.onnx,
    device: Annotated[Device, typer.Option(help="Where to replay.")] = Device.cpu,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Replay what RLlib answered at export on this machine; exit 1 on any mismatch."""
    from serving.engines.choice import choose
    from serving.engines.graph import load_graph
    from serving.verification import verify_graph

    found = read_bundle(bundle)
    choice = choose([found], engine.value, device.value)
    report = verify_graph(found, load_graph(found, choice.engine, choice.device))
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
        return
    _console.print(
        f"verified {found.path} ({found.manifest.policy_id}): {report.n_observations} golden "
        f"observations at B = {', '.join(map(str, report.batch_sizes))} on {report.engine} "
        f"({report.device}) answer as RLlib did; largest error {report.max_error:.1g}"
    )


def serve(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Bundles, or policy repositories (NAME/VERSION/<bundle>).",
            metavar="BUNDLE_OR_REPOSITORY...",
        ),
    ],
    config: Annotated[
        Path | None, typer.Option(help="Settings as YAML; flags win over it.", metavar="YAML")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The policy's name in URLs [its directory's].")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on [127.0.0.1]; 0.0.0.0: every network.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Public port [8000]; 0: a free one.")] = None,
    ingress: Annotated[
        Ingress | None,
        typer.Option(
            help="Who listens on the public port: the replicas, or an HAProxy before them "
            "[direct; haproxy on a cluster]."
        ),
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Port of gRPC [the one after --port]; 0: a free one.")
    ] = None,
    grpc: Annotated[
        bool | None, typer.Option("--grpc/--no-grpc", help="Serve gRPC too [yes].")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Processes that serve [1].")] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(help="Start more processes under load, up to this many [none more]."),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(help="Where inference runs [auto: what is timed as the fastest]."),
    ] = None,
    engine: Annotated[
        Engine | None,
        typer.Option(help="Runtime [onnx]. TorchScript and pt2 are programs: trust them first."),
    ] = None,
    trust_programs: Annotated[
        bool | None,
        typer.Option("--trust-programs", help="Let --engine auto take TorchScript or pt2 too."),
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(help="Most observations in a batch [256].")
    ] = None,
    max_queue_size: Annotated[
        int | None, typer.Option(help="Most observations waiting; beyond it 503 [4096].")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster to join (also RAY_ADDRESS) [a private one that ends with this].",
            metavar="ADDRESS",
        ),
    ] = None,
) -> None:
    """Serve policies on Ray Serve until Ctrl-C or SIGTERM.

    Prints `ready http://HOST:PORT` when it answers. Every bundle is verified against its golden
    vectors before anything starts, and again in every replica.
    """
    from serving.config import build_config
    from serving.repository import find_policies

    flags = {
        "host": host,
        "port": port,
        "ingress": ingress and ingress.value,
        "grpc": grpc,
        "grpc_port": grpc_port,
        "replicas": replicas,
        "max_replicas": max_replicas,
        "device": device and device.value,
        "engine": engine and engine.value,
        "trust_programs": trust_programs,
        "max_batch_size": max_batch_size,
        "max_queue_size": max_queue_size,
        "ray_address": ray_address,
    }
    settings = build_config(config, flags)
    _serve(find_policies(sources, name=name), settings)


def _serve(policies: list[PolicySource], settings: ServingConfig) -> None:
    """Start, say so, and end with the first signal."""
    from serving.server import StopSignals, running_server
    from serving.uvicorn_fit import fits

    signals = StopSignals()
    try:
        with running_server(policies, settings) as server:
            for policy in policies:
                _announce(server.url, policy.name, read_bundle(policy.path))
            _console.print(f"engine: {server.choice.reason}")
            reason = fits()
            if reason is not None:
                _console.print(f"no fast lane: {reason}; every request goes the ordinary way")
            if server.grpc is not None:
                print(f"grpc {server.grpc}")
            print(f"ready {server.url}", flush=True)
            signals.wait()
            print("stopping", flush=True)
    except KeyboardInterrupt:
        sys.exit(128 + (signals.number or signal.SIGINT))


def _announce(url: str, name: str, bundle: Bundle) -> None:
    from serving.schemas import example_observation

    manifest = bundle.manifest
    observation = example_observation(manifest.observation_space.to_json())
    _console.print(
        f"{name}: {describe_space(manifest.observation_space)} -> "
        f"{describe_space(manifest.action_space)}, {manifest.policy_id}"
    )
    _console.print(
        f"  curl -s {url}/v1/policies/{name}/compute_action -H 'content-type: application/json' "
        f"-d '{json.dumps({'observation': observation}, separators=(',', ':'))}'",
        markup=False,
    )


def act(
    url: Annotated[str, typer.Argument(help="http://HOST:PORT/v1/policies/NAME", metavar="URL")],
    observation: Annotated[
        str, typer.Option(help="The observation as JSON; - reads it from standard input.")
    ],
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="Sample instead of the most likely action.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Makes a sample repeatable.", min=0)] = None,
    state: Annotated[
        str | None,
        typer.Option(help="What the policy remembers: the last answer's `state`.", metavar="JSON"),
    ] = None,
    reward: Annotated[
        float | None, typer.Option(help="Of the step before, for a policy that reads it.")
    ] = None,
    action_mask: Annotated[
        str | None, typer.Option(help="Which actions are allowed: [1,0,1].", metavar="JSON")
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait.", min=0.001)] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer.")] = False,
) -> None:
    """One action for one observation from a served policy; with its state where it has one."""
    from serving.client import PolicyClient

    request: dict[str, Any] = {
        "observation": _json_option(
            "--observation", sys.stdin.read() if observation == "-" else observation
        ),
        "deterministic": not stochastic,
    }
    if seed is not None:
        request["seed"] = seed
    if reward is not None:
        request["reward"] = reward
    if state is not None:
        request["state"] = _json_option("--state", state)
    if action_mask is not None:
        request["action_mask"] = _json_option("--action-mask", action_mask)
    with PolicyClient(url, timeout_s=timeout_s) as client:
        answer = client.answer(request)
    print(json.dumps(answer if as_json else answer["action"]))


def _json_option(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as exc:
        raise UsageError(f"{name} is not JSON: {exc}") from exc


def _environment(
    described: Mapping[str, Any], env: str | None, env_config: str | None, wrappers: Sequence[str]
) -> NamedEnvironment:
    """The environment that was asked for, else the one that a policy was trained in."""
    from serving.environments import (
        NamedEnvironment,
        described_environment,
        parse_env_config,
        parse_wrappers,
    )

    kwargs, added = parse_env_config(env_config), parse_wrappers(wrappers)
    if env is not None:
        return NamedEnvironment(env, kwargs, added)
    found = described_environment(described)
    if found is None:
        raise UsageError("the policy names no environment; give one: --env ID")
    return NamedEnvironment(found.id, {**found.kwargs, **kwargs}, (*found.wrappers, *added))


def play(
    url: Annotated[str, typer.Argument(help="http://HOST:PORT/v1/policies/NAME", metavar="URL")],
    env: EnvOption = None,
    env_config: EnvConfigOption = None,
    wrapper: WrapperOption = None,
    episodes: Annotated[int, typer.Option(help="Episodes to play.", min=1)] = 10,
    num_envs: Annotated[
        int, typer.Option(help="Environments stepped together, one request a step.", min=1)
    ] = 1,
    protocol: Annotated[
        Protocol,
        typer.Option(help="A request for each step, or one WebSocket for all: the fastest."),
    ] = Protocol.http,
    seed: SeedOption = 0,
    stochastic: StochasticOption = False,
    action_mask: ActionMaskOption = False,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for a step.", min=0.001)] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Step an environment here with the actions of a policy that is served elsewhere."""
    from serving.remote import open_policy
    from serving.rollout import check_spaces, evaluate_policy

    with open_policy(url, protocol.value, timeout_s=timeout_s) as client:
        described = client.describe()
        named = _environment(described, env, env_config, wrapper or [])
        first = named.make()
        try:
            check_spaces(named.id, first, described)
        finally:
            first.close()
        result = evaluate_policy(
            client,
            named.make,
            n_episodes=episodes,
            seed=seed,
            deterministic=not stochastic,
            num_envs=num_envs,
            use_action_mask=action_mask,
        )
    latencies_us = np.percentile(result.step_latencies_s, [50, 95, 99]) * 1e6
    figures: dict[str, Any] = {
        **result.summary(),
        "protocol": protocol.value,
        "num_envs": num_envs,
        "env_steps": result.n_steps,
        "env_steps_per_s": result.n_steps / result.duration_s,
        "step_p50_us": float(latencies_us[0]),
        "step_p95_us": float(latencies_us[1]),
        "step_p99_us": float(latencies_us[2]),
    }
    if as_json:
        print(json.dumps(figures))
        return
    _console.print(_play_table(url, named.id, figures))


def _play_table(url: str, env: str, figures: dict[str, Any]) -> Table:
    table = Table(title=f"{env} played by {url}", show_header=False, title_justify="left")
    table.add_row("episodes", f"{figures['n_episodes']}")
    table.add_row(
        "return",
        f"{figures['mean_return']:.1f} ± {figures['std_return']:.1f} (min "
        f"{figures['min_return']:.1f}, max {figures['max_return']:.1f})",
    )
    table.add_row(
        "ended",
        f"{figures['n_terminated']} terminated, {figures['n_truncated']} truncated, mean length "
        f"{figures['mean_length']:.0f}",
    )
    table.add_row(
        f"step latency ({figures['protocol']}, {figures['num_envs']} at a time)",
        f"p50 {figures['step_p50_us']:.0f} µs, p95 {figures['step_p95_us']:.0f} µs, p99 "
        f"{figures['step_p99_us']:.0f} µs",
    )
    table.add_row("environment steps/s", f"{figures['env_steps_per_s']:,.0f}")
    return table
