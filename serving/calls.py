"""What a client can ask of a served policy, whatever carries it.

Each function here makes one request; `blocking` and `awaiting` turn it into a method of a client,
which has the same parameters and returns the answer. So the methods of all clients are written
once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

from serving.dialects.native_client import States, options
from serving.interface import OutputName, PolicyOutput, State

P = ParamSpec("P")
T = TypeVar("T")
# A request's body, and what reads its answer.
Call: TypeAlias = tuple[bytes, Callable[[Mapping[str, Any]], T]]


class Dialect(Protocol):
    """How one policy's requests are written, and its answers read."""

    @property
    def content_type(self) -> str:
        """Of a body."""
        ...

    def body_for_one(
        self,
        observation: Any,
        options: Mapping[str, Any],
        *,
        state: State | None = None,
        reward: float | None = None,
        action_mask: Any = None,
    ) -> bytes:
        """The body that asks for one action."""
        ...

    def body_for_many(
        self,
        observations: Any,
        options: Mapping[str, Any],
        *,
        state: States | None = None,
        rewards: Any = None,
        action_mask: Any = None,
    ) -> bytes:
        """The body that asks for many actions."""
        ...

    def read(self, body: bytes) -> Any:
        """What an answer's bytes hold; None where they are not of this dialect."""
        ...

    def action(self, answer: Mapping[str, Any]) -> Any:
        """The action of an answer to one observation."""
        ...

    def step(self, answer: Mapping[str, Any]) -> tuple[Any, State | None]:
        """The action and the state of an answer to one observation."""
        ...

    def output(self, answer: Mapping[str, Any]) -> PolicyOutput:
        """An answer to many observations."""
        ...


class Asker(Protocol):
    """A client that waits for its answer."""

    def dialect(self) -> Dialect:
        """Its policy's; asks the server what that is, the first time."""
        ...

    def exchange(self, body: bytes, /) -> Mapping[str, Any]:
        """One request's body for its answer."""
        ...


class AsyncAsker(Protocol):
    """The same for asyncio."""

    async def dialect(self) -> Dialect:
        """See `Asker`."""
        ...

    async def exchange(self, body: bytes, /) -> Mapping[str, Any]:
        """See `Asker`."""
        ...


def blocking(
    make: Callable[Concatenate[Dialect, P], Call[T]],
) -> Callable[Concatenate[Asker, P], T]:
    """A client's method: makes the request, waits, and returns the answer."""

    @functools.wraps(make)
    def method(self: Asker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        body, read = make(self.dialect(), *args, **kwargs)
        return read(self.exchange(body))

    return method


def awaiting(
    make: Callable[Concatenate[Dialect, P], Call[T]],
) -> Callable[Concatenate[AsyncAsker, P], Coroutine[Any, Any, T]]:
    """The same for asyncio."""

    @functools.wraps(make)
    async def method(self: AsyncAsker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        body, read = make(await self.dialect(), *args, **kwargs)
        return read(await self.exchange(body))

    return method


def compute_action(
    dialect: Dialect,
    observation: Any,
    *,
    deterministic: bool = True,
    seed: int | None = None,
    timeout_ms: float | None = None,
    state: State | None = None,
    reward: float | None = None,
    action_mask: Any = None,
) -> Call[Any]:
    """One action for one observation, as the environment takes it.

    A policy with memory needs its state back: see `step`.

    Args:
        dialect: The client's own; not given by a caller.
        observation: As the environment gives it: anything NumPy reads as an array of the
            observation space's shape; a dict for Dict, a tuple for Tuple.
        deterministic: Take the most likely action instead of sampling.
        seed: Makes a sampled action repeatable.
        timeout_ms: The server answers in this time or not at all (`DeadlineExceededError`).
        state: What the policy remembers of this episode; None at its start.
        reward: Of the step before; sent only to a policy that reads it.
        action_mask: (M,) 0/1 or bool, which actions are allowed; None: all.

    Returns:
        A NumPy scalar (Discrete) or array of the action space's dtype; a dict or a tuple of
        them for Dict and Tuple.

    Raises:
        PolicyServingError: The server's own error, or `ConnectionFailedError`.
    """
    chosen = options(deterministic=deterministic, seed=seed, timeout_ms=timeout_ms)
    body = dialect.body_for_one(
        observation, chosen, state=state, reward=reward, action_mask=action_mask
    )
    return body, dialect.action


def step(
    dialect: Dialect,
    observation: Any,
    state: State | None = None,
    reward: float | None = None,
    *,
    deterministic: bool = True,
    seed: int | None = None,
    timeout_ms: float | None = None,
    action_mask: Any = None,
) -> Call[tuple[Any, State | None]]:
    """One action, and what a policy with memory remembers for the next step.

        state, reward = None, None  # an episode's start
        action, state = policy.step(observation, state, reward)

    See `compute_action`; the state is None for a policy without memory.
    """
    chosen = options(deterministic=deterministic, seed=seed, timeout_ms=timeout_ms)
    body = dialect.body_for_one(
        observation, chosen, state=state, reward=reward, action_mask=action_mask
    )
    return body, dialect.step


def compute_actions(
    dialect: Dialect,
    observations: Any,
    *,
    deterministic: bool = True,
    seed: int | None = None,
    outputs: Collection[OutputName] = (),
    state: States | None = None,
    rewards: Any = None,
    action_mask: Any = None,
    timeout_ms: float | None = None,
) -> Call[PolicyOutput]:
    """One action per observation, in one request; see `serving.interface.Policy`."""
    chosen = options(deterministic=deterministic, seed=seed, timeout_ms=timeout_ms, outputs=outputs)
    body = dialect.body_for_many(
        observations, chosen, state=state, rewards=rewards, action_mask=action_mask
    )
    return body, dialect.output
