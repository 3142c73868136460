"""Locust users of a served policy: plain action queries, and real environment loops.

`policyserve loadtest URL -o DIR` runs this headless. With Locust's own web page:

    locust -f loadtests/locustfile.py --policy-url http://127.0.0.1:8000/v1/policies/cartpole
"""

from __future__ import annotations

import json
import platform
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import gevent
import gymnasium as gym
import numpy as np
import orjson
import psutil
from locust import FastHttpUser, constant_throughput, events, task
from locust.env import Environment
from locust.exception import StopUser

from serving.client import PolicyClient
from serving.rollout import make_env, policy_environment
from serving.schemas import example_observation

# A driver above this share of one core waits for itself, not for the server; likewise a machine
# above this share of all its cores.
LIMIT_PERCENT = 90.0
_JSON = {"content-type": "application/json"}
_N_OBSERVATIONS = 256


@events.init_command_line_parser.add_listener
def add_arguments(parser: ArgumentParser) -> None:
    """Add what this file needs to Locust's own options."""
    group = parser.add_argument_group("policyserve")
    group.add_argument("--policy-url", help="http://HOST:PORT/v1/policies/NAME", default="")
    group.add_argument("--env-id", help="Environment of the env loops [the policy's own]")
    group.add_argument("--rate", type=float, help="Requests/s of all users together [unlimited]")
    group.add_argument("--seed", type=int, default=0, help="Of observations and environments")
    group.add_argument("--duration-s", type=float, help="Stop after this many seconds")
    group.add_argument("--summary", help="Write summary.json here")


class Run:
    """What one load test knows and collects, beside Locust's own statistics."""

    def __init__(self) -> None:
        self.policy: dict[str, Any] = {}
        self.compute_path = ""
        self.env_id: str | None = None
        self.env_kwargs: dict[str, Any] = {}
        self.observations: list[bytes] = []
        self.action_space: dict[str, Any] = {}
        self.latencies_ms: list[float] = []
        self.returns: list[float] = []
        self.n_errors = 0
        self.errors: dict[str, int] = {}
        self.n_users = 0
        self.started = 0.0
        self.duration_s = 0.0
        self.driver = psutil.Process()
        self.driver_cpu_percent = 0.0
        self.machine_cpu_percent = 0.0
        self.period_s: float | None = None


RUN = Run()


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Ask the server what the policy expects, once, before any user runs."""
    options = environment.parsed_options
    if options is None or not options.policy_url:
        raise SystemExit("--policy-url is needed: http://HOST:PORT/v1/policies/NAME")
    with PolicyClient(options.policy_url) as client:
        RUN.policy = client.describe()
    parts = urlsplit(options.policy_url)
    environment.host = f"{parts.scheme}://{parts.netloc}"
    RUN.compute_path = f"{parts.path.rstrip('/')}/compute_action"
    RUN.env_id, RUN.env_kwargs = policy_environment(RUN.policy, options.env_id)
    RUN.action_space = RUN.policy["action_space"]
    space = RUN.policy["observation_space"]
    rng = np.random.default_rng(options.seed)
    RUN.observations = [
        _body({"observation": example_observation(space, rng)}) for _ in range(_N_OBSERVATIONS)
    ]
    if options.rate:
        RUN.period_s = options.num_users / options.rate


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """Start the clock and the driver's own CPU count."""
    options = environment.parsed_options
    if options is not None and options.duration_s and environment.runner is not None:
        # Locust's own --run-time knows whole seconds only.
        gevent.spawn_later(options.duration_s, environment.runner.quit)
    RUN.started = time.perf_counter()
    RUN.driver.cpu_percent()
    psutil.cpu_percent()


@events.request.add_listener
def count(
    response_time: float | None = None, exception: BaseException | None = None, **_: Any
) -> None:
    """Keep exact latencies: Locust rounds its own to whole milliseconds."""
    if exception is not None:
        RUN.n_errors += 1
        name = f"{type(exception).__name__}: {exception}"[:200]
        RUN.errors[name] = RUN.errors.get(name, 0) + 1
    elif response_time is not None:
        RUN.latencies_ms.append(response_time)


@events.test_stop.add_listener
def finish(environment: Environment, **_: Any) -> None:
    """Write the summary."""
    RUN.duration_s = time.perf_counter() - RUN.started
    RUN.driver_cpu_percent = RUN.driver.cpu_percent()
    RUN.machine_cpu_percent = psutil.cpu_percent()
    options = environment.parsed_options
    if options is not None and options.summary:
        path = Path(options.summary)
        path.write_text(json.dumps(summary(options.num_users), indent=2) + "\n")


