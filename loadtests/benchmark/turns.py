"""One server's turn: start it, see that it answers right, measure every load, end it."""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from loadtests.benchmark import processes
from loadtests.benchmark.bodies import (
    MSGPACK,
    json_action,
    json_body,
    msgpack_actions,
    msgpack_body,
)
from loadtests.benchmark.client_driver import drive_client
from loadtests.benchmark.environments import prepare_environment
from loadtests.benchmark.http_driver import Requests, drive_http
from loadtests.benchmark.policy import ServedPolicy
from loadtests.benchmark.results import DriverResult, Measurement, Turn
from loadtests.benchmark.stream_driver import Messages, drive_stream
from loadtests.benchmark.targets import CONSTANT, JSON_LOADS, Load, Target
from loadtests.benchmark.usage import measure_usage, shares
from loadtests.commands import installed, run
from loadtests.errors import LoadTestError

PEERS = Path(__file__).parents[1] / "peers"
_READY_S = 120.0
_WARM_UP_S = 1.0
_ASK_TIMEOUT_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Workshop:
    """What every turn works with.

    Attributes:
        policy: What is served.
        directory: Where environments, logs and the servers' home are.
        duration_s: Of each measurement.
        quiet_s: How long to wait for a quiet machine before a turn.
    """

    policy: ServedPolicy
    directory: Path
    duration_s: float
    quiet_s: float

    def command(self, target: Target) -> tuple[list[str], int]:
        """What starts a target, and the port it will answer on.

        Raises:
            LoadTestError: Its environment cannot be made.
        """
        python = sys.executable
        if target.environment is not None:
            python = str(prepare_environment(target.environment, self.directory / "environments"))
        ports = processes.free_ports(3)
        values = {
            "python": python,
            "peers": str(PEERS),
            "model": str(self.policy.model.resolve()),
            "bundle": str(self.policy.bundle.resolve()),
            "checkpoint": str(self.policy.checkpoint.resolve()),
            "port": str(ports[0]),
            "port2": str(ports[1]),
            "port3": str(ports[2]),
        }
        first, *rest = target.command
        program = installed("policyserve") if first == "{policyserve}" else [first]
        return [part.format(**values) for part in (*program, *rest)], ports[0]


def take_turn(target: Target, workshop: Workshop, note: Callable[[str], None]) -> Turn:
    """Measure a target once, under all its loads.

    Args:
        target: Which.
        workshop: What to work with.
        note: Told of each result.
    """
    home = workshop.directory / "home"
    home.mkdir(parents=True, exist_ok=True)
    turn = Turn()
    try:
        command, port = workshop.command(target)
        turn.was_quiet = processes.wait_until_quiet(workshop.quiet_s)
        log = workshop.directory / f"{target.key}.log"
        began = time.monotonic()
        with processes.running(command, home, log) as server:
            _wait_until_ready(target, workshop.policy, port, server)
            turn.start_s = time.monotonic() - began
            _check_actions(target, workshop.policy, port)
            _warm_up(target, workshop, port)
            for load in target.loads:
                measurement = _measure(target, load, workshop, port, server)
                turn.loads[load.key] = measurement
                note(_line(load, measurement))
            members = server.members()
            turn.memory_mib = processes.memory_mib(members)
            turn.replica_mib = processes.replica_mib(members)
    except LoadTestError as exc:
        turn.problem = exc.message
        note(f"not measured: {exc.message}")
    return turn


def time_steps(policy: ServedPolicy) -> dict[str, dict[str, float]]:
    """Microseconds of the steps of a request that need no socket.

    Raises:
        LoadTestError: They could not be timed.
    """
    files = [str(policy.bundle), str(policy.model)]
    done = run([sys.executable, "-m", "loadtests.ladder.in_process", *files], capture=True)
    if done.returncode != 0:
        raise LoadTestError(f"the steps could not be timed: {done.stdout.strip()[-300:]}")
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- asking once ---


