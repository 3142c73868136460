"""The native dialect: which bodies are taken, what the others are told, and exactness."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.bundle import PolicyManifest, read_bundle
from serving.dialects.native import NativeCodec
from serving.errors import PolicyServingError
from serving.interface import PolicyOutput
from tests.bundles import box_policy, discrete_policy

GOOD = [0.5, -1.0, 2.0, 3.0]
# The same examples on every machine; the codec is made once for all of them.
REPEATABLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> PolicyManifest:
    path = tmp_path_factory.mktemp("codec") / "bundle"
    return read_bundle(discrete_policy().save(path)).manifest


@pytest.fixture(scope="module")
def codec(manifest: PolicyManifest) -> NativeCodec:
    return NativeCodec("tiny", 3, manifest, max_observations_per_request=4)


@pytest.fixture(scope="module")
def matrix_codec(tmp_path_factory) -> NativeCodec:
    """For observations of shape (2, 3)."""
    path = tmp_path_factory.mktemp("codec") / "matrix"
    bundle = read_bundle(discrete_policy(observation_shape=(2, 3)).save(path))
    return NativeCodec("matrix", 1, bundle.manifest, max_observations_per_request=4)


def refusal(codec: NativeCodec, body: Any) -> tuple[int | None, str, str | None]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(PolicyServingError) as caught:
        codec.decode(data)
    error = caught.value
    assert error.message
    assert "Traceback" not in error.message
    assert len(error.message) < 2000
    return error.http_status, error.code, error.details.get("pointer")


MALFORMED = (400, "malformed_request", None)


def observation_error(pointer: str) -> tuple[int, str, str]:
    return 422, "invalid_observation", pointer


def request_error(pointer: str) -> tuple[int, str, str]:
    return 422, "invalid_request", pointer


BAD_BODIES: dict[str, tuple[Any, tuple[int, str, str | None]]] = {
    "nothing": (b"", MALFORMED),
    "blank": (b"  \n", MALFORMED),
    "words": (b"hello", MALFORMED),
    "cut short": (b'{"observation": [1, 2', MALFORMED),
    "two values": (b'{"observation": [1,2,3,4]} {}', MALFORMED),
    "trailing comma": (b'{"observation": [1,2,3,4],}', MALFORMED),
    "single quotes": (b"{'observation': [1,2,3,4]}", MALFORMED),
    "not UTF-8": (b'{"observation": "\xff\xfe"}', MALFORMED),
    "a NUL": (b"\x00", MALFORMED),
    "UTF-16": ('{"observation": [1,2,3,4]}'.encode("utf-16"), MALFORMED),
    "wrong type, then cut short": (b'{"observation": "x", ', MALFORMED),
    "100,000 brackets": (b"[" * 100_000, MALFORMED),
    "100,000 brackets inside": (
        b'{"observation": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        MALFORMED,
    ),
    "an array": ([GOOD], request_error("")),
    "a number": (b"5", request_error("")),
    "null": (b"null", request_error("")),
    "an empty object": ({}, request_error("")),
    "neither": ({"deterministic": True}, request_error("")),
    "both": ({"observation": GOOD, "observations": [GOOD]}, request_error("")),
    "an unknown key": ({"observation": GOOD, "observatoin": 1}, request_error("")),
    "no observations": ({"observations": []}, request_error("/observations")),
    "too many": ({"observations": [GOOD] * 5}, (413, "batch_too_large", "/observations")),
    "deterministic as text": (
        {"observation": GOOD, "deterministic": "true"},
        request_error("/deterministic"),
    ),
    "deterministic null": (
        {"observation": GOOD, "deterministic": None},
        request_error("/deterministic"),
    ),
    "deterministic as 1": (
        {"observation": GOOD, "deterministic": 1},
        request_error("/deterministic"),
    ),
    "a negative seed": ({"observation": GOOD, "seed": -1}, request_error("/seed")),
    "a broken seed": ({"observation": GOOD, "seed": 1.5}, request_error("/seed")),
    "a seed beyond 63 bits": ({"observation": GOOD, "seed": 2**63}, request_error("/seed")),
    "a seed of 500 digits": ({"observation": GOOD, "seed": 10**499}, request_error("/seed")),
    "no time": ({"observation": GOOD, "timeout_ms": 0}, request_error("/timeout_ms")),
    "negative time": ({"observation": GOOD, "timeout_ms": -5}, request_error("/timeout_ms")),
    "endless time": ({"observation": GOOD, "timeout_ms": 1e12}, request_error("/timeout_ms")),
    "time as text": ({"observation": GOOD, "timeout_ms": "5"}, request_error("/timeout_ms")),
    "an unknown output": (
        {"observation": GOOD, "outputs": ["action_logp", "q"]},
        request_error("/outputs/1"),
    ),
    "outputs as text": ({"observation": GOOD, "outputs": "value"}, request_error("/outputs")),
    "version as text": ({"observation": GOOD, "version": "3"}, request_error("/version")),
    "a mask": ({"observation": GOOD, "action_mask": [1, 0, 1]}, request_error("/action_mask")),
    "a state": ({"observation": GOOD, "state": None}, request_error("/state")),
    "observation null": ({"observation": None}, observation_error("/observation")),
    "observation a number": ({"observation": 1.0}, observation_error("/observation")),
    "observation an object": ({"observation": {"0": 1}}, observation_error("/observation")),
    "too short": ({"observation": GOOD[:3]}, observation_error("/observation")),
    "too long": ({"observation": [*GOOD, 1.0]}, observation_error("/observation")),
    "text inside": ({"observation": [1, 2, "3", 4]}, observation_error("/observation/2")),
    "null inside": ({"observation": [1, 2, 3, None]}, observation_error("/observation/3")),
    "true inside": ({"observation": [True, 2, 3, 4]}, observation_error("/observation/0")),
    "too deep": ({"observation": [[GOOD]] * 4}, observation_error("/observation/0")),
    "flat where many are expected": ({"observations": GOOD}, observation_error("/observations/0")),
    "one short among many": (
        {"observations": [GOOD, GOOD[:3]]},
        observation_error("/observations/1"),
    ),
    "NaN": (b'{"observation": [1, NaN, 3, 4]}', observation_error("/observation/1")),
    "minus infinity": (
        b'{"observations": [[1,2,3,4], [1,2,3,-Infinity]]}',
        observation_error("/observations/1/3"),
    ),
    "NaN in one too short": (b'{"observation": [NaN, 2, 3]}', observation_error("/observation")),
    "NaN beside text": (b'{"observation": [NaN, "2", 3, 4]}', observation_error("/observation")),
    "NaN elsewhere": (b'{"observation": [1,2,3,4], "timeout_ms": NaN}', MALFORMED),
    "1e39": (b'{"observation": [1, 2, 1e39, 4]}', observation_error("/observation/2")),
    "1e39 among many": (
        b'{"observations": [[1,2,3,4], [1,2,-1e39,4]]}',
        observation_error("/observations/1/2"),
    ),
    "1e999": (b'{"observation": [1, 2, 3, 1e999]}', observation_error("/observation/3")),
    "an integer of 500 digits": (
        b'{"observation": [1, 2, 3, ' + b"9" * 500 + b"]}",
        observation_error("/observation/3"),
    ),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_told_what_and_where(codec: NativeCodec, name: str):
    body, expected = BAD_BODIES[name]
    found = refusal(codec, body)
    assert found == expected


def test_an_integer_of_ten_thousand_digits_is_refused(codec: NativeCodec):
    status, _, _ = refusal(codec, b'{"observation": [1, 2, 3, ' + b"9" * 10_000 + b"]}")
    assert status in (400, 422)


def test_a_byte_order_mark_is_named_not_called_nan(codec: NativeCodec):
    with pytest.raises(PolicyServingError) as caught:
        codec.decode(b"\xef\xbb\xbf" + b'{"observation": [1,2,3,4]}')
    assert "NaN" not in caught.value.message


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b'{"observation": [[1,2,3],[4,5]]}', "/observation/1"),
        (b'{"observation": [[1,2,3]]}', "/observation"),
        (b'{"observation": [[1,2,3],[4,null,6]]}', "/observation/1/1"),
        (b'{"observation": [[1,2,3],[4,1e39,6]]}', "/observation/1/1"),
        (b'{"observations": [[[1,2,3],[4,5,NaN]]]}', "/observations/0/1/2"),
    ],
)
def test_the_place_in_a_matrix_is_named(matrix_codec: NativeCodec, body: bytes, pointer: str):
    assert refusal(matrix_codec, body) == observation_error(pointer)


def test_one_observation_is_taken_with_its_defaults(codec: NativeCodec):
    request = codec.decode(json.dumps({"observation": GOOD}).encode())
    np.testing.assert_array_equal(request.observations, np.array([GOOD], dtype=np.float32))
    assert request.observations.dtype == np.float32
    assert request.observations.flags.c_contiguous
    assert request.is_single
    assert request.deterministic
    assert (request.seed, request.timeout_s, request.version) == (None, None, None)
    assert request.outputs == frozenset()


def test_every_field_is_read(codec: NativeCodec):
    request = codec.decode(
        json.dumps(
            {
                "observations": [GOOD, [0, 1, 2, 3]],
                "deterministic": False,
                "seed": 2**63 - 1,
                "timeout_ms": 250,
                "outputs": ["value", "action_logp", "value"],
                "version": 3,
            }
        ).encode()
    )
    assert request.observations.shape == (2, 4)
    assert not request.is_single
    assert not request.deterministic
    assert (request.seed, request.timeout_s, request.version) == (2**63 - 1, 0.25, 3)
    assert request.outputs == {"value", "action_logp"}


def test_null_stands_for_what_was_left_out(codec: NativeCodec):
    body = {"observation": GOOD, "seed": None, "timeout_ms": None, "outputs": None, "version": None}
    request = codec.decode(json.dumps(body).encode())
    assert (request.seed, request.timeout_s, request.version) == (None, None, None)
    assert request.outputs == frozenset()


def test_of_a_key_given_twice_the_last_counts(codec: NativeCodec):
    request = codec.decode(b'{"observation": [9,9,9,9], "observation": [1,2,3,4]}')
    assert request.observations.tolist() == [[1, 2, 3, 4]]


def test_as_many_observations_as_allowed_are_taken(codec: NativeCodec):
    request = codec.decode(json.dumps({"observations": [GOOD] * 4}).encode())
    assert len(request.observations) == 4


def test_numbers_whose_sum_overflows_are_still_finite(codec: NativeCodec):
    largest = float(np.finfo(np.float32).max)
    request = codec.decode(json.dumps({"observation": [largest] * 4}).encode())
    assert request.observations.tolist() == [[largest] * 4]


def test_infinities_that_cancel_in_a_sum_are_still_refused(codec: NativeCodec):
    assert refusal(codec, {"observation": [1e39, -1e39, 0, 0]}) == observation_error(
        "/observation/0"
    )


@settings(REPEATABLE, max_examples=200)
@given(
    values=st.lists(
        st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=4, max_size=4
    )
)
def test_a_float32_arrives_as_it_was_sent(codec: NativeCodec, values: list[float]):
    request = codec.decode(json.dumps({"observation": values}).encode())
    np.testing.assert_array_equal(
        request.observations[0].view(np.uint32), np.array(values, np.float32).view(np.uint32)
    )


@settings(REPEATABLE, max_examples=200)
@given(
    values=st.lists(
        st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=4
    )
)
def test_a_float32_leaves_as_it_was_computed(codec: NativeCodec, values: list[float]):
    array = np.array(values, dtype=np.float32)
    output = PolicyOutput(actions=array[:, None], value=array)
    answer = json.loads(codec.encode(output, is_single=False))
    for found in (np.array(answer["actions"])[:, 0], np.array(answer["value"])):
        np.testing.assert_array_equal(
            found.astype(np.float32).view(np.uint32), array.view(np.uint32)
        )


def test_an_answer_names_the_policy_and_only_what_was_computed(
    codec: NativeCodec, manifest: PolicyManifest
):
    identity = {"policy": "tiny", "version": 3, "policy_id": manifest.policy_id}
    actions = np.array([2, 0])
    single = json.loads(codec.encode(PolicyOutput(actions[:1]), is_single=True))
    assert single == {"action": 2, **identity}
    output = PolicyOutput(
        actions,
        action_logp=np.array([-0.5, -0.25], np.float32),
        action_dist_inputs=np.array([[1, 2, 3], [4, 5, 6]], np.float32),
    )
    assert json.loads(codec.encode(output, is_single=False)) == {
        "actions": [2, 0],
        "action_logp": [-0.5, -0.25],
        "action_dist_inputs": [[1, 2, 3], [4, 5, 6]],
        **identity,
    }
    assert json.loads(codec.encode(output, is_single=True)) == {
        "action": 2,
        "action_logp": -0.5,
        "action_dist_inputs": [1, 2, 3],
        **identity,
    }


def test_a_box_action_is_a_list(tmp_path):
    bundle = read_bundle(box_policy().save(tmp_path / "box"))
    codec = NativeCodec("box", 1, bundle.manifest, max_observations_per_request=4)
    output = PolicyOutput(np.array([[0.5, -1.0]], np.float32))
    assert json.loads(codec.encode(output, is_single=True))["action"] == [0.5, -1.0]


def test_a_policy_s_name_with_quotes_cannot_break_the_answer(manifest: PolicyManifest):
    codec = NativeCodec('a"b', 1, manifest, max_observations_per_request=4)
    answer = json.loads(codec.encode(PolicyOutput(np.array([1])), is_single=True))
    assert answer["policy"] == 'a"b'


KEYS = st.sampled_from(
    [
        "observation",
        "observations",
        "deterministic",
        "seed",
        "timeout_ms",
        "outputs",
        "version",
        "action_mask",
        "state",
        "other",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([math.nan, math.inf, 1e39, -1e39])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, min_size=4, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=20,
)


@settings(REPEATABLE, max_examples=150)
@given(body=st.dictionaries(KEYS, VALUES, max_size=4) | VALUES)
def test_any_json_is_taken_or_refused_with_an_error_of_ours(codec: NativeCodec, body: Any):
    data = json.dumps(body).encode()
    error: PolicyServingError | None = None
    try:
        request = codec.decode(data)
    except PolicyServingError as exc:
        error = exc
    if error is None:
        assert request.observations.shape[1:] == (4,)
        assert request.observations.dtype == np.float32
        assert np.isfinite(request.observations).all()
        return
    assert error.http_status in (400, 413, 422)
    found = body
    for key in (error.details.get("pointer") or "").split("/")[1:]:  # the place is in the body
        found = found[int(key)] if isinstance(found, list) else found[key]


@settings(REPEATABLE, max_examples=200)
@given(body=st.binary(max_size=60))
def test_any_bytes_are_taken_or_refused_with_an_error_of_ours(codec: NativeCodec, body: bytes):
    # Hypothesis tries constants that it finds in loaded modules, a good body among them.
    with contextlib.suppress(PolicyServingError):
        assert np.isfinite(codec.decode(body).observations).all()