def summary(n_users: int) -> dict[str, Any]:
    """The figures of the run; durations in milliseconds, rates per second."""
    latencies = np.array(RUN.latencies_ms or [np.nan])
    p50, p95, p99, p999 = np.percentile(latencies, [50, 95, 99, 99.9])
    n_requests = len(RUN.latencies_ms) + RUN.n_errors
    known = bool(RUN.latencies_ms)
    figures: dict[str, Any] = {
        "requests_per_s": len(RUN.latencies_ms) / RUN.duration_s if RUN.duration_s else 0.0,
        "p50_ms": float(p50) if known else None,
        "p95_ms": float(p95) if known else None,
        "p99_ms": float(p99) if known else None,
        "p999_ms": float(p999) if known else None,
        "n_requests": n_requests,
        "n_errors": RUN.n_errors,
        "errors": RUN.errors,
        "duration_s": RUN.duration_s,
        "users": n_users,
        "loop": "closed" if RUN.period_s is None else "closed, paced",
        "driver_cpu_percent": RUN.driver_cpu_percent,
        "driver_was_limit": RUN.driver_cpu_percent > LIMIT_PERCENT,
        "machine_cpu_percent": RUN.machine_cpu_percent,
        "machine_was_limit": RUN.machine_cpu_percent > LIMIT_PERCENT,
        "n_episodes": len(RUN.returns),
        "policy": {key: RUN.policy.get(key) for key in ("policy", "version", "policy_id")},
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(),
            "python": platform.python_version(),
        },
    }
    if RUN.returns:
        figures["mean_return"] = float(np.mean(RUN.returns))
        figures["std_return"] = float(np.std(RUN.returns))
    return figures


def _body(request: dict[str, Any]) -> bytes:
    return orjson.dumps(request, option=orjson.OPT_SERIALIZE_NUMPY)


def _sendable(observation: Any) -> Any:
    """As the encoder takes it: it knows arrays with axes, and no others."""
    if isinstance(observation, dict):
        return {key: _sendable(each) for key, each in observation.items()}
    if isinstance(observation, tuple):
        return [_sendable(each) for each in observation]
    array = np.asarray(observation)
    return np.ascontiguousarray(array) if array.ndim else array.item()


class _PolicyUser(FastHttpUser):
    abstract = True
    connection_timeout = 10.0
    network_timeout = 10.0

    def wait_time(self) -> float:
        """No pause, or what keeps the asked rate."""
        if RUN.period_s is None:
            return 0.0
        return float(constant_throughput(1.0 / RUN.period_s)(self))

    def ask(self, body: bytes, name: str) -> Any:
        """One answer; None after an error, which Locust has counted."""
        with self.client.post(
            RUN.compute_path, data=cast(Any, body), headers=_JSON, name=name, catch_response=True
        ) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}: {_detail(response.content)}")
                return None
            answer = orjson.loads(response.content)
            problem = _wrong(answer)
            if problem:
                response.failure(problem)
                return None
            return answer


def _detail(content: bytes | None) -> str:
    try:
        return str(orjson.loads(content or b"")["code"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return repr((content or b"")[:80])


def _wrong(answer: Any) -> str | None:
    """What is wrong with an answer's content: a fast wrong answer is an error too."""
    if answer.get("policy_id") != RUN.policy["policy_id"]:
        return f"answered by the policy {answer.get('policy_id')}"
    action = answer.get("action")
    if action is None:
        return "there is no action in the answer"
    if RUN.action_space["type"] == "Discrete":
        first = RUN.action_space["start"]
        end = first + RUN.action_space["n"]
        if not (isinstance(action, int) and first <= action < end):
            return f"the action {action!r} is outside {first}..{end - 1}"
    return None


def _action(value: Any, space: gym.Space[Any]) -> Any:
    """An action as the environment takes it."""
    if isinstance(space, gym.spaces.Dict):
        return {key: _action(value[key], child) for key, child in space.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(_action(each, child) for each, child in zip(value, space, strict=True))
    return np.asarray(value, dtype=space.dtype)[()]


class ActionUser(_PolicyUser):
    """Asks for actions for made-up observations, one after the other."""

    def on_start(self) -> None:
        """Begin somewhere in the list."""
        self._next = id(self) % len(RUN.observations)

    @task
    def query(self) -> None:
        """One query."""
        self._next = (self._next + 1) % len(RUN.observations)
        self.ask(RUN.observations[self._next], "action query")


class EnvLoopUser(_PolicyUser):
    """Steps a real environment with served actions, and reports the episodes' returns."""

    def on_start(self) -> None:
        """Make the environment."""
        if RUN.env_id is None:
            raise StopUser("the policy names no environment; give --env-id")
        self._env = make_env(RUN.env_id, **RUN.env_kwargs)
        self._reset()

    def on_stop(self) -> None:
        """Close it."""
        self._env.close()

    def _reset(self) -> None:
        RUN.n_users += 1
        self._observation, _ = self._env.reset(seed=RUN.n_users)
        self._return = 0.0
        # What the answer and the step before leave to the next request.
        self._memory: dict[str, Any] = {}

    @task
    def step(self) -> None:
        """One step; a new episode after the last."""
        body = _body({"observation": _sendable(self._observation), **self._memory})
        answer = self.ask(body, "env step")
        if answer is None:
            return
        action = _action(answer["action"], self._env.action_space)
        self._observation, reward, terminated, truncated, _ = self._env.step(action)
        self._return += float(reward)
        if "state" in answer:
            self._memory["state"] = answer["state"]
        if RUN.policy["takes"]["reward"]:
            self._memory["reward"] = float(reward)
        if terminated or truncated:
            RUN.returns.append(self._return)
            self._reset()
