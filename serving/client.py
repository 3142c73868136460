"""Clients of a served policy: one for a loop, one for asyncio.

    policy = PolicyClient("http://127.0.0.1:8000/v1/policies/cartpole")
    action = policy.compute_action(observation)

Loads no Ray, no torch and no onnxruntime.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import httpx

from serving import calls
from serving.dialects.binary_client import BinaryClientCodec
from serving.dialects.native_client import ClientCodec
from serving.endpoint import Endpoint, Request
from serving.errors import PolicyServingError, UsageError

Encoding: TypeAlias = Literal["json", "msgpack"]
_CODECS: Mapping[str, Callable[[Mapping[str, Any]], calls.Dialect]] = {
    "json": ClientCodec,
    "msgpack": BinaryClientCodec,
}


def _codec_of(encoding: str) -> Callable[[Mapping[str, Any]], calls.Dialect]:
    if encoding not in _CODECS:
        raise UsageError(f"found the encoding {encoding!r}, expected {' or '.join(_CODECS)}")
    return _CODECS[encoding]


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
        encoding: Encoding = "msgpack",
        timeout_s: float = 10.0,
        max_retries: int = 3,
        backoff_s: float = 0.05,
    ) -> None:
        """Store and check; nothing is sent before the first call.

        Args:
            url: `http://HOST:PORT/v1/policies/NAME`; or `http://HOST:PORT` of a server with one
                policy, or together with `policy`.
            policy: The policy's name.
            encoding: How requests and answers travel: msgpack with raw bytes, or JSON. The actions
                are the same bit for bit.
            timeout_s: For connecting and for each answer.
            max_retries: Further attempts after a failed connection or a 503.
            backoff_s: Upper bound of the first pause; it doubles with each attempt.

        Raises:
            UsageError: `url` or `encoding` is not one.
        """
        self._endpoint = Endpoint(url, policy, max_retries, backoff_s)
        self._codec = _codec_of(encoding)
        self._dialect: calls.Dialect | None = None
        self._timeout_s = timeout_s
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """What the policy expects and returns: the answer of `GET /v1/policies/{policy}`."""
        self._resolve()
        return self._call(self._endpoint.describe())

    compute_action = calls.blocking(calls.compute_action)
    step = calls.blocking(calls.step)
    compute_actions = calls.blocking(calls.compute_actions)

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer to a `compute_action` request as it stands, in JSON."""
        self._resolve()
        # The standard encoder: it writes any integer, and NaN, which the server answers in words.
        return self._call(self._endpoint.compute(json.dumps(dict(request)).encode()))

    @property
    def policy_url(self) -> str:
        """The policy's whole URL."""
        self._resolve()
        return f"{self._endpoint.origin}{self._endpoint.policy_path}"

    def dialect(self) -> calls.Dialect:
        """How requests to this policy are written; asks the server once."""
        if self._dialect is None:
            self._dialect = self._codec(self.describe())
        return self._dialect

    def exchange(self, body: bytes, /) -> dict[str, Any]:
        """One body for `compute_action`, in this client's encoding, for its answer."""
        dialect = self.dialect()
        return self._call(self._endpoint.compute(body, dialect.content_type, dialect.read))

    def _resolve(self) -> None:
        if self._endpoint.policy is None:
            listed = self._call(self._endpoint.list_policies())
            self._endpoint.policy = self._endpoint.only_policy(listed)

    def _call(self, request: Request) -> dict[str, Any]:
        attempt = 0
        while True:
            try:
                return self._endpoint.read(request, *self._attempt(request))
            except PolicyServingError as exc:
                pause_s = self._endpoint.pause_s(attempt, exc)
                if pause_s is None:
                    raise
            attempt += 1
            time.sleep(pause_s)

    def _attempt(self, request: Request) -> tuple[int, bytes, str | None]:
        """Status, body and `Retry-After` of the answer."""
        connection = self._connection()
        was_open = connection.sock is not None
        try:
            # A server that refuses a large body answers and closes before it has read all of it.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(request.method, request.path, request.body, request.headers)
            response = connection.getresponse()
            return response.status, response.read(), response.headers.get("retry-after")
        except TimeoutError as exc:
            connection.close()
            raise self._endpoint.timed_out(self._timeout_s) from exc
        except (OSError, http.client.HTTPException, UnicodeError) as exc:
            connection.close()
            if was_open:
                # The server closed an idle connection, as servers do; that is no failure.
                return self._attempt(request)
            raise self._endpoint.no_answer(exc) from exc

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
        encoding: Encoding = "msgpack",
        timeout_s: float = 10.0,
        max_retries: int = 3,
        backoff_s: float = 0.05,
        max_connections: int = 64,
    ) -> None:
        """See `PolicyClient`; `max_connections` bounds the pool."""
        self._endpoint = Endpoint(url, policy, max_retries, backoff_s)
        self._timeout_s = timeout_s
        self._codec = _codec_of(encoding)
        self._dialect: calls.Dialect | None = None
        self._learning = asyncio.Lock()
        limits = httpx.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections
        )
        self._http = httpx.AsyncClient(
            base_url=self._endpoint.origin,
            timeout=timeout_s,
            limits=limits,
            trust_env=False,
            # Reading the certificates takes 40 ms; plain HTTP needs none, so it trusts none.
            verify=self._endpoint.scheme == "https" or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        )

    async def describe(self) -> dict[str, Any]:
        """See `PolicyClient.describe`."""
        await self._resolve()
        return await self._call(self._endpoint.describe())

    compute_action = calls.awaiting(calls.compute_action)
    step = calls.awaiting(calls.step)
    compute_actions = calls.awaiting(calls.compute_actions)

    async def dialect(self) -> calls.Dialect:
        """See `PolicyClient.dialect`."""
        if self._dialect is None:
            async with self._learning:  # many first steps at once ask once
                if self._dialect is None:
                    self._dialect = self._codec(await self.describe())
        return self._dialect

    async def exchange(self, body: bytes, /) -> dict[str, Any]:
        """See `PolicyClient.exchange`."""
        dialect = await self.dialect()
        return await self._call(self._endpoint.compute(body, dialect.content_type, dialect.read))

    async def _resolve(self) -> None:
        if self._endpoint.policy is None:
            listed = await self._call(self._endpoint.list_policies())
            self._endpoint.policy = self._endpoint.only_policy(listed)

    async def _call(self, request: Request) -> dict[str, Any]:
        attempt = 0
        while True:
            try:
                return self._endpoint.read(request, *await self._attempt(request))
            except PolicyServingError as exc:
                pause_s = self._endpoint.pause_s(attempt, exc)
                if pause_s is None:
                    raise
            attempt += 1
            await asyncio.sleep(pause_s)

    async def _attempt(self, request: Request) -> tuple[int, bytes, str | None]:
        """Status, body and `Retry-After` of the answer."""
        try:
            response = await self._http.request(
                request.method, request.path, content=request.body, headers=request.headers
            )
        except httpx.TimeoutException as exc:
            raise self._endpoint.timed_out(self._timeout_s) from exc
        except httpx.HTTPError as exc:
            raise self._endpoint.no_answer(exc) from exc
        return response.status_code, response.content, response.headers.get("retry-after")

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncPolicyClient:
        """The client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.aclose()
