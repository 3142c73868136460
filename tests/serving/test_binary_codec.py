"""The binary dialect: the same requests and errors as JSON, and bytes that are what they say."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import gymnasium as gym
import msgpack
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.bundle import read_bundle
from serving.dialects.binary import BinaryCodec, encode_error, frame_id
from serving.dialects.binary_answers import answer_specs
from serving.dialects.native import NativeCodec
from serving.engines.graph import GraphPolicy
from serving.errors import InvalidObservationError, PolicyServingError
from serving.interface import PolicyOutput
from serving.request import ComputeRequest
from serving.spaces import unflatten
from tests.bundles import discrete_policy
from tests.serving.binary_form import columns, floats, pack, unpack
from tests.serving.conftest import LiveServer
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    MEMORY,
    OBSERVATION_SPACES,
    as_json,
    flat,
    manifest_of,
    sample,
)

GOOD = floats(0.5, -1.0, 2.0, 3.0)
REPEATABLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
MASKED = {"discrete": 3, "multi-discrete": 7}


def codecs_of(
    observation: gym.Space[Any], action: gym.Space[Any], **kwargs: Any
) -> tuple[BinaryCodec, NativeCodec]:
    manifest = manifest_of(observation, action, **kwargs)
    settings = {"max_observations_per_request": 8}
    return BinaryCodec("any", 1, manifest, **settings), NativeCodec("any", 1, manifest, **settings)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> BinaryCodec:
    """Of a policy with observations of 4 float32 and 3 actions that can be masked."""
    path = tmp_path_factory.mktemp("codec") / "bundle"
    manifest = read_bundle(discrete_policy().save(path)).manifest
    return BinaryCodec("tiny", 3, manifest, max_observations_per_request=4)


@pytest.fixture(scope="module")
def rich() -> BinaryCodec:
    """Of a policy that takes everything that a request may hold."""
    space, action = spaces.Box(-1, 1, (4,), np.float32), ACTION_SPACES["discrete"]
    return codecs_of(space, action, state=MEMORY, has_reward=True, has_mask=True)[0]


def refusal(codec: BinaryCodec, body: Any) -> tuple[int | None, str, str | None, str]:
    with pytest.raises(PolicyServingError) as caught:
        codec.decode(body if isinstance(body, bytes) else pack(body))
    error = caught.value
    assert "Traceback" not in error.message
    assert 0 < len(error.message) < 2000
    return error.http_status, error.code, error.details.get("pointer"), error.message


MALFORMED = (400, "malformed_request", None)
FRAMES = floats(*range(6))


def wrong(pointer: str) -> tuple[int, str, str]:
    return 422, "invalid_request", pointer


def wrong_observation(pointer: str) -> tuple[int, str, str]:
    return 422, "invalid_observation", pointer


BAD_BODIES: dict[str, tuple[Any, tuple[int, str, str | None]]] = {
    "nothing": (b"", MALFORMED),
    "JSON": (b'{"observation": [1, 2, 3, 4]}', MALFORMED),
    "a byte that is never used": (b"\xc1", MALFORMED),
    "cut short": (pack({"observation": GOOD})[:-1], MALFORMED),
    "a byte too many": (pack({"observation": GOOD}) + b"\x00", MALFORMED),
    "a wrong type, then cut short": (pack({"seed": "x", "observation": GOOD})[:-1], MALFORMED),
    "text that is not UTF-8": (b"\x81\xabobservation\xa2\xff\xfe", MALFORMED),
    "a key that is not UTF-8": (b"\x81\xa2\xff\xfe\x01", MALFORMED),
    "a key that is a map": (b"\x81\xabobservation\x81\x80\x01", MALFORMED),
    "100,000 arrays inside each other": (b"\x81\xabobservation" + b"\x91" * 100_000, MALFORMED),
    "a length without content": (b"\x81\xabobservation\xc6\xff\xff\xff\xff", MALFORMED),
    "an array without content": (b"\x81\xabobservation\xdd\xff\xff\xff\xff", MALFORMED),
    "an array": ([GOOD], wrong("")),
    "a number": (5, wrong("")),
    "nil": (None, wrong("")),
    "an empty map": ({}, wrong("")),
    "a number as a key": ({1: GOOD}, wrong("")),
    "a bin as a key": ({b"observation": GOOD}, wrong("")),
    "neither": ({"deterministic": True}, wrong("")),
    "both": ({"observation": GOOD, "observations": GOOD}, wrong("")),
    "an unknown key": ({"observation": GOOD, "observatoin": 1}, wrong("")),
    "an id, which only frames have": ({"observation": GOOD, "id": 1}, wrong("")),
    "no observations": ({"observations": b""}, wrong("/observations")),
    "too many": ({"observations": GOOD * 5}, (413, "batch_too_large", "/observations")),
    "deterministic as text": ({"observation": GOOD, "deterministic": "x"}, wrong("/deterministic")),
    "deterministic nil": ({"observation": GOOD, "deterministic": None}, wrong("/deterministic")),
    "a negative seed": ({"observation": GOOD, "seed": -1}, wrong("/seed")),
    "a seed beyond 63 bits": ({"observation": GOOD, "seed": 2**63}, wrong("/seed")),
    "no time": ({"observation": GOOD, "timeout_ms": 0}, wrong("/timeout_ms")),
    "time that is no number": ({"observation": GOOD, "timeout_ms": math.nan}, wrong("/timeout_ms")),
    "endless time": ({"observation": GOOD, "timeout_ms": math.inf}, wrong("/timeout_ms")),
    "an unknown output": ({"observation": GOOD, "outputs": ["value", "q"]}, wrong("/outputs/1")),
    "outputs as a bin": ({"observation": GOOD, "outputs": b"value"}, wrong("/outputs")),
    "version as text": ({"observation": GOOD, "version": "3"}, wrong("/version")),
    "a mask too short": ({"observation": GOOD, "action_mask": b"\1\0"}, wrong("/action_mask")),
    "a mask of twos": ({"observation": GOOD, "action_mask": b"\1\2\0"}, wrong("/action_mask/1")),
    "a mask as an array": ({"observation": GOOD, "action_mask": [1, 0]}, wrong("/action_mask")),
    "a mask that forbids all": (
        {"observation": GOOD, "action_mask": bytes(3)},
        wrong("/action_mask"),
    ),
    "one mask for many": (
        {"observations": GOOD * 3, "action_mask": b"\1" * 3},
        wrong("/action_mask"),
    ),
    "one of many masks forbids all": (
        {"observations": GOOD * 2, "action_mask": b"\1\0\1\0\0\0"},
        wrong("/action_mask/1"),
    ),
    "a reward": ({"observation": GOOD, "reward": 1.0}, wrong("/reward")),
    "rewards": ({"observations": GOOD, "rewards": floats(1)}, wrong("/rewards")),
    "a state": ({"observation": GOOD, "state": None}, wrong("/state")),
    "observation nil": ({"observation": None}, wrong_observation("/observation")),
    "observation as numbers": ({"observation": [1.0] * 4}, wrong_observation("/observation")),
    "observation as text": ({"observation": "x" * 16}, wrong_observation("/observation")),
    "observation as a map": ({"observation": {}}, wrong_observation("/observation")),
    "too short": ({"observation": GOOD[:12]}, wrong_observation("/observation")),
    "too long": ({"observation": GOOD * 2}, wrong_observation("/observation")),
    "nothing inside": ({"observation": b""}, wrong_observation("/observation")),
    "half a row": ({"observations": GOOD + GOOD[:8]}, wrong_observation("/observations")),
    "a list of rows": ({"observations": [GOOD, GOOD]}, wrong_observation("/observations")),
    "NaN": ({"observation": floats(1, math.nan, 3, 4)}, wrong_observation("/observation/1")),
    "minus infinity": (
        {"observations": GOOD + floats(1, 2, 3, -math.inf)},
        wrong_observation("/observations/1/3"),
    ),
    "infinities that cancel": (
        {"observation": floats(1, 2, math.inf, -math.inf)},
        wrong_observation("/observation/2"),
    ),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused_with_its_place(codec: BinaryCodec, name: str):
    body, expected = BAD_BODIES[name]
    assert refusal(codec, body)[:3] == expected
    data = body if isinstance(body, bytes) else pack(body)
    row = codec.plain(data)
    if row is not None:
        assert codec.collect([row, GOOD]) is None


BAD_RICH: dict[str, tuple[Any, tuple[int, str, str | None]]] = {
    "rewards for one": ({"observation": GOOD, "rewards": floats(1)}, wrong("/rewards")),
    "a reward for many": ({"observations": GOOD, "reward": 1.0}, wrong("/reward")),
    "a reward as text": ({"observation": GOOD, "reward": "1"}, wrong("/reward")),
    "a reward of true": ({"observation": GOOD, "reward": True}, wrong("/reward")),
    "a reward that is nil": ({"observation": GOOD, "reward": None}, wrong("/reward")),
    "a reward that is no number": ({"observation": GOOD, "reward": math.nan}, wrong("/reward")),
    "a reward beyond float32": ({"observation": GOOD, "reward": 1e39}, wrong("/reward")),
    "a reward too few": ({"observations": GOOD * 2, "rewards": floats(1)}, wrong("/rewards")),
    "rewards as an array": ({"observations": GOOD, "rewards": [1.0]}, wrong("/rewards")),
    "one reward not finite": (
        {"observations": GOOD * 2, "rewards": floats(1, math.inf)},
        wrong("/rewards/1"),
    ),
    "state as a bin": ({"observation": GOOD, "state": FRAMES}, wrong("/state")),
    "a state incomplete": ({"observation": GOOD, "state": {"frames": FRAMES}}, wrong("/state")),
    "a state too short": (
        {"observation": GOOD, "state": {"frames": FRAMES, "total": b""}},
        wrong("/state/total"),
    ),
    "a state for one of two": (
        {"observations": GOOD * 2, "state": {"frames": FRAMES * 2, "total": floats(1)}},
        wrong("/state/total"),
    ),
    "a state with a name too many": (
        {"observation": GOOD, "state": {"frames": FRAMES, "total": floats(1), "h": b""}},
        wrong("/state/h"),
    ),
    "a state not finite": (
        {
            "observation": GOOD,
            "state": {"frames": floats(0, 0, 0, 0, math.nan, 0), "total": floats(1)},
        },
        wrong("/state/frames/1/1"),
    ),
    "a state of many not finite": (
        {"observations": GOOD * 2, "state": {"frames": FRAMES * 2, "total": floats(1, math.nan)}},
        wrong("/state/1/total"),
    ),
}


@pytest.mark.parametrize("name", BAD_RICH)
def test_what_stands_beside_is_checked_too(rich: BinaryCodec, name: str):
    body, expected = BAD_RICH[name]
    assert refusal(rich, body)[:3] == expected


def test_an_error_says_the_bytes_found_and_expected(codec: BinaryCodec):
    message = refusal(codec, {"observation": bytes(12)})[3]
    assert "found 12 bytes" in message
    assert "expected 4 float32 = 16 bytes" in message
    message = refusal(codec, {"observation": [1, 2, 3, 4]})[3]
    assert "found an array, expected a bin" in message
    message = refusal(codec, {"observation": floats(1, math.nan, 2, 3)})[3]
    assert "nan" in message


NESTED: dict[str, tuple[str, Any, str]] = {
    "below its start": ("discrete", struct.pack("<q", -3), ""),
    "beyond its end": ("discrete", struct.pack("<q", 3), ""),
    "four bytes for an int64": ("discrete", struct.pack("<i", 1), ""),
    "one component out of range": ("multi-discrete", struct.pack("<2q", 1, 3), "/1"),
    "in the second row of a grid": ("grid", struct.pack("<4q", 0, 0, 2, 0), "/1/0"),
    "a two": ("multi-binary", bytes([0, 1, 0, 1, 2, 0]), "/1/1"),
    "minus one": ("multi-binary", bytes([0, 1, 255, 1, 0, 0]), "/0/2"),
    "a short image": ("image", bytes(47), ""),
    "not finite in float64": ("doubles", struct.pack("<4d", 0, 0, math.inf, 0), "/1/0"),
    "a bin for a Dict": ("dict", bytes(8), ""),
    "an array for a Dict": ("dict", [], ""),
    "a Dict without keys": ("dict", {}, ""),
    "a bin for a Tuple": ("tuple", bytes(8), ""),
    "a Tuple too short": ("tuple", [bytes(8)], ""),
    "an unnameable key missing": ("unnameable", {'quo"te': bytes(8)}, ""),
    "an unnameable key out of range": (
        "unnameable",
        {'quo"te': bytes(8), "back\\slash": struct.pack("<q", 4)},
        "/back\\slash",
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_the_place_in_any_space_is_named(name: str):
    space_name, row, place = NESTED[name]
    codec, _ = codecs_of(OBSERVATION_SPACES[space_name], ACTION_SPACES["discrete"])
    assert refusal(codec, {"observation": row})[:3] == wrong_observation(f"/observation{place}")


@pytest.mark.parametrize("path", ["z/last", "a.b[0] `c` ~", "class/0"])
def test_the_place_inside_a_dict_is_a_json_pointer(path: str):
    space = OBSERVATION_SPACES["dict"]
    codec, _ = codecs_of(space, ACTION_SPACES["discrete"])
    body = columns(space, sample(space, 2))
    expected = {"z/last": "/z~1last", "a.b[0] `c` ~": "/a.b[0] `c` ~0", "class/0": "/class/0"}[path]
    if path == "class/0":
        body["class"]["0"] = bytes(15)
    else:
        body[path] += b"\x00"
    assert refusal(codec, {"observations": body})[:3] == wrong_observation(
        f"/observations{expected}"
    )


def test_leaves_of_unequal_lengths_are_refused():
    space = OBSERVATION_SPACES["dict"]
    codec, _ = codecs_of(space, ACTION_SPACES["discrete"])
    body = columns(space, sample(space, 2))
    body["z/last"] = bytes(24)
    status, code, pointer, message = refusal(codec, {"observations": body})
    assert (status, code, pointer) == wrong_observation("/observations")
    assert "'observation/z~1last': 3" in message


def test_rows_without_bytes_cannot_be_counted_but_one_can_be_asked():
    codec, _ = codecs_of(spaces.Box(-1, 1, (0,), np.float32), ACTION_SPACES["discrete"])
    assert refusal(codec, {"observations": b""})[:3] == wrong("/observations")
    request = codec.decode(pack({"observation": b""}))
    assert request.inputs["observation"].shape == (1, 0)
    assert refusal(codec, {"observation": b"x"})[:3] == wrong_observation("/observation")


def test_a_leaf_without_bytes_says_nothing_of_the_number():
    space = spaces.Dict({"a": spaces.Box(-1, 1, (0,)), "b": spaces.Discrete(3)})
    codec, _ = codecs_of(space, ACTION_SPACES["discrete"])
    request = codec.decode(pack({"observations": {"a": b"", "b": bytes(16)}}))
    assert {name: array.shape for name, array in request.inputs.items()} == {
        "observation/a": (2, 0),
        "observation/b": (2,),
    }


def test_bool_arrays_hold_only_zeros_and_ones():
    space = spaces.Box(0, 1, (3,), np.bool_)
    codec, _ = codecs_of(space, ACTION_SPACES["discrete"])
    request = codec.decode(pack({"observation": b"\0\1\1"}))
    assert request.inputs["observation"].dtype == np.bool_
    assert request.inputs["observation"].tolist() == [[False, True, True]]
    assert refusal(codec, {"observation": b"\0\2\1"})[:3] == wrong_observation("/observation/1")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_among_many_is_found(codec: BinaryCodec, bad: float):
    """Few numbers and many are looked at in different ways."""
    rows = [GOOD] * 40
    assert codec.collect(rows) is not None
    rows[33] = floats(1, 2, bad, 4)
    assert codec.collect(rows) is None


def test_numbers_whose_squares_overflow_are_still_finite(codec: BinaryCodec):
    largest = float(np.finfo(np.float32).max)
    request = codec.decode(pack({"observation": floats(*[largest] * 4)}))
    assert request.inputs["observation"].tolist() == [[largest] * 4]
    wide, _ = codecs_of(spaces.Box(-1, 1, (50,), np.float32), ACTION_SPACES["discrete"])
    request = wide.decode(pack({"observation": floats(*[largest] * 50)}))
    assert request.inputs["observation"].tolist() == [[largest] * 50]


def test_any_form_of_msgpack_says_the_same(codec: BinaryCodec):
    """Encoders choose among lengths of one, two and four bytes."""
    long = b"\xdf\x00\x00\x00\x01\xd9\x0bobservation\xc6\x00\x00\x00\x10" + GOOD
    assert codec.plain(long) is None  # the quick look knows the shortest form
    assert codec.decode(long).inputs["observation"].tolist() == [[0.5, -1.0, 2.0, 3.0]]


@st.composite
def questions(draw: st.DrawFn) -> tuple[BinaryCodec, NativeCodec, dict[str, Any], dict[str, Any]]:
    """A policy's two codecs, and one question as msgpack and as JSON hold it."""
    space = OBSERVATION_SPACES[draw(st.sampled_from(sorted(OBSERVATION_SPACES)))]
    action = draw(st.sampled_from(sorted(MASKED)))
    has_memory, has_reward = draw(st.booleans()), draw(st.booleans())
    codecs = codecs_of(
        space,
        ACTION_SPACES[action],
        state=MEMORY if has_memory else None,
        has_reward=has_reward,
        has_mask=True,
    )
    n = draw(st.none() | st.integers(1, 8))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = sample(space, n or 1, seed=draw(st.integers(0, 2**31)))
    many = columns(space, rows)
    binary: dict[str, Any] = {"observations" if n else "observation": many}
    plain: dict[str, Any] = {"observations": rows} if n else {"observation": rows[0]}
    if draw(st.booleans()):
        mask = generator.random((n or 1, MASKED[action])) < 0.5
        mask[:, [0, -1]] = True  # of each component at least one
        if action == "multi-discrete":
            mask[:, 3] = True
        binary["action_mask"], plain["action_mask"] = mask.tobytes(), mask if n else mask[0]
    elif draw(st.booleans()):
        binary["action_mask"], plain["action_mask"] = None, [None] * n if n else None
    if has_memory and draw(st.booleans()):
        state = {
            "total": generator.normal(size=n or 1).astype("<f4"),
            "frames": generator.normal(size=(n or 1, 2, 3)).astype("<f4"),
        }
        binary["state"] = {name: array.tobytes() for name, array in state.items()}
        each = [{name: array[row] for name, array in state.items()} for row in range(n or 1)]
        plain["state"] = each if n else each[0]
    if has_reward and draw(st.booleans()):
        rewards = generator.normal(size=n or 1).astype("<f4")
        name = "rewards" if n else "reward"
        binary[name] = rewards.tobytes() if n else float(rewards[0])
        plain[name] = rewards if n else rewards[0]
    common = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "deterministic": st.booleans(),
                "seed": st.none() | st.integers(0, 2**63 - 1),
                "timeout_ms": st.none() | st.integers(1, 1000) | st.floats(0.5, 1e6),
                "outputs": st.none() | st.lists(st.sampled_from(["value", "action_logp"])),
                "version": st.none() | st.integers(0, 9),
            },
        )
    )
    return *codecs, {**binary, **common}, {**plain, **common}


