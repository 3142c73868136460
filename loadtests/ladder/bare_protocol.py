"""The bare prototype: a protocol class in uvicorn, as policyserve's is. Run: FILE MODEL PORT.

It parses with orjson, computes what arrived in one turn of the event loop as one batch and writes
the action: no validation, no metrics, no request ids, no limits, no errors, no other routes. What
policyserve does beside that is what it costs more.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loadtests.ladder.bare_asyncio import Batch


class BareProtocol(HttpToolsProtocol):
    """One connection; every request is answered as `compute_action`."""

    batch: Batch

    def on_message_begin(self) -> None:
        """A request begins."""
        self._body = b""

    def on_url(self, url: bytes) -> None:
        """Every path is the same."""

    def on_header(self, name: bytes, value: bytes) -> None:
        """No header is read."""

    def on_headers_complete(self) -> None:
        """Nothing to decide."""

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._body += body

    def on_message_complete(self) -> None:
        """A whole request."""
        self.batch.add(self._body, self)

    def answer(self, response: bytes) -> None:
        """Write, unless the caller is gone."""
        if not self.transport.is_closing():
            self.transport.write(response)


async def _no_application(*_: Any) -> None:
    raise AssertionError("the protocol answers everything itself")


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    BareProtocol.batch = Batch(sys.argv[1])
    uvicorn.run(
        _no_application,
        host="127.0.0.1",
        port=int(sys.argv[2]),
        http=BareProtocol,
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
