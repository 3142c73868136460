"""An error is the same class with the same facts wherever it travels."""

from __future__ import annotations

import json
import pickle

import pytest

from serving import client, errors, rollout, server
from serving.errors import PolicyServingError, all_errors, from_problem, problem

assert client
assert rollout
assert server  # they define errors of their own

SERVING = [
    error for error in all_errors().values() if error.__module__.partition(".")[0] == "serving"
]

# docs: style.md, section 6.
STATUSES = {
    "internal_error": 500,
    "malformed_request": 400,
    "unknown_policy": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "body_too_large": 413,
    "batch_too_large": 413,
    "unsupported_media_type": 415,
    "invalid_request": 422,
    "invalid_observation": 422,
    "overloaded": 503,
    "policy_not_ready": 503,
    "deadline_exceeded": 504,
    "connection_failed": None,
    "inference_failed": 500,
}
RETRYABLE = {
    "unavailable",
    "overloaded",
    "policy_not_ready",
    "deadline_exceeded",
    "connection_failed",
}


@pytest.mark.parametrize("error_class", SERVING, ids=lambda error: error.code)
def test_an_error_survives_the_wire(error_class: type[PolicyServingError]):
    error = error_class("what was found", pointer="/observation/1", retry_after_s=3)
    body = json.loads(json.dumps(problem(error)))
    found = from_problem(body, body["status"])
    assert type(found) is error_class
    assert found.message == "what was found"
    assert found.details == {"pointer": "/observation/1", "retry_after_s": 3}


@pytest.mark.parametrize("error_class", SERVING, ids=lambda error: error.code)
def test_an_error_survives_pickling(error_class: type[PolicyServingError]):
    found = pickle.loads(pickle.dumps(error_class("what was found", pointer="/seed")))
    assert type(found) is error_class
    assert (found.message, found.details) == ("what was found", {"pointer": "/seed"})
    assert str(found) == "what was found"


def test_every_code_belongs_to_one_class():
    codes = [error.code for error in SERVING]
    assert len(codes) == len(set(codes))
    # A class that forgot to set its own would share its parent's.
    inherited = [
        error.__name__
        for error in SERVING
        if "code" not in vars(error) or "title" not in vars(error)
    ]
    assert inherited == []


@pytest.mark.parametrize("code", STATUSES)
def test_a_code_has_its_documented_status(code: str):
    error_class = all_errors()[code]
    assert error_class.http_status == STATUSES[code]
    assert error_class.retryable == (code in RETRYABLE)


def test_a_problem_has_the_members_of_rfc_9457():
    body = problem(errors.InvalidObservationError("too short", pointer="/observation"))
    assert body == {
        "type": "about:blank",
        "title": "Invalid observation",
        "status": 422,
        "code": "invalid_observation",
        "detail": "too short",
        "pointer": "/observation",
    }


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, errors.CallerError),
        (401, errors.CallerError),
        (404, errors.NotFoundError),
        (408, errors.DeadlineExceededError),
        (418, errors.CallerError),
        (500, PolicyServingError),
        (502, PolicyServingError),
        (503, errors.UnavailableError),
        (504, errors.DeadlineExceededError),
    ],
)
def test_a_stranger_s_error_is_read_by_its_status(status: int, expected: type):
    for body in ({}, {"code": "no_such_code"}, {"code": None, "detail": None}, {"code": ["a"]}):
        found = from_problem(body, status)
        assert type(found) is expected
        assert str(status) in found.message


@pytest.mark.parametrize("key", ["message", "self", "error", "args"])
def test_no_member_of_a_stranger_s_body_breaks_its_reading(key: str):
    # Gateways answer {"message": "no Route matched"}.
    found = from_problem({key: "no Route matched"}, 404)
    assert type(found) is errors.NotFoundError
    assert found.details == {key: "no Route matched"}
