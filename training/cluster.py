"""Ray for one training run: a cluster of its own, or the one that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.node import Node

from training.errors import TrainingError
from training.private_directory import private_directory

logger = logging.getLogger("policyserve.training")

# Ray keeps this much shared memory for objects; weights and batches of vector policies are small.
_OBJECT_STORE_BYTES = 256 * 2**20
_RAY_DIRECTORY = "r"
# The dashboard's server (it starts without a dashboard too), the autoscaler, and what would bring
# workers' output here (`log_to_driver` is off): nothing for one run on one machine.
_UNUSED_SERVICES = ("start_api_server", "start_monitor", "start_log_monitor")


@contextmanager
def ray_cluster(*, n_workers: int, n_gpus: int) -> Iterator[None]:
    """Start Ray, or join the cluster of RAY_ADDRESS, and leave it at the end.

    A cluster of our own is apart from any other on this machine: its own ports, its own
    directory, deleted at the end. Its switches are those of `set_ray_environment`.

    Args:
        n_workers: Processes beside the training process, one CPU each.
        n_gpus: GPUs that the training process uses.

    Raises:
        TrainingError: Ray did not start or could not be joined.
    """
    if os.environ.get("RAY_ADDRESS"):
        _init(address=os.environ["RAY_ADDRESS"])
        try:
            yield
        finally:
            ray.shutdown()
        return
    with private_directory() as directory:
        try:
            with _fewer_services():
                _init(
                    address="local",
                    num_cpus=n_workers + 1,
                    num_gpus=n_gpus,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    # Ray opens its directory to every user of the machine: inside ours, which stays
                    # closed, that opens nothing.
                    _temp_dir=str(directory / _RAY_DIRECTORY),
                )
            yield
        except Exception:
            _keep_worker_tracebacks(directory / _RAY_DIRECTORY)
            raise
        finally:
            ray.shutdown()


@contextmanager
def _fewer_services() -> Iterator[None]:
    # Half of the time that `ray.init` takes goes into these, which have no switch. A Ray that
    # doesn't know one of them starts whatever it starts instead.
    started = {name: getattr(Node, name) for name in _UNUSED_SERVICES if hasattr(Node, name)}

    def start_nothing(*_: Any, **__: Any) -> None:
        return None

    for name in started:
        setattr(Node, name, start_nothing)
    try:
        yield
    finally:
        for name, start in started.items():
            setattr(Node, name, start)


def _keep_worker_tracebacks(directory: Path) -> None:
    # RLlib ends an environment runner that raised; what it raised stands in its own log alone.
    for path in sorted(directory.glob("session_latest/logs/worker*.err")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if "Traceback" in text:
            logger.error("from a worker process:\n%s", text)


def _init(**arguments: Any) -> None:
    # Ray takes SIGTERM over, and would exit before the last checkpoint.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **arguments)
    except Exception as exc:
        reason = f"{exc}".strip().splitlines()[0] if f"{exc}".strip() else type(exc).__name__
        raise TrainingError(f"Ray could not be started or joined: {reason}") from exc
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
