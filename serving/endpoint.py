"""Where a served policy is, what its answers mean, and when to ask again.

Knows no transport: all clients use it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from serving.dialects.native_client import member, read_json
from serving.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    PolicyServingError,
    UnexpectedAnswerError,
    UnknownPolicyError,
    UsageError,
    from_problem,
)

_POLICIES = "/v1/policies"
_MAX_BACKOFF_S = 2.0


class Request(NamedTuple):
    """One HTTP request, and what reads its answer.

    Attributes:
        method: GET or POST.
        path: With all prefixes.
        body: None for GET.
        content_type: Of the body.
        read: What the bytes of a good answer hold, or None. Errors are JSON in every dialect.
    """

    method: str
    path: str
    body: bytes | None = None
    content_type: str = "application/json"
    read: Callable[[bytes], Any] = read_json

    @property
    def headers(self) -> dict[str, str]:
        """Its own headers."""
        return {} if self.body is None else {"content-type": self.content_type}


class Endpoint:
    """What the clients share: the address, reading answers, when to retry."""

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
    def stream_path(self) -> str:
        """Of the WebSocket."""
        return f"{self.policy_path}/stream"

    def list_policies(self) -> Request:
        """What asks which policies there are."""
        return Request("GET", f"{self.prefix}{_POLICIES}")

    def describe(self) -> Request:
        """What asks for the policy's description."""
        return Request("GET", self.policy_path)

    def compute(
        self,
        body: bytes,
        content_type: str = "application/json",
        read: Callable[[bytes], Any] = read_json,
    ) -> Request:
        """What asks for actions."""
        return Request("POST", f"{self.policy_path}/compute_action", body, content_type, read)

    def only_policy(self, listed: Mapping[str, Any]) -> str:
        """The name of the one policy that a server has."""
        names = [entry["policy"] for entry in member(listed, "policies")]
        if len(names) != 1:
            raise UnknownPolicyError(
                f"{self.origin} serves {', '.join(names) or 'nothing'}; name one: "
                f"{self.origin}{_POLICIES}/NAME"
            )
        return str(names[0])

    def read(
        self, request: Request, status: int, body: bytes, retry_after: str | None
    ) -> dict[str, Any]:
        """The answer's object, or the server's error raised.

        Args:
            request: What was asked.
            status: Of HTTP.
            body: The answer.
            retry_after: That header of the answer.
        """
        if status != 200:
            raise self.refusal(status, body, retry_after)
        content = request.read(body)
        if not isinstance(content, dict):
            raise UnexpectedAnswerError(
                f"{self.origin} is no policy server: {_quoted(status, body)}"
            )
        return content

    def refusal(self, status: int, body: bytes, retry_after: str | None) -> PolicyServingError:
        """The error that an answer other than 200 states.

        Its `retry_after_s` is what the header said, if that was seconds.
        """
        content = read_json(body)
        if not isinstance(content, dict):
            content = {"detail": _quoted(status, body)}
        error = from_problem(content, status)
        if retry_after is not None and retry_after.isdigit():
            error.details.setdefault("retry_after_s", int(retry_after))
        return error

    def timed_out(self, timeout_s: float) -> DeadlineExceededError:
        """The error of an answer that did not come in time."""
        return DeadlineExceededError(f"{self.origin} did not answer within {timeout_s:g} s")

    def no_answer(self, reason: BaseException | str) -> ConnectionFailedError:
        """The error of a connection that failed."""
        return ConnectionFailedError(
            f"no answer from {self.origin}: {str(reason) or type(reason).__name__}"
        )

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
