"""Locust users of a served policy: queries, environment loops, vectorised ones, and the stream.

`policyserve loadtest URL -o DIR` runs this headless. With Locust's own web page:

    locust -f loadtests/locustfile.py --policy-url http://127.0.0.1:8000/v1/policies/cartpole
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import gevent
import orjson
from locust import FastHttpUser, events, task
from locust.env import Environment
from locust.exception import CatchResponseError, StopUser

from loadtests.env_loop import EnvLoop
from loadtests.plan import Protocol
from loadtests.questions import Questions, make_questions
from loadtests.recording import REJECTED, Recorder
from serving.client import PolicyClient
from serving.environments import NamedEnvironment, described_environment
from serving.errors import PolicyServingError
from serving.stream_client import StreamClient

_PROBE_S = 0.01
# Far apart: an environment loop counts its episodes on from its own first seed.
_SEEDS_PER_USER = 1_000_000
_Judge: TypeAlias = Callable[[Mapping[str, Any]], str | None]


@events.init_command_line_parser.add_listener
def add_arguments(parser: ArgumentParser) -> None:
    """Add what this file needs to Locust's own options."""
    group = parser.add_argument_group("policyserve")
    group.add_argument("--policy-url", help="http://HOST:PORT/v1/policies/NAME", default="")
    group.add_argument(
        "--protocol", choices=[each.value for each in Protocol], default="http", help="How to ask"
    )
    group.add_argument("--env-id", help="Environment of the env loops [the policy's own]")
    group.add_argument("--num-envs", type=int, default=8, help="Of a vectorised env loop")
    group.add_argument("--seed", type=int, default=0, help="Of observations and environments")
    group.add_argument("--timeout-s", type=float, default=10.0, help="Of each request")
    group.add_argument("--duration-s", type=float, help="Stop after this many seconds")
    group.add_argument("--recording", help="Write every latency here (.npz)")


class Run:
    """What one load test knows and collects, beside Locust's own statistics."""

    def __init__(self) -> None:
        self.options: Any = None
        self.policy: dict[str, Any] = {}
        self.client: PolicyClient | None = None
        self.questions: Questions | None = None
        self.compute_path = ""
        self.recorder = Recorder()
        self.n_users = 0
        self.started = self.ended = self.cpu = 0.0
        self.is_running = False


