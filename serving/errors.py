"""Every error a caller can meet, its stable code, its HTTP status, and how it travels.

The same classes are raised in the engine, answered by the server as `application/problem+json`
(RFC 9457) and raised again by the client, found there by `code`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


class PolicyServingError(Exception):
    """The base of all errors of `serving`.

    Attributes:
        code: A stable name for programs.
        http_status: The HTTP status that carries it; None where it never crosses HTTP.
        retryable: Whether the same call may succeed later.
        exit_code: What the command line exits with.
        message: One sentence: what was found, what was expected, what to do.
        details: Facts for programs (for example `pointer`, a JSON pointer into the body).
    """

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    http_status: ClassVar[int | None] = 500
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, /, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive pickling between Ray processes, details included."""
        return (_rebuild, (type(self), self.message, self.details))


def _rebuild(
    error_class: type[PolicyServingError], message: str, details: dict[str, Any]
) -> PolicyServingError:
    return error_class(message, **details)


class CallerError(PolicyServingError):
    """The request is wrong; the same request will fail again."""

    code = "bad_request"
    title = "Bad request"
    http_status = 400


class MalformedRequestError(CallerError):
    """The body is not JSON, or is cut short."""

    code = "malformed_request"
    title = "Malformed request"


class UnknownPolicyError(CallerError):
    """No policy of that name is served here."""

    code = "unknown_policy"
    title = "Unknown policy"
    http_status = 404


class NotFoundError(CallerError):
    """No endpoint has that path."""

    code = "not_found"
    title = "Not found"
    http_status = 404


class MethodNotAllowedError(CallerError):
    """The path exists, the method does not."""

    code = "method_not_allowed"
    title = "Method not allowed"
    http_status = 405


class BodyTooLargeError(CallerError):
    """The body is larger than the server accepts."""

    code = "body_too_large"
    title = "Body too large"
    http_status = 413


class BatchTooLargeError(CallerError):
    """More observations in one request than the server accepts."""

    code = "batch_too_large"
    title = "Batch too large"
    http_status = 413


class UnsupportedMediaTypeError(CallerError):
    """The body's content type or encoding is not one that the server reads."""

    code = "unsupported_media_type"
    title = "Unsupported media type"
    http_status = 415


class InvalidRequestError(CallerError):
    """The body is JSON but not the request's schema."""

    code = "invalid_request"
    title = "Invalid request"
    http_status = 422


class InvalidObservationError(CallerError):
    """An observation is outside the policy's space: shape, type or finiteness."""

    code = "invalid_observation"
    title = "Invalid observation"
    http_status = 422


class UnavailableError(PolicyServingError):
    """The server cannot answer now; the same request may succeed after a wait."""

    code = "unavailable"
    title = "Unavailable"
    http_status: ClassVar[int | None] = 503
    retryable = True


class OverloadedError(UnavailableError):
    """The queue is full; answered with `Retry-After`."""

    code = "overloaded"
    title = "Overloaded"


class PolicyNotReadyError(UnavailableError):
    """The policy is still loading, or the server is shutting down."""

    code = "policy_not_ready"
    title = "Policy not ready"


class DeadlineExceededError(UnavailableError):
    """The request's `timeout_ms` passed before an answer was computed."""

    code = "deadline_exceeded"
    title = "Deadline exceeded"
    http_status = 504


class ConnectionFailedError(UnavailableError):
    """No answer came from the server. Raised by the client alone."""

    code = "connection_failed"
    title = "Connection failed"
    http_status: ClassVar[int | None] = None


class UnexpectedAnswerError(PolicyServingError):
    """Something answered that is no policy server. Raised by the client alone."""

    code = "unexpected_answer"
    title = "Unexpected answer"
    http_status = None


class InferenceError(PolicyServingError):
    """The engine failed on a valid batch."""

    code = "inference_failed"
    title = "Inference failed"


class BundleError(PolicyServingError):
    """A bundle is missing, damaged or of another format; the server refuses to start."""

    code = "bundle_error"
    title = "Bundle error"
    http_status = None


class ManifestError(BundleError):
    """`manifest.json` is missing, unreadable or incomplete."""

    code = "manifest_error"
    title = "Manifest error"


class ChecksumError(BundleError):
    """A file's SHA-256 differs from the manifest."""

    code = "checksum_error"
    title = "Checksum error"


class VerificationError(BundleError):
    """The policy does not reproduce its golden vectors on this machine."""

    code = "verification_failed"
    title = "Verification failed"


class ServingConfigError(PolicyServingError):
    """The server was asked for something that it cannot do (a port in use, a missing device)."""

    code = "serving_config"
    title = "Serving configuration"
    http_status = None
    exit_code = 2


class UsageError(PolicyServingError):
    """A command's arguments are wrong."""

    code = "usage"
    title = "Usage"
    http_status = None
    exit_code = 2


def unexpected_error() -> InferenceError:
    """What a caller gets for a mistake of ours: no traceback; the log has it."""
    return InferenceError("the server failed; its log has the reason")


def _subclasses(base: type[PolicyServingError]) -> Iterator[type[PolicyServingError]]:
    yield base
    for child in base.__subclasses__():
        yield from _subclasses(child)


def all_errors() -> dict[str, type[PolicyServingError]]:
    """Every error class by its code."""
    return {error.code: error for error in _subclasses(PolicyServingError)}


def problem(error: PolicyServingError) -> dict[str, Any]:
    """The RFC 9457 body of an error: `type`, `title`, `status`, `code`, `detail`, and its facts.

    `type` is `about:blank` (RFC 9457, 4.2.1): the machine-readable name is `code`.
    """
    return {
        "type": "about:blank",
        "title": error.title,
        "status": error.http_status or 500,
        "code": error.code,
        "detail": error.message,
        **error.details,
    }


def from_problem(body: Mapping[str, Any], status: int) -> PolicyServingError:
    """The error that a server's answer describes.

    Args:
        body: A problem+json object; an unknown or missing `code` falls back on the status.
        status: The HTTP status.

    Returns:
        An error of the same class as the one the server raised.
    """
    known = all_errors()
    error_class = known.get(str(body.get("code")))
    if error_class is None:
        error_class = _class_of_status(status)
    standard = {"type", "title", "status", "code", "detail"}
    details = {key: value for key, value in body.items() if key not in standard}
    return error_class(str(body.get("detail") or f"the server answered HTTP {status}"), **details)


def _class_of_status(status: int) -> type[PolicyServingError]:
    if status == 503:
        return UnavailableError
    if status in (408, 504):
        return DeadlineExceededError
    if status == 404:
        return NotFoundError
    return CallerError if 400 <= status < 500 else PolicyServingError
