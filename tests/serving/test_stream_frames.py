"""What is cut out of a connection's bytes is what the `websockets` library alone reads there."""

from __future__ import annotations

import asyncio
import functools
import itertools
import struct
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from serving.service import PolicyServices
from serving.stream import StreamRegistry, StreamSettings
from serving.stream_frames import MessageReader, binary_frame
from serving.stream_protocol import StreamProtocol
from tests.serving.binary_form import columns, pack, unpack
from tests.serving.numpy_policies import sample, services_of, summing_policy, total_of

LIMIT = 300
MASK = b"\x01\x02\x03\x04"
REPEATABLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow],
)


@functools.cache
def frame(
    opcode: int, payload: bytes, *, fin: bool = True, rsv: int = 0, mask: bool = True
) -> bytes:
    """One frame by RFC 6455, 5.2, right or wrong."""
    size = len(payload)
    head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    flag = 0x80 if mask else 0
    if size < 126:
        head += bytes([flag | size])
    elif size < 2**16:
        head += struct.pack(">BH", flag | 126, size)
    else:
        head += struct.pack(">BQ", flag | 127, size)
    if not mask:
        return head + payload
    return head + MASK + bytes(byte ^ MASK[k % 4] for k, byte in enumerate(payload))


def by_library(data: bytes) -> tuple[list[bytes | str], bytes, State]:
    """The messages, what the library writes, and its state after all of `data`."""
    websocket = ServerProtocol(state=State.OPEN, max_size=LIMIT)
    websocket.receive_data(data)
    messages: list[bytes | str] = []
    parts: list[bytes] = []
    is_text = False
    for event in websocket.events_received():
        assert isinstance(event, Frame)
        if event.opcode in (Opcode.TEXT, Opcode.BINARY):
            is_text, parts = event.opcode is Opcode.TEXT, []
        if event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            parts.append(bytes(event.data))
            if event.fin:
                messages.append("" if is_text else b"".join(parts))
    return messages, b"".join(websocket.data_to_send()), websocket.state


def by_reader(chunks: list[bytes]) -> tuple[list[bytes | str], bytes, State]:
    websocket = ServerProtocol(state=State.OPEN, max_size=LIMIT)
    reader = MessageReader(websocket, LIMIT)
    messages = []
    for chunk in chunks:
        reader.feed(chunk)
        while (message := reader.next()) is not None:
            messages.append(message)
    return messages, b"".join(websocket.data_to_send()), websocket.state


SIZES = st.sampled_from([0, 1, 5, 31, 125, 126, 127, 299, 300, 301, 70_000])
FRAMES = st.builds(
    frame,
    st.sampled_from([2] * 12 + [1, 0, 0, 0, 8, 9, 9, 10, 3, 11]),
    SIZES.map(lambda size: bytes(k % 251 for k in range(size))),
    fin=st.sampled_from([True, True, True, False]),
    rsv=st.sampled_from([0] * 20 + [1, 4]),
    mask=st.sampled_from([True] * 20 + [False]),
)


@REPEATABLE
@given(frames=st.lists(FRAMES, max_size=8), data=st.data())
def test_any_frames_in_any_pieces_are_read_as_the_library_reads_them(
    frames: list[bytes], data: st.DataObject
):
    stream = b"".join(frames)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    edges = [0, *cuts, len(stream)]
    chunks = [stream[a:b] for a, b in itertools.pairwise(edges)]
    assert by_reader(chunks) == by_library(stream)


CONVERSATION = [
    frame(2, b"first"),
    frame(2, bytes(range(200))),
    frame(9, b"ping"),
    frame(2, b"frag", fin=False),
    frame(9, b"between"),
    frame(0, b"men", fin=False),
    frame(0, b"ted"),
    frame(1, b"text"),
    frame(2, b""),
    frame(2, b"last"),
    frame(8, struct.pack(">H", 1000) + b"bye"),
]


