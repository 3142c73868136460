"""What a load test asks, and whether an answer is right.

A fast wrong answer is an error too. Observations are drawn once and asked alone before the load;
under load each has to be answered with the same action again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loadtests.recording import REJECTED
from serving.calls import Dialect
from serving.client import PolicyClient
from serving.schemas import example_observation

N_QUESTIONS = 128
_MAX_TOTAL_BYTES = 16_000_000
# A sum depends in its last digits on the batch that it is computed in; in float16 or float32 far
# less than on another observation. A share of the range of each number of the action.
_TOLERANCE = 0.01
_MAX_BODIES = 64


@dataclass
class Questions:
    """Bodies of requests, and their right answers.

    Attributes:
        bodies: Of the requests, in the protocol's encoding.
        known: For each the bodies of answers that were found right: the rest of the time an
            answer is compared with them byte for byte.
        n_observations: In each request.
    """

    bodies: list[bytes]
    known: list[set[bytes]]
    n_observations: int
    _dialect: Dialect
    _policy_id: str
    _actions: list[list[np.ndarray[Any, Any]]]
    _tolerances: list[np.ndarray[Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for leaf in zip(*self._actions, strict=True):
            stacked = np.stack(leaf)
            span = np.ptp(stacked, axis=0) if stacked.dtype.kind == "f" else np.zeros(1)
            self._tolerances.append(_TOLERANCE * span + 1e-6)

    def __len__(self) -> int:
        """Different questions."""
        return len(self.bodies)

    def is_right(self, index: int, body: bytes) -> bool:
        """Whether these bytes are known to be right."""
        return body in self.known[index]

    def problem(self, index: int, body: bytes) -> str | None:
        """What is wrong with an answer (HTTP: of status 200); None if nothing is."""
        answer = self._dialect.read(body)
        if not isinstance(answer, Mapping):
            return "the answer cannot be read"
        error = answer.get("error")  # of a stream
        if isinstance(error, Mapping):
            if error.get("status") == 503:
                return REJECTED
            return f"HTTP {error.get('status')}: {error.get('code')}"
        problem = self.problem_of(index, answer)
        if problem is None and len(self.known[index]) < _MAX_BODIES:
            self.known[index].add(body)
        return problem

    def problem_of(self, index: int, answer: Mapping[str, Any]) -> str | None:
        """What is wrong with an answer that was read; None if nothing is."""
        if answer.get("policy_id") != self._policy_id:
            return f"answered by the policy {answer.get('policy_id')}"
        try:
            found = _leaves(self._read(answer))
        except Exception as exc:  # whatever a broken server makes the decoder raise
            return f"{type(exc).__name__}: {exc}"
        for leaf, expected, tolerance in zip(
            found, self._actions[index], self._tolerances, strict=True
        ):
            if leaf.shape != expected.shape or (np.abs(leaf - expected) > tolerance).any():
                return "another action than when it was asked alone"
        return None

    def _read(self, answer: Mapping[str, Any]) -> Any:
        if self.n_observations > 1:
            return self._dialect.output(answer).actions
        return self._dialect.action(answer)


def make_questions(
    client: PolicyClient, *, seed: int, batch_size: int = 1, n_questions: int = N_QUESTIONS
) -> Questions:
    """Draw observations and ask each once.

    Args:
        client: Of the policy, in the encoding to ask in.
        seed: Of the observations.
        batch_size: Observations per request.
        n_questions: How many; fewer where they are large.

    Raises:
        PolicyServingError: The server refuses them, or does not answer.
    """
    described = client.describe()
    dialect = client.dialect()
    rng = np.random.default_rng(seed)
    bodies: list[bytes] = []
    actions: list[list[np.ndarray[Any, Any]]] = []
    while len(bodies) < n_questions and (
        len(bodies) < 8 or sum(map(len, bodies)) < _MAX_TOTAL_BYTES
    ):
        rows = [draw(described["observation_space"], rng) for _ in range(batch_size)]
        body = (
            dialect.body_for_one(rows[0], {})
            if batch_size == 1
            else dialect.body_for_many(rows, {})
        )
        answer = client.exchange(body)
        action = dialect.action(answer) if batch_size == 1 else dialect.output(answer).actions
        bodies.append(body)
        actions.append(_leaves(action))
    return Questions(
        bodies=bodies,
        known=[set() for _ in bodies],
        n_observations=batch_size,
        _dialect=dialect,
        _policy_id=str(described["policy_id"]),
        _actions=actions,
    )


def draw(space: Mapping[str, Any], rng: np.random.Generator) -> Any:
    """One observation of a described space, as an environment would give it."""
    return _as_given(example_observation(space, rng), space)


def _as_given(value: Any, space: Mapping[str, Any]) -> Any:
    if space["type"] == "Dict":
        return {key: _as_given(value[key], child) for key, child in space["spaces"].items()}
    if space["type"] == "Tuple":
        return tuple(
            _as_given(each, child) for each, child in zip(value, space["spaces"], strict=True)
        )
    if space["type"] == "Box":
        return np.asarray(value, space["dtype"])
    return np.asarray(value)


def _leaves(action: Any) -> list[np.ndarray[Any, Any]]:
    """The arrays of an action of any space, in an order that does not change."""
    if isinstance(action, Mapping):
        return [leaf for key in sorted(action) for leaf in _leaves(action[key])]
    if isinstance(action, tuple):
        return [leaf for each in action for leaf in _leaves(each)]
    array = np.asarray(action)
    return [array if array.dtype.kind == "f" else array.astype(np.int64)]
