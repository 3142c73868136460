"""Run the steps of a load test: the driver in its own process, the server watched meanwhile."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadtests.commands import installed, stop
from loadtests.errors import LoadTestError
from loadtests.plan import Kind, LoadPlan, Protocol
from loadtests.recording import Recording, read_recording
from loadtests.server_facts import ServerSamples, ServerWatch

_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
# Beside the load itself: starting, asking each question once, the last answers, writing.
_MARGIN_S = 120.0
_MAX_INTERVAL_S = 5.0
_MIN_INTERVAL_S = 0.25
_N_SAMPLES = 400


@dataclass(frozen=True)
class Step:
    """What one step was to do, and what happened.

    Attributes:
        plan: Of this step.
        recording: Every request.
        samples: The server's CPU and memory.
    """

    plan: LoadPlan
    recording: Recording
    samples: ServerSamples


def run_step(plan: LoadPlan) -> Step:
    """Load a server as planned.

    Raises:
        LoadTestError: The driver itself failed, or could not even begin.
    """
    parts = urlsplit(plan.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    interval_s = min(_MAX_INTERVAL_S, max(_MIN_INTERVAL_S, plan.duration_s / _N_SAMPLES))
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "recording.npz"
        with ServerWatch(parts.hostname or "", port, interval_s=interval_s) as watch:
            _run_driver(plan, output)
        return Step(plan, read_recording(output), watch.samples)


def _run_driver(plan: LoadPlan, output: Path) -> None:
    is_locust = plan.kind is not Kind.queries
    command = _locust(plan, output) if is_locust else _own_driver(plan, output)
    name = "Locust" if is_locust else "the driver"
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # `python -m` looks into the current directory first, where a user's own files may have
        # the names of a library's. Locust needs that directory: environments can lie there.
        cwd=None if is_locust else Path(__file__).parent.parent,
    ) as process:
        try:
            said, _ = process.communicate(timeout=plan.duration_s + 3 * plan.timeout_s + _MARGIN_S)
        except subprocess.TimeoutExpired:
            raise LoadTestError(f"{name} did not end") from None
        finally:
            stop(process)
    if process.returncode != 0 or not output.is_file():
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        raise LoadTestError(
            last[0]
            if process.returncode == 1
            else f"{name} ended with {process.returncode}: {last[0]}"
        )


def _own_driver(plan: LoadPlan, output: Path) -> list[str]:
    return [sys.executable, "-m", "loadtests.driver", plan.to_json(), str(output)]


def _locust(plan: LoadPlan, output: Path) -> list[str]:
    arguments: dict[str, Any] = {
        "-f": _LOCUSTFILE,
        "--users": plan.users,
        "--spawn-rate": plan.users,
        "--duration-s": plan.duration_s,
        "--policy-url": plan.url,
        "--protocol": plan.protocol.value,
        "--num-envs": plan.num_envs,
        "--timeout-s": plan.timeout_s,
        "--seed": plan.seed,
        "--recording": output,
        "--loglevel": "WARNING",
        "--exit-code-on-error": 0,
    }
    if plan.env:
        arguments["--env-id"] = plan.env
    flat = [str(part) for pair in arguments.items() for part in pair]
    return [*installed("locust"), "--headless", "--only-summary", *flat, *_users(plan)]


def _users(plan: LoadPlan) -> Sequence[str]:
    env_loop = "StreamUser" if plan.protocol is Protocol.ws else "EnvLoopUser"
    return {
        Kind.env_loops: [env_loop],
        Kind.vector_env_loops: ["VectorEnvLoopUser"],
        Kind.both: ["ActionUser", env_loop],
    }[plan.kind]
