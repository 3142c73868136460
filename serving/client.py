"""Clients of a served policy: one for a loop, one for asyncio.

    policy = PolicyClient("http://127.0.0.1:8000/v1/policies/cartpole")
    action = policy.compute_action(observation)

Loads no Ray, no torch and no onnxruntime.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.message
import http.client
import json
import ssl
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any

import httpx

from serving.dialects.native_client import ClientCodec, States, options
from serving.endpoint import Endpoint, with_retry_after
from serving.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    PolicyServingError,
)
from serving.interface import OutputName, PolicyOutput, State

_JSON_HEADERS = {"content-type": "application/json"}


class PolicyClient:
    """A served policy as a `Policy`, over a kept-alive connection per thread.

    Safe for threads. Use it as a context manager, or call `close`.
    """

    # The standard library's HTTP connection: half the time per step of httpx
    # (docs/decisions/0004-client-transport.md).

    def __init__(
        self,
        url: str,
        *,
        policy: str | None = None,
        timeout_s: float = 10.0,
        max_retries: int = 3,
        backoff_s: float = 0.05,
    ) -> None:
        """Store and check; nothing is sent before the first call.

        Args:
            url: `http://HOST:PORT/v1/policies/NAME`; or `http://HOST:PORT` of a server with one
                policy, or together with `policy`.
            policy: The policy's name.
            timeout_s: For connecting and for each answer.
            max_retries: Further attempts after a failed connection or a 503.
            backoff_s: Upper bound of the first pause; it doubles with each attempt.

        Raises:
            UsageError: `url` is not one.
        """
        self._endpoint = Endpoint(url, policy, max_retries, backoff_s)
        self._timeout_s = timeout_s
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._described: ClientCodec | None = None

    def describe(self) -> dict[str, Any]:
        """What the policy expects and returns: the answer of `GET /v1/policies/{policy}`."""
        self._resolve()
        return self._call("GET", self._endpoint.policy_path, None)

    def compute_action(
        self,
        observation: Any,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        timeout_ms: float | None = None,
        state: State | None = None,
        reward: float | None = None,
        action_mask: Any = None,
    ) -> Any:
        """One action for one observation, as the environment takes it.

        A policy with memory needs its state back: see `step`.

        Args:
            observation: As the environment gives it: anything NumPy reads as an array of the
                observation space's shape; a dict for Dict, a tuple for Tuple.
            deterministic: Take the most likely action instead of sampling.
            seed: Makes a sampled action repeatable.
            timeout_ms: The server answers in this time or not at all (`DeadlineExceededError`).
            state: What the policy remembers of this episode; None at its start.
            reward: Of the step before; sent only to a policy that reads it.
            action_mask: (M,) 0/1 or bool, which actions are allowed; None: all.

        Returns:
            A NumPy scalar (Discrete) or array of the action space's dtype; a dict or a tuple of
            them for Dict and Tuple.

        Raises:
            PolicyServingError: The server's own error, or `ConnectionFailedError`.
        """
        action, _ = self.step(
            observation,
            state,
            reward,
            deterministic=deterministic,
            seed=seed,
            timeout_ms=timeout_ms,
            action_mask=action_mask,
        )
        return action

    def step(
        self,
        observation: Any,
        state: State | None = None,
        reward: float | None = None,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        timeout_ms: float | None = None,
        action_mask: Any = None,
    ) -> tuple[Any, State | None]:
        """One action, and what a policy with memory remembers for the next step.

            state, reward = None, None  # an episode's start
            action, state = policy.step(observation, state, reward)

        See `compute_action`; the state is None for a policy without memory.
        """
        codec = self._codec()
        body = codec.body_for_one(
            observation,
            options(deterministic=deterministic, seed=seed, timeout_ms=timeout_ms),
            state=state,
            reward=reward,
            action_mask=action_mask,
        )
        answer = self._call("POST", self._compute_path, body)
        return codec.action(answer), codec.state(answer)

    def compute_actions(
        self,
        observations: Any,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        outputs: Collection[OutputName] = (),
        state: States | None = None,
        rewards: Any = None,
        action_mask: Any = None,
        timeout_ms: float | None = None,
    ) -> PolicyOutput:
        """One action per observation, in one request; see `serving.interface.Policy`."""
        codec = self._codec()
        body = codec.body_for_many(
            observations,
            options(deterministic=deterministic, seed=seed, timeout_ms=timeout_ms, outputs=outputs),
            state=state,
            rewards=rewards,
            action_mask=action_mask,
        )
        return codec.output(self._call("POST", self._compute_path, body))

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer to a `compute_action` request as it stands."""
        self._resolve()
        # The standard encoder: it writes any integer, and NaN, which the server answers in words.
        return self._call("POST", self._compute_path, json.dumps(dict(request)).encode())

    @property
    def policy_url(self) -> str:
        """The policy's whole URL."""
        self._resolve()
        return f"{self._endpoint.origin}{self._endpoint.policy_path}"

    @property
    def _compute_path(self) -> str:
        return f"{self._endpoint.policy_path}/compute_action"

    def _resolve(self) -> None:
        if self._endpoint.policy is None:
            listed = self._call("GET", self._endpoint.list_path, None)
            self._endpoint.policy = self._endpoint.only_policy(listed)

    def _codec(self) -> ClientCodec:
        if self._described is None:
            self._described = ClientCodec(self.describe())
        return self._described

    def _call(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        attempt = 0
        while True:
            try:
                return self._attempt(method, path, body)
            except PolicyServingError as exc:
                pause_s = self._endpoint.pause_s(attempt, exc)
                if pause_s is None:
                    raise
            attempt += 1
            time.sleep(pause_s)

    def _attempt(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        connection = self._connection()
        was_open = connection.sock is not None
        try:
            status, headers, content = self._exchange(connection, method, path, body)
        except TimeoutError as exc:
            connection.close()
            raise DeadlineExceededError(
                f"{self._endpoint.origin} did not answer within {self._timeout_s:g} s"
            ) from exc
        except (OSError, http.client.HTTPException, UnicodeError) as exc:
            connection.close()
            if was_open:
                # The server closed an idle connection, as servers do; that is no failure.
                return self._attempt(method, path, body)
            raise ConnectionFailedError(
                f"no answer from {self._endpoint.origin}: {exc or type(exc).__name__}"
            ) from exc
        try:
            return self._endpoint.read(status, content)
        except PolicyServingError as exc:
            raise with_retry_after(exc, headers.get("retry-after")) from None

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
    ) -> tuple[int, email.message.Message, bytes]:
        # A server that refuses a large body answers and closes before it has read all of it.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, path, body, _JSON_HEADERS if body is not None else {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            endpoint = self._endpoint
            if endpoint.scheme == "https":
                connection = http.client.HTTPSConnection(
                    endpoint.host,
                    endpoint.port,
                    timeout=self._timeout_s,
                    context=ssl.create_default_context(),
                )
            else:
                connection = http.client.HTTPConnection(
                    endpoint.host, endpoint.port, timeout=self._timeout_s
                )
            self._local.connection = connection
            with self._lock:
                self._connections.append(connection)
        return connection

    def close(self) -> None:
        """Close every thread's connection."""
        with self._lock:
            for connection in self._connections:
                connection.close()

    def __enter__(self) -> PolicyClient:
        """The client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class AsyncPolicyClient:
    """A served policy for asyncio: many steps at once over a pool of connections."""

    def __init__(
        self,
        url: str,
        *,
        policy: str | None = None,
        timeout_s: float = 10.0,
        max_retries: int = 3,
        backoff_s: float = 0.05,
        max_connections: int = 64,
    ) -> None:
        """See `PolicyClient`; `max_connections` bounds the pool."""
        self._endpoint = Endpoint(url, policy, max_retries, backoff_s)
        self._timeout_s = timeout_s
        self._described: ClientCodec | None = None
        limits = httpx.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections
        )
        self._http = httpx.AsyncClient(
            base_url=self._endpoint.origin, timeout=timeout_s, limits=limits, trust_env=False
        )

    async def describe(self) -> dict[str, Any]:
        """See `PolicyClient.describe`."""
        await self._resolve()
        return await self._call("GET", self._endpoint.policy_path, None)

    async def compute_action(
        self,
        observation: Any,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        timeout_ms: float | None = None,
        state: State | None = None,
        reward: float | None = None,
        action_mask: Any = None,
    ) -> Any:
        """See `PolicyClient.compute_action`."""
        action, _ = await self.step(
            observation,
            state,
            reward,
            deterministic=deterministic,
            seed=seed,
            timeout_ms=timeout_ms,
            action_mask=action_mask,
        )
        return action

    async def step(
        self,
        observation: Any,
        state: State | None = None,
        reward: float | None = None,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        timeout_ms: float | None = None,
        action_mask: Any = None,
    ) -> tuple[Any, State | None]:
        """See `PolicyClient.step`."""
        codec = await self._codec()
        body = codec.body_for_one(
            observation,
            options(deterministic=deterministic, seed=seed, timeout_ms=timeout_ms),
            state=state,
            reward=reward,
            action_mask=action_mask,
        )
        answer = await self._call("POST", self._compute_path, body)
        return codec.action(answer), codec.state(answer)

    async def compute_actions(
        self,
        observations: Any,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        outputs: Collection[OutputName] = (),
        state: States | None = None,
        rewards: Any = None,
        action_mask: Any = None,
        timeout_ms: float | None = None,
    ) -> PolicyOutput:
        """See `PolicyClient.compute_actions`."""
        codec = await self._codec()
        body = codec.body_for_many(
            observations,
            options(deterministic=deterministic, seed=seed, timeout_ms=timeout_ms, outputs=outputs),
            state=state,
            rewards=rewards,
            action_mask=action_mask,
        )
        return codec.output(await self._call("POST", self._compute_path, body))

    @property
    def _compute_path(self) -> str:
        return f"{self._endpoint.policy_path}/compute_action"

    async def _resolve(self) -> None:
        if self._endpoint.policy is None:
            listed = await self._call("GET", self._endpoint.list_path, None)
            self._endpoint.policy = self._endpoint.only_policy(listed)

    async def _codec(self) -> ClientCodec:
        if self._described is None:
            self._described = ClientCodec(await self.describe())
        return self._described

    async def _call(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        attempt = 0
        while True:
            try:
                return await self._attempt(method, path, body)
            except PolicyServingError as exc:
                pause_s = self._endpoint.pause_s(attempt, exc)
                if pause_s is None:
                    raise
            attempt += 1
            await asyncio.sleep(pause_s)

    async def _attempt(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        headers = _JSON_HEADERS if body is not None else {}
        try:
            response = await self._http.request(method, path, content=body, headers=headers)
        except httpx.TimeoutException as exc:
            raise DeadlineExceededError(
                f"{self._endpoint.origin} did not answer within {self._timeout_s:g} s"
            ) from exc
        except httpx.HTTPError as exc:
            raise ConnectionFailedError(
                f"no answer from {self._endpoint.origin}: {exc or type(exc).__name__}"
            ) from exc
        try:
            return self._endpoint.read(response.status_code, response.content)
        except PolicyServingError as exc:
            raise with_retry_after(exc, response.headers.get("retry-after")) from None

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncPolicyClient:
        """The client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.aclose()
