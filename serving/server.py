"""A running server: from a configuration to `ready`, and back to nothing at all.

check everything -> Ray -> Serve and HAProxy -> ready -> signal -> drained, stopped, gone
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from serving import environment, vacancy
from serving.bundle import read_bundle
from serving.config import PolicySource, ServingConfig
from serving.engines.choice import EngineChoice, choose
from serving.engines.graph import load_graph
from serving.environment import PortInUseError
from serving.errors import PolicyServingError, ServingConfigError
from serving.public_server import shared_socket
from serving.reaper import RUNTIME_DIR_VARIABLE, reaped
from serving.verification import verify_graph

_READY_DEADLINE_S = 120.0
# Shared memory for Ray's objects; requests never go through it.
_OBJECT_STORE_BYTES = 128 * 2**20


class ServerFailedError(PolicyServingError):
    """The server did not become ready, or ended by itself."""

    code = "server_failed"
    title = "Server failed"
    http_status = None


@dataclass(frozen=True)
class RunningServer:
    """A server that answers.

    Attributes:
        url: Where, without a trailing slash.
        choice: What `--engine` and `--device` came to.
        grpc: HOST:PORT of gRPC, if it is served.
    """

    url: str
    choice: EngineChoice
    grpc: str | None = None


def choose_and_verify(sources: Sequence[PolicySource], config: ServingConfig) -> EngineChoice:
    """Load and verify every bundle here, before anything starts, in what they will run in.

    Raises:
        BundleError: A bundle is damaged, or does not act as RLlib did on this machine.
        ServingConfigError: CUDA was asked for and is not there.
    """
    bundles = [read_bundle(source.path) for source in sources]
    choice = choose(
        bundles,
        config.engine,
        config.device,
        max_batch_size=config.max_batch_size,
        allow_programs=config.trust_programs,
    )
    for bundle in bundles:
        verify_graph(bundle, load_graph(bundle, choice.engine, choice.device))
    return choice


@contextlib.contextmanager
def running_server(
    sources: Sequence[PolicySource], config: ServingConfig
) -> Iterator[RunningServer]:
    """Start a server, hand it over when it answers, and stop all of it at the end.

    Raises:
        BundleError: A bundle is damaged, or does not act as RLlib did on this machine.
        PortInUseError: The port is taken.
        ServerFailedError: The server did not become ready.
    """
    choice = choose_and_verify(sources, config)
    # Replicas don't choose again: all have to compute in the same engine.
    config = config.model_copy(update={"engine": choice.engine, "device": choice.device})
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        config = config.model_copy(update={"ingress": config.ingress or "haproxy"})
        with _joined_cluster(address, sources, config, choice) as server:
            yield server
        return
    ingress = config.ingress or "direct"
    port = _free_public_port(config)
    config = config.model_copy(update={"port": port, "ingress": ingress})
    config = config.model_copy(update={"grpc_port": _free_grpc_port(config)})
    runtime_dir = environment.new_runtime_dir()
    environment.apply(environment.switches(os.cpu_count() or 1, ingress))
    os.environ.update(environment.private_cluster(runtime_dir, config.host, ingress))
    with reaped(runtime_dir) as afterwards:
        try:
            with _held_ports(config) as was_served, _private_cluster(runtime_dir, config):
                server = _deploy(sources, config, choice)
                # Before that nobody would answer for a replica that dies.
                was_served.wait(_READY_DEADLINE_S)
                yield server
        except ServerFailedError as exc:
            afterwards.keep_directory = True
            raise ServerFailedError(f"{exc.message}; Ray's logs: {runtime_dir}") from exc


def _free_public_port(config: ServingConfig) -> int:
    try:
        if config.port == 0:
            return environment.free_port(config.host)
        is_free = environment.port_is_free(config.host, config.port)
    except OSError as exc:
        raise ServingConfigError(
            f"cannot listen on {config.host}: {exc.strerror or exc}; --host takes an address of "
            "this machine"
        ) from exc
    if not is_free:
        raise PortInUseError(
            f"{config.host}:{config.port} is in use by another process; stop it, or choose "
            "another port with --port (0 takes a free one)"
        )
    return config.port


def _free_grpc_port(config: ServingConfig) -> int | None:
    """The port of gRPC; None where it is not served.

    Raises:
        PortInUseError: The port that was asked for is taken.
    """
    if not config.grpc:
        return None
    wanted = config.port + 1 if config.grpc_port is None else config.grpc_port
    if 0 < wanted <= 65535 and environment.port_is_free(config.host, wanted):
        return wanted
    if config.grpc_port:
        raise PortInUseError(
            f"{config.host}:{wanted} is in use by another process; choose another port for gRPC "
            "with --grpc-port (0 takes a free one), or serve none with --no-grpc"
        )
    return environment.free_port(config.host)


@contextlib.contextmanager
def _held_ports(config: ServingConfig) -> Iterator[threading.Event]:
    """Where replicas listen themselves, something has to while they come and go.

    Yields:
        Set when a replica has been seen to listen.
    """
    if config.ingress != "direct":
        seen = threading.Event()
        seen.set()
        yield seen
        return
    with contextlib.ExitStack() as stack:
        was_served = stack.enter_context(vacancy.held(config.host, config.port))
        if config.grpc_port is not None:
            stack.enter_context(contextlib.closing(shared_socket(config.host, config.grpc_port)))
        yield was_served


@contextlib.contextmanager
def _private_cluster(runtime_dir: Path, config: ServingConfig) -> Iterator[None]:
    try:
        _init_ray(
            address="local",
            num_cpus=max(os.cpu_count() or 1, _cpus_wanted(config)),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(environment.ray_dir(runtime_dir)),
        )
    except Exception as exc:  # Ray's start fails in many ways, all of them fatal here
        raise ServerFailedError(f"Ray did not start: {exc}") from exc
    try:
        yield
    finally:
        _shut_down(stop_serve=True)


def _cpus_wanted(config: ServingConfig) -> int:
    replicas = max(config.replicas, config.max_replicas or 0)
    return int(replicas * config.cpus_per_replica + 1)


@contextlib.contextmanager
def _joined_cluster(
    address: str, sources: Sequence[PolicySource], config: ServingConfig, choice: EngineChoice
) -> Iterator[RunningServer]:
    switches = environment.switches(os.cpu_count() or 1, config.ingress or "haproxy")
    environment.apply(switches)
    import ray

    try:
        _init_ray(address=address)
        serve_runs = _serve_runs()
        if not serve_runs:
            # Serve's own actors take the environment of the job that starts them.
            ray.shutdown()
            _init_ray(address=address, runtime_env={"env_vars": switches})
    except Exception as exc:  # Ray's joining fails in many ways, all of them fatal here
        raise ServerFailedError(f"cannot join the Ray cluster at {address}: {exc}") from exc
    try:
        if serve_runs:
            # Its ports are chosen, and a gRPC service cannot be added to it.
            config = config.model_copy(update={"grpc_port": None, "grpc": False})
        else:
            config = config.model_copy(update={"port": _free_public_port(config)})
            config = config.model_copy(update={"grpc_port": _free_grpc_port(config)})
        yield _deploy(sources, config, choice)
    finally:
        _shut_down(stop_serve=not serve_runs)


def _init_ray(**options: Any) -> None:
    """Start or join Ray; it takes SIGTERM over, and its handler would skip our own end."""
    import ray

    # Ray's reports of its own start are not the user's business; its errors still are raised.
    logging.getLogger("ray").setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def _serve_runs() -> bool:
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _deploy(
    sources: Sequence[PolicySource], config: ServingConfig, choice: EngineChoice
) -> RunningServer:
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.context import _get_global_client

    from serving.deployment import APPLICATION, build_serve_app

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    variables = {
        name: os.environ[name]
        for name in (*environment.REPLICA_VARIABLES, RUNTIME_DIR_VARIABLE)
        if name in os.environ
    }
    try:
        serve.start(
            proxy_location="Disabled" if config.ingress == "direct" else "HeadOnly",
            http_options=HTTPOptions(host=config.host, port=config.port),
            grpc_options=_grpc_options(config),
        )
        serve.run(
            build_serve_app(sources, config, choice.device, variables),
            name=APPLICATION,
            route_prefix="/",
        )
    except Exception as exc:  # Serve raises RuntimeError and whatever its actors raise
        reason = _replica_failure() or _last_line(str(exc))
        raise ServerFailedError(f"Ray Serve did not start: {reason}") from exc
    host, port = config.host, config.port
    if config.ingress != "direct":
        client = _get_global_client()
        assert client is not None  # it raises where there is none
        # A cluster whose Serve runs already has a port of its own.
        host, port = str(client.http_config.host), client.http_config.port
    url = f"http://{_url_host(host)}:{port}"
    _wait_until_ready(url)
    grpc = None if config.grpc_port is None else f"{_url_host(config.host)}:{config.grpc_port}"
    return RunningServer(url, choice, grpc)


def _grpc_options(config: ServingConfig) -> Any:
    """Serve's own gRPC ingress; with direct ingress replicas listen themselves."""
    from ray.serve.config import gRPCOptions

    from serving.dialects.open_inference.grpc_service import SERVICER_FUNCTION

    if config.grpc_port is None or config.ingress == "direct":
        return None
    return gRPCOptions(
        port=config.grpc_port,
        grpc_servicer_functions=[SERVICER_FUNCTION],
        enable_reflection=False,
    )


