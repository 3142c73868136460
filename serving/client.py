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
import random
import ssl
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray

from serving.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    InvalidObservationError,
    PolicyServingError,
    UnexpectedAnswerError,
    UnknownPolicyError,
    UsageError,
    from_problem,
)
from serving.interface import OutputName, PolicyOutput
from serving.spaces import Space, space_from_json

_POLICIES = "/v1/policies"
_JSON_HEADERS = {"content-type": "application/json"}
_MAX_BACKOFF_S = 2.0


class _Endpoint:
    """What both clients share: the address, building bodies, reading answers, when to retry."""

    def __init__(self, url: str, policy: str | None, max_retries: int, backoff_s: float) -> None:
        expected = "expected http://HOST:PORT/v1/policies/NAME"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as exc:
            raise UsageError(f"{url!r} is no URL: {exc}; {expected}") from exc
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no URL of a served policy; {expected}")
        self.scheme = parts.scheme
        self.host = parts.hostname
        self.port = port or (443 if parts.scheme == "https" else 80)
        self.prefix, _, name = parts.path.rstrip("/").partition(_POLICIES)
        name = unquote(name.strip("/"))
        if "/" in name:
            raise UsageError(f"{url!r}: {name!r} is no policy's name; give the policy's URL")
        self.policy = policy or name or None
        self.max_retries = max_retries
        self._backoff_s = backoff_s

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def policy_path(self) -> str:
        """The policy's path."""
        return f"{self.prefix}{_POLICIES}/{quote(self.policy or '', safe='')}"

    @property
    def list_path(self) -> str:
        """The path of the list of policies."""
        return f"{self.prefix}{_POLICIES}"

    def only_policy(self, listed: Mapping[str, Any]) -> str:
        """The name of the one policy that a server has."""
        names = [entry["policy"] for entry in _member(listed, "policies")]
        if len(names) != 1:
            raise UnknownPolicyError(
                f"{self.origin} serves {', '.join(names) or 'nothing'}; name one: "
                f"{self.origin}{_POLICIES}/NAME"
            )
        return str(names[0])

    def read(self, status: int, body: bytes) -> dict[str, Any]:
        """The answer's object, or the server's error raised."""
        try:
            content = orjson.loads(body)
        except orjson.JSONDecodeError:
            content = None
        if status != 200:
            if not isinstance(content, dict):
                content = {"detail": _quoted(status, body)}
            raise from_problem(content, status)
        if not isinstance(content, dict):
            raise UnexpectedAnswerError(
                f"{self.origin} is no policy server: {_quoted(status, body)}"
            )
        return content

    def pause_s(self, attempt: int, error: PolicyServingError) -> float | None:
        """How long to wait before the next attempt; None: give up.

        Full jitter (a uniform draw up to a doubling bound), so that clients that failed together
        do not come back together; never less than the server's `Retry-After`.
        """
        if not error.retryable or isinstance(error, DeadlineExceededError):
            return None
        if attempt >= self.max_retries:
            return None
        bound = min(_MAX_BACKOFF_S, self._backoff_s * 2.0**attempt)
        return max(random.uniform(0.0, bound), float(error.details.get("retry_after_s", 0.0)))


def _quoted(status: int, body: bytes) -> str:
    return f"it answered {status} with {body[:200].decode('utf-8', 'replace')!r}"


def _member(answer: Mapping[str, Any], name: str) -> Any:
    if name not in answer:
        raise UnexpectedAnswerError(
            f"found no `{name}` in the answer, which has {', '.join(answer) or 'nothing'}; is this "
            "a policy server?"
        )
    return answer[name]


def _array(value: Any, dtype: str) -> NDArray[Any]:
    try:
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError) as exc:
        raise UnexpectedAnswerError(f"found {value!r} in the answer, expected {dtype}") from exc


def _sendable(value: NDArray[Any], pointer: str) -> NDArray[Any]:
    """The array as the encoder takes it: contiguous, native byte order, at most 64 bits."""
    if value.dtype.kind not in "fiub" or not np.isfinite(value).all():
        # JSON has no NaN and no infinity, so this cannot be left to the server to say.
        raise InvalidObservationError(
            f"found {value.dtype} values that are not all finite numbers", pointer=pointer
        )
    dtype = value.dtype.newbyteorder("=")
    if dtype.kind == "f" and dtype.itemsize not in (4, 8):
        dtype = np.dtype(np.float64)
    return np.ascontiguousarray(value, dtype=dtype).reshape(value.shape)