def assert_same(found: ComputeRequest, expected: ComputeRequest) -> None:
    assert found.inputs.keys() == expected.inputs.keys()
    for name, array in expected.inputs.items():
        assert found.inputs[name].dtype == array.dtype
        np.testing.assert_array_equal(found.inputs[name], array)
        flags = found.inputs[name].flags
        assert flags.c_contiguous
        assert flags.aligned
    for field in ("n", "is_single", "deterministic", "seed", "timeout_s", "outputs", "version"):
        assert getattr(found, field) == getattr(expected, field)


@settings(REPEATABLE, max_examples=150)
@given(question=questions())
def test_msgpack_and_json_ask_the_same(question: Any):
    binary, native, packed, plain = question
    expected = native.decode(json.dumps({key: as_json_value(v) for key, v in plain.items()}))
    assert_same(binary.decode(pack(packed)), expected)
    identifier, request = binary.decode_frame(pack({"id": 7, **packed}))
    assert identifier == 7
    assert_same(request, expected)
    row = binary.plain(pack(packed))
    assert (row is not None) == (list(packed) == ["observation"])
    if row is not None:
        for name, array in (binary.collect([row, row, row]) or {}).items():
            np.testing.assert_array_equal(array, np.repeat(expected.inputs[name], 3, axis=0))


