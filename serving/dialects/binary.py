"""The binary dialect: the native request as msgpack, its arrays as raw bytes.

The same keys, checks and errors as JSON (`serving.dialects.native`); a batch comes in columns, so
a request of a thousand observations is a few views on its body. A body of `compute_action` and a
frame of a stream are the same but for the frame's `id`. docs/protocols.md has the format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType
from numpy.typing import NDArray

from serving.dialects.binary_answers import AnswerEncoder, with_id
from serving.dialects.columns import ColumnCodec, box, placing
from serving.dialects.native import COMMON_FIELDS
from serving.dialects.rows import not_exactly_one, state_space, what_and_where, wrong_count
from serving.errors import (
    InvalidRequestError,
    MalformedRequestError,
    PolicyServingError,
    problem,
)
from serving.interface import PolicyOutput
from serving.manifest import PolicyManifest
from serving.policy_inputs import PolicyInputs
from serving.request import ComputeRequest
from serving.spaces import leaves

Id = int | str

_LONGEST_ID = 128
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_ID: Any = Annotated[int, Meta(ge=0, le=2**63 - 1)] | str | UnsetType


class BinaryCodec:
    """msgpack to `ComputeRequest` and `PolicyOutput` to msgpack, for one policy."""

    content_type = b"application/msgpack"
    media_types: tuple[bytes | None, ...] = (
        b"application/msgpack",
        b"application/x-msgpack",
        b"application/vnd.msgpack",
    )

    def __init__(
        self,
        name: str,
        version: int,
        manifest: PolicyManifest,
        *,
        max_observations_per_request: int,
    ) -> None:
        space = manifest.observation_space
        self._max_observations = max_observations_per_request
        self._observations = ColumnCodec(space, leaves(space, "observation"))
        self._beside = _Beside(manifest)
        self._body = msgspec.msgpack.Decoder(_request_type([]))
        self._frame = msgspec.msgpack.Decoder(_request_type([("id", _ID, UNSET)]))
        self._plain_body = msgspec.msgpack.Decoder(_PlainRequest)
        identity = {"policy": name, "version": version, "policy_id": manifest.policy_id}
        self._answers = AnswerEncoder(manifest, identity)
        self._plain_head, self._plain_size = _plain_form(self._observations)

    # --- any request ---

    def decode(self, body: bytes | bytearray) -> ComputeRequest:
        """Parse and check a body.

        Raises:
            MalformedRequestError: Not msgpack.
            InvalidRequestError: msgpack, but not this schema.
            InvalidObservationError: An observation's structure, length or values are wrong.
            BatchTooLargeError: More observations than one request may hold.
        """
        return self._request(_parse(self._body, body))

    def decode_frame(self, data: bytes | bytearray) -> tuple[Id | None, ComputeRequest]:
        """Parse and check a stream's frame; `frame_id` tells the id of one that is refused.

        Returns:
            The frame's id, if it has one, and what it asks.

        Raises:
            PolicyServingError: As of `decode`.
        """
        parsed = _parse(self._frame, data)
        identifier = None if parsed.id is UNSET else parsed.id
        if isinstance(identifier, str) and not _is_short(identifier):
            raise InvalidRequestError(
                f"found an id of {len(identifier.encode())} bytes, expected at most {_LONGEST_ID}",
                pointer="/id",
            )
        return identifier, self._request(parsed)

    def encode(self, output: PolicyOutput, *, is_single: bool) -> bytes:
        """The answer's body."""
        return self._answers.encode(output, is_single=is_single)

    def encode_frame(
        self, output: PolicyOutput, *, is_single: bool, identifier: Id | None
    ) -> bytes:
        """The answer's frame."""
        answer = self._answers.encode(output, is_single=is_single)
        return answer if identifier is None else with_id(answer, identifier)

    # --- one observation and nothing beside it ---

    def plain(self, body: bytes | bytearray) -> Any:
        """The bytes of a body that holds one observation and nothing else; None for every other.

        A quick look that refuses nothing: `decode` says what is wrong with what is left.
        """
        head = self._plain_head
        if head is not None:
            if len(body) == self._plain_size and body.startswith(head):
                return body[len(head) :]
            return None
        try:
            return self._observations.quick_find(self._plain_body.decode(body).observation)
        except _UNREADABLE:
            return None

    def collect(self, rows: Sequence[Any]) -> dict[str, NDArray[Any]] | None:
        """The graph's inputs of n observations that `plain` found, (n, *shape) each.

        Returns:
            None where one of them does not conform.
        """
        columns = [rows] if self._plain_head is not None else zip(*rows, strict=True)
        return self._observations.quick_arrays([b"".join(each) for each in columns], len(rows))

    def encode_each(self, output: PolicyOutput) -> list[bytes]:
        """The answers of callers who asked for one action each and for nothing beside it."""
        return self._answers.encode_each(output)

    # --- parts ---

    def _request(self, parsed: Any) -> ComputeRequest:
        n, is_single, inputs = self._read_observations(parsed)
        if not (
            parsed.state is UNSET
            and parsed.action_mask is UNSET
            and parsed.reward is UNSET
            and parsed.rewards is UNSET
        ):
            inputs |= self._beside.read(parsed, n, is_single)
        outputs = parsed.outputs
        return ComputeRequest(
            inputs=inputs,
            n=n,
            is_single=is_single,
            deterministic=parsed.deterministic,
            seed=parsed.seed,
            timeout_s=None if parsed.timeout_ms is None else parsed.timeout_ms / 1e3,
            outputs=frozenset(outputs) if outputs else frozenset(),
            version=parsed.version,
        )

    def _read_observations(self, parsed: Any) -> tuple[int, bool, dict[str, NDArray[Any]]]:
        """n, whether it is `observation`, and the graph's inputs."""
        is_single = parsed.observation is not UNSET
        if is_single == (parsed.observations is not UNSET):
            raise not_exactly_one(has_both=is_single)
        place = "/observation" if is_single else "/observations"
        parts = self._observations.find(
            parsed.observation if is_single else parsed.observations, place
        )
        n = 1 if is_single else self._observations.count(parts, place)
        if not 0 < n <= self._max_observations:
            raise wrong_count(n, self._max_observations)
        self._observations.check_lengths(parts, n, place)
        arrays = self._observations.arrays(parts, n, "/observations", is_single=is_single)
        return n, is_single, arrays


