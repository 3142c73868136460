"""Compressed bodies: `gzip` and `deflate` (zlib, RFC 9110), both ways, within a size limit."""

from __future__ import annotations

import asyncio
import zlib

from serving.errors import BodyTooLargeError, MalformedRequestError, UnsupportedMediaTypeError

# zlib's `wbits`: 16 more than the window for gzip's header, the window alone for zlib's.
_WBITS = {b"gzip": 31, b"deflate": 15}
# Compressing less costs more than it saves; a client reads what an answer says it is.
_SMALLEST_ANSWER = 1024
# More than this keeps the event loop from others for about a millisecond.
_LARGEST_INLINE = 64 * 1024
_FASTEST = 1


async def decompressed(body: bytes, encoding: bytes | None, *, max_bytes: int) -> bytes:
    """A request's body as it was before its `Content-Encoding`.

    Inflating stops at the limit, so that a small body cannot take a large memory.

    Raises:
        UnsupportedMediaTypeError: Another encoding.
        BodyTooLargeError: It would inflate to more than `max_bytes`.
        MalformedRequestError: Cut short, damaged, or followed by something else.
    """
    name = b"" if encoding is None else encoding.strip().lower()
    if name in (b"", b"identity"):
        return body
    wbits = _WBITS.get(name)
    if wbits is None:
        raise UnsupportedMediaTypeError(
            f"found content-encoding {name.decode('latin-1')[:100]!r}, expected gzip, deflate or "
            "none"
        )
    if len(body) > _LARGEST_INLINE:
        return await asyncio.to_thread(_inflated, body, name.decode(), wbits, max_bytes)
    return _inflated(body, name.decode(), wbits, max_bytes)


def _inflated(body: bytes, name: str, wbits: int, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(wbits)
    try:
        found = inflater.decompress(body, max_bytes + 1)
    except zlib.error as exc:
        raise MalformedRequestError(f"the body is not {name}: {exc}") from exc
    if len(found) > max_bytes:
        raise BodyTooLargeError(
            f"the body inflates to more than {max_bytes} bytes; send fewer rows a request"
        )
    if not inflater.eof:
        raise MalformedRequestError(f"the body is cut short: its {name} stream has no end")
    if inflater.unused_data:
        raise MalformedRequestError(
            f"found {len(inflater.unused_data)} bytes after the end of the {name} stream"
        )
    return found


def accepted_encoding(accept_encoding: bytes | None, size: int) -> bytes | None:
    """In what an answer of `size` bytes is to be compressed; None: not at all.

    Args:
        accept_encoding: The request's header; an encoding of the quality 0 is refused by it.
        size: Of the answer, in bytes; a short one is not compressed.
    """
    if accept_encoding is None or size < _SMALLEST_ANSWER:
        return None
    refused, accepted = set(), []
    for part in accept_encoding.lower().split(b","):
        name, *options = (each.strip() for each in part.split(b";"))
        quality = next((each[2:] for each in options if each.startswith(b"q=")), b"1")
        if quality.rstrip(b"0") in (b"", b"0."):
            refused.add(name)
        accepted.append(name)
    return next((name for name in accepted if name in _WBITS and name not in refused), None)


async def compressed(body: bytes, encoding: bytes) -> bytes:
    """A body in `gzip` or `deflate`."""
    if len(body) > _LARGEST_INLINE:
        return await asyncio.to_thread(_deflated, body, encoding)
    return _deflated(body, encoding)


def _deflated(body: bytes, encoding: bytes) -> bytes:
    deflater = zlib.compressobj(_FASTEST, zlib.DEFLATED, _WBITS[encoding])
    return deflater.compress(body) + deflater.flush()
