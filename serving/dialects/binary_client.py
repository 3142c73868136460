"""The binary dialect from the caller's side: arrays as raw bytes in a msgpack map.

Bytes say nothing of their shape or type, so everything is checked here, with the same functions
and the same words as in the server; what conforms already is only copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from serving.conforming import conform_leaf, conform_observations
from serving.dialects.native_client import States, key_of, member
from serving.dialects.rows import placed
from serving.errors import InvalidRequestError, PolicyServingError, UnexpectedAnswerError
from serving.interface import OUTPUT_NAMES, PolicyOutput, State
from serving.spaces import (
    BoxSpace,
    DictSpace,
    LeafSpace,
    Space,
    TupleSpace,
    batch_size,
    escape,
    graph_dtype,
    leaves,
    space_from_json,
    unflatten,
)

# What a description says of the bytes.
_LAYOUT = ("observation_space", "action_space", "inputs", "answers", "state", "takes")
# From here on the copy costs more than the view.
_LARGE_BYTES = 16_384


class _Layout(NamedTuple):
    """How rows of an array stand in bytes.

    Attributes:
        wire: The dtype as it is sent, little-endian.
        native: The dtype for the caller.
        shape: Of one row; None for a width that only the bytes tell.
    """

    wire: np.dtype[Any]
    native: np.dtype[Any]
    shape: tuple[int | None, ...]


class BinaryClientCodec:
    """msgpack bodies and frames for one served policy, and what its answers mean."""

    content_type = "application/msgpack"

    def __init__(self, described: Mapping[str, Any]) -> None:
        """Read a policy's description.

        Raises:
            UnexpectedAnswerError: It is none, or of a server that speaks no msgpack.
        """
        # Codecs of equal layouts write and read the same.
        self.layout = {name: described.get(name) for name in _LAYOUT}
        self._space = space_from_json(member(described, "observation_space"))
        self._action_space = space_from_json(member(described, "action_space"))
        self._row = _row_layout(self._space)
        self._answers = {
            str(entry["name"]): _layout(entry["dtype"], entry["shape"])
            for entry in member(described, "answers")
        }
        for name, leaf in leaves(self._action_space, "action").items():
            found = key_of(self._answers, name)
            self._answers[name] = found._replace(native=np.dtype(leaf.dtype))
        self._state = {
            str(name): (
                BoxSpace(
                    tuple(spec["shape"]), str(spec["dtype"]), np.array(-np.inf), np.array(np.inf)
                ),
                spec["initial"],
            )
            for name, spec in described.get("state", {}).items()
        }
        self._mask_size = next(
            (each["shape"][1] for each in described["inputs"] if each["role"] == "action_mask"), 0
        )
        self._takes_reward = bool(described.get("takes", {}).get("reward"))
        self._encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode

    def body_for_one(
        self,
        observation: Any,
        options: Mapping[str, Any],
        *,
        state: State | None = None,
        reward: float | None = None,
        action_mask: Any = None,
    ) -> bytes:
        """The body that asks for one action; see `ClientCodec.body_for_one`.

        Raises:
            InvalidObservationError: Of another structure, shape or type, or not finite.
            InvalidRequestError: The same of the state, the reward or the mask.
        """
        row = self._row
        if (
            row is not None
            and type(observation) is np.ndarray
            and observation.dtype == row.wire
            and observation.shape == row.shape
        ):
            body: dict[str, Any] = {"observation": observation.tobytes()}
        else:
            body = {"observation": self._one(observation)}
        if options:
            body.update(options)
        try:
            if state is not None:
                body["state"] = self._states(state, is_single=True)
            if reward is not None and self._takes_reward:
                body["reward"] = float(_numbers([reward], "/reward")[0])
            if action_mask is not None:
                body["action_mask"] = self._masks([action_mask])
        except PolicyServingError as exc:
            raise placed(exc, is_single=True) from None
        return self._pack(body)

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
            InvalidObservationError: Of another structure, shape or type, or not finite.
            InvalidRequestError: The same of the state, the rewards or the masks.
        """
        row = self._row
        if (
            row is not None
            and type(observations) is np.ndarray
            and observations.dtype == row.wire
            and observations.ndim
            and observations.shape[1:] == row.shape
        ):
            body: dict[str, Any] = {"observations": _bytes(observations, row.wire)}
        else:
            arrays = conform_observations(observations, self._space)
            body = {"observations": self._nested(arrays)}
        body.update(options)
        if state is not None and (
            isinstance(state, Mapping) or any(row is not None for row in state)
        ):
            body["state"] = self._states(state, is_single=False)
        if rewards is not None and self._takes_reward:
            body["rewards"] = _bytes(_numbers(rewards, "/rewards"), np.dtype("<f4"))
        if action_mask is not None:
            body["action_mask"] = self._masks(action_mask)
        return self._pack(body)

    def read(self, body: bytes) -> Any:
        """What an answer's bytes hold; None where they are no msgpack."""
        try:
            return msgspec.msgpack.decode(body)
        except (msgspec.DecodeError, RecursionError):
            return None

    def action(self, answer: Mapping[str, Any]) -> Any:
        """The action of an answer to one observation, as the environment takes it.

        Raises:
            UnexpectedAnswerError: There is none, or of another space.
        """
        return self._action(member(answer, "action"), self._action_space, "action", is_single=True)

    def step(self, answer: Mapping[str, Any]) -> tuple[Any, State | None]:
        """The action and the state of an answer to one observation.

        Raises:
            UnexpectedAnswerError: There is none, or of another space or policy.
        """
        action = self.action(answer)
        if not self._state:
            return action, None
        found = member(answer, "state")
        return action, {
            name: self._array(key_of(found, name), f"state/{name}", is_single=True)
            for name in self._state
        }

    def output(self, answer: Mapping[str, Any]) -> PolicyOutput:
        """An answer to many observations.

        Raises:
            UnexpectedAnswerError: It is not one of this policy.
        """
        actions = self._action(
            member(answer, "actions"), self._action_space, "action", is_single=False
        )
        state = None
        if self._state:
            found = member(answer, "state")
            state = {
                name: self._array(key_of(found, name), f"state/{name}") for name in self._state
            }
        n = batch_size(actions)
        outputs = {
            name: self._array(answer[name], name, n=n) for name in OUTPUT_NAMES if name in answer
        }
        return PolicyOutput(actions=actions, state=state, **outputs)

    def _one(self, observation: Any) -> Any:
        try:
            return self._nested(conform_observations([observation], self._space))
        except PolicyServingError as exc:
            raise placed(exc, is_single=True) from None

    def _nested(self, arrays: Mapping[str, NDArray[Any]]) -> Any:
        found = {name: _bytes(each, each.dtype.newbyteorder("<")) for name, each in arrays.items()}
        return unflatten(self._space, "observation", found)

    def _states(self, state: Any, *, is_single: bool) -> dict[str, bytes]:
        """The state of n episodes by name, one row per episode in each."""
        is_columns = isinstance(state, Mapping) and not is_single
        rows = [state] if is_single or is_columns else list(state)
        for index, row in enumerate(rows):
            if row is not None:
                self._check_names(row, "/state" if len(rows) == 1 else f"/state/{index}")
        found = {}
        for name, (leaf, initial) in self._state.items():
            start = np.broadcast_to(np.asarray(initial, dtype=leaf.dtype), leaf.shape)
            column = (
                state[name] if is_columns else [start if row is None else row[name] for row in rows]
            )
            found[name] = _conformed(column, leaf, "/state", f"/{escape(name)}")
        return found

    def _check_names(self, row: Any, pointer: str) -> None:
        if not self._state:
            raise InvalidRequestError(
                "this policy has no memory, so it takes no state", pointer=pointer
            )
        if not isinstance(row, Mapping) or row.keys() != self._state.keys():
            found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise InvalidRequestError(
                f"found the state {found or 'of nothing'}, expected {', '.join(self._state)}: the "
                "`state` of the last answer",
                pointer=pointer,
            )

    def _masks(self, rows: Any) -> bytes:
        """The masks of n rows, one byte 0 or 1 for each action."""
        pointer = "/action_mask"
        if not self._mask_size:
            raise InvalidRequestError("this policy takes no action_mask", pointer=pointer)
        if isinstance(rows, list | tuple) and any(row is None for row in rows):
            rows = [np.ones(self._mask_size, np.bool_) if row is None else row for row in rows]
        leaf = BoxSpace((self._mask_size,), "bool", np.zeros(()), np.ones(()))
        return _conformed(rows, leaf, pointer, "")

    def _pack(self, body: Mapping[str, Any]) -> bytes:
        try:
            return self._encode(body)
        except (TypeError, OverflowError, ValueError) as exc:
            raise InvalidRequestError(f"the request cannot be written as msgpack: {exc}") from exc

    def _action(self, value: Any, space: Space, name: str, *, is_single: bool) -> Any:
        if isinstance(space, DictSpace | TupleSpace):
            is_dict = isinstance(space, DictSpace)
            children = {
                key: self._action(
                    key_of(value, key if is_dict else index),
                    child,
                    f"{name}/{escape(key)}",
                    is_single=is_single,
                )
                for index, (key, child) in enumerate(space.items())
            }
            return children if is_dict else tuple(children.values())
        return self._array(value, name, is_single=is_single)

    def _array(
        self, value: Any, name: str, *, is_single: bool = False, n: int | None = None
    ) -> Any:
        """An array of an answer, (n, *shape) or one row of it; the caller may write to it.

        A row without axes is a NumPy scalar.
        """
        wire, native, shape = key_of(self._answers, name)
        sizes = tuple(-1 if size is None else size for size in shape)
        if not is_single:
            sizes = (n if n is not None else -1, *sizes)
        try:
            if not sizes and wire == native and len(value) == wire.itemsize:
                return np.frombuffer(value, wire)[0]  # what most actions are: 2 microseconds less
            return np.frombuffer(value, wire).reshape(sizes).astype(native)[()]
        except (TypeError, ValueError) as exc:
            size = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
            rows = "one row" if is_single else "rows"
            raise UnexpectedAnswerError(
                f"found {size} as {name} in the answer, expected {rows} of {native} {list(shape)}"
            ) from exc