def _replica_failure() -> str | None:
    """The last line of what a replica's constructor raised, if one did."""
    from ray import serve

    from serving.deployment import APPLICATION

    # Asked while Serve is failing: no answer is better than another error on top.
    with contextlib.suppress(Exception):
        for deployment in serve.status().applications[APPLICATION].deployments.values():
            if "Error" in deployment.message:
                return _last_line(deployment.message)
    return None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "Error" in line] or text.splitlines()
    return lines[-1].strip() if lines else "no reason given"


def _url_host(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + _READY_DEADLINE_S
    pause = threading.Event()
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2.0) as response:
                if response.status == 200:
                    return
        except OSError:
            pass  # not listening yet, or HAProxy without a replica
        pause.wait(0.05)
    raise ServerFailedError(f"{url} did not become ready within {_READY_DEADLINE_S:.0f} s")


def _shut_down(*, stop_serve: bool) -> None:
    import ray
    from ray import serve

    from serving.deployment import APPLICATION

    # Ray prints what its own actors say of being stopped; nobody can act on it.
    silence = io.StringIO()
    with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
        # A cluster that is already gone has nothing left to stop, and what is left of a private
        # one is ended by pid afterwards.
        with contextlib.suppress(Exception):
            if stop_serve:
                serve.shutdown()
            else:
                serve.delete(APPLICATION)
        ray.shutdown()


class StopSignals:
    """SIGINT and SIGTERM as an event; a signal while starting interrupts the start."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._stopped = threading.Event()
        self._is_starting = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._stopped.set()
        if self._is_starting:
            self._is_starting = False
            raise KeyboardInterrupt

    def wait(self) -> None:
        """Wait for a signal, or for Ray's own processes to end.

        Raises:
            ServerFailedError: Ray ended by itself.
        """
        self._is_starting = False
        children = psutil.Process().children()
        essential = [child for child in children if child.name() in ("raylet", "gcs_server")]
        while not self._stopped.wait(1.0):
            for process in essential:
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    raise ServerFailedError(f"Ray's {process.name()} ended by itself")