def _post(port: int, path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """One answer.

    Raises:
        LoadTestError: There is none, or its status is not 200.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ASK_TIMEOUT_S)
    try:
        connection.request("POST", path, body, {"content-type": content_type})
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise LoadTestError(f"no answer: {exc or type(exc).__name__}") from exc
    finally:
        connection.close()
    if response.status != 200:
        raise LoadTestError(f"answered {response.status}: {answer[:200]!r}")
    return answer


def _ask(target: Target, policy: ServedPolicy, port: int, index: int) -> int:
    """One action."""
    body = json_body(policy.answers.observations[index], target.style)
    try:
        return json_action(_post(port, target.path, body), target.style)
    except ValueError as exc:
        raise LoadTestError(str(exc)) from exc


def _wait_until_ready(
    target: Target, policy: ServedPolicy, port: int, server: processes.ServerProcess
) -> None:
    deadline = time.monotonic() + _READY_S
    while True:
        server.check()
        try:
            _ask(target, policy, port, 0)
            return
        except LoadTestError as exc:
            if time.monotonic() > deadline:
                raise LoadTestError(
                    f"no action within {_READY_S:.0f} s: {exc.message}; "
                    f"its last words: {server.last_line()}"
                ) from exc
            server.wait(_POLL_S)


def _check_actions(target: Target, policy: ServedPolicy, port: int) -> None:
    """Raise unless the server answers what ONNX Runtime itself does."""
    answers = policy.answers
    for index, expected in enumerate(answers.actions):
        action = _ask(target, policy, port, index)
        if action != expected and target.key != CONSTANT:
            raise LoadTestError(
                f"the action {action} for {answers.observations[index]} is not ONNX Runtime's "
                f"own, {expected}"
            )


# --- loading ---


def _warm_up(target: Target, workshop: Workshop, port: int) -> None:
    load = JSON_LOADS[-2]
    _drive(target, load, replace(workshop, duration_s=_WARM_UP_S), port)


def _measure(
    target: Target,
    load: Load,
    workshop: Workshop,
    port: int,
    server: processes.ServerProcess,
) -> Measurement:
    members = server.members()
    before = measure_usage(members)
    try:
        result = _drive(target, load, workshop, port)
    except LoadTestError as exc:
        server.check()
        return Measurement(None, problem=exc.message)
    used = shares(before, measure_usage(members))
    return Measurement(result, used.driver, used.server, used.other)


def _drive(target: Target, load: Load, workshop: Workshop, port: int) -> DriverResult:
    origin = f"http://127.0.0.1:{port}"
    answers, duration_s = workshop.policy.answers, workshop.duration_s
    if load.kind == "client":
        url = origin + target.path.rpartition("/")[0]
        return drive_client(url, answers.observations, answers.actions, duration_s=duration_s)
    if load.kind == "stream":
        messages = _messages(target, load, workshop.policy, origin)
        return drive_stream(
            messages, connections=load.connections, depth=load.depth, duration_s=duration_s
        )
    requests = Requests(
        origin + target.path,
        [json_body(observation, target.style) for observation in answers.observations],
    )
    if load.kind == "binary":
        requests = _binary_requests(requests.url, workshop.policy, port, target.path)
    return drive_http(requests, connections=load.connections, duration_s=duration_s)


def _binary_requests(url: str, policy: ServedPolicy, port: int, path: str) -> Requests:
    bodies = [msgpack_body([observation]) for observation in policy.answers.observations]
    for body, action in zip(bodies, policy.answers.actions, strict=True):
        try:
            found = msgpack_actions(_post(port, path, body, MSGPACK), 1)
        except ValueError as exc:
            raise LoadTestError(str(exc)) from exc
        if found != [action]:
            raise LoadTestError("the binary answer's action is not ONNX Runtime's own")
    return Requests(url, bodies, MSGPACK)


def _messages(target: Target, load: Load, policy: ServedPolicy, origin: str) -> Messages:
    answers = policy.answers
    n = len(answers.observations)
    # Message i begins with observation i, so that the connections do not ask the same.
    picked = [[(index + row) % n for row in range(load.batch)] for index in range(n)]
    return Messages(
        origin + (target.stream or target.path),
        [msgpack_body([answers.observations[each] for each in rows]) for rows in picked],
        None if target.is_echo else [[answers.actions[each] for each in rows] for rows in picked],
        has_greeting=not target.is_echo,
    )


def _line(load: Load, measurement: Measurement) -> str:
    result = measurement.result
    if result is None:
        return f"{load.key}: {measurement.problem}"
    bound = ", the driver was the limit" if measurement.is_driver_bound else ""
    return (
        f"{load.key}: {result.requests_per_s:,.0f} requests/s, p50 {result.p50_ms or 0:.3f} ms, "
        f"p99 {result.p99_ms or 0:.3f} ms, {result.n_errors} errors; cores: driver "
        f"{measurement.driver_cores:.2f}, server {measurement.server_cores:.2f}, others "
        f"{measurement.other_cores:.2f}{bound}"
    )
