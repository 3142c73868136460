"""Where a served policy is, what its answers mean, and when to ask again.

Knows no transport: both clients use it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import orjson

from serving.dialects.native_client import member
from serving.errors import (
    DeadlineExceededError,
    PolicyServingError,
    UnexpectedAnswerError,
    UnknownPolicyError,
    UsageError,
    from_problem,
)

_POLICIES = "/v1/policies"
_MAX_BACKOFF_S = 2.0


class Endpoint:
    """What both clients share: the address, reading answers, when to retry."""

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
        names = [entry["policy"] for entry in member(listed, "policies")]
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


def with_retry_after(error: PolicyServingError, value: str | None) -> PolicyServingError:
    """The error with what the server's `Retry-After` header said, if it was seconds."""
    if value is not None and value.isdigit():
        error.details.setdefault("retry_after_s", int(value))
    return error
