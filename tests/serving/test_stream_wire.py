"""The client's half of the WebSocket, against the library's server half, without sockets."""

from __future__ import annotations

import random
from typing import Any

import pytest
from websockets.server import ServerProtocol

from serving.endpoint import Endpoint
from serving.errors import (
    BodyTooLargeError,
    ConnectionFailedError,
    OverloadedError,
    UnexpectedAnswerError,
    UnknownPolicyError,
)
from serving.stream_wire import StreamWire

ENDPOINT = Endpoint("http://127.0.0.1:8000/v1/policies/p", None, 0, 0.0)
MASKED = b"\x82\x81\x00\x00\x00\x00a"  # a server's frames are not


class Pair:
    """A client and a server that have shaken hands, byte by byte in memory."""

    def __init__(self, **kwargs: Any) -> None:
        self.client = StreamWire(ENDPOINT, **kwargs)
        self.server = ServerProtocol()
        self.server.receive_data(self.client.request())
        self.request = self.server.events_received()[0]
        self.server.send_response(self.server.accept(self.request))  # type: ignore[arg-type]
        self.head = b"".join(self.server.data_to_send())

    def opened(self) -> Pair:
        assert self.client.feed(self.head) == []
        assert self.client.is_open
        return self

    def said(self) -> bytes:
        """What the server has to send."""
        return b"".join(self.server.data_to_send())


def fed(wire: StreamWire, data: bytes, sizes: list[int]) -> list[bytes]:
    """Feed data in pieces of these sizes, again and again."""
    found: list[bytes] = []
    position = turn = 0
    while position < len(data):
        size = sizes[turn % len(sizes)]
        found += wire.feed(data[position : position + size])
        position += size
        turn += 1
    return found


def conversation(server: ServerProtocol) -> list[bytes]:
    """Frames of every kind; returns the messages that they are."""
    sizes = (0, 1, 125, 126, 127, 65_535, 65_536, 70_000)
    messages = [bytes([number]) * size for number, size in enumerate(sizes, start=1)]
    for message in messages:
        server.send_ping(b"are you there")
        server.send_binary(message)
        server.send_binary(message[:50], fin=False)
        server.send_pong(b"")
        server.send_continuation(message[50:60], fin=False)
        server.send_ping(b"still")
        server.send_continuation(message[60:], fin=True)
    return [message for message in messages for _ in range(2)]


@pytest.mark.parametrize(
    "sizes", [[1], [2, 3, 5, 7], [1000], [65_536], [10**7]], ids=lambda sizes: str(sizes[0])
)
def test_frames_are_put_together_however_they_arrive(sizes: list[int]):
    pair = Pair()
    expected = conversation(pair.server)
    assert fed(pair.client, pair.head + pair.said(), sizes) == expected
    assert pair.client.error is None
    pair.server.receive_data(pair.client.to_send())
    assert len(pair.server.events_received()) == 2 * len(expected) // 2  # a pong to every ping


def test_a_frame_is_the_same_cut_at_every_byte():
    pair = Pair().opened()
    for message in (b"", b"abc", b"x" * 126, b"y" * 300):
        for length in (1, 2):
            frames = []
            for _ in range(length):
                pair.server.send_binary(message)
                frames.append(pair.said())
            data = b"".join(frames)
            for cut in range(len(data) + 1):
                found = pair.client.feed(data[:cut]) if cut else []
                found += pair.client.feed(data[cut:]) if cut < len(data) else []
                assert found == [message] * length


def test_random_cuts_of_random_conversations():
    generator = random.Random(0)
    for _ in range(30):
        pair = Pair()
        expected = conversation(pair.server)
        sizes = [generator.choice([1, 2, 7, 100, 40_000]) for _ in range(20)]
        assert fed(pair.client, pair.head + pair.said(), sizes) == expected


def test_a_message_arrives_at_the_server_as_it_was():
    pair = Pair().opened()
    for size in (0, 1, 125, 126, 65_536):
        pair.server.receive_data(pair.client.frame(b"z" * size))
        (frame,) = pair.server.events_received()
        assert frame.data == b"z" * size  # type: ignore[union-attr]