def _request_body(
    key: str,
    value: NDArray[Any],
    deterministic: bool,
    seed: int | None,
    timeout_ms: float | None,
    outputs: Collection[OutputName],
) -> bytes:
    body: dict[str, Any] = {key: _sendable(value, f"/{key}")}
    if not deterministic:
        body["deterministic"] = False
        if seed is not None:
            body["seed"] = seed
    if timeout_ms is not None:
        body["timeout_ms"] = timeout_ms
    if outputs:
        body["outputs"] = sorted(outputs)
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _output(answer: Mapping[str, Any], space: Space) -> PolicyOutput:
    def floats(name: str) -> NDArray[np.float32] | None:
        return _array(answer[name], "float32") if name in answer else None

    return PolicyOutput(
        actions=_array(_member(answer, "actions"), space.dtype),
        action_logp=floats("action_logp"),
        value=floats("value"),
        action_dist_inputs=floats("action_dist_inputs"),
    )


def _action(answer: Mapping[str, Any], space: Space) -> Any:
    return _array(_member(answer, "action"), space.dtype)[()]


def _with_retry_after(error: PolicyServingError, value: str | None) -> PolicyServingError:
    if value is not None and value.isdigit():
        error.details.setdefault("retry_after_s", int(value))
    return error


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
        self._endpoint = _Endpoint(url, policy, max_retries, backoff_s)
        self._timeout_s = timeout_s
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._action_space: Space | None = None

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
    ) -> Any:
        """One action for one observation, as the environment takes it.

        Args:
            observation: Anything NumPy reads as an array of the observation space's shape.
            deterministic: Take the most likely action instead of sampling.
            seed: Makes a sampled action repeatable.
            timeout_ms: The server answers in this time or not at all (`DeadlineExceededError`).

        Returns:
            A NumPy scalar (Discrete) or array (Box) of the action space's dtype.

        Raises:
            PolicyServingError: The server's own error, or `ConnectionFailedError`.
        """
        space = self._space()
        body = _request_body(
            "observation", np.asarray(observation), deterministic, seed, timeout_ms, ()
        )
        return _action(self._call("POST", self._compute_path, body), space)

    def compute_actions(
        self,
        observations: Any,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        outputs: Collection[OutputName] = (),
        timeout_ms: float | None = None,
    ) -> PolicyOutput:
        """One action per observation, in one request; see `serving.interface.Policy`."""
        space = self._space()
        body = _request_body(
            "observations", np.asarray(observations), deterministic, seed, timeout_ms, outputs
        )
        return _output(self._call("POST", self._compute_path, body), space)

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

    def _space(self) -> Space:
        if self._action_space is None:
            self._action_space = space_from_json(_member(self.describe(), "action_space"))
        return self._action_space

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
            raise _with_retry_after(exc, headers.get("retry-after")) from None

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
        self._endpoint = _Endpoint(url, policy, max_retries, backoff_s)
        self._timeout_s = timeout_s
        self._action_space: Space | None = None
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
    ) -> Any:
        """See `PolicyClient.compute_action`."""
        space = await self._space()
        body = _request_body(
            "observation", np.asarray(observation), deterministic, seed, timeout_ms, ()
        )
        return _action(await self._call("POST", self._compute_path, body), space)

    async def compute_actions(
        self,
        observations: Any,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        outputs: Collection[OutputName] = (),
        timeout_ms: float | None = None,
    ) -> PolicyOutput:
        """See `PolicyClient.compute_actions`."""
        space = await self._space()
        body = _request_body(
            "observations", np.asarray(observations), deterministic, seed, timeout_ms, outputs
        )
        return _output(await self._call("POST", self._compute_path, body), space)

    @property
    def _compute_path(self) -> str:
        return f"{self._endpoint.policy_path}/compute_action"

    async def _resolve(self) -> None:
        if self._endpoint.policy is None:
            listed = await self._call("GET", self._endpoint.list_path, None)
            self._endpoint.policy = self._endpoint.only_policy(listed)

    async def _space(self) -> Space:
        if self._action_space is None:
            self._action_space = space_from_json(_member(await self.describe(), "action_space"))
        return self._action_space

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
            raise _with_retry_after(exc, response.headers.get("retry-after")) from None

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncPolicyClient:
        """The client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.aclose()