def _row_layout(space: Space) -> _Layout | None:
    """The layout of an observation that is one array."""
    if isinstance(space, DictSpace | TupleSpace):
        return None
    return _layout(graph_dtype(space), space.shape)


def _layout(dtype: Any, shape: Sequence[int | None]) -> _Layout:
    native = np.dtype(dtype)
    return _Layout(native.newbyteorder("<"), native, tuple(shape))


def _bytes(array: NDArray[Any], wire: np.dtype[Any]) -> Any:
    """The array's bytes in C order; of a large one a view, which is not copied once more."""
    found = np.ascontiguousarray(array, wire)
    return found.tobytes() if found.nbytes < _LARGE_BYTES else found.data.cast("B")


def _conformed(rows: Any, leaf: LeafSpace, pointer: str, path: str) -> bytes:
    array = conform_leaf(rows, leaf, pointer=pointer, path=path, error=InvalidRequestError)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _numbers(values: Any, pointer: str) -> NDArray[Any]:
    leaf = BoxSpace((), "float32", np.array(-np.inf), np.array(np.inf))
    return conform_leaf(values, leaf, pointer=pointer, error=InvalidRequestError)


def _plain(value: Any) -> Any:
    """What msgpack has no type for: NumPy's scalars, as of `seed=np.int64(3)`."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no form in msgpack")