RUN = Run()


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Ask the server what the policy expects, once, before any user runs."""
    options = environment.parsed_options
    if options is None or not options.policy_url:
        raise SystemExit("--policy-url is needed: http://HOST:PORT/v1/policies/NAME")
    RUN.options = options
    RUN.client = PolicyClient(
        options.policy_url,
        encoding=Protocol(options.protocol).encoding,
        timeout_s=options.timeout_s,
    )
    _PolicyUser.connection_timeout = _PolicyUser.network_timeout = options.timeout_s
    RUN.policy = RUN.client.describe()
    RUN.questions = make_questions(RUN.client, seed=options.seed)
    origin, slash, path = RUN.client.policy_url.partition("/v1/policies/")
    environment.host = origin
    RUN.compute_path = f"{slash}{path}/compute_action"


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """Start the clock."""
    if RUN.options.duration_s and environment.runner is not None:
        # Locust's own --run-time knows whole seconds only.
        gevent.spawn_later(RUN.options.duration_s, environment.runner.quit)
    RUN.recorder = Recorder()
    RUN.started = time.perf_counter()
    RUN.cpu = time.process_time()
    RUN.is_running = True
    gevent.spawn(_probe)


def _probe() -> None:
    """Measure how late this process comes to what is due, apart from any request."""
    while RUN.is_running:
        due = time.perf_counter() + _PROBE_S
        gevent.sleep(_PROBE_S)
        RUN.recorder.lateness.append(max(0.0, time.perf_counter() - due))


@events.request.add_listener
def count(
    name: str = "",
    response_time: float | None = None,
    exception: BaseException | None = None,
    context: dict[str, Any] | None = None,
    **_: Any,
) -> None:
    """Keep exact latencies: Locust rounds its own to whole milliseconds."""
    if not RUN.is_running:
        return
    latency = (response_time or 0.0) / 1e3
    due = time.perf_counter() - latency
    group = RUN.recorder.group(name)
    if exception is None:
        n_observations = (context or {}).get("n_observations", 1)
        RUN.recorder.ok(due, latency, group=group, n_observations=n_observations)
        return
    problem = str(exception)
    if not isinstance(exception, CatchResponseError):
        problem = f"{type(exception).__name__}: {problem}"
    RUN.recorder.failed(due, latency, problem, group=group)


@events.test_stopping.add_listener
def end(**_: Any) -> None:
    """Stop the clock: Locust breaks off what is on its way, which says nothing of the server."""
    RUN.is_running = False
    RUN.ended = time.perf_counter()
    RUN.cpu = time.process_time() - RUN.cpu


@events.test_stop.add_listener
def finish(**_: Any) -> None:
    """Write what was recorded."""
    if RUN.options.recording:
        RUN.recorder.save(
            Path(RUN.options.recording),
            started=RUN.started,
            ended=RUN.ended,
            cpu_percent=100.0 * RUN.cpu / (RUN.ended - RUN.started),
            n_connections=RUN.n_users,
            n_retries=0,
        )


@events.quitting.add_listener
def close(**_: Any) -> None:
    """Leave the server."""
    if RUN.client is not None:
        RUN.client.close()


class _PolicyUser(FastHttpUser):
    """Asks over HTTP, or over a stream of its own where `--protocol ws` says so."""

    abstract = True

    def on_start(self) -> None:
        """Count the users."""
        self.number = RUN.n_users
        RUN.n_users += 1
        self._stream: StreamClient | None = None
        if self.protocol is Protocol.ws:
            self._stream = StreamClient(
                RUN.options.policy_url, timeout_s=RUN.options.timeout_s, max_retries=0
            )
            self._stream.dialect()

    def on_stop(self) -> None:
        """Close the stream."""
        if self._stream is not None:
            self._stream.close()

    @property
    def protocol(self) -> Protocol:
        """How this user asks."""
        return Protocol(RUN.options.protocol)

    def ask(self, body: bytes, name: str, judge: _Judge, *, n: int = 1) -> bool:
        """Whether a right answer came; Locust counts it either way.

        Args:
            body: The request.
            name: What Locust calls it.
            judge: Says what is wrong with an answer.
            n: Observations in the request.
        """
        context = {"n_observations": n}
        if self._stream is not None:
            return self._ask_stream(self._stream, body, name, judge, context)
        assert RUN.client is not None
        dialect = RUN.client.dialect()
        with self.client.post(
            RUN.compute_path,
            data=cast(Any, body),
            headers={"content-type": dialect.content_type},
            name=name,
            catch_response=True,
            context=context,
        ) as response:
            content = response.content or b""
            if response.status_code == 503:
                problem: str | None = REJECTED
            elif response.status_code != 200:
                problem = str(response.error or f"HTTP {response.status_code}: {_code(content)}")
            else:
                problem = _problem(dialect.read(content), judge)
            if problem is not None:
                response.failure(problem)
        return problem is None

    def _ask_stream(
        self,
        stream: StreamClient,
        body: bytes,
        name: str,
        judge: _Judge,
        context: dict[str, Any],
    ) -> bool:
        started = time.perf_counter()
        try:
            answer: Any = stream.exchange(body)
        except PolicyServingError as exc:
            answer = exc
        elapsed = time.perf_counter() - started
        if isinstance(answer, PolicyServingError):
            is_rejected = answer.http_status == 503
            problem = REJECTED if is_rejected else f"{answer.code}: {answer.message}"
        else:
            problem = _problem(answer, judge) or ""
        self.environment.events.request.fire(
            request_type="WS",
            name=name,
            response_time=elapsed * 1e3,
            response_length=0,
            exception=CatchResponseError(problem) if problem else None,
            context=context,
        )
        return not problem


def _problem(answer: Any, judge: _Judge) -> str | None:
    if not isinstance(answer, Mapping):
        return "the answer cannot be read"
    if answer.get("policy_id") != RUN.policy["policy_id"]:
        return f"answered by the policy {answer.get('policy_id')}"
    return judge(answer)


def _code(content: bytes) -> str:
    try:
        return str(orjson.loads(content)["code"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return repr(content[:80])


class ActionUser(_PolicyUser):
    """Asks for actions for made-up observations, one after the other."""

    def on_start(self) -> None:
        """Begin somewhere in the list."""
        super().on_start()
        self._next = self.number * 7

    @task
    def query(self) -> None:
        """One query."""
        questions = RUN.questions
        assert questions is not None
        self._next = number = (self._next + 1) % len(questions)
        self.ask(
            questions.bodies[number],
            "action query",
            lambda answer: questions.problem_of(number, answer),
        )


class EnvLoopUser(_PolicyUser):
    """Steps a real environment with served actions, and reports the episodes' returns."""

    step_name = "env step"
    is_batch = False

    def n_envs(self) -> int:
        """Environments of this user."""
        return 1

    def on_start(self) -> None:
        """Make the environments."""
        super().on_start()
        asked = RUN.options.env_id
        named = NamedEnvironment(asked, {}) if asked else described_environment(RUN.policy)
        if named is None:
            raise StopUser("the policy names no environment; give --env-id")
        assert RUN.client is not None
        self._loop = EnvLoop(
            [named.make() for _ in range(self.n_envs())],
            RUN.client.dialect() if self._stream is None else self._stream.dialect(),
            RUN.recorder,
            first_seed=RUN.options.seed + self.number * _SEEDS_PER_USER,
            is_batch=self.is_batch,
        )

    def on_stop(self) -> None:
        """Close them."""
        super().on_stop()
        self._loop.close()

    @task
    def step(self) -> None:
        """One step; a new episode after the last."""
        loop = self._loop
        if self.ask(loop.request(), self.step_name, loop.take, n=loop.n_envs):
            loop.step()


class VectorEnvLoopUser(EnvLoopUser):
    """Steps `--num-envs` environments with one request for all of them."""

    step_name = "vector env step"
    is_batch = True

    def n_envs(self) -> int:
        """See `EnvLoopUser`."""
        return int(RUN.options.num_envs)


class StreamUser(EnvLoopUser):
    """Steps a real environment over a WebSocket, whatever `--protocol` says."""

    step_name = "stream step"

    @property
    def protocol(self) -> Protocol:
        """See `_PolicyUser`."""
        return Protocol.ws
