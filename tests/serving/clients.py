"""Every way to ask a served policy, with one face, so that all meet the same tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from serving.async_stream_client import AsyncStreamClient
from serving.client import AsyncPolicyClient, PolicyClient
from serving.stream_client import StreamClient


class AsyncInAThread:
    """An asynchronous client with PolicyClient's face."""

    def __init__(self, url: str, client_class: Any = AsyncPolicyClient, **kwargs: Any) -> None:
        self._loop = asyncio.new_event_loop()
        try:
            self._client = client_class(url, **kwargs)
        except BaseException:
            self._loop.close()
            raise

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: self._loop.run_until_complete(method(*args, **kwargs))

    def answer(self, request: dict[str, Any]) -> Any:
        action = self.compute_action(np.array(request["observation"]))
        return {"action": int(action)}

    def gather(self, name: str, arguments: list[Any]) -> list[Any]:
        """Call a method with each argument, all at once."""

        async def main() -> list[Any]:
            method = getattr(self._client, name)
            return await asyncio.gather(*map(method, arguments), return_exceptions=True)

        return self._loop.run_until_complete(main())

    def __enter__(self) -> AsyncInAThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()


def json_client(url: str, **kwargs: Any) -> Any:
    return PolicyClient(url, encoding="json", **kwargs)


def msgpack_client(url: str, **kwargs: Any) -> Any:
    return PolicyClient(url, encoding="msgpack", **kwargs)


def async_json_client(url: str, **kwargs: Any) -> Any:
    return AsyncInAThread(url, encoding="json", **kwargs)


def async_msgpack_client(url: str, **kwargs: Any) -> Any:
    return AsyncInAThread(url, encoding="msgpack", **kwargs)


def async_stream_client(url: str, **kwargs: Any) -> Any:
    return AsyncInAThread(url, AsyncStreamClient, **kwargs)


STREAM_CLIENTS = {"stream": StreamClient, "async-stream": async_stream_client}
CLIENTS = {
    "json": json_client,
    "msgpack": msgpack_client,
    "async-json": async_json_client,
    "async-msgpack": async_msgpack_client,
    **STREAM_CLIENTS,
}