def as_json_value(value: Any) -> Any:
    return (
        value
        if value is None or isinstance(value, str | bool | int | float)
        else (
            [None if each is None else as_json(each) for each in value]
            if isinstance(value, list)
            else as_json(value)
        )
    )


@pytest.mark.parametrize("name", OBSERVATION_SPACES)
def test_plain_bodies_of_many_callers_become_one_batch(name: str):
    space = OBSERVATION_SPACES[name]
    codec, _ = codecs_of(space, ACTION_SPACES["discrete"])
    rows = sample(space, 5)
    found = codec.collect([codec.plain(pack({"observation": columns(space, [r])})) for r in rows])
    assert found is not None
    for index, row in enumerate(rows):
        numbers = np.concatenate([each[index].ravel() for each in found.values()])
        np.testing.assert_array_equal(numbers, flat(row))


def test_a_plain_look_takes_nothing_that_is_wrong(codec: BinaryCodec):
    for body in (
        b"",
        pack({"observation": GOOD[:-1]}),
        pack({"observation": GOOD + b"\0"}),
        pack({"observation": GOOD, "seed": 1}),
        pack({"observations": GOOD}),
        pack({"observatiom": GOOD}),
    ):
        assert codec.plain(body) is None
    assert codec.plain(bytearray(pack({"observation": GOOD}))) == GOOD