def test_a_conversation_may_be_split_at_every_byte():
    stream = b"".join(CONVERSATION)
    expected = by_library(stream)
    assert expected[0] == [b"first", bytes(range(200)), b"fragmented", "", b"", b"last"]
    assert by_reader([bytes([byte]) for byte in stream]) == expected
    for cut in range(len(stream) + 1):
        assert by_reader([stream[:cut], stream[cut:]]) == expected


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536])
def test_answers_are_frames_that_a_client_reads(size: int):
    client = ClientProtocol(parse_uri("ws://test/"), state=State.OPEN, max_size=None)
    message = bytes(k % 256 for k in range(size))
    client.receive_data(binary_frame(message))
    (event,) = client.events_received()
    assert isinstance(event, Frame)
    assert (event.opcode, event.fin, bytes(event.data)) == (Opcode.BINARY, True, message)


def test_a_large_message_in_small_pieces_is_copied_a_few_times_only():
    """Not once per piece: that would be quadratic."""
    websocket = ServerProtocol(state=State.OPEN, max_size=2**24)
    reader = MessageReader(websocket, 2**24)
    payload = bytes(2**24)
    head = b"\x82\xff" + struct.pack(">Q", len(payload)) + bytes(4)
    reader.feed(head + payload[:10])
    for start in range(10, len(payload), 2**12):
        assert reader.next() is None
        reader.feed(payload[start : start + 2**12])
        assert len(reader._data) <= 2**12
    assert reader.next() == payload


# --- the protocol, with a transport whose every step is in the test's hands ---


class Transport:
    """What a connection's socket was told."""

    def __init__(self) -> None:
        self.written = b""
        self.is_reading = True
        self.is_over = False
        self.has_eof = False

    def write(self, data: bytes) -> None:
        assert not self.has_eof
        self.written += data

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_eof = True

    def is_closing(self) -> bool:
        return self.is_over

    def close(self) -> None:
        self.is_over = True

    abort = close