class _PlainRequest(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    observation: Any


def _request_type(further: Sequence[tuple[str, Any, Any]]) -> Any:
    # What holds arrays is looked at in a second step: which bytes are expected depends on n.
    arrays = ("observation", "observations", "action_mask", "state", "reward", "rewards")
    fields = [*((name, Any, UNSET) for name in arrays), *COMMON_FIELDS, *further]
    return msgspec.defstruct("BinaryRequest", fields, forbid_unknown_fields=True, gc=False)


def _plain_form(rows: ColumnCodec) -> tuple[bytes | None, int]:
    """How a plain body begins and its length; no beginning where a row is several bins."""
    if not rows.is_flat:
        return None, 0
    n_bytes = rows.columns[0].n_bytes
    body = msgspec.msgpack.encode({"observation": bytes(n_bytes)})
    return body[: len(body) - n_bytes], len(body)


def _parse(decoder: Any, body: bytes | bytearray) -> Any:
    try:
        return decoder.decode(body)
    except _UNREADABLE as exc:
        raise _explain(bytes(body), exc) from exc


def _explain(body: bytes, exc: Exception) -> PolicyServingError:
    """Why a body was not taken.

    The decoder stops at the first wrong type, so whether the rest is msgpack at all is asked
    again.
    """
    try:
        msgspec.msgpack.decode(body)
    except _UNREADABLE as malformed:
        return MalformedRequestError(f"found no msgpack, expected one map: {malformed}")
    if not isinstance(exc, msgspec.ValidationError):
        return MalformedRequestError(f"found no msgpack, expected one map: {exc}")
    what, path = what_and_where(exc)
    if not path.startswith("$"):
        path = "$"
    pointer = re.sub(r"\.(\w+)|\[(\d+|\.\.\.)\]", r"/\1\2", path[1:]).replace("...", "-")
    return InvalidRequestError(f"{what} at {pointer or 'the top level'}", pointer=pointer)


def frame_id(data: bytes | bytearray) -> Id | None:
    """The id of a frame that is refused, if it has one that can be echoed."""
    try:
        value = msgspec.msgpack.decode(data)
    except _UNREADABLE:
        return None
    found = value.get("id") if isinstance(value, dict) else None
    if isinstance(found, str):
        return found if _is_short(found) else None
    return found if type(found) is int and 0 <= found < 2**63 else None


def _is_short(identifier: str) -> bool:
    return len(identifier.encode()) <= _LONGEST_ID


def encode_error(error: PolicyServingError, identifier: Id | None) -> bytes:
    """The frame that says why a request was refused: its problem+json object in msgpack."""
    frame: dict[str, Any] = {} if identifier is None else {"id": identifier}
    return msgspec.msgpack.encode({**frame, "error": problem(error)})


class _Beside:
    """What a request holds beside its observations: state, action masks and rewards."""

    def __init__(self, manifest: PolicyManifest) -> None:
        self._manifest = manifest
        self._inputs = PolicyInputs(manifest)
        mask = box((manifest.mask_size,), "bool")
        self._mask = ColumnCodec(mask, ["action_mask"], InvalidRequestError)
        self._rewards = ColumnCodec(box((), "float32"), ["reward"], InvalidRequestError)
        names = [f"state/{name}" for name in sorted(manifest.state)]
        self._state = ColumnCodec(state_space(manifest.state), names, InvalidRequestError)

    def read(self, parsed: Any, n: int, is_single: bool) -> dict[str, NDArray[Any]]:
        """The graph's inputs that came with the observations."""
        found: dict[str, NDArray[Any]] = {}
        if parsed.action_mask is not UNSET:
            found |= self._read_mask(parsed.action_mask, n, is_single)
        if parsed.state is not UNSET:
            found |= self._read_state(parsed.state, n, is_single)
        if parsed.reward is not UNSET or parsed.rewards is not UNSET:
            found |= self._read_rewards(parsed, n, is_single)
        return found

    def _read_mask(self, value: Any, n: int, is_single: bool) -> dict[str, NDArray[Any]]:
        if not self._manifest.mask_size:
            raise InvalidRequestError("this policy takes no action_mask", pointer="/action_mask")
        if value is None:
            return {"action_mask": np.ones((n, self._manifest.mask_size), np.bool_)}
        parts = self._mask.find(value, "/action_mask")
        self._mask.check_lengths(parts, n, "/action_mask")
        with placing(is_single):
            return self._inputs.conform_masks(self._mask.columns[0].array(parts[0], n), n)

    def _read_state(self, value: Any, n: int, is_single: bool) -> dict[str, NDArray[Any]]:
        if not self._manifest.state:
            raise InvalidRequestError(
                "this policy has no memory, so it takes no state", pointer="/state"
            )
        if value is None:
            return {}
        parts = self._state.find(value, "/state")
        self._state.check_lengths(parts, n, "/state")
        return self._state.arrays(parts, n, "/state", is_single=is_single)

    def _read_rewards(self, parsed: Any, n: int, is_single: bool) -> dict[str, NDArray[Any]]:
        right, wrong = ("reward", "rewards") if is_single else ("rewards", "reward")
        if not self._manifest.has_reward:
            name = "reward" if parsed.rewards is UNSET else "rewards"
            raise InvalidRequestError(f"this policy takes no {name}", pointer=f"/{name}")
        if getattr(parsed, wrong) is not UNSET:
            raise InvalidRequestError(
                f"found `{wrong}`; `{right}` belongs to "
                f"`{'observation' if is_single else 'observations'}`",
                pointer=f"/{wrong}",
            )
        if not is_single:
            parts = self._rewards.find(parsed.rewards, "/rewards")
            self._rewards.check_lengths(parts, n, "/rewards")
            return self._rewards.arrays(parts, n, "/rewards", is_single=False)
        if type(parsed.reward) not in (float, int):
            raise InvalidRequestError(
                f"found {type(parsed.reward).__name__}, expected a float", pointer="/reward"
            )
        with placing(is_single):
            return self._inputs.conform_rewards([float(parsed.reward)], n)
