"""The native dialect from the caller's side: nested batches to bodies, answers to actions.

Light on purpose: a client on a small machine loads NumPy and orjson.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray

from serving.errors import (
    CallerError,
    InvalidObservationError,
    InvalidRequestError,
    UnexpectedAnswerError,
)
from serving.interface import OUTPUT_NAMES, OutputName, PolicyOutput, State
from serving.spaces import DictSpace, Space, TupleSpace, escape, space_from_json

States: TypeAlias = State | Sequence[State | None]


class ClientCodec:
    """JSON bodies for one served policy, and what its answers mean."""

    content_type = "application/json"

    def __init__(self, described: Mapping[str, Any]) -> None:
        """Read a policy's description.

        Raises:
            UnexpectedAnswerError: It is none.
        """
        self._observation_space = space_from_json(member(described, "observation_space"))
        self._action_space = space_from_json(member(described, "action_space"))
        self._state_dtypes = {
            name: str(spec["dtype"]) for name, spec in described.get("state", {}).items()
        }
        self._takes_reward = bool(described.get("takes", {}).get("reward"))

    def body_for_one(
        self,
        observation: Any,
        options: Mapping[str, Any],
        *,
        state: State | None = None,
        reward: float | None = None,
        action_mask: Any = None,
    ) -> bytes:
        """The body that asks for one action.

        Args:
            observation: As the environment gives it.
            options: From `options`.
            state: The last answer's, of one row.
            reward: Of the step before; left out for a policy that reads none.
            action_mask: (M,) 0/1 or bool.

        Raises:
            InvalidObservationError: Not numbers, or not finite, which JSON cannot say.
            InvalidRequestError: The same of the state, the reward or the mask.
        """
        body = {"observation": _row(observation, self._observation_space, "/observation")}
        body.update(options)
        if state is not None:
            body["state"] = _state_row(state, "/state")
        if reward is not None and self._takes_reward:
            body["reward"] = _leaf(reward, "/reward", InvalidRequestError)
        if action_mask is not None:
            body["action_mask"] = _leaf(action_mask, "/action_mask", InvalidRequestError)
        return _pack(body)

    def body_for_many(
        self,
        observations: Any,
        options: Mapping[str, Any],
        *,
        state: States | None = None,
        rewards: Any = None,
        action_mask: Any = None,
    ) -> bytes:
        """The body that asks for many actions; see `serving.interface.Policy`.

        Raises:
            InvalidObservationError: Not numbers, or not finite, which JSON cannot say.
            InvalidRequestError: The same of the state, the rewards or the masks.
        """
        body = {"observations": _rows(observations, self._observation_space)}
        body.update(options)
        if isinstance(state, Mapping):
            columns = _state_row(state, "/state")
            body["state"] = _unzip(columns, "/state", InvalidRequestError)
        elif state is not None and any(row is not None for row in state):
            body["state"] = [
                None if row is None else _state_row(row, f"/state/{index}")
                for index, row in enumerate(state)
            ]
        if rewards is not None and self._takes_reward:
            body["rewards"] = _leaf(rewards, "/rewards", InvalidRequestError)
        if action_mask is not None:
            body["action_mask"] = _masks(action_mask)
        return _pack(body)

    def read(self, body: bytes) -> Any:
        """What an answer's bytes hold; None where they are no JSON."""
        return read_json(body)

    def action(self, answer: Mapping[str, Any]) -> Any:
        """The action of an answer to one observation, as the environment takes it.

        Raises:
            UnexpectedAnswerError: There is none, or of another space.
        """
        return _element(member(answer, "action"), self._action_space)

    def step(self, answer: Mapping[str, Any]) -> tuple[Any, State | None]:
        """The action and the state of an answer to one observation.

        The state is None for a policy without memory.

        Raises:
            UnexpectedAnswerError: They are not those that were described.
        """
        action = self.action(answer)
        if not self._state_dtypes:
            return action, None
        found = member(answer, "state")
        return action, {
            name: _array(key_of(found, name), dtype) for name, dtype in self._state_dtypes.items()
        }

    def output(self, answer: Mapping[str, Any]) -> PolicyOutput:
        """An answer to many observations.

        Raises:
            UnexpectedAnswerError: It is not one of this policy.
        """
        state = None
        if self._state_dtypes:
            rows = member(answer, "state")
            state = {
                name: _array([key_of(row, name) for row in rows], dtype)
                for name, dtype in self._state_dtypes.items()
            }
        return PolicyOutput(
            actions=_batch(member(answer, "actions"), self._action_space),
            state=state,
            **{name: _array(answer[name], "float32") for name in OUTPUT_NAMES if name in answer},
        )


def options(
    *,
    deterministic: bool,
    seed: int | None,
    timeout_ms: float | None,
    outputs: Collection[OutputName] = (),
) -> dict[str, Any]:
    """The members of a body that say how to answer: only those that differ from the default."""
    found: dict[str, Any] = {}
    if not deterministic:
        found["deterministic"] = False
        if seed is not None:
            found["seed"] = seed
    if timeout_ms is not None:
        found["timeout_ms"] = timeout_ms
    if outputs:
        found["outputs"] = sorted(outputs)
    return found