def test_the_request_names_the_policy_s_stream_and_offers_no_compression():
    wire = StreamWire(Endpoint("https://host:9/api/v1/policies/a%20b", None, 0, 0.0))
    head = wire.request().decode()
    assert head.startswith("GET /api/v1/policies/a%20b/stream HTTP/1.1\r\n")
    assert "Host: host:9\r\n" in head
    assert "Sec-WebSocket-Protocol: policyserve.v1\r\n" in head
    assert "Extensions" not in head


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (1000, ConnectionFailedError),
        (1001, ConnectionFailedError),
        (1009, BodyTooLargeError),
        (1011, ConnectionFailedError),
        (1002, UnexpectedAnswerError),
        (1008, UnexpectedAnswerError),
        (4000, UnexpectedAnswerError),
    ],
)
def test_a_farewell_says_whether_to_come_back(code: int, expected: type):
    pair = Pair().opened()
    pair.server.send_binary(b"last")
    pair.server.send_close(code, "a reason")
    assert pair.client.feed(pair.said()) == [b"last"]
    assert type(pair.client.error) is expected
    assert f"{code} a reason" in pair.client.error.message
    assert pair.client.feed(b"\x82\x01a") == []  # nothing follows a farewell
    with pytest.raises(expected):
        pair.client.frame(b"more")
    pair.server.receive_data(pair.client.to_send())
    assert pair.server.close_sent is not None
    assert pair.server.close_rcvd is not None  # the farewell was answered


def test_our_own_farewell_is_the_library_s():
    pair = Pair().opened()
    pair.server.receive_data(pair.client.close_frame())
    assert pair.server.close_rcvd is not None
    assert pair.server.close_rcvd.code == 1000
    assert pair.client.close_frame() == b""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x81\x02hi", "text"),
        (MASKED, "masking"),
        (b"\xc2\x01a", "reserved"),
        (b"\x80\x01a", "continuation"),
        (b"\x02\x01a\x82\x01b", "continuation"),
        (b"\x83\x01a", "opcode"),
        (b"\x82\x7f" + (10_001).to_bytes(8, "big"), "10001"),
        (
            b"\x02\x7f"
            + (6000).to_bytes(8, "big")
            + b"a" * 6000
            + b"\x80\x7f"
            + (6000).to_bytes(8, "big"),
            "6000",
        ),
    ],
    ids=["text", "masked", "reserved", "stray", "interleaved", "opcode", "large", "large in parts"],
)
@pytest.mark.parametrize("size", [1, 3, 10**6])
def test_what_breaks_the_protocol_ends_the_stream(data: bytes, words: str, size: int):
    pair = Pair(max_message_bytes=10_000).opened()
    assert fed(pair.client, data, [size]) == []
    assert isinstance(pair.client.error, UnexpectedAnswerError)
    assert words in pair.client.error.message
    assert pair.client.to_send()  # the server is told
    assert pair.client.feed(b"") == []


@pytest.mark.parametrize("cut", [0, 1, 20, 60])
def test_a_connection_that_ends_is_a_failure_that_may_pass(cut: int):
    pair = Pair()
    pair.client.feed(pair.head[:cut] if cut else pair.head)
    assert pair.client.feed(b"") == []
    assert isinstance(pair.client.error, ConnectionFailedError)


def test_half_a_message_is_no_message():
    pair = Pair().opened()
    assert pair.client.feed(b"\x82\x05abc") == []
    assert pair.client.feed(b"") == []
    assert isinstance(pair.client.error, ConnectionFailedError)


PROBLEM = b'{"code": "unknown_policy", "detail": "no such policy", "status": 404}'
BUSY = b'{"code": "overloaded", "detail": "full", "status": 503}'


def page(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Reason", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.mark.parametrize("sizes", [[1], [10_000]])
@pytest.mark.parametrize(
    ("answer", "expected", "words"),
    [
        (page(404, PROBLEM), UnknownPolicyError, "no such policy"),
        (page(503, BUSY, "Retry-After: 7"), OverloadedError, "full"),
        (page(200, b"<html>\r\n\r\nlog in"), UnexpectedAnswerError, "200"),
        (page(302, b"", "Location: http://elsewhere"), UnexpectedAnswerError, "302"),
        (page(101, b"", "Upgrade: h2c", "Connection: Upgrade"), UnexpectedAnswerError, "WebSocket"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", ConnectionFailedError, "127.0.0.1"),
    ],
    ids=["404", "503", "page", "elsewhere", "another upgrade", "ssh"],
)
def test_a_refused_upgrade_is_a_typed_error(
    answer: bytes, expected: type, words: str, sizes: list[int]
):
    pair = Pair()
    assert fed(pair.client, answer, sizes) == []
    pair.client.feed(b"")
    assert type(pair.client.error) is expected
    assert words in pair.client.error.message
    if expected is OverloadedError:
        assert pair.client.error.details == {"retry_after_s": 7}
