"""A served policy by its URL, however it is spoken to."""

from __future__ import annotations

from typing import Literal

from serving.client import PolicyClient
from serving.stream_client import StreamClient


def open_policy(
    url: str, protocol: Literal["http", "ws"] = "http", *, timeout_s: float = 10.0
) -> PolicyClient | StreamClient:
    """A client; use it as a context manager, or call `close`.

    Args:
        url: `http://HOST:PORT/v1/policies/NAME`.
        protocol: A request for each step, or one WebSocket for all of them.
        timeout_s: For connecting and for each answer.

    Raises:
        UsageError: `url` is not one.
    """
    if protocol == "ws":
        return StreamClient(url, timeout_s=timeout_s)
    return PolicyClient(url, timeout_s=timeout_s)
