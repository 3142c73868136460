"""A served policy over one WebSocket: the least time per step, for a loop that waits.

    with StreamClient("http://127.0.0.1:8000/v1/policies/cartpole") as policy:
        action = policy.compute_action(observation)

`serving.async_stream_client` has the same for asyncio. Loads no Ray, no torch and no onnxruntime.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Concatenate

from serving import calls
from serving.calls import Call, Dialect, P, T
from serving.client import PolicyClient
from serving.dialects.binary_client import BinaryClientCodec
from serving.endpoint import Endpoint
from serving.errors import (
    BodyTooLargeError,
    ConnectionFailedError,
    PolicyServingError,
    UnexpectedAnswerError,
    UsageError,
)
from serving.interface import OutputName, PolicyOutput
from serving.stream_connection import BlockingConnection, Question
from serving.stream_wire import read_answer, replaced


def _as_it_is(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    return answer


def _sending(
    make: Callable[Concatenate[Dialect, P], Call[T]],
) -> Callable[Concatenate[StreamClient, P], None]:
    def method(self: StreamClient, /, *args: P.args, **kwargs: P.kwargs) -> None:
        self.enqueue(make(self.dialect(), *args, **kwargs))

    method.__doc__ = f"Ask as `{make.__name__}` does and do not wait; `receive` has the answer."
    return method


class StreamClient:
    """A served policy as a `Policy`, over one connection that is kept.

    A connection that breaks, or that the server closes to shut down, is opened again, and what was
    not answered is asked again: a step depends on nothing but its request. Threads may share it,
    and then wait for each other. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        url: str,
        *,
        policy: str | None = None,
        timeout_s: float = 10.0,
        max_retries: int = 3,
        backoff_s: float = 0.05,
    ) -> None:
        """See `PolicyClient`; nothing is sent before the first call."""
        self._endpoint = Endpoint(url, policy, max_retries, backoff_s)
        self._http = PolicyClient(
            url, policy=policy, timeout_s=timeout_s, max_retries=max_retries, backoff_s=backoff_s
        )
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._dialect: BinaryClientCodec | None = None
        self._policy_id: Any = None
        self._connection: BlockingConnection | None = None
        # Sent (or to be sent once there is a connection), in the order of their answers.
        self._unanswered: deque[Question] = deque()
        self._refused: list[Question] = []
        self._to_receive: deque[Question] = deque()
        self._pause_s = 0.0
        self._n_failures = 0

    def describe(self) -> dict[str, Any]:
        """See `PolicyClient.describe`."""
        described = self._http.describe()
        self._http.close()
        return described

    compute_action = calls.blocking(calls.compute_action)
    step = calls.blocking(calls.step)
    compute_actions = calls.blocking(calls.compute_actions)
    send = _sending(calls.step)
    send_many = _sending(calls.compute_actions)

    def receive(self) -> Any:
        """The answer to the oldest `send` or `send_many` that was not received yet.

        Returns:
            What `step` returns for a `send`, and `compute_actions` for a `send_many`.

        Raises:
            UsageError: Nothing was sent.
            PolicyServingError: Of this one request; the others are not affected.
        """
        with self._lock:
            if not self._to_receive:
                raise UsageError("nothing was sent that could be received")
            question = self._to_receive.popleft()
            answer = self._settle(question, is_sent=True)
        return question.read(answer)

    def compute_many(
        self,
        batches: Iterable[Any],
        *,
        in_flight: int = 8,
        deterministic: bool = True,
        outputs: Collection[OutputName] = (),
    ) -> Iterator[PolicyOutput]:
        """Answer many batches of observations, several of them on their way at a time.

        Args:
            batches: Each as of `compute_actions`; read as the answers are taken.
            in_flight: How many are asked before the first is answered.
            deterministic: Take the most likely actions instead of sampling.
            outputs: What to answer beside the actions.
        """
        asked: deque[Question] = deque()
        for batch in batches:
            call = calls.compute_actions(
                self.dialect(), batch, deterministic=deterministic, outputs=outputs
            )
            with self._lock:
                asked.append(Question(*call))
                self._post(asked[-1])
            if len(asked) >= in_flight:
                yield self._finish(asked.popleft())
        while asked:
            yield self._finish(asked.popleft())

    def _finish(self, question: Question) -> PolicyOutput:
        with self._lock:
            answer = self._settle(question, is_sent=True)
        output: PolicyOutput = question.read(answer)
        return output

    def dialect(self) -> Dialect:
        """How requests to this policy are written; asks the server once."""
        return self._dialect or self._learn()

    def _learn(self) -> BinaryClientCodec:
        described = self.describe()
        self._dialect = BinaryClientCodec(described)
        self._policy_id = described.get("policy_id")
        self._endpoint.policy = self._endpoint.policy or str(described.get("policy"))
        return self._dialect

    def exchange(self, body: bytes, /) -> Mapping[str, Any]:
        """One request's frame for its answer."""
        with self._lock:
            return self._settle(Question(body, _as_it_is), is_sent=False)

    def enqueue(self, call: Call[Any]) -> None:
        """Send a request whose answer `receive` returns."""
        with self._lock:
            question = Question(*call)
            self._post(question)
            self._to_receive.append(question)

    def _settle(self, question: Question, *, is_sent: bool) -> Mapping[str, Any]:
        """Ask, where that is still to be done, and wait for the answer."""
        try:
            if not is_sent:
                self._post(question)
            while question.answer is None:
                self._guarded(self._go_on, question)
        except PolicyServingError:
            raise
        except BaseException:  # as Ctrl-C
            self._give_up(question)
            raise
        if isinstance(question.answer, PolicyServingError):
            raise question.answer
        return question.answer

    def _post(self, question: Question) -> None:
        """Send a request; on a connection that is lost it is sent by `_go_on`."""
        is_alone = not self._unanswered
        self._unanswered.append(question)

        def send() -> None:
            if self._connection is None:
                self._connect()
            elif is_alone:
                self._connection.send(question.body)
            else:
                self._connection.send_reading(question.body, self._take)

        try:
            self._guarded(send, question)
        except BaseException:  # half of it may be sent
            self._give_up(question)
            raise

    def _go_on(self) -> None:
        """What brings the next answer nearer."""
        if self._refused:
            self._ask_again()
        elif self._connection is None:
            self._connect()
        else:
            self._take(self._connection.read())

    def _guarded(self, act: Callable[[], None], question: Question) -> None:
        """Act for a question; what is lost with its connection is made good, or raised."""
        try:
            act()
        except (PolicyServingError, OSError, UnicodeError) as exc:
            self._lost(exc, question)

    def _connect(self) -> None:
        """Open a connection and send what was not answered."""
        self.dialect()
        connection = BlockingConnection(self._endpoint, self._timeout_s)
        try:
            greeting, *messages = connection.read()
            self._check(greeting)
            if messages:
                raise UnexpectedAnswerError(f"{self._endpoint.origin} answered nothing asked")
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        # Those that cannot be sent, because this connection is lost too, stay with `_refused`.
        self._refused = [*self._unanswered, *self._refused]
        self._unanswered.clear()
        self._send_refused()

    def _check(self, greeting: bytes) -> None:
        """Read the description again where another policy greets: its spaces may be others."""
        before = self._dialect or self._learn()
        found = read_answer(self._endpoint, before.read(greeting))
        if found.get("policy_id") == self._policy_id or self._learn().layout == before.layout:
            return
        for question in (*self._unanswered, *self._refused):
            question.answer = replaced(self._endpoint)
        self._unanswered.clear()
        self._refused.clear()

    def _take(self, messages: list[bytes]) -> None:
        """Give answers to those who asked, in order."""
        connection, dialect = self._connection, self._dialect
        assert connection is not None
        assert dialect is not None
        for message in messages:
            if not self._unanswered:
                raise UnexpectedAnswerError(f"{self._endpoint.origin} answered nothing asked")
            question = self._unanswered.popleft()
            connection.has_answered = True
            self._n_failures = 0
            try:
                question.answer = read_answer(self._endpoint, dialect.read(message))
            except PolicyServingError as exc:
                pause_s = self._endpoint.pause_s(question.n_refusals, exc)
                if pause_s is None:
                    question.answer = exc
                else:
                    question.n_refusals += 1
                    self._refused.append(question)
                    self._pause_s = max(self._pause_s, pause_s)

    def _ask_again(self) -> None:
        """After a wait, what the server had no room for."""
        pause_s, self._pause_s = self._pause_s, 0.0
        time.sleep(pause_s)
        self._send_refused()

    def _send_refused(self) -> None:
        questions, self._refused = deque(self._refused), []
        try:
            while questions and self._connection is not None:
                question = questions.popleft()
                self._unanswered.append(question)
                self._connection.send_reading(question.body, self._take)
        finally:
            self._refused.extend(questions)

    def _lost(self, reason: Exception, question: Question) -> None:
        """Close the connection; raise, or wait until it may be opened again.

        Raises:
            PolicyServingError: There is no use in that, or there were attempts enough.
        """
        had_answered = self._connection is not None and self._connection.has_answered
        self._drop()
        error = self._as_error(reason)
        if isinstance(error, BodyTooLargeError) and self._unanswered:
            # One of them was over the limit, so the largest was.
            largest = max(self._unanswered, key=lambda each: len(each.body))
            self._unanswered.remove(largest)
            largest.answer = error
            return
        if had_answered and isinstance(error, ConnectionFailedError):
            return  # servers close connections, as when they shut down; that is no failure
        pause_s = self._endpoint.pause_s(self._n_failures, error)
        if pause_s is None:
            self._n_failures = 0
            self._give_up(question)
            raise error from (None if error is reason else reason)
        self._n_failures += 1
        time.sleep(pause_s)

    def _as_error(self, reason: Exception) -> PolicyServingError:
        if isinstance(reason, PolicyServingError):
            return reason
        if isinstance(reason, TimeoutError):
            return self._endpoint.timed_out(self._timeout_s)
        return self._endpoint.no_answer(reason)

    def _give_up(self, question: Question) -> None:
        """Forget a question; its connection goes too, as its answer would be taken for another."""
        self._drop()
        with contextlib.suppress(ValueError):
            self._unanswered.remove(question)

    def _drop(self) -> None:
        self._unanswered.extend(self._refused)
        self._refused.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Close the connection; what was not answered is forgotten."""
        with self._lock:
            self._drop()
            self._unanswered.clear()
            self._to_receive.clear()
        self._http.close()

    def __enter__(self) -> StreamClient:
        """The client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()