@settings(REPEATABLE, max_examples=200)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_taken_or_refused_with_an_error_of_ours(rich: BinaryCodec, data: bytes):
    for body in (data, b"\x81\xabobservation" + data, pack({"observation": GOOD})[:-20] + data):
        error: PolicyServingError | None = None
        try:
            assert rich.decode(body).inputs
        except PolicyServingError as exc:
            error = exc
        assert error is None or error.http_status in (400, 413, 422)
        frame_id(body)


# --- answers ---


def identity(codec: str = "any", version: int = 1) -> dict[str, Any]:
    return {"policy": codec, "version": version, "policy_id": "0123456789ab"}


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_an_answer_s_bytes_are_what_its_description_says(name: str):
    space = ACTION_SPACES[name]
    observation = OBSERVATION_SPACES["vector"]
    codec, _ = codecs_of(observation, space, state=MEMORY)
    described = {
        spec.name: spec for spec in answer_specs(manifest_of(observation, space, state=MEMORY))
    }
    actions = sample(space, 3)
    batch = PolicyOutput(
        actions=stacked(space, actions),
        action_logp=np.array([-1, -2, -3], np.float32),
        q_values=np.arange(6, dtype=np.float32).reshape(3, 2),
        state={"total": np.array([1, 2, 3], np.float32), "frames": np.ones((3, 2, 3), np.float32)},
    )
    answer = unpack(codec.encode(batch, is_single=False))
    for leaf, path in paths(space):
        values = answer["actions"]
        for key in path:
            values = values[key]
        spec = described["/".join(["action", *(str(k).replace("/", "~1") for k in path)])]
        found = np.frombuffer(values, spec.dtype).reshape(3, *spec.shape)
        expected = [at(action, path) for action in actions]
        assert found.dtype == leaf.dtype
        np.testing.assert_array_equal(found, np.array(expected))
    assert answer["action_logp"] == floats(-1, -2, -3)
    assert answer["q_values"] == floats(*range(6))
    assert described["q_values"].to_json() == {
        "name": "q_values",
        "dtype": "float32",
        "shape": [None],
    }
    assert answer["state"] == {"total": floats(1, 2, 3), "frames": floats(*[1] * 18)}
    assert {key: answer[key] for key in identity()} == identity()
    each = codec.encode_each(PolicyOutput(batch.actions, state=batch.state))
    singles = [codec.encode(row, is_single=True) for row in batch_rows(batch)]
    assert each == singles
    assert set(unpack(each[0])) == {"action", "state", *identity()}


