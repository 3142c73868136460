"""Plain requests: one observation, nothing beside it. Nearly all of a server's are.

What one turn of the event loop has read is checked, computed and answered as one batch: one
conversion to arrays, one run, one pass over the answers. Every other request goes the general
way, and so does a batch in which something is wrong: there each caller gets its own answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.batching import Batcher, BatchItem, Result
from serving.errors import PolicyServingError, unexpected_error
from serving.interface import PolicyOutput

logger = logging.getLogger("policyserve")


class PlainCodec(Protocol):
    """The part of a dialect that plain requests need."""

    def plain(self, body: bytes) -> Any:
        """The observation of a body that holds nothing else; None for every other body."""
        ...

    def collect(self, rows: Sequence[Any]) -> dict[str, NDArray[Any]] | None:
        """The graph's inputs, (n, *shape) each; None where an observation does not conform."""
        ...

    def encode_each(self, output: PolicyOutput) -> list[bytes]:
        """The answers of single callers, in order."""
        ...


class Caller(Protocol):
    """Who waits for one answer.

    Attributes:
        body: The request.
        is_gone: Whether nobody would read the answer.
    """

    body: bytes
    is_gone: bool

    def succeed(self, body: bytes) -> None:
        """Take the answer's body."""
        ...


class PlainLane:
    """The plain requests of one policy in one dialect."""

    def __init__(
        self,
        codec: PlainCodec,
        batcher: Batcher,
        *,
        is_sound: Callable[[PolicyOutput], bool],
        answered: Callable[[Sequence[Any]], None],
        refuse: Callable[[Any, PolicyServingError], None],
        otherwise: Callable[[Any], object],
    ) -> None:
        """Store.

        Args:
            codec: The dialect.
            batcher: The policy's.
            is_sound: Whether an answer holds only what may be answered.
            answered: Told of callers that got their action.
            refuse: Answers a caller with an error.
            otherwise: Takes a caller the general way.
        """
        self.plain = codec.plain
        self._codec = codec
        self._batcher = batcher
        self._is_sound = is_sound
        self._answered = answered
        self._refuse = refuse
        self._otherwise = otherwise
        self._rows: list[Any] = []
        self._callers: list[Any] = []

    def add(self, row: Any, caller: Caller) -> None:
        """Queue what `plain` found; it runs on the next turn of the loop."""
        if not self._rows:
            asyncio.get_running_loop().call_soon(self._flush)
        self._rows.append(row)
        self._callers.append(caller)

    def _flush(self) -> None:
        rows, callers = self._rows, self._callers
        self._rows, self._callers = [], []
        if any(caller.is_gone for caller in callers):
            kept = [(row, who) for row, who in zip(rows, callers, strict=True) if not who.is_gone]
            rows, callers = [row for row, _ in kept], [who for _, who in kept]
        taken = self._admit(callers)
        size = self._batcher.max_batch_size
        for start in range(0, taken, size):
            end = min(taken, start + size)
            self._submit(rows[start:end], callers[start:end])

    def _admit(self, callers: Sequence[Any]) -> int:
        """How many are taken; those for whom the queue has no room are refused."""
        room = self._batcher.room
        for caller in callers[room:]:
            refusal = self._batcher.refusal(1, before=room)
            if refusal is not None:
                self._refuse(caller, refusal)
        return min(room, len(callers))

    def _submit(self, rows: Sequence[Any], callers: Sequence[Any]) -> None:
        try:
            inputs = self._codec.collect(rows)
        except Exception:  # callers get an answer, not a hang
            self._fail(callers)
            return
        if inputs is None:
            self._all_otherwise(callers)
            return
        item = BatchItem(inputs, len(rows))
        result = self._batcher.run_now(item)
        if result is not None:
            self._finish(callers, result)
            return
        self._batcher.submit(
            item,
            partial(self._finish, callers),
            is_gone=lambda: all(caller.is_gone for caller in callers),
            at_once=True,
        )

    def _finish(self, callers: Sequence[Any], result: Result) -> None:
        if isinstance(result, PolicyServingError):
            for caller in callers:
                self._refuse(caller, result)
            return
        try:
            if not self._is_sound(result):
                self._all_otherwise(callers)
                return
            answers = self._codec.encode_each(result)
            for caller, answer in zip(callers, answers, strict=True):
                caller.succeed(answer)
            self._answered(callers)
        except Exception:  # callers get an answer, not a hang
            self._fail(callers)

    def _all_otherwise(self, callers: Sequence[Any]) -> None:
        for caller in callers:
            if caller.is_gone:
                continue
            try:
                self._otherwise(caller)
            except Exception:  # callers get an answer, not a hang
                self._fail([caller])

    def _fail(self, callers: Sequence[Any]) -> None:
        logger.exception("a batch of plain requests failed")
        for caller in callers:
            self._refuse(caller, unexpected_error())


def is_finite(nested: Any) -> bool:
    """Whether all floating-point numbers of a nested batch are finite."""
    if isinstance(nested, np.ndarray):
        return nested.dtype.kind != "f" or bool(np.isfinite(nested).all())
    if nested is None:
        return True
    parts = nested if isinstance(nested, tuple) else nested.values()
    return all(map(is_finite, parts))
