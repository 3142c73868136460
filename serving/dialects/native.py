"""The native dialect: `POST /v1/policies/{policy}/compute_action`, JSON in and out.

A request's schema is made from the policy's own spaces, so one pass in C parses the body and
checks every shape and type, and an error names the place.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType
from numpy.typing import NDArray

from serving.conforming import conform_observations
from serving.dialects.beside import BesideCodec
from serving.dialects.rows import (
    RowCodec,
    not_exactly_one,
    place,
    placed,
    what_and_where,
    wrong_count,
)
from serving.errors import (
    InvalidObservationError,
    InvalidRequestError,
    MalformedRequestError,
    PolicyServingError,
)
from serving.interface import OUTPUT_NAMES, OutputName, PolicyOutput
from serving.manifest import PolicyManifest
from serving.policy_inputs import PolicyInputs
from serving.request import ComputeRequest
from serving.spaces import describe_space, leaves, take

_MAX_SEED = 2**63 - 1
_MAX_KNOWN = 4096
_NOT_PLAIN = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError)
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# What a request says of itself in every encoding: name, msgspec type, default.
COMMON_FIELDS: tuple[tuple[str, Any, Any], ...] = (
    ("deterministic", bool, True),
    ("seed", Annotated[int, Meta(ge=0, le=_MAX_SEED)] | None, None),
    ("timeout_ms", Annotated[float, Meta(gt=0, le=3_600_000)] | None, None),
    ("outputs", list[OutputName] | None, None),
    ("version", int | None, None),
)


class NativeCodec:
    """Bytes to `ComputeRequest` and `PolicyOutput` to bytes, for one policy."""

    content_type = b"application/json"
    # What a request's body may be called; one that is not called anything is JSON.
    media_types: tuple[bytes | None, ...] = (None, b"application/json")

    def __init__(
        self,
        name: str,
        version: int,
        manifest: PolicyManifest,
        *,
        max_observations_per_request: int,
    ) -> None:
        self._space = manifest.observation_space
        self._max_observations = max_observations_per_request
        self._observations = RowCodec(
            self._space, leaves(self._space, "observation"), "Observation"
        )
        self.beside = BesideCodec(manifest, PolicyInputs(manifest))
        self.request_type = request_type(self._observations.row_type, manifest)
        self._decoder = msgspec.json.Decoder(self.request_type)
        self._plain_decoder = msgspec.json.Decoder(_plain_type(self._observations.row_type))
        self._encoder = msgspec.json.Encoder()
        identity = {"policy": name, "version": version, "policy_id": manifest.policy_id}
        # What every answer ends with, `{` cut off.
        self._tail = self._encoder.encode(identity)[1:]
        # Whole answers by their action, where there are few different ones.
        self._known: dict[int, bytes] = {}

    def decode(self, body: bytes | bytearray) -> ComputeRequest:
        """Parse and check a body.

        Raises:
            MalformedRequestError: Not JSON.
            InvalidRequestError: JSON, but not this schema.
            InvalidObservationError: An observation's shape, type or finiteness is wrong.
            BatchTooLargeError: More observations than one request may hold.
        """
        try:
            request = self._decoder.decode(body)
            rows, is_single = self._rows(request)
            inputs = self._observations.arrays(rows)
            if inputs is None:
                inputs = self._conform_slowly(rows, is_single)
            if not (
                request.state is UNSET
                and request.action_mask is UNSET
                and request.reward is UNSET
                and request.rewards is UNSET
            ):
                inputs |= self.beside.decode(request, len(rows), is_single)
        except _MALFORMED as exc:
            raise self._explain(bytes(body), exc) from exc
        outputs = request.outputs
        return ComputeRequest(
            inputs=inputs,
            n=len(rows),
            is_single=is_single,
            deterministic=request.deterministic,
            seed=request.seed,
            timeout_s=None if request.timeout_ms is None else request.timeout_ms / 1e3,
            outputs=frozenset(outputs) if outputs else frozenset(),
            version=request.version,
        )

    def encode(self, output: PolicyOutput, *, is_single: bool) -> bytes:
        """The answer's body.

        Floating-point numbers are written so that they read back as the same float32.
        """
        if is_single:
            answer: dict[str, Any] = {"action": _json_row(take(output.actions, 0))}
        else:
            answer = {"actions": _json_rows(output.actions)}
        for name in OUTPUT_NAMES:
            values = getattr(output, name)
            if values is not None:
                answer[name] = (values[0] if is_single else values).tolist()
        if output.state is not None:
            state = dict(output.state)
            answer["state"] = _json_row(take(state, 0)) if is_single else _json_rows(state)
        return self._encoder.encode(answer)[:-1] + b"," + self._tail

    def plain(self, body: bytes | bytearray) -> Any:
        """The observation of a body that holds nothing else; None for every other body.

        A quick look that refuses nothing: `decode` says what is wrong with what is left.
        """
        try:
            return self._plain_decoder.decode(body).observation
        except _NOT_PLAIN:
            return None

    def collect(self, rows: Sequence[Any]) -> dict[str, NDArray[Any]] | None:
        """The graph's inputs of n observations that `plain` found, (n, *shape) each.

        Returns:
            None where one of them does not conform.
        """
        return self._observations.arrays(rows)

    def encode_each(self, output: PolicyOutput) -> list[bytes]:
        """The answers of callers who asked for one action each and for nothing beside it."""
        actions = output.actions
        if output.state is not None or not isinstance(actions, np.ndarray):
            return [self.encode(rows, is_single=True) for rows in output.rows()]
        if actions.ndim == 1 and actions.dtype.kind == "i":
            return [self._known.get(action) or self._learn(action) for action in actions.tolist()]
        encode, tail = self._encoder.encode, self._tail
        return [b'{"action":%b,%b' % (encode(action), tail) for action in actions.tolist()]

    def _learn(self, action: int) -> bytes:
        answer = b'{"action":%d,%b' % (action, self._tail)
        if len(self._known) < _MAX_KNOWN:
            self._known[action] = answer
        return answer

    def _rows(self, request: Any) -> tuple[Any, bool]:
        if (request.observation is UNSET) == (request.observations is UNSET):
            raise not_exactly_one(has_both=request.observation is not UNSET)
        if request.observation is not UNSET:
            return [request.observation], True
        n = len(request.observations)
        if not 0 < n <= self._max_observations:
            raise wrong_count(n, self._max_observations)
        return request.observations, False

    def _conform_slowly(self, rows: Any, is_single: bool) -> dict[str, NDArray[Any]]:
        try:
            return conform_observations(msgspec.to_builtins(rows), self._space)
        except PolicyServingError as exc:
            raise placed(exc, is_single) from None

    def _explain(self, body: bytes, exc: Exception) -> PolicyServingError:
        """Why a body was not taken, with the place.

        The decoder stops at the first wrong type, so whether the rest is JSON at all is asked
        again. Python's own parser takes NaN and Infinity, which many clients write: they are
        worth better words than "malformed".
        """
        if body.startswith(codecs.BOM_UTF8):
            return MalformedRequestError("the body begins with a byte order mark; send plain JSON")
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as malformed:
            return MalformedRequestError(f"the body is not JSON: {malformed}")
        if isinstance(exc, msgspec.ValidationError):
            return self._invalid(exc)
        is_single = isinstance(value, dict) and "observation" in value
        try:
            self._conform_slowly(
                [value["observation"]] if is_single else value["observations"], is_single
            )
        except PolicyServingError as invalid:
            return invalid
        except (KeyError, TypeError):
            pass
        return MalformedRequestError("the body is not JSON: NaN and Infinity are not JSON numbers")

    def _invalid(self, exc: msgspec.ValidationError) -> PolicyServingError:
        what, path = what_and_where(exc)
        for name in ("observations", "observation"):
            if path.startswith(f"$.{name}"):
                rest = path[len(name) + 2 :]
                pointer = place(name, rest, self._observations, name == "observations")
                return InvalidObservationError(
                    f"{what} at {pointer}; an observation of this policy is "
                    f"{describe_space(self._space)}",
                    pointer=pointer,
                )
        pointer = re.sub(r"\.(\w+)|\[(\d+|\.\.\.)\]", r"/\1\2", path[1:]).replace("...", "-")
        return InvalidRequestError(f"{what} at {pointer or 'the top level'}", pointer=pointer)


def request_type(observation: Any, manifest: PolicyManifest) -> Any:
    """The msgspec type of a whole `compute_action` request of a policy.

    Args:
        observation: The type of one observation.
        manifest: What the policy takes.
    """
    has_reward = manifest.has_reward
    fields: list[tuple[str, Any, Any]] = [
        ("observation", observation | UnsetType, UNSET),
        ("observations", list[observation] | UnsetType, UNSET),
        *COMMON_FIELDS,
        # Read in a second step: what stands here depends on `observation` or `observations`.
        ("action_mask", msgspec.Raw | UnsetType, UNSET),
        ("state", msgspec.Raw | UnsetType, UNSET),
        ("reward", (float if has_reward else msgspec.Raw) | UnsetType, UNSET),
        ("rewards", (list[float] if has_reward else msgspec.Raw) | UnsetType, UNSET),
    ]
    return msgspec.defstruct("ComputeActionRequest", fields, forbid_unknown_fields=True, gc=False)


def _plain_type(observation: Any) -> Any:
    return msgspec.defstruct(
        "PlainRequest", [("observation", observation)], forbid_unknown_fields=True, gc=False
    )


def _json_row(row: Any) -> Any:
    """One row of a nested batch as JSON takes it."""
    if isinstance(row, dict):
        return {key: _json_row(each) for key, each in row.items()}
    if isinstance(row, tuple):
        return [_json_row(each) for each in row]
    return row.tolist()


def _json_rows(nested: Any) -> list[Any]:
    """A nested batch as a list of rows."""
    if isinstance(nested, dict):
        columns = [_json_rows(each) for each in nested.values()]
        return [dict(zip(nested, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(nested, tuple):
        return [list(row) for row in zip(*map(_json_rows, nested), strict=True)]
    rows: list[Any] = nested.tolist()
    return rows
