"""Messages out of what a WebSocket client sends.

The protocol is the library `websockets`. Only what nearly every message is, one complete
unfragmented binary frame, is cut out here: that takes a tenth of the library's time per frame.
Every other frame goes through the library, one after the other.
"""

from __future__ import annotations

import struct

from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

try:  # as the library does it
    from websockets.speedups import apply_mask
except ImportError:
    from websockets.utils import apply_mask

_BINARY = 0x80 | Opcode.BINARY  # the last fragment of a binary message, which is also its first
_MASKED = 0x80
_LENGTH = 0x7F


class MessageReader:
    """The messages of one open connection, one by one.

    Attributes:
        has_news: Whether the library may have something to say: an answer to a ping, a farewell.
    """

    def __init__(self, websocket: ServerProtocol, max_message_bytes: int) -> None:
        """Store.

        Args:
            websocket: The library's protocol, after its handshake.
            max_message_bytes: Of the largest message that is taken.
        """
        self._websocket = websocket
        self._max_bytes = max_message_bytes
        self._data = b""
        self._at = 0  # what stands before was taken
        # Bytes that are missing of a frame whose start the library has been given.
        self._owed = 0
        # Whether the library is between messages, so that frames may be cut out without it.
        self._is_between = True
        self._parts: list[bytes] = []
        self._is_text = False
        self.has_news = False

    def feed(self, data: bytes) -> None:
        """Append what was received."""
        left = self._data[self._at :]
        self._data = left + data if left else data
        self._at = 0

    @property
    def has_message(self) -> bool:
        """Whether a whole frame waits."""
        if not self._is_open:
            return False
        head = self._head()
        return head is not None and self._at + sum(head) <= len(self._data)

    def next(self) -> bytes | str | None:
        """The next message, or None where it is not there yet.

        Of a text only that it came: "".
        """
        while self._at < len(self._data):
            if self._owed or not self._is_open:
                message = self._give()
                if message is not None:
                    return message
                continue
            head = self._head()
            if head is None:
                return None
            n_head, size = head
            data, at = self._data, self._at
            start = at + n_head
            stop = start + size
            if (
                data[at] == _BINARY
                and data[at + 1] & _MASKED
                and stop <= len(data)
                and size <= self._max_bytes
                and self._is_between
            ):
                self._at = stop
                return apply_mask(data[start:stop], data[start - 4 : start])
            self._owed = stop - at
        return None

    @property
    def _is_open(self) -> bool:
        return self._websocket.state is State.OPEN

    def _head(self) -> tuple[int, int] | None:
        """The lengths of a frame's head and payload (RFC 6455, 5.2); None if it is cut short."""
        data, at = self._data, self._at
        n_left = len(data) - at
        if n_left < 2:
            return None
        second = data[at + 1]
        size = second & _LENGTH
        n_head = 2
        if size > 125:
            n_head = 4 if size == 126 else 10
            if n_left < n_head:
                return None
            size = int.from_bytes(data[at + 2 : at + n_head], "big")
        if second & _MASKED:
            n_head += 4
            # Not before the mask is there, unless the length is refused without it.
            if n_left < n_head and size <= self._max_bytes:
                return None
        return n_head, size

    def _give(self) -> bytes | str | None:
        """Give the library the frame that it has to read or goes on reading.

        One at a time: each may end a message, and with it the need for the library.
        """
        stop = len(self._data)
        if self._is_open:
            stop = min(stop, self._at + self._owed)
        self._owed -= stop - self._at
        part = self._data[self._at : stop]
        self._at = stop
        self._websocket.receive_data(part)
        self.has_news = True
        found = None
        for event in self._websocket.events_received():
            if isinstance(event, Frame):
                found = self._take(event)
        self._is_between = self._websocket.current_size is None
        return found if self._is_open else None

    def _take(self, frame: Frame) -> bytes | str | None:
        """The message that a frame completes."""
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return None
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
            self._parts = []
        self._parts.append(bytes(frame.data))
        if not frame.fin:
            return None
        message, self._parts = b"".join(self._parts), []
        return "" if self._is_text else message


def binary_frame(message: bytes) -> bytes:
    """A whole binary message as a server sends it: one frame, not masked."""
    size = len(message)
    if size < 126:
        return b"%c%c%b" % (_BINARY, size, message)
    if size < 65_536:
        return struct.pack(">BBH", _BINARY, 126, size) + message
    return struct.pack(">BBQ", _BINARY, 127, size) + message
