"""The native dialect: which bodies are taken, what the others are told, and exactness."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.bundle import PolicyManifest, read_bundle
from serving.dialects.native import NativeCodec
from serving.errors import PolicyServingError
from serving.interface import PolicyOutput
from serving.request import ComputeRequest
from tests.bundles import box_policy, discrete_policy
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    IMAGE,
    MEMORY,
    OBSERVATION_SPACES,
    as_json,
    flat,
    manifest_of,
    sample,
)

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


def observations(request: ComputeRequest) -> Any:
    return request.inputs["observation"]


def codec_of(observation_space: Any, action_space: Any, **kwargs: Any) -> NativeCodec:
    manifest = manifest_of(observation_space, action_space, **kwargs)
    return NativeCodec("any", 1, manifest, max_observations_per_request=8)


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
    "a mask too short": (
        {"observation": GOOD, "action_mask": [1, 0]},
        request_error("/action_mask"),
    ),
    "a mask of twos": (
        {"observation": GOOD, "action_mask": [1, 2, 0]},
        request_error("/action_mask/1"),
    ),
    "a mask of text": (
        {"observation": GOOD, "action_mask": [1, "1", 0]},
        request_error("/action_mask/1"),
    ),
    "a mask that forbids all": (
        {"observation": GOOD, "action_mask": [0, 0, 0]},
        request_error("/action_mask"),
    ),
    "one mask for many": (
        {"observations": [GOOD] * 3, "action_mask": [1, 0, 1]},
        request_error("/action_mask/0"),
    ),
    "a mask too few": (
        {"observations": [GOOD] * 3, "action_mask": [[1, 0, 1], None]},
        request_error("/action_mask"),
    ),
    "many masks for one": (
        {"observation": GOOD, "action_mask": [[1, 0, 1]]},
        request_error("/action_mask/0"),
    ),
    "one of many masks forbids all": (
        {"observations": [GOOD] * 3, "action_mask": [None, [1, 0, 1], [0, 0, 0]]},
        request_error("/action_mask/2"),
    ),
    "a reward": ({"observation": GOOD, "reward": 1.0}, request_error("/reward")),
    "rewards": ({"observations": [GOOD], "rewards": [1.0]}, request_error("/rewards")),
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
    np.testing.assert_array_equal(observations(request), np.array([GOOD], dtype=np.float32))
    assert observations(request).dtype == np.float32
    assert observations(request).flags.c_contiguous
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
    assert observations(request).shape == (2, 4)
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
    assert observations(request).tolist() == [[1, 2, 3, 4]]


def test_as_many_observations_as_allowed_are_taken(codec: NativeCodec):
    request = codec.decode(json.dumps({"observations": [GOOD] * 4}).encode())
    assert request.n == 4


def test_numbers_whose_sum_overflows_are_still_finite(codec: NativeCodec):
    largest = float(np.finfo(np.float32).max)
    request = codec.decode(json.dumps({"observation": [largest] * 4}).encode())
    assert observations(request).tolist() == [[largest] * 4]


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
        observations(request)[0].view(np.uint32), np.array(values, np.float32).view(np.uint32)
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
        "reward",
        "rewards",
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
        assert set(request.inputs) <= {"observation", "action_mask"}
        assert observations(request).shape[1:] == (4,)
        assert observations(request).dtype == np.float32
        assert np.isfinite(observations(request)).all()
        return
    assert error.http_status in (400, 413, 422)
    found = body
    for key in (error.details.get("pointer") or "").split("/")[1:]:  # the place is in the body
        found = found[int(key)] if isinstance(found, list) else found[key]


@pytest.mark.parametrize("name", OBSERVATION_SPACES)
@pytest.mark.parametrize("is_single", [True, False])
def test_every_leaf_arrives_as_it_was_sent(name: str, is_single: bool):
    space = OBSERVATION_SPACES[name]
    codec = codec_of(space, ACTION_SPACES["discrete"])
    rows = sample(space, 1 if is_single else 5)
    body = {"observation": rows[0]} if is_single else {"observations": rows}
    request = codec.decode(json.dumps(as_json(body)).encode())
    assert (request.n, request.is_single) == (len(rows), is_single)
    specs = {spec.name: spec for spec in codec_manifest(space).inputs if spec.role == "observation"}
    assert list(request.inputs) == list(specs)
    for spec_name, array in request.inputs.items():
        assert (array.dtype, array.shape[1:]) == (specs[spec_name].dtype, specs[spec_name].shape)
    for index, row in enumerate(rows):
        found = np.concatenate([each[index].ravel() for each in request.inputs.values()])
        np.testing.assert_array_equal(found, flat(row))


def codec_manifest(space: gym.Space[Any]) -> PolicyManifest:
    return manifest_of(space, ACTION_SPACES["discrete"])


DICT = {"z/last": 2, "a.b[0] `c` ~": [0.5, 1.0], "class": {"self": [0, 1], "0": 1}}
TUPLE = [3, {"image": np.zeros((4, 4, 3), int).tolist()}, [0.5]]


def but(value: Any, *path: Any, last: Any) -> Any:
    """The value with another one at a place."""
    if not path:
        return last
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = but(value[path[0]] if len(path) > 1 else None, *path[1:], last=last)
    return copy


BAD_ROWS: dict[str, tuple[str, Any, str]] = {
    "a number for a scalar that is text": ("scalar", "1", ""),
    "a list for a scalar": ("scalar", [1.0], ""),
    "beyond a float32": ("scalar", 1e39, ""),
    "below its start": ("discrete", -3, ""),
    "beyond its end": ("discrete", 3, ""),
    "a fraction": ("discrete", 1.5, ""),
    "true": ("discrete", True, ""),
    "one component out of range": ("multi-discrete", [1, 3], "/1"),
    "below a component's start": ("multi-discrete", [0, 0], "/0"),
    "a component too many": ("multi-discrete", [1, 0, 0], ""),
    "in the second row of a grid": ("grid", [[0, 0], [2, 0]], "/1/0"),
    "a two": ("multi-binary", [[0, 1, 0], [1, 2, 0]], "/1/1"),
    "a short row of bits": ("multi-binary", [[0, 1, 0], [1]], "/1"),
    "256 in an image": ("image", but(TUPLE[1]["image"], 3, 2, 1, last=256), "/3/2/1"),
    "a fraction in an image": ("image", but(TUPLE[1]["image"], 0, 0, 0, last=0.5), "/0/0/0"),
    "beyond 32 bits": ("int32", [0, 2**31], "/1"),
    "beyond 64 bits": ("int32", [0, 2**70], "/1"),
    "a list for a Dict": ("dict", [1, 2, 3], ""),
    "a Dict without a key": ("dict", {"z/last": 2, "class": DICT["class"]}, ""),
    "a Dict with a key too many": ("dict", {**DICT, "more": 1}, ""),
    "a key with dots and brackets": (
        "dict",
        but(DICT, "a.b[0] `c` ~", 1, last="x"),
        "/a.b[0] `c` ~0/1",
    ),
    "deep in a Dict": ("dict", but(DICT, "class", "self", 0, last=5), "/class/self/0"),
    "a leaf of a Dict": ("dict", but(DICT, "class", "0", last=[]), "/class/0"),
    "beside a slash": ("dict", but(DICT, "z/last", last=3), "/z~1last"),
    "not finite in a Dict": ("dict", but(DICT, "a.b[0] `c` ~", 1, last=1e39), "/a.b[0] `c` ~0/1"),
    "a Tuple too short": ("tuple", TUPLE[:2], ""),
    "an object for a Tuple": ("tuple", {"0": 3}, ""),
    "a Tuple's first": ("tuple", but(TUPLE, 0, last=4), "/0"),
    "in a Dict in a Tuple": (
        "tuple",
        but(TUPLE, 1, "image", 3, 0, 2, last=-1),
        "/1/image/3/0/2",
    ),
    "not finite in a Tuple": ("tuple", but(TUPLE, 2, 0, last=1e39), "/2/0"),
    "an unnameable key out of range": (
        "unnameable",
        {'quo"te': 1, "back\\slash": 9},
        "/back\\slash",
    ),
    "an unnameable key missing": ("unnameable", {'quo"te': 1}, ""),
    "a list for an unnameable Dict": ("unnameable", [1], ""),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_the_place_in_any_space_is_named(name: str):
    space_name, row, place = BAD_ROWS[name]
    space = OBSERVATION_SPACES[space_name]
    codec = codec_of(space, ACTION_SPACES["discrete"])
    assert refusal(codec, {"observation": row}) == observation_error(f"/observation{place}")
    good = as_json(sample(space, 1)[0])
    assert refusal(codec, {"observations": [good, row]}) == observation_error(
        f"/observations/1{place}"
    )


def test_nan_in_a_dict_is_placed():
    codec = codec_of(OBSERVATION_SPACES["dict"], ACTION_SPACES["discrete"])
    row = but(DICT, "a.b[0] `c` ~", 0, last=math.nan)
    assert refusal(codec, {"observation": row}) == observation_error("/observation/a.b[0] `c` ~0/0")


def test_an_integer_beyond_64_bits_of_a_leaf_without_an_upper_bound_is_refused():
    space = gym.spaces.Box(0, np.iinfo(np.uint64).max, (2,), np.uint64)
    codec = codec_of(space, ACTION_SPACES["discrete"])
    request = codec.decode(b'{"observation": [0, 18446744073709551615]}')
    assert observations(request).tolist() == [[0, 2**64 - 1]]
    status, code, _ = refusal(codec, {"observation": [0, 2**64]})
    assert (status, code) == (422, "invalid_observation")


@pytest.fixture(scope="module")
def memory_codec() -> NativeCodec:
    return codec_of(IMAGE, ACTION_SPACES["multi-discrete"], state=MEMORY, has_reward=True)


BLANK = np.zeros((4, 4, 3), int).tolist()
FRAMES = [[0.5, 1.0, 1.5], [2.0, 2.5, 3.0]]
STATE = {"total": 1.25, "frames": FRAMES}


def test_the_state_and_the_reward_of_one_are_read(memory_codec: NativeCodec):
    body = {"observation": BLANK, "state": STATE, "reward": -1.5}
    inputs = memory_codec.decode(json.dumps(body).encode()).inputs
    assert set(inputs) == {"observation", "state/total", "state/frames", "reward"}
    assert inputs["state/total"].tolist() == [1.25]
    assert inputs["state/frames"].tolist() == [FRAMES]
    assert inputs["reward"].tolist() == [-1.5]
    assert {inputs[name].dtype.name for name in inputs if name != "observation"} == {"float32"}


def test_null_rows_of_a_state_start_an_episode(memory_codec: NativeCodec):
    body = {"observations": [BLANK] * 3, "state": [None, STATE, None], "rewards": [0, 2, 0]}
    inputs = memory_codec.decode(json.dumps(body).encode()).inputs
    # As MEMORY states: 0.5, and -1 everywhere.
    assert inputs["state/total"].tolist() == [0.5, 1.25, 0.5]
    start = [[-1.0] * 3] * 2
    assert inputs["state/frames"].tolist() == [start, FRAMES, start]
    assert inputs["reward"].tolist() == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("body", [{"observation": BLANK}, {"observations": [BLANK]}])
def test_no_state_at_all_is_left_to_the_policy(memory_codec: NativeCodec, body: Any):
    state = None if "observation" in body else [None]
    for beside in ({}, {"state": state}):
        request = memory_codec.decode(json.dumps({**body, **beside}).encode())
        assert set(request.inputs) == {"observation"}


BAD_STATES: dict[str, tuple[Any, str]] = {
    "a number": (1, "/state"),
    "a list for one": ([STATE], "/state"),
    "a name missing": ({"total": 1}, "/state"),
    "a name too many": ({**STATE, "more": 1}, "/state"),
    "text": (but(STATE, "frames", 1, 2, last="x"), "/state/frames/1/2"),
    "too short": (but(STATE, "frames", 1, last=[1.0]), "/state/frames/1"),
    "beyond a float32": (but(STATE, "frames", 0, 1, last=1e39), "/state/frames/0/1"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_bad_state_is_told_what_and_where(memory_codec: NativeCodec, name: str):
    state, pointer = BAD_STATES[name]
    assert refusal(memory_codec, {"observation": BLANK, "state": state}) == request_error(pointer)
    many = {"observations": [BLANK] * 2, "state": [None, state]}
    expected = pointer.replace("/state", "/state/1", 1)
    assert refusal(memory_codec, many) == request_error(expected)


@pytest.mark.parametrize(
    ("beside", "pointer"),
    [
        ({"state": STATE}, "/state"),
        ({"state": [STATE]}, "/state"),
        ({"state": [STATE] * 3}, "/state"),
        ({"rewards": [1]}, "/rewards"),
        ({"rewards": 1}, "/rewards"),
        ({"rewards": [1, None]}, "/rewards/1"),
        ({"rewards": [1, 1e39]}, "/rewards/1"),
        ({"reward": 1}, "/reward"),
    ],
)
def test_as_many_rows_as_observations_are_expected(memory_codec, beside: Any, pointer: str):
    body = {"observations": [BLANK] * 2, **beside}
    assert refusal(memory_codec, body) == request_error(pointer)


@pytest.mark.parametrize(
    ("beside", "pointer"),
    [({"rewards": [1]}, "/rewards"), ({"reward": [1]}, "/reward"), ({"reward": 1e39}, "/reward")],
)
def test_one_reward_belongs_to_one_observation(memory_codec, beside: Any, pointer: str):
    assert refusal(memory_codec, {"observation": BLANK, **beside}) == request_error(pointer)


def test_a_policy_of_box_actions_takes_no_mask(tmp_path):
    bundle = read_bundle(box_policy().save(tmp_path / "box"))
    codec = NativeCodec("box", 1, bundle.manifest, max_observations_per_request=4)
    body = {"observation": [0, 0, 0], "action_mask": [1, 0]}
    assert refusal(codec, body) == request_error("/action_mask")


def test_masks_of_zeros_ones_and_booleans_are_read():
    codec = codec_of(IMAGE, ACTION_SPACES["multi-discrete"], has_mask=True)
    mask = [1, 0, True, False, 0, 1, True]
    one = {"observation": BLANK, "action_mask": mask}
    found = codec.decode(json.dumps(one).encode()).inputs["action_mask"]
    assert found.dtype == np.bool_
    assert found.tolist() == [list(map(bool, mask))]
    many = {"observations": [BLANK] * 2, "action_mask": [None, mask]}
    found = codec.decode(json.dumps(many).encode()).inputs["action_mask"]
    assert found.tolist() == [[True] * 7, list(map(bool, mask))]


@pytest.mark.parametrize("mask", [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
def test_every_component_of_an_action_needs_an_allowed_value(mask: list[int]):
    codec = codec_of(IMAGE, ACTION_SPACES["multi-discrete"], has_mask=True)
    body = {"observation": BLANK, "action_mask": mask}
    assert refusal(codec, body) == request_error("/action_mask")


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_actions_of_any_space_leave_as_they_are(name: str):
    space = ACTION_SPACES[name]
    codec = codec_of(IMAGE, space)
    rows = sample(space, 3)
    output = PolicyOutput(actions=stacked(rows))
    many = json.loads(codec.encode(output, is_single=False))["actions"]
    assert many == as_json(rows)
    assert json.loads(codec.encode(output, is_single=True))["action"] == many[0]


def stacked(rows: list[Any]) -> Any:
    if isinstance(rows[0], dict):
        return {key: stacked([row[key] for row in rows]) for key in rows[0]}
    if isinstance(rows[0], tuple):
        return tuple(stacked([row[k] for row in rows]) for k in range(len(rows[0])))
    return np.array(rows)


@settings(REPEATABLE, max_examples=100)
@given(
    values=st.lists(
        st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=7, max_size=7
    )
)
def test_a_state_comes_back_as_it_was_computed(memory_codec: NativeCodec, values: list[float]):
    total = np.array(values[:1], np.float32)
    frames = np.array(values[1:], np.float32).reshape(1, 2, 3)
    output = PolicyOutput(
        actions=np.array([[0, 0]]), state={"total": total, "frames": frames}, q_values=frames[:, 0]
    )
    for is_single in (True, False):
        answer = json.loads(memory_codec.encode(output, is_single=is_single))
        body = {"observation": BLANK} if is_single else {"observations": [BLANK]}
        request = memory_codec.decode(json.dumps({**body, "state": answer["state"]}).encode())
        for name, array in (("total", total), ("frames", frames)):
            found = request.inputs[f"state/{name}"]
            np.testing.assert_array_equal(found.view(np.uint32), array.view(np.uint32))
        assert np.shape(answer["q_values"]) == ((3,) if is_single else (1, 3))


@settings(REPEATABLE, max_examples=150)
@given(
    body=st.dictionaries(KEYS, VALUES, max_size=4),
    given=st.sampled_from([{"observation": BLANK}, {"observations": [BLANK] * 2}, {}]),
)
def test_any_state_is_taken_or_refused_with_an_error_of_ours(memory_codec, body: Any, given: Any):
    with contextlib.suppress(PolicyServingError):
        inputs = memory_codec.decode(json.dumps({**body, **given}).encode()).inputs
        assert all(np.isfinite(array).all() for array in inputs.values())


@settings(REPEATABLE, max_examples=200)
@given(body=st.binary(max_size=60))
def test_any_bytes_are_taken_or_refused_with_an_error_of_ours(codec: NativeCodec, body: bytes):
    # Hypothesis tries constants that it finds in loaded modules, a good body among them.
    with contextlib.suppress(PolicyServingError):
        assert np.isfinite(observations(codec.decode(body))).all()
