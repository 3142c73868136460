"""Requests to batches: what waits together runs together, and nothing ever waits for more.

Knows neither HTTP nor Ray. One asyncio event loop owns a batcher.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.engines.graph import GraphPolicy
from serving.errors import (
    DeadlineExceededError,
    InferenceError,
    OverloadedError,
    PolicyNotReadyError,
    PolicyServingError,
)
from serving.interface import OutputName, PolicyOutput
from serving.spaces import take

# A batch that takes longer than this runs in a worker thread, so that the event loop keeps
# reading and answering meanwhile; handing a batch to a thread and back costs about 0.1 ms.
INLINE_LIMIT_S = 1e-3


@dataclass(frozen=True)
class BatchItem:
    """One caller's observations, already conforming.

    Attributes:
        inputs: The graph's inputs by name, (n, ...) each: every observation leaf, and of the
            others what the caller gave; `noise` where the actions are to be sampled.
        n: How many observations.
        is_sampled: Whether the actions are to be sampled.
        outputs: What to compute beside the actions.
    """

    inputs: Mapping[str, NDArray[Any]]
    n: int
    is_sampled: bool = False
    outputs: frozenset[OutputName] = frozenset()


@dataclass
class _Waiting:
    item: BatchItem
    future: asyncio.Future[PolicyOutput]


class Batcher:
    """Runs one policy for many callers.

    A batch is whatever is waiting when the policy is free: with one caller that is one request,
    and under load what arrived while the last batch ran. No timer, so no added latency.
    """

    def __init__(
        self,
        policy: GraphPolicy,
        *,
        max_batch_size: int,
        max_queue_size: int,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        """Store and check; nothing runs before the first request.

        Args:
            policy: What to run.
            max_batch_size: Most observations in one batch; a larger request runs alone.
            max_queue_size: Most observations waiting; beyond it requests are refused.
            on_batch: Called after each batch with its size and its duration in seconds.
        """
        self._policy = policy
        self._max_batch_size = max_batch_size
        self._max_queue_size = max_queue_size
        self._on_batch = on_batch
        self._waiting: deque[_Waiting] = deque()
        self._n_waiting = 0
        self._is_busy = False
        self._is_closed = False
        self._executor: ThreadPoolExecutor | None = None

    @property
    def queue_size(self) -> int:
        """Observations waiting for a batch."""
        return self._n_waiting

    @property
    def runs_inline(self) -> bool:
        """Whether batches run on the event loop itself."""
        return self._executor is None

    def calibrate(self) -> dict[int, float]:
        """Time the policy and decide whether batches run on the event loop or in a thread.

        Returns:
            Batch size to median seconds of one batch.
        """
        durations: dict[int, float] = {}
        for size in sorted({1, 8, min(64, self._max_batch_size), self._max_batch_size}):
            rows = self._policy.inputs.example(size)
            # What a caller may leave out gets its default, as it does in a request.
            durations[size] = _median_duration(
                partial(self._policy.compute_conformed, rows, is_sampled=False)
            )
        if max(durations.values()) > INLINE_LIMIT_S:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="inference")
        return durations

    async def compute(self, item: BatchItem, *, timeout_s: float | None = None) -> PolicyOutput:
        """Compute one caller's actions, in a batch with whoever else is waiting.

        Args:
            item: The observations.
            timeout_s: Give up after this long; what has not begun by then never runs.

        Raises:
            OverloadedError: The queue is full.
            PolicyNotReadyError: The batcher is closed.
            DeadlineExceededError: `timeout_s` passed.
            InferenceError: The engine failed.
        """
        n = item.n
        if self._is_closed:
            raise PolicyNotReadyError("the server is shutting down")
        # A request larger than the whole queue is still served when nothing else waits.
        if self._n_waiting and self._n_waiting + n > self._max_queue_size:
            raise OverloadedError(
                f"{self._n_waiting} observations are waiting, the limit is {self._max_queue_size}; "
                "wait and try again"
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[PolicyOutput] = loop.create_future()
        self._waiting.append(_Waiting(item, future))
        self._n_waiting += n
        if not self._is_busy:
            self._is_busy = True
            # On the next turn of the loop: every request that was read in this turn joins.
            loop.call_soon(self._run_next)
        if timeout_s is None:
            return await future
        timer = loop.call_later(timeout_s, _expire, future, timeout_s)
        try:
            return await future
        finally:
            timer.cancel()

    async def close(self) -> None:
        """Refuse new requests, answer the waiting ones, stop the thread."""
        self._is_closed = True
        while self._is_busy:
            await asyncio.sleep(1e-3)
        if self._executor is not None:
            self._executor.shutdown()

    def _run_next(self) -> None:
        batch = self._take_batch()
        if not batch:
            self._is_busy = False
            return
        if self._executor is None:
            self._finish(batch, *self._run(batch))
            self._continue()
        else:
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._executor, self._run, batch)
            running.add_done_callback(lambda done: self._on_thread_done(batch, done))

    def _on_thread_done(
        self,
        batch: list[_Waiting],
        done: asyncio.Future[tuple[PolicyOutput | PolicyServingError, float]],
    ) -> None:
        if not done.cancelled():
            self._finish(batch, *done.result())
        self._continue()

    def _continue(self) -> None:
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._run_next)
        else:
            self._is_busy = False

    def _take_batch(self) -> list[_Waiting]:
        """Take what fits, in order of arrival; leave out callers that are gone or too late."""
        batch: list[_Waiting] = []
        size = 0
        while self._waiting:
            n = self._waiting[0].item.n
            if batch and size + n > self._max_batch_size:
                break
            waiting = self._waiting.popleft()
            self._n_waiting -= n
            if not waiting.future.done():
                batch.append(waiting)
                size += n
        return batch

    def _run(self, batch: list[_Waiting]) -> tuple[PolicyOutput | PolicyServingError, float]:
        """Run one batch; may be called in the worker thread."""
        started = time.perf_counter()
        try:
            answer: PolicyOutput | PolicyServingError = _compute(
                self._policy, [waiting.item for waiting in batch]
            )
        except PolicyServingError as exc:
            answer = exc
        except Exception as exc:  # a batch's outermost edge: its callers get an answer, not a hang
            answer = InferenceError(f"a batch failed: {type(exc).__name__}: {exc}")
        return answer, time.perf_counter() - started

    def _finish(
        self, batch: list[_Waiting], answer: PolicyOutput | PolicyServingError, duration_s: float
    ) -> None:
        start = 0
        for waiting in batch:
            end = start + waiting.item.n
            if waiting.future.done():
                pass
            elif isinstance(answer, PolicyServingError):
                waiting.future.set_exception(answer)
            else:
                waiting.future.set_result(_rows(answer, start, end, waiting.item.outputs))
            start = end
        if self._on_batch is not None:
            self._on_batch(start, duration_s)


def _compute(policy: GraphPolicy, items: list[BatchItem]) -> PolicyOutput:
    if len(items) == 1:
        item = items[0]
        return policy.compute_conformed(
            item.inputs, is_sampled=item.is_sampled, outputs=item.outputs
        )
    parts = [item.inputs for item in items]
    names = parts[0].keys()
    if any(part.keys() != names for part in parts):
        # Whoever left out what a neighbour gave gets the default that it would get alone.
        parts = [policy.inputs.complete(item.inputs, item.n) for item in items]
        names = parts[0].keys()
    inputs = {name: np.concatenate([part[name] for part in parts]) for name in names}
    outputs = frozenset[OutputName]().union(*(item.outputs for item in items))
    return policy.compute_conformed(inputs, is_sampled=_modes(items), outputs=outputs)


def _modes(items: list[BatchItem]) -> bool | NDArray[np.bool_]:
    """Which rows are sampled: all, none, or row by row."""
    first = items[0].is_sampled
    if all(item.is_sampled == first for item in items):
        return first
    return np.repeat([item.is_sampled for item in items], [item.n for item in items])


def _rows(answer: PolicyOutput, start: int, end: int, asked: frozenset[OutputName]) -> PolicyOutput:
    """One caller's rows, and only what it asked for."""
    rows = slice(start, end)
    return PolicyOutput(
        actions=take(answer.actions, rows),
        state=None if answer.state is None else take(dict(answer.state), rows),
        **{name: values[rows] for name in asked if (values := getattr(answer, name)) is not None},
    )


def _expire(future: asyncio.Future[PolicyOutput], timeout_s: float) -> None:
    if not future.done():
        future.set_exception(
            DeadlineExceededError(f"no answer within timeout_ms = {timeout_s * 1e3:g}")
        )


def _median_duration(call: Callable[[], object], repeats: int = 5) -> float:
    call()
    durations = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        durations.append(time.perf_counter() - started)
    return sorted(durations)[repeats // 2]