VECTOR = spaces.Box(-1, 1, (4,), np.float32)
HANDSHAKE = (
    b"GET /v1/policies/sum/stream HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@functools.cache
def services() -> PolicyServices:
    return services_of({"sum": summing_policy(VECTOR, spaces.Box(-1e6, 1e6, (1,), np.float32))})


def opened(**settings: Any) -> tuple[StreamProtocol, Transport, StreamRegistry]:
    registry = StreamRegistry(services(), StreamSettings(**settings))
    protocol, transport = StreamProtocol(registry, "/v1/policies/sum/stream"), Transport()
    protocol.connection_made(transport)  # type: ignore[arg-type]
    return protocol, transport, registry


def frames_of(written: bytes) -> list[Frame]:
    """What a client sees after the HTTP answer and the greeting."""
    _, _, data = written.partition(b"\r\n\r\n")
    client = ClientProtocol(parse_uri("ws://test/"), state=State.OPEN)
    client.receive_data(data)
    found = client.events_received()[1:]
    assert all(isinstance(each, Frame) for each in found)
    return found  # type: ignore[return-value]


def totals_of(written: bytes) -> list[float]:
    answers = [unpack(each.data) for each in frames_of(written) if each.opcode is Opcode.BINARY]  # type: ignore[arg-type]
    return [float(np.frombuffer(each["action"], "<f4")[0]) for each in answers]


async def answers_of(transport: Transport, n: int) -> list[float]:
    """The totals, once n answers are there; for none, after a few turns of the loop."""
    for _ in range(20):
        await asyncio.sleep(0)
    for _ in range(5000):
        if len(found := totals_of(transport.written)) >= n:
            break
        await asyncio.sleep(1e-3)
    return found


def test_a_connection_may_be_split_at_every_byte_from_its_handshake_on():
    rows = sample(VECTOR, 2)
    asked = [frame(2, pack({"observation": columns(VECTOR, [row])})) for row in rows]
    stream = HANDSHAKE + asked[0] + frame(9, b"?") + asked[1]

    async def main() -> None:
        for cut in range(len(stream) + 1):
            protocol, transport, _ = opened()
            protocol.data_received(stream[:cut])
            protocol.data_received(stream[cut:])
            assert await answers_of(transport, 2) == [total_of(row) for row in rows]
            protocol.connection_lost(None)

    asyncio.run(main())


def test_of_many_frames_in_one_segment_only_so_many_are_taken_at_once():
    rows = sample(VECTOR, 300)
    asked = b"".join(frame(2, pack({"observation": columns(VECTOR, [row])})) for row in rows)

    async def main() -> None:
        protocol, transport, _ = opened(max_unanswered=16)
        protocol.data_received(HANDSHAKE + asked)
        assert not transport.is_reading
        assert protocol._session is not None
        assert protocol._session.n_unanswered == 16
        assert await answers_of(transport, 300) == [total_of(row) for row in rows]
        assert transport.is_reading
        protocol.connection_lost(None)

    asyncio.run(main())


def test_draining_answers_the_frames_that_wait_for_room_too():
    rows = sample(VECTOR, 40)
    asked = b"".join(frame(2, pack({"observation": columns(VECTOR, [row])})) for row in rows)

    async def main() -> None:
        protocol, transport, registry = opened(max_unanswered=4)
        protocol.data_received(HANDSHAKE + asked + frame(2, b"half of it")[:7])
        draining = asyncio.create_task(registry.drain(60.0))
        assert await answers_of(transport, 40) == [total_of(row) for row in rows]
        last = frames_of(transport.written)[-1]
        assert (last.opcode, bytes(last.data[:2])) == (Opcode.CLOSE, struct.pack(">H", 1001))
        assert not draining.done()
        protocol.data_received(frame(2, b"half of it")[7:] + frame(8, struct.pack(">H", 1001)))
        assert transport.has_eof
        protocol.connection_lost(None)
        await asyncio.wait_for(draining, 5)

    asyncio.run(main())


def test_while_the_client_does_not_read_nothing_more_is_computed_for_it():
    asked = frame(2, pack({"observation": bytes(16)}))

    async def main() -> None:
        protocol, transport, _ = opened(max_unanswered=2)
        protocol.data_received(HANDSHAKE + asked * 20)
        protocol.pause_writing()
        assert len(await answers_of(transport, 2)) == 2
        assert not transport.is_reading
        protocol.resume_writing()
        assert len(await answers_of(transport, 20)) == 20
        assert transport.is_reading
        protocol.connection_lost(None)

    asyncio.run(main())


def test_draining_waits_for_a_client_that_does_not_read_for_now():
    asked = frame(2, pack({"observation": bytes(16)}))

    async def main() -> None:
        protocol, transport, _ = opened(max_unanswered=2)
        protocol.data_received(HANDSHAKE + asked * 20)
        protocol.pause_writing()
        assert len(await answers_of(transport, 2)) == 2
        protocol.drain()
        assert frames_of(transport.written)[-1].opcode is Opcode.BINARY
        protocol.resume_writing()
        assert len(await answers_of(transport, 20)) == 20
        assert frames_of(transport.written)[-1].opcode is Opcode.CLOSE
        protocol.connection_lost(None)

    asyncio.run(main())


def test_after_the_farewell_nothing_is_answered():
    async def main() -> None:
        protocol, transport, _ = opened()
        protocol.data_received(HANDSHAKE)
        protocol.drain()
        assert frames_of(transport.written)[-1].opcode is Opcode.CLOSE
        written = transport.written
        protocol.data_received(frame(2, pack({"observation": bytes(16)})) * 2)
        await answers_of(transport, 0)
        assert transport.written == written
        protocol.connection_lost(None)

    asyncio.run(main())


def test_an_end_without_a_farewell_ends_the_stream():
    async def main() -> None:
        protocol, transport, registry = opened()
        protocol.data_received(HANDSHAKE + frame(2, pack({"observation": bytes(16)})))
        protocol.eof_received()
        assert transport.has_eof
        assert await answers_of(transport, 0) == []
        protocol.connection_lost(None)
        assert len(registry) == 0

    asyncio.run(main())


def test_a_client_that_does_not_answer_a_farewell_is_cut_off():
    async def main() -> None:
        protocol, transport, registry = opened(close_timeout_s=0.01)
        protocol.data_received(HANDSHAKE)
        protocol.drain()
        assert frames_of(transport.written)[-1].opcode is Opcode.CLOSE

        async def cut_off() -> None:
            while not transport.is_over:
                await asyncio.sleep(1e-3)

        await asyncio.wait_for(cut_off(), 5)
        protocol.connection_lost(None)
        assert len(registry) == 0

    asyncio.run(main())


def test_a_handshake_that_does_not_end_is_cut_off():
    async def main() -> None:
        protocol, transport, _ = opened()
        protocol.data_received(b"GET / HTTP/1.1\r\nx: ")
        protocol.data_received(b"y" * 70_000)
        assert transport.is_over
        protocol.connection_lost(None)

    asyncio.run(main())
