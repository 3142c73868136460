"""Errors of the Open Inference Protocol: statuses, the one-line text, and what is not offered."""

from __future__ import annotations

from serving.errors import (
    BatchTooLargeError,
    BodyTooLargeError,
    CallerError,
    InvalidObservationError,
    InvalidRequestError,
    PolicyServingError,
)


class NotOfferedError(CallerError):
    """A part of the protocol that this server does not have."""

    code = "not_offered"
    title = "Not offered"
    http_status = 501


def http_status(error: PolicyServingError) -> int:
    """The status of an error inside `/v2`: 400 for everything that a request says wrongly."""
    if isinstance(error, InvalidRequestError | InvalidObservationError | BatchTooLargeError):
        return 400
    return error.http_status or 500


def grpc_code(error: PolicyServingError) -> str:
    """The name of the gRPC status code of an error."""
    if isinstance(error, BodyTooLargeError):
        return "RESOURCE_EXHAUSTED"
    by_status = {
        400: "INVALID_ARGUMENT",
        404: "NOT_FOUND",
        501: "UNIMPLEMENTED",
        503: "RESOURCE_EXHAUSTED" if error.code == "overloaded" else "UNAVAILABLE",
        504: "DEADLINE_EXCEEDED",
    }
    return by_status.get(http_status(error), "INTERNAL")


def text_of(error: PolicyServingError) -> str:
    """An error in one line, with its place where the message does not name it."""
    pointer = error.details.get("pointer")
    if not pointer or pointer in error.message:
        return error.message
    return f"{error.message} (at {pointer})"
