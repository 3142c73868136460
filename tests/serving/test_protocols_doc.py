"""docs/protocols.md: its bytes are the server's, and its numbers too."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces
from websockets.protocol import State
from websockets.server import ServerProtocol

from serving.config import ServingConfig
from serving.dialects.binary import BinaryCodec
from serving.errors import all_errors
from serving.interface import PolicyOutput
from serving.stream import StreamSettings
from serving.stream_frames import MessageReader, binary_frame
from tests.processes import ROOT
from tests.serving.binary_form import floats, pack, unpack
from tests.serving.numpy_policies import manifest_of

DOC = ROOT / "docs" / "protocols.md"
ROW, OTHER = (0.03125, -0.5, 0.0625, 1.25), (0.0, 0.25, -0.0625, -1.0)


def dump(name: str) -> bytes:
    """The bytes of a hex dump; what follows two blanks explains them."""
    block = re.search(rf"<!-- {name} -->\n```\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert block, name
    return b"".join(bytes.fromhex(line.split("  ")[0]) for line in block[1].splitlines())


@pytest.fixture
def codec() -> BinaryCodec:
    """CartPole's."""
    low = np.array([-4.8, -np.inf, -0.41887903, -np.inf], np.float32)
    manifest = manifest_of(spaces.Box(low, -low), spaces.Discrete(2))
    return BinaryCodec("cartpole", 1, manifest, max_observations_per_request=1024)


def test_the_request_is_one_that_the_server_takes(codec: BinaryCodec):
    assert dump("request") == pack({"observation": floats(*ROW)})
    request = codec.decode(dump("request"))
    assert request.inputs["observation"].tolist() == [list(ROW)]
    assert codec.plain(dump("request")) == floats(*ROW)


def test_the_answer_is_what_the_server_writes(codec: BinaryCodec):
    output = PolicyOutput(np.array([1]))
    assert dump("answer") == codec.encode(output, is_single=True) == codec.encode_each(output)[0]


def test_the_batch_and_its_answer_are_the_server_s(codec: BinaryCodec):
    asked = {"id": 7, "observations": floats(*ROW, *OTHER), "outputs": ["action_logp"]}
    assert dump("batch request") == pack(asked)
    identifier, request = codec.decode_frame(dump("batch request"))
    assert request.inputs["observation"].tolist() == [list(ROW), list(OTHER)]
    output = PolicyOutput(np.array([1, 0]), action_logp=np.array([-0.5, -0.25], np.float32))
    answer = codec.encode_frame(output, is_single=False, identifier=identifier)
    assert dump("batch answer") == answer
    assert unpack(answer)["actions"] == struct.pack("<2q", 1, 0)


def test_the_frames_are_those_of_a_connection():
    reader = MessageReader(ServerProtocol(state=State.OPEN), 2**20)
    reader.feed(dump("request frame"))
    assert reader.next() == dump("request")
    assert dump("answer frame") == binary_frame(dump("answer"))
    library = ServerProtocol(state=State.OPEN)
    library.receive_data(dump("request frame"))
    (event,) = library.events_received()
    assert bytes(event.data) == dump("request")  # type: ignore[union-attr, arg-type]


def test_the_numbers_are_the_defaults():
    text = re.sub(r"\s+", " ", DOC.read_text())
    stream = StreamSettings()
    config = ServingConfig()
    assert stream.max_message_bytes == config.max_body_bytes
    assert f"`max_body_bytes`, {config.max_body_bytes // 2**20} MiB" in text
    assert f"`max_observations_per_request`, {config.max_observations_per_request}" in text
    assert f"`max_queue_size`, {config.max_queue_size}" in text
    assert f"without an answer, on one connection | {stream.max_unanswered} |" in text
    assert f"nothing has come for {stream.ping_interval_s:g} s is pinged" in text
    assert f"has come for {stream.dead_after_s:g} s" in text


def test_the_errors_are_the_server_s():
    known = all_errors()
    rows = re.findall(r"^\| (\d{3}) \| (`.*?`) \|", Path(DOC).read_text(), re.MULTILINE)
    assert len(rows) == 8
    for status, codes in rows:
        for code in re.findall(r"`(\w+)`", codes):
            assert known[code].http_status == int(status)


def test_the_error_of_the_example_is_the_server_s(codec: BinaryCodec):
    with pytest.raises(Exception, match="found 12 bytes") as caught:
        codec.decode(pack({"observation": bytes(12)}))
    assert str(caught.value) in DOC.read_text()
