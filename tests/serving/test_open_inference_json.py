"""`infer` with tensors in JSON: what is answered, and every refusal."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.bundles import LinearPolicy
from tests.serving.conftest import LiveServer
from tests.serving.open_inference import assert_error, body_of, infer, outputs_of, tensor

ROWS = np.array([[0.5, -1.0, 2.0, 3.0], [1.0, 0.25, -2.0, 0.0]], np.float32)
GOOD = body_of(tensor("observation", ROWS))


def expected(policy: LinearPolicy, rows: Any = ROWS, **more: Any) -> dict[str, Any]:
    return policy.answers(rows, np.zeros((len(rows), policy.noise_size)), **more)


def test_an_answer_holds_every_output_and_names_its_model(live_server, discrete: LinearPolicy):
    response = infer(live_server, GOOD)
    content = response.json()
    assert response.headers["content-type"] == "application/json"
    assert (content["model_name"], content["model_version"]) == ("discrete", "1")
    assert "id" not in content
    found = outputs_of(response)
    assert list(found) == ["action", "action_logp", "value", "action_dist_inputs"]
    for name, values in found.items():
        np.testing.assert_allclose(values, expected(discrete)[name], rtol=1e-5)
    assert content["outputs"][0]["datatype"] == "INT64"
    assert content["outputs"][3]["shape"] == [2, 3]


def test_box_actions_come_as_the_environment_takes_them(live_server, box: LinearPolicy):
    rows = box.observations(5)
    found = outputs_of(infer(live_server, body_of(tensor("observation", rows)), model="box"))
    np.testing.assert_allclose(found["action"], expected(box, rows)["action"], rtol=1e-5)


def test_flat_and_nested_data_are_the_same(live_server: LiveServer):
    nested = {**tensor("observation", ROWS), "data": ROWS.tolist()}
    spaced = json.dumps(body_of(nested), indent=2 * " " * 40).encode()
    first = outputs_of(infer(live_server, GOOD))
    for body in (body_of(nested), spaced):
        second = outputs_of(infer(live_server, body))
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


def test_a_version_in_the_path_is_answered(live_server: LiveServer):
    assert infer(live_server, GOOD, version="1").json()["model_version"] == "1"


@pytest.mark.parametrize("request_id", ["a-1", "", "é\n"])
def test_the_id_is_echoed(live_server: LiveServer, request_id: str):
    assert infer(live_server, {**GOOD, "id": request_id}).json()["id"] == request_id


def test_outputs_come_as_asked_and_in_that_order(live_server, discrete: LinearPolicy):
    asked = [{"name": "value"}, {"name": "action", "parameters": {"binary_data": False}}]
    found = outputs_of(infer(live_server, {**GOOD, "outputs": asked}))
    assert list(found) == ["value", "action"]
    np.testing.assert_array_equal(found["action"], expected(discrete)["action"])


@pytest.mark.parametrize(
    "more",
    [
        {"model_name": "another", "unknown": [1]},
        {"parameters": {}},
        {"parameters": None, "outputs": None},
        {"outputs": []},
        {"parameters": {"our_own": 1, "priority": 3, "timeout": 0, "sequence_id": 0}},
    ],
)
def test_what_is_not_ours_is_passed_over(live_server: LiveServer, more: Any):
    assert (
        outputs_of(infer(live_server, {**GOOD, **more})).keys()
        == outputs_of(infer(live_server, GOOD)).keys()
    )


@pytest.mark.parametrize("content_type", [None, "application/json", "text/plain"])
def test_the_content_type_does_not_matter(live_server: LiveServer, content_type: str | None):
    headers = {} if content_type is None else {"content-type": content_type}
    assert infer(live_server, GOOD, headers=headers).status == 200


@pytest.mark.parametrize(
    "values",
    [
        ROWS.astype(np.float64),
        np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.int64),
        np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.uint8),
    ],
)
def test_numbers_of_another_datatype_are_taken_if_they_fit(
    live_server, discrete: LinearPolicy, values: Any
):
    found = outputs_of(infer(live_server, body_of(tensor("observation", values))))
    np.testing.assert_allclose(
        found["value"], expected(discrete, values.astype(np.float32))["value"], rtol=1e-5
    )


def test_a_mask_in_json_is_true_and_false_or_0_and_1(live_server, discrete: LinearPolicy):
    mask = np.array([[False, True, True], [True, False, False]])
    wanted = expected(discrete, mask=mask)["action"]
    for data in (mask.ravel().tolist(), mask.astype(int).tolist()):
        masks = {**tensor("action_mask", mask), "data": data}
        found = outputs_of(infer(live_server, body_of(GOOD["inputs"][0], masks)))
        np.testing.assert_array_equal(found["action"], wanted)


def wrong(**changes: Any) -> dict[str, Any]:
    """The good request with its one input changed; None takes a field away."""
    changed = {**GOOD["inputs"][0], **changes}
    return body_of({key: value for key, value in changed.items() if value is not None})


HUGE = 2**60
REFUSED: list[tuple[str, Any, list[str]]] = [
    ("an unknown output", {**GOOD, "outputs": [{"name": "q"}]}, ["'q'", "action_logp"]),
    ("an output twice", {**GOOD, "outputs": [{"name": "value"}] * 2}, ["'value'", "twice"]),
    ("no input", body_of(), ["'observation' is missing"]),
    ("an unknown input", body_of(*GOOD["inputs"], tensor("x", ROWS)), ["'x'", "observation"]),
    ("the noise", body_of(*GOOD["inputs"], tensor("noise", ROWS)), ["'noise'"]),
    ("an input twice", body_of(*GOOD["inputs"] * 2), ["'observation'", "twice"]),
    ("text", wrong(data=["1"] * 8), ["'observation'", "`str`"]),
    ("another datatype", wrong(datatype="INT64", data=[0.5] * 8), ["'observation'", "INT64"]),
    ("bytes", wrong(datatype="BYTES", data=["a"] * 8), ["'observation'", "BYTES"]),
    ("an unknown datatype", wrong(datatype="FP31"), ["'FP31'", "FP32"]),
    ("half floats", wrong(datatype="FP16"), ["FP16", "binary"]),
    ("another rank", wrong(shape=[8]), ["'observation'", "[8]", "[-1, 4]"]),
    ("another width", wrong(shape=[4, 2]), ["'observation'", "[4, 2]"]),
    ("too few", wrong(shape=[3, 4]), ["'observation'", "[8]", "12"]),
    ("too many", wrong(shape=[1, 4]), ["'observation'", "4 elements"]),
    ("nested otherwise", wrong(data=ROWS.reshape(4, 2).tolist()), ["[4, 2]", "[2, 4]"]),
    ("ragged", wrong(data=[[1.0] * 4, [1.0] * 3]), ["'observation'"]),
    ("nested too deep", wrong(data=[[[1.0] * 4] * 2]), ["'observation'"]),
    ("a huge integer", wrong(datatype="INT64", data=[10**40] * 8), ["'observation'"]),
    ("a huge byte", wrong(datatype="UINT8", data=[256] * 8), ["'observation'"]),
    ("a huge number", wrong(data=[1e300] * 8), ["'observation'", "inf", "[0, 0]"]),
    ("a number beyond all", json.dumps(GOOD).replace("0.5", "1e999").encode(), []),
    ("a huge dimension", wrong(shape=[HUGE, 4]), ["at most 1024"]),
    ("huge dimensions", wrong(shape=[HUGE] * 8), ["'observation'"]),
    ("a dimension beyond 64 bits", wrong(shape=[2**70, 4]), []),
    ("many dimensions", wrong(shape=[1] * 5000), ["'observation'"]),
    ("a negative dimension", wrong(shape=[-2, 4]), ["[-2, 4]"]),
    ("a negative width", wrong(shape=[2, -4]), ["[2, -4]"]),
    ("half a dimension", wrong(shape=[2.5, 4]), ["shape"]),
    ("a scalar", wrong(shape=[], data=[1.0]), ["[-1, 4]"]),
    ("an empty batch", wrong(shape=[0, 4], data=[]), ["[0, 4]", "at least 1"]),
    ("too large a batch", wrong(shape=[1025, 4], data=[0.0] * 4100), ["1025", "1024"]),
    ("no data", wrong(data=None), ["neither", "binary_data_size"]),
    ("no name", wrong(name=None), ["name"]),
    ("no shape", wrong(shape=None), ["shape"]),
    ("no datatype", wrong(datatype=None), ["datatype"]),
    ("a list", [], []),
    ("null", None, []),
    ("no inputs", {}, ["inputs"]),
    ("a number for an id", {**GOOD, "id": 5}, ["id"]),
    ("NaN", wrong(data=[float("nan")] * 8), ["NaN", "not JSON"]),
    ("Infinity", wrong(data=[float("inf")] * 8), ["Infinity", "not JSON"]),
    ("nothing", b"", ["not JSON"]),
    ("half a body", json.dumps(GOOD).encode()[:-5], ["not JSON"]),
    ("no text", b"\xff\xfe", ["not JSON"]),
    ("deep", b"[" * 50_000, []),
    ("deep data", json.dumps(GOOD).replace("[0.5", "[" * 40_000).encode(), []),
    ("deep and closed", b'{"inputs":' + b"[" * 20_000 + b"]" * 20_000 + b"}", []),
    ("a sequence", {**GOOD, "parameters": {"sequence_id": 5}}, ["sequence extension"]),
    ("a named sequence", {**GOOD, "parameters": {"sequence_id": "a"}}, ["sequence extension"]),
    ("a start", {**GOOD, "parameters": {"sequence_start": True}}, ["sequence extension"]),
    ("a deterministic 1", {**GOOD, "parameters": {"deterministic": 1}}, ["deterministic"]),
    ("a negative seed", {**GOOD, "parameters": {"seed": -1}}, ["seed"]),
    ("a long timeout", {**GOOD, "parameters": {"timeout": 2**63}}, ["timeout"]),
    (
        "classes",
        {**GOOD, "outputs": [{"name": "action", "parameters": {"classification": 2}}]},
        ["classification", "not offered"],
    ),
    (
        "shared memory",
        wrong(data=None, parameters={"shared_memory_region": "r"}),
        ["shared_memory_region", "not offered"],
    ),
]


@pytest.mark.parametrize(
    ("body", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_is_wrong_is_refused_with_words(live_server: LiveServer, body: Any, words: list[str]):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    text = assert_error(infer(live_server, body), 400, *words)
    assert len(text) < 700


@pytest.mark.parametrize(
    ("path", "words"), [("nobody", "there is box"), ("discrete/versions/7", "version 1")]
)
def test_who_is_not_served_is_not_found(live_server: LiveServer, path: str, words: str):
    response = live_server.request("POST", f"/v2/models/{path}/infer", json.dumps(GOOD).encode())
    assert_error(response, 404, words)


def test_a_policy_without_a_mask_takes_none(live_server: LiveServer, box: LinearPolicy):
    rows, mask = box.observations(1), np.ones((1, 2), np.bool_)
    body = body_of(tensor("observation", rows), tensor("action_mask", mask))
    assert_error(infer(live_server, body, model="box"), 400, "'action_mask'")


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones((2, 4), np.bool_), "[2, 4]"),
        (np.ones((1, 3), np.bool_), "batch sizes differ"),
        (np.zeros((2, 3), np.bool_), "allows none"),
        (np.full((2, 3), 2), "0, 1, true or false"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(live_server: LiveServer, mask: Any, words: str):
    body = body_of(*GOOD["inputs"], tensor("action_mask", mask))
    assert_error(infer(live_server, body), 400, words)


def test_a_bool_that_is_none_is_refused(live_server: LiveServer):
    mask = {**tensor("action_mask", np.ones((2, 3), np.bool_)), "data": [2, 0, 0, 1, 1, 1]}
    assert_error(infer(live_server, body_of(*GOOD["inputs"], mask)), 400, "true, false, 0 or 1")


def test_a_body_over_the_limit_is_too_large(live_server: LiveServer):
    assert_error(infer(live_server, b" " * 100_001), 413, "100000 bytes")
    chunks = (b" " * 1000 for _ in range(101))
    response = live_server.request("POST", "/v2/models/discrete/infer", chunks)
    assert_error(response, 413, "100000 bytes")


def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(live_server: LiveServer):
    with live_server.connect() as connection:
        head = b"POST /v2/models/discrete/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 100001\r\n"
        connection.sendall(head + b"\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 413 ")


def test_a_body_in_chunks_is_taken(live_server: LiveServer):
    data = json.dumps(GOOD).encode()
    chunks = (data[k : k + 7] for k in range(0, len(data), 7))
    response = live_server.request("POST", "/v2/models/discrete/infer", chunks)
    assert response.json() == infer(live_server, GOOD).json()
