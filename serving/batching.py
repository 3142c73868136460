"""Requests to batches: what waits together runs together, and nothing ever waits for more.

Knows neither HTTP nor Ray. One asyncio event loop owns a batcher.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

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
_SIZES = (1, 8, 64, 256, 1024)

logger = logging.getLogger("policyserve")

Result: TypeAlias = "PolicyOutput | PolicyServingError"
Done: TypeAlias = Callable[[Result], None]


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


class Pending:
    """One caller's place in the queue, until it has its result."""

    __slots__ = ("_done", "_is_gone", "_timer", "deadline", "item", "submitted", "timeout_s")

    def __init__(
        self,
        item: BatchItem,
        done: Done,
        timeout_s: float | None,
        is_gone: Callable[[], bool] | None,
    ) -> None:
        self.item = item
        self.submitted = time.perf_counter()
        self.timeout_s = timeout_s
        self.deadline = None if timeout_s is None else self.submitted + timeout_s
        self._done: Done | None = done
        self._is_gone = is_gone
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_over(self) -> bool:
        """Whether nobody waits any more: answered, cancelled, or too late."""
        return self._done is None or (self._is_gone is not None and self._is_gone())

    def cancel(self) -> None:
        """Forget the caller: what has not begun is never computed, and nobody is told."""
        self._done = None
        if self._timer is not None:
            self._timer.cancel()

    def arm(self) -> None:
        """Answer at the deadline, if there is one, whether or not the batch has come back."""
        if self.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.timeout_s, self.expire)

    def expire(self) -> None:
        """Answer that the deadline passed."""
        timeout_ms = (self.timeout_s or 0.0) * 1e3
        self.finish(DeadlineExceededError(f"no answer within timeout_ms = {timeout_ms:g}"))

    def finish(self, result: Result) -> None:
        """Answer, once."""
        done = self._done
        self.cancel()
        if done is None:
            return
        try:
            done(result)
        except Exception:  # one caller's edge: its neighbours in the batch still get theirs
            logger.exception("an answer could not be delivered")


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
        on_batch: Callable[[int, float, float], None] | None = None,
    ) -> None:
        """Store and check; nothing runs before the first request.

        Args:
            policy: What to run.
            max_batch_size: Most observations in one batch; a larger request runs alone.
            max_queue_size: Most observations waiting; beyond it requests are refused.
            on_batch: Called after each batch with its size, its duration in seconds and how long
                its first caller had waited, in seconds.
        """
        self._policy = policy
        self.max_batch_size = max_batch_size
        self._max_queue_size = max_queue_size
        self._on_batch = on_batch
        self._waiting: deque[Pending] = deque()
        self._n_waiting = 0
        self._is_busy = False
        self._is_closed = False
        self._executor: ThreadPoolExecutor | None = None
        # Batches up to this many observations run on the event loop itself.
        self.inline_up_to = max_batch_size

    @property
    def queue_size(self) -> int:
        """Observations waiting for a batch."""
        return self._n_waiting

    @property
    def runs_inline(self) -> bool:
        """Whether every batch of at most `max_batch_size` runs on the event loop itself."""
        return self._executor is None

    def calibrate(self) -> dict[int, float]:
        """Time the policy and decide which batches run on the event loop and which in a thread.

        Returns:
            Batch size to median seconds of one batch.
        """
        sizes = {size for size in _SIZES if size < self.max_batch_size} | {self.max_batch_size}
        durations: dict[int, float] = {}
        for size in sorted(sizes):
            rows = self._policy.inputs.example(size)
            # What a caller may leave out gets its default, as it does in a request.
            durations[size] = _median_duration(
                partial(self._policy.compute_conformed, rows, is_sampled=False)
            )
        slow = [size for size, duration in durations.items() if duration > INLINE_LIMIT_S]
        if slow:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="inference")
            self.inline_up_to = max((size for size in durations if size < slow[0]), default=0)
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
        future: asyncio.Future[PolicyOutput] = asyncio.get_running_loop().create_future()
        pending = self.submit(
            item, partial(resolve, future), timeout_s=timeout_s, is_gone=future.done
        )
        try:
            return await future
        finally:
            pending.cancel()

    def submit(
        self,
        item: BatchItem,
        done: Done,
        *,
        timeout_s: float | None = None,
        is_gone: Callable[[], bool] | None = None,
        at_once: bool = False,
    ) -> Pending:
        """Queue one caller's observations.

        Args:
            item: The observations.
            done: Called once on the event loop with the result or with what `compute` raises,
                possibly before this returns.
            timeout_s: Answer with an error after this long; what has not begun by then never
                runs.
            is_gone: Whether nobody would take the result any more; asked before a batch begins.
            at_once: Begin now if the policy is free: the caller has waited for others itself.

        Returns:
            The caller's place, which it can give up.
        """
        pending = Pending(item, done, timeout_s, is_gone)
        refusal = self.refusal(item.n)
        if refusal is not None:
            pending.finish(refusal)
            return pending
        pending.arm()
        self._waiting.append(pending)
        self._n_waiting += item.n
        if not self._is_busy:
            self._is_busy = True
            if at_once:
                self._run_next()
            else:
                # On the next turn of the loop: every request that was read in this turn joins.
                asyncio.get_running_loop().call_soon(self._run_next)
        return pending

    def run_now(self, item: BatchItem) -> Result | None:
        """Compute one item without a queue, if nothing waits and it may run on this event loop.

        What `submit` does in that case, in a third of the steps: a single step's latency.

        Returns:
            The result; None if it has to be submitted.
        """
        if self._is_busy or self._is_closed or item.n > self.inline_up_to:
            return None
        started = time.perf_counter()
        result = self._run([item])
        if self._on_batch is not None:
            self._on_batch(item.n, time.perf_counter() - started, 0.0)
        return result

    @property
    def room(self) -> int:
        """How many further observations the queue takes, if they come one by one."""
        return 0 if self._is_closed else max(0, self._max_queue_size - self._n_waiting)

    def refusal(self, n: int, *, before: int = 0) -> PolicyServingError | None:
        """Why n further observations cannot be taken now, or None.

        Args:
            n: Of one caller.
            before: Observations that are as good as waiting.
        """
        if self._is_closed:
            return PolicyNotReadyError("the server is shutting down")
        n_waiting = self._n_waiting + before
        # A request larger than the whole queue is still served when nothing else waits.
        if n_waiting and n_waiting + n > self._max_queue_size:
            return OverloadedError(
                f"{n_waiting} observations are waiting, the limit is {self._max_queue_size}; wait "
                "and try again"
            )
        return None

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
        started = time.perf_counter()
        waited_s = started - batch[0].submitted
        if self._executor is None or sum(each.item.n for each in batch) <= self.inline_up_to:
            self._finish(batch, self._run(_items(batch)), started, waited_s)
            self._continue()
            return
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._executor, self._run, _items(batch))
        running.add_done_callback(lambda done: self._on_thread_done(batch, done, started, waited_s))

    def _on_thread_done(
        self, batch: list[Pending], done: asyncio.Future[Result], started: float, waited_s: float
    ) -> None:
        if not done.cancelled():
            self._finish(batch, done.result(), started, waited_s)
        self._continue()

    def _continue(self) -> None:
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._run_next)
        else:
            self._is_busy = False

    def _take_batch(self) -> list[Pending]:
        """Take what fits, in order of arrival; leave out callers that are gone or too late."""
        batch: list[Pending] = []
        size = 0
        now = time.perf_counter()
        while self._waiting:
            n = self._waiting[0].item.n
            if batch and size + n > self.max_batch_size:
                break
            pending = self._waiting.popleft()
            self._n_waiting -= n
            if pending.deadline is not None and pending.deadline <= now:
                # The loop was busy past the deadline, so its timer has not run yet.
                pending.expire()
            if not pending.is_over:
                batch.append(pending)
                size += n
        return batch

    def _run(self, items: list[BatchItem]) -> Result:
        """Run one batch; may be called in the worker thread."""
        try:
            return _compute(self._policy, items)
        except PolicyServingError as exc:
            return exc
        except Exception as exc:  # a batch's outermost edge: its callers get an answer, not a hang
            return InferenceError(f"a batch failed: {type(exc).__name__}: {exc}")

    def _finish(
        self, batch: list[Pending], result: Result, started: float, waited_s: float
    ) -> None:
        duration_s = time.perf_counter() - started
        if len(batch) == 1:
            batch[0].finish(result)
            size = batch[0].item.n
        else:
            size = 0
            for pending in batch:
                end = size + pending.item.n
                if isinstance(result, PolicyServingError):
                    pending.finish(result)
                elif not pending.is_over:
                    pending.finish(_rows(result, size, end, pending.item.outputs))
                size = end
        if self._on_batch is not None:
            self._on_batch(size, duration_s, waited_s)


def _items(batch: list[Pending]) -> list[BatchItem]:
    return [pending.item for pending in batch]


def resolve(future: asyncio.Future[PolicyOutput], result: Result) -> None:
    """Give a result to whoever awaits it, if anybody still does."""
    if future.done():
        return
    if isinstance(result, PolicyServingError):
        future.set_exception(result)
    else:
        future.set_result(result)


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


def _median_duration(call: Callable[[], object], repeats: int = 5) -> float:
    call()
    durations = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        durations.append(time.perf_counter() - started)
    return sorted(durations)[repeats // 2]
