"""`infer` with raw tensors, raw bodies, compressed bodies, and third-party clients over HTTP."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from serving.config import ServingConfig
from serving.dialects.open_inference.compression import decompressed
from serving.errors import BodyTooLargeError
from tests.bundles import LinearPolicy
from tests.serving.conftest import LiveServer, serving_services
from tests.serving.numpy_policies import services_of, summing_policy
from tests.serving.open_inference import (
    LENGTH,
    assert_error,
    body_of,
    infer,
    outputs_of,
    tensor,
)

ROWS = np.array([[0.5, -1.0, 2.0, 3.0], [1.0, 0.25, -2.0, 0.0]], np.float32)
MASK = np.array([[False, True, True], [True, False, False]])
PATH = "/v2/models/discrete/infer"


@pytest.fixture(scope="module")
def client(live_server: LiveServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"{live_server.host}:{live_server.port}") as found:
        yield found


def given(*, binary: bool = True, binary_mask: bool | None = None) -> list[triton.InferInput]:
    found = [
        triton.InferInput("observation", [2, 4], "FP32"),
        triton.InferInput("action_mask", [2, 3], "BOOL"),
    ]
    found[0].set_data_from_numpy(ROWS, binary_data=binary)
    found[1].set_data_from_numpy(MASK, binary_data=binary if binary_mask is None else binary_mask)
    return found


@pytest.fixture(scope="module")
def wanted(discrete: LinearPolicy) -> dict[str, Any]:
    return discrete.answers(ROWS, np.zeros((2, 3)), MASK)


@pytest.mark.parametrize(("binary", "binary_mask"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_a_third_party_client_gets_the_policy_s_answers(
    client, wanted, binary: bool, binary_mask: bool, compression: str | None
):
    result = client.infer(
        "discrete",
        given(binary=binary, binary_mask=binary_mask),
        request_id="r1",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    assert result.get_response()["id"] == "r1"
    names = [output["name"] for output in result.get_response()["outputs"]]
    assert names == ["action", "action_logp", "value", "action_dist_inputs"]
    for name in names:
        assert "binary_data_size" in result.get_output(name)["parameters"]
        np.testing.assert_allclose(result.as_numpy(name), wanted[name], rtol=1e-5)


def test_each_output_may_be_binary_or_not(client, wanted):
    outputs = [
        triton.InferRequestedOutput("value", binary_data=False),
        triton.InferRequestedOutput("action", binary_data=True),
    ]
    result = client.infer("discrete", given(), outputs=outputs)
    value, action = result.get_response()["outputs"]
    assert (value["name"], "data" in value, "parameters" in value) == ("value", True, False)
    assert (action["name"], "data" in action) == ("action", False)
    assert action["parameters"] == {"binary_data_size": 16}
    np.testing.assert_allclose(result.as_numpy("value"), wanted["value"], rtol=1e-5)
    np.testing.assert_array_equal(result.as_numpy("action"), wanted["action"])


@pytest.mark.parametrize(
    ("default", "own", "is_binary"),
    [
        (None, None, False),
        (False, None, False),
        (True, None, True),
        (True, False, False),
        (False, True, True),
    ],
)
def test_the_request_s_default_gives_way_to_the_output_s_own(live_server, default, own, is_binary):
    parameters = {} if default is None else {"binary_data_output": default}
    output = {"name": "action", "parameters": {} if own is None else {"binary_data": own}}
    body = body_of(tensor("observation", ROWS), outputs=[output], parameters=parameters)
    response = infer(live_server, body)
    assert (LENGTH.lower() in response.headers) == is_binary
    kind = "application/octet-stream" if is_binary else "application/json"
    assert response.headers["content-type"] == kind
    assert outputs_of(response)["action"].shape == (2,)


def test_a_third_party_client_meets_errors_as_its_own(client):
    bad = given()
    bad[0].set_data_from_numpy(np.full((2, 4), np.nan, np.float32))
    with pytest.raises(InferenceServerException, match=r"'observation': found nan") as info:
        client.infer("discrete", bad)
    assert info.value.status() == "400"
    with pytest.raises(InferenceServerException, match="no policy 'nobody'"):
        client.infer("nobody", given())


def test_an_asynchronous_client_gets_the_same(live_server, wanted):
    async def main() -> Any:
        address = f"{live_server.host}:{live_server.port}"
        async with triton_aio.InferenceServerClient(address) as client:
            assert await client.is_server_ready()
            calls = [client.infer("discrete", given()) for _ in range(5)]
            return await asyncio.gather(*calls)

    for result in asyncio.run(main()):
        np.testing.assert_array_equal(result.as_numpy("action"), wanted["action"])
        np.testing.assert_allclose(result.as_numpy("value"), wanted["value"], rtol=1e-5)


def test_bytes_are_little_endian(live_server: LiveServer, discrete: LinearPolicy):
    found = outputs_of(
        infer(
            live_server,
            body_of(tensor("observation", ROWS, binary=True)),
            raw=ROWS.astype("<f4").tobytes(),
        )
    )
    swapped = ROWS.astype(">f4").view("<f4")
    read_otherwise = outputs_of(
        infer(
            live_server,
            body_of(tensor("observation", ROWS, binary=True)),
            raw=ROWS.astype(">f4").tobytes(),
        )
    )
    no_noise = np.zeros((2, 3))
    for rows, answers in ((ROWS, found), (swapped, read_otherwise)):
        expected = discrete.answers(rows, no_noise)["value"]
        np.testing.assert_allclose(answers["value"], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "int32", "int64", "uint8"])
def test_bytes_of_another_datatype_are_taken_if_they_fit(live_server, discrete, dtype: str):
    values = np.array([[1, 2, 3, 4], [0, 1, 0, 5]], dtype)
    body = body_of(tensor("observation", values, binary=True))
    found = outputs_of(infer(live_server, body, raw=values.tobytes()))
    wanted = discrete.answers(values, np.zeros((2, 3)))
    np.testing.assert_allclose(found["value"], wanted["value"], rtol=1e-5)


GOOD = tensor("observation", ROWS, binary=True)
RAW = ROWS.tobytes()


def sized(size: Any) -> dict[str, Any]:
    return body_of({**GOOD, "parameters": {"binary_data_size": size}})


@pytest.mark.parametrize(
    ("body", "raw", "words"),
    [
        (body_of(GOOD), RAW[:-1], ["31 bytes are left"]),
        (body_of(GOOD), RAW + b"x", ["33 bytes", "add up to 32"]),
        (sized(31), RAW[:-1], ["31 bytes", "expected 32"]),
        (sized(36), RAW + b"1234", ["36 bytes", "expected 32"]),
        (sized(-1), RAW, ["-1"]),
        (sized(2**70), RAW, [str(2**70)]),
        (sized(32.5), RAW, ["binary_data_size"]),
        (sized(None), RAW, ["neither"]),
        (sized(0), b"", ["0 bytes", "expected 32"]),
        (body_of({**GOOD, "data": [1.0] * 8}), RAW, ["both"]),
        (body_of({**GOOD, "shape": [1, 4]}), RAW, ["32 bytes", "expected 16"]),
        (body_of({**GOOD, "shape": [2**61, 4]}), RAW, ["at most 1024"]),
        (body_of({**GOOD, "datatype": "BYTES"}), RAW, ["BYTES"]),
        (body_of(GOOD, tensor("action_mask", MASK, binary=True)), RAW, ["0 bytes are left"]),
        (
            body_of(GOOD, tensor("action_mask", MASK, binary=True)),
            RAW + b"\0\1\2\0\1\1",
            ["'action_mask'", "byte 2"],
        ),
    ],
)
def test_bytes_that_do_not_add_up_are_refused(live_server, body: Any, raw: bytes, words):
    assert_error(infer(live_server, body, raw=raw), 400, *words)


@pytest.mark.parametrize("length", ["-1", "1.5", "x", "", "99999", "9" * 5000, "\uff11"])
def test_a_wrong_header_length_is_refused(live_server: LiveServer, length: str):
    data = json.dumps(body_of(GOOD)).encode() + RAW
    headers = {LENGTH: length.encode().decode("latin-1")}
    assert_error(live_server.request("POST", PATH, data, headers), 400, LENGTH)


def test_json_that_is_shorter_than_its_header_says_is_refused(live_server: LiveServer):
    data = json.dumps(body_of(tensor("observation", ROWS))).encode()
    headers = {LENGTH: str(len(data) + 1)}
    text = f"only {len(data)} bytes"
    assert_error(live_server.request("POST", PATH, data, headers), 400, text)


def test_bytes_without_the_header_are_explained(live_server: LiveServer):
    data = json.dumps(body_of(GOOD)).encode() + RAW
    assert_error(live_server.request("POST", PATH, data), 400, LENGTH)


def test_tensors_at_any_offset_are_read(live_server: LiveServer, discrete: LinearPolicy):
    expected = discrete.answers(ROWS, np.zeros((2, 3)))["value"]
    for pad in range(4):
        body = json.dumps(body_of(GOOD)).encode() + b" " * pad
        found = outputs_of(infer(live_server, body, raw=RAW))
        np.testing.assert_allclose(found["value"], expected, rtol=1e-5)


def test_a_raw_body_is_the_one_input(live_server: LiveServer, discrete: LinearPolicy):
    for n in (1, 2):
        response = live_server.request("POST", PATH, ROWS[:n].tobytes(), {LENGTH: "0"})
        found = outputs_of(response)
        assert LENGTH.lower() in response.headers
        wanted = discrete.answers(ROWS[:n], np.zeros((n, 3)))
        for name, values in found.items():
            np.testing.assert_allclose(values, wanted[name], rtol=1e-5)


@pytest.mark.parametrize("size", [0, 1, 15, 17])
def test_a_raw_body_that_is_no_row_is_refused(live_server: LiveServer, size: int):
    response = live_server.request("POST", PATH, bytes(size), {LENGTH: "0"})
    assert_error(response, 400, f"{size} bytes", "16 bytes each")


def test_a_raw_body_of_too_many_rows_is_refused(live_server: LiveServer):
    response = live_server.request("POST", PATH, bytes(16 * 1025), {LENGTH: "0"})
    assert_error(response, 400, "1025", "1024")


def test_a_raw_body_needs_a_model_of_one_input():
    space = gym.spaces.Dict({"a": gym.spaces.Discrete(3), "b": gym.spaces.Discrete(3)})
    services = services_of({"two": summing_policy(space, gym.spaces.Discrete(2))})
    with serving_services(services, ServingConfig()) as server:
        path = "/v2/models/two/infer"
        response = server.request("POST", path, bytes(8), {LENGTH: "0"})
        assert_error(response, 400, "one input", "observation/a, observation/b")


COMPRESSIONS = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_compressed_body_is_json_and_bytes_together(live_server: LiveServer, name: str):
    head = json.dumps(body_of(GOOD)).encode()
    headers = {LENGTH: str(len(head)), "Content-Encoding": name.upper()}
    data = COMPRESSIONS[name](head + RAW)
    plain = infer(live_server, body_of(GOOD), raw=RAW)
    assert live_server.request("POST", PATH, data, headers).body == plain.body


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_long_answer_is_compressed_for_who_takes_it(live_server: LiveServer, name: str):
    many = body_of(tensor("observation", np.zeros((200, 4), np.float32)))
    plain = infer(live_server, many)
    packed = infer(live_server, many, headers={"Accept-Encoding": f"br, {name};q=0.5"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == name
    assert len(packed.body) < len(plain.body) / 5
    unpack = {"gzip": gzip.decompress, "deflate": zlib.decompress}[name]
    assert unpack(packed.body) == plain.body
    assert int(packed.headers["content-length"]) == len(packed.body)


@pytest.mark.parametrize("accepted", ["br", "gzip;q=0", "gzip; q=0.0, identity", "", ";,"])
def test_an_answer_is_not_compressed_for_who_does_not_take_it(live_server, accepted: str):
    many = body_of(tensor("observation", np.zeros((200, 4), np.float32)))
    response = infer(live_server, many, headers={"Accept-Encoding": accepted})
    assert "content-encoding" not in response.headers
    assert response.json()


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_damaged_compressed_body_is_refused(live_server: LiveServer, name: str):
    good = COMPRESSIONS[name](json.dumps(body_of(tensor("observation", ROWS))).encode())
    headers = {"content-encoding": name}
    for data, words in (
        (good[:-1], "cut short"),
        (good + b"more", "after the end"),
        (b"{}", name),
        (b"", "cut short"),
        (good[:20] + bytes([good[20] ^ 0xFF]) + good[21:], ""),
    ):
        assert_error(live_server.request("POST", PATH, data, headers), 400, words)


def test_a_body_that_inflates_beyond_the_limit_is_refused(live_server: LiveServer):
    bomb = gzip.compress(bytes(20_000_000))
    assert len(bomb) < 100_000
    response = live_server.request("POST", PATH, bomb, {"content-encoding": "gzip"})
    assert_error(response, 413, "inflates", "100000")


def test_a_bomb_takes_no_more_memory_than_the_limit():
    bomb = gzip.compress(bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLargeError):
            asyncio.run(decompressed(bomb, b"gzip", max_bytes=100_000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


def test_another_encoding_is_named(live_server: LiveServer):
    response = infer(live_server, body_of(GOOD), headers={"content-encoding": "br"})
    assert_error(response, 415, "'br'", "gzip")