def batch_rows(batch: PolicyOutput) -> list[PolicyOutput]:
    return list(PolicyOutput(batch.actions, state=batch.state).rows())


def stacked(space: gym.Space[Any], actions: list[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: stacked(space[key], [each[key] for each in actions]) for key in sorted(space)}
    if isinstance(space, spaces.Tuple):
        return tuple(stacked(child, [a[k] for a in actions]) for k, child in enumerate(space))
    return np.array(actions, space.dtype)


def paths(space: gym.Space[Any], path: tuple[Any, ...] = ()) -> list[tuple[Any, tuple[Any, ...]]]:
    if isinstance(space, spaces.Dict):
        return [each for key in space for each in paths(space[key], (*path, key))]
    if isinstance(space, spaces.Tuple):
        return [each for k, child in enumerate(space) for each in paths(child, (*path, k))]
    return [(space, path)]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("size", [1, 63, 64, 16_384])
def test_single_answers_of_a_batch_are_those_of_single_requests(size: int):
    """Lengths of one, two and four bytes."""
    space = spaces.Box(-1, 1, (size,), np.float32)
    codec, _ = codecs_of(OBSERVATION_SPACES["vector"], space)
    batch = PolicyOutput(np.arange(3 * size, dtype=np.float32).reshape(3, size))
    for row, answer in zip(batch.rows(), codec.encode_each(batch), strict=True):
        assert answer == codec.encode(row, is_single=True)
        assert unpack(answer) == {"action": row.actions.tobytes(), **identity()}


def test_actions_of_another_dtype_are_written_in_the_described_one():
    codec, _ = codecs_of(OBSERVATION_SPACES["vector"], spaces.Discrete(3))
    answer = unpack(codec.encode(PolicyOutput(np.array([2], np.int32)), is_single=True))
    assert answer["action"] == struct.pack("<q", 2)


# --- frames ---


@pytest.mark.parametrize("identifier", [0, 1, 2**63 - 1, "", "step-7", "\u20ac" * 42])
def test_an_id_is_echoed(codec: BinaryCodec, identifier: int | str):
    frame = pack({"observation": GOOD, "id": identifier})
    found, request = codec.decode_frame(frame)
    assert found == identifier
    assert frame_id(frame) == identifier
    output = PolicyOutput(np.array([1]))
    answer = unpack(codec.encode_frame(output, is_single=True, identifier=found))
    assert answer.pop("id") == identifier
    assert answer == unpack(codec.encode(output, is_single=True))
    assert request.is_single


@pytest.mark.parametrize(
    "identifier", [-1, 2**63, 1.5, None, True, b"x", [1], "x" * 129, "\u20ac" * 43]
)
def test_another_id_is_refused_and_not_echoed(codec: BinaryCodec, identifier: Any):
    frame = pack({"observation": GOOD, "id": identifier})
    with pytest.raises(PolicyServingError) as caught:
        codec.decode_frame(frame)
    assert (caught.value.code, caught.value.details["pointer"]) == ("invalid_request", "/id")
    assert frame_id(frame) is None


def test_a_frame_without_an_id_is_answered_without_one(codec: BinaryCodec):
    identifier, _ = codec.decode_frame(pack({"observation": GOOD}))
    assert identifier is None
    output = PolicyOutput(np.array([1]))
    assert codec.encode_frame(output, is_single=True, identifier=None) == codec.encode(
        output, is_single=True
    )


def test_an_error_frame_holds_the_problem_and_the_id():
    error = InvalidObservationError("found 1, expected 2", pointer="/observation")
    problem = {
        "type": "about:blank",
        "title": "Invalid observation",
        "status": 422,
        "code": "invalid_observation",
        "detail": "found 1, expected 2",
        "pointer": "/observation",
    }
    assert unpack(encode_error(error, 5)) == {"id": 5, "error": problem}
    assert unpack(encode_error(error, None)) == {"error": problem}


# --- over HTTP ---

MSGPACK = {"Content-Type": "application/msgpack"}


@pytest.mark.parametrize("name", ["application/msgpack", "application/x-msgpack"])
@pytest.mark.parametrize("server", ["live_server", "ordinary_server"])
def test_a_body_is_answered_with_the_action_of_the_policy(
    request: pytest.FixtureRequest, server: str, name: str
):
    live: LiveServer = request.getfixturevalue(server)
    policy = request.getfixturevalue("discrete")
    rows = policy.observations(5)
    expected = policy.answers(rows, np.zeros((5, 3)))
    for row, action in zip(rows, expected["action"], strict=True):
        response = live.post(
            "discrete", pack({"observation": row.tobytes()}), {"Content-Type": name}
        )
        assert (response.status, response.headers["content-type"]) == (200, "application/msgpack")
        assert unpack(response.body)["action"] == struct.pack("<q", action)
    body = pack({"observations": rows.tobytes(), "outputs": ["value"]})
    answer = unpack(live.post("discrete", body, MSGPACK).body)
    assert answer["actions"] == expected["action"].astype("<i8").tobytes()
    np.testing.assert_allclose(np.frombuffer(answer["value"], "<f4"), expected["value"], rtol=1e-5)


@pytest.mark.parametrize("server", ["live_server", "ordinary_server"])
def test_a_bad_body_is_answered_with_problem_json(request: pytest.FixtureRequest, server: str):
    live: LiveServer = request.getfixturevalue(server)
    response = live.post("discrete", pack({"observation": floats(1, 2, math.nan, 4)}), MSGPACK)
    assert response.status == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["pointer"] == "/observation/2"


def test_the_description_lists_the_arrays_of_an_answer(live_server: LiveServer):
    described = live_server.request("GET", "/v1/policies/discrete").json()
    assert described["answers"] == [
        {"name": "action", "dtype": "int64", "shape": []},
        {"name": "action_logp", "dtype": "float32", "shape": []},
        {"name": "value", "dtype": "float32", "shape": []},
        {"name": "action_dist_inputs", "dtype": "float32", "shape": [None]},
    ]


def test_every_tiny_policy_answers_msgpack_as_its_twin(
    tiny_policies: dict[str, GraphPolicy], tiny_bundles: dict[str, Path]
):
    """Real graphs take the arrays that the codec makes, and their answers fit its description."""
    assert tiny_bundles
    for name, policy in tiny_policies.items():
        codec = BinaryCodec(name, 1, policy.manifest, max_observations_per_request=8)
        inputs = policy.inputs.example(3)
        body = pack({"observations": nested(policy.manifest.observation_space, inputs)})
        request = codec.decode(body)
        output = policy.compute_conformed(request.inputs)
        answer = unpack(codec.encode(output, is_single=False))
        expected = policy.compute_conformed(inputs)
        assert flat_bytes(answer["actions"]) == flat_bytes(expected.actions), name


def nested(space: Any, inputs: dict[str, Any]) -> Any:
    return bins(unflatten(space, "observation", inputs))


def bins(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: bins(each) for key, each in value.items()}
    return [bins(each) for each in value] if isinstance(value, tuple) else value.tobytes()


def flat_bytes(value: Any) -> list[bytes]:
    if isinstance(value, dict):
        return [each for key in sorted(value) for each in flat_bytes(value[key])]
    if isinstance(value, list | tuple):
        return [each for child in value for each in flat_bytes(child)]
    return [value if isinstance(value, bytes) else value.tobytes()]


def test_the_reference_implementation_reads_our_bytes(codec: BinaryCodec):
    answer = codec.encode(PolicyOutput(np.array([1])), is_single=True)
    unpacker = msgpack.Unpacker(strict_map_key=True)
    unpacker.feed(answer)
    assert next(unpacker)["action"] == struct.pack("<q", 1)
    with pytest.raises(msgpack.OutOfData):
        unpacker.unpack()