def read_json(body: bytes) -> Any:
    """What bytes hold; None where they are no JSON."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _pack(body: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError as exc:
        raise InvalidRequestError(f"the request cannot be written as JSON: {exc}") from exc


def member(answer: Mapping[str, Any], name: str) -> Any:
    """A member that an answer has to have.

    Raises:
        UnexpectedAnswerError: It has not.
    """
    if name not in answer:
        raise UnexpectedAnswerError(
            f"found no `{name}` in the answer, which has {', '.join(answer) or 'nothing'}; is this "
            "a policy server?"
        )
    return answer[name]


def _row(value: Any, space: Space | None, pointer: str) -> Any:
    """One observation, or a nested batch of them, with arrays that the encoder takes.

    Another structure than the space's is left to the server to name.
    """
    if isinstance(space, DictSpace) and isinstance(value, Mapping):
        return {
            str(key): _row(child, space.spaces.get(key), f"{pointer}/{escape(str(key))}")
            for key, child in value.items()
        }
    if isinstance(space, TupleSpace) and isinstance(value, tuple | list):
        spaces = [*space.spaces, *[None] * len(value)]
        return [
            _row(child, spaces[index], f"{pointer}/{index}") for index, child in enumerate(value)
        ]
    return _leaf(value, pointer, InvalidObservationError)


def _rows(values: Any, space: Space) -> Any:
    pointer = "/observations"
    if not isinstance(space, DictSpace | TupleSpace):
        return _row(values, space, pointer)
    is_batch = isinstance(values, Mapping if isinstance(space, DictSpace) else tuple)
    if is_batch:
        return _unzip(_row(values, space, pointer), pointer, InvalidObservationError)
    return [_row(value, space, f"{pointer}/{index}") for index, value in enumerate(values)]


def _leaf(value: Any, pointer: str, error: type[CallerError]) -> Any:
    """The array as the encoder takes it: contiguous, native byte order, at most 64 bits."""
    try:
        array = np.asarray(value)
    except ValueError as exc:
        raise error("found rows of unequal shapes", pointer=pointer) from exc
    if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
        # JSON has no NaN and no infinity, so this cannot be left to the server to say.
        raise error(f"found {array.dtype} values that are not all finite numbers", pointer=pointer)
    if array.ndim == 0:
        return array.item()
    dtype = array.dtype.newbyteorder("=")
    if dtype.kind == "f" and dtype.itemsize not in (4, 8):
        dtype = np.dtype(np.float64)
    return np.ascontiguousarray(array, dtype=dtype)


def _unzip(columns: Any, pointer: str, error: type[CallerError]) -> list[Any]:
    """Columns of a nested batch as a list of rows."""
    if isinstance(columns, dict | list):
        parts = columns.values() if isinstance(columns, dict) else columns
        rows = [_unzip(part, pointer, error) for part in parts]
        if len({len(part) for part in rows}) != 1:
            raise error(
                f"found arrays of {[len(part) for part in rows]} rows, expected one row per "
                "observation in each",
                pointer=pointer,
            )
        if isinstance(columns, dict):
            return [dict(zip(columns, row, strict=True)) for row in zip(*rows, strict=True)]
        return [list(row) for row in zip(*rows, strict=True)]
    if not isinstance(columns, np.ndarray):
        raise error("found a single number, expected one row per observation", pointer=pointer)
    return columns.tolist() if columns.ndim == 1 else list(columns)


def _state_row(state: State, pointer: str) -> dict[str, Any]:
    if not isinstance(state, Mapping):
        raise InvalidRequestError(
            f"found {type(state).__name__}, expected the state's arrays by name", pointer=pointer
        )
    return {
        name: _leaf(value, f"{pointer}/{escape(name)}", InvalidRequestError)
        for name, value in state.items()
    }


def _masks(values: Any) -> Any:
    pointer = "/action_mask"
    if isinstance(values, list | tuple) and any(row is None for row in values):
        return [
            None if row is None else _leaf(row, f"{pointer}/{index}", InvalidRequestError)
            for index, row in enumerate(values)
        ]
    return _leaf(values, pointer, InvalidRequestError)


def _array(value: Any, dtype: str) -> NDArray[Any]:
    try:
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError, OverflowError) as exc:
        raise UnexpectedAnswerError(f"found {value!r} in the answer, expected {dtype}") from exc


def key_of(value: Any, key: str | int) -> Any:
    """An entry of an object or an array in an answer.

    Raises:
        UnexpectedAnswerError: There is none.
    """
    try:
        return value[key]
    except (KeyError, IndexError, TypeError) as exc:
        raise UnexpectedAnswerError(f"found no {key!r} in {value!r} of the answer") from exc


def _element(value: Any, space: Space) -> Any:
    """One action from JSON."""
    if isinstance(space, DictSpace):
        return {key: _element(key_of(value, key), child) for key, child in space.items()}
    if isinstance(space, TupleSpace):
        return tuple(_element(key_of(value, k), child) for k, child in enumerate(space.spaces))
    return _array(value, space.dtype)[()]


def _batch(values: Any, space: Space) -> Any:
    """A list of actions from JSON as a nested batch."""
    if isinstance(space, DictSpace):
        return {
            key: _batch([key_of(value, key) for value in values], child)
            for key, child in space.items()
        }
    if isinstance(space, TupleSpace):
        return tuple(
            _batch([key_of(value, k) for value in values], child)
            for k, child in enumerate(space.spaces)
        )
    return _array(values, space.dtype)
