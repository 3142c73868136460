"""The native dialect: `POST /v1/policies/{policy}/compute_action`, JSON in and out.

A request's schema is made from the policy's own observation space, so one pass in C parses the
body and checks every shape and type, and an error names the place.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType
from numpy.typing import NDArray

from serving.bundle import PolicyManifest
from serving.errors import (
    BatchTooLargeError,
    InvalidObservationError,
    InvalidRequestError,
    MalformedRequestError,
    PolicyServingError,
)
from serving.interface import OutputName, PolicyOutput
from serving.spaces import BoxSpace, conform_observations, describe_space

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class ComputeRequest:
    """A request that conforms.

    Attributes:
        observations: (n, *shape) float32, finite.
        is_single: Whether it came as `observation`, and the answer is `action`.
        deterministic: Most likely action, or a sample.
        seed: Makes a sample repeatable.
        timeout_s: The caller's deadline, from arrival.
        outputs: What to answer beside the actions.
        version: The version that the caller insists on.
    """

    observations: NDArray[np.float32]
    is_single: bool
    deterministic: bool
    seed: int | None
    timeout_s: float | None
    outputs: frozenset[OutputName]
    version: int | None


class NativeCodec:
    """Bytes to `ComputeRequest` and `PolicyOutput` to bytes, for one policy."""

    content_type = b"application/json"

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
        self.request_type = request_type(manifest.observation_space)
        self._decoder = msgspec.json.Decoder(self.request_type)
        self._encoder = msgspec.json.Encoder()
        identity = {"policy": name, "version": version, "policy_id": manifest.policy_id}
        # What every answer ends with, `{` cut off.
        self._tail = self._encoder.encode(identity)[1:]

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
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise self._explain(bytes(body), exc) from exc
        rows, is_single = self._rows(request)
        outputs = request.outputs
        return ComputeRequest(
            observations=self._conform(rows, is_single),
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
            answer: dict[str, Any] = {"action": output.actions[0].tolist()}
        else:
            answer = {"actions": output.actions.tolist()}
        for name in ("action_logp", "value", "action_dist_inputs"):
            values = getattr(output, name)
            if values is not None:
                answer[name] = (values[0] if is_single else values).tolist()
        return self._encoder.encode(answer)[:-1] + b"," + self._tail

    def _rows(self, request: Any) -> tuple[Any, bool]:
        if request.action_mask is not UNSET:
            raise InvalidRequestError("this policy takes no action_mask", pointer="/action_mask")
        if request.state is not UNSET:
            raise InvalidRequestError(
                "this policy has no memory, so it takes no state", pointer="/state"
            )
        if (request.observation is UNSET) == (request.observations is UNSET):
            found = "neither" if request.observation is UNSET else "both"
            raise InvalidRequestError(
                f"found {found} of `observation` (for one action) and `observations` (for many), "
                "expected exactly one",
                pointer="",
            )
        if request.observation is not UNSET:
            return [request.observation], True
        n = len(request.observations)
        if n == 0:
            raise InvalidRequestError(
                "`observations` is empty, expected at least one", pointer="/observations"
            )
        if n > self._max_observations:
            raise BatchTooLargeError(
                f"found {n} observations, at most {self._max_observations} are taken in one "
                "request; send several",
                pointer="/observations",
            )
        return request.observations, False

    def _conform(self, rows: Any, is_single: bool) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):
            batch = np.array(rows, dtype=np.float32)
            # One sum instead of a test of every number: NaN and infinity survive addition. A sum
            # of huge finite numbers may overflow too; the slow way below then finds no fault.
            if math.isfinite(batch.sum()):
                return batch
        return self._conform_slowly(rows, is_single)

    def _conform_slowly(self, rows: Any, is_single: bool) -> NDArray[np.float32]:
        try:
            return conform_observations(rows, self._space)
        except InvalidObservationError as exc:
            if is_single:
                place = re.sub(r"^/observations(/0)?", "/observation", exc.details["pointer"])
                exc.details["pointer"] = place
            raise

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
            return _invalid(exc, self._space)
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


def observation_type(space: BoxSpace) -> Any:
    """The msgspec type of one observation: nested lists of exactly the space's shape."""
    kind: Any = float
    for size in reversed(space.shape):
        kind = Annotated[list[kind], Meta(min_length=size, max_length=size)]
    return kind


def request_type(space: BoxSpace) -> Any:
    """The msgspec type of a whole `compute_action` request for an observation space."""
    one: Any = observation_type(space)
    many: Any = list[one]
    positive = Annotated[float, Meta(gt=0, le=3_600_000)]
    fields: list[tuple[str, Any, Any]] = [
        ("observation", one | UnsetType, UNSET),
        ("observations", many | UnsetType, UNSET),
        ("deterministic", bool, True),
        ("seed", Annotated[int, Meta(ge=0, le=_MAX_SEED)] | None, None),
        ("timeout_ms", positive | None, None),
        ("outputs", list[Literal["action_logp", "value", "action_dist_inputs"]] | None, None),
        ("version", int | None, None),
        ("action_mask", msgspec.Raw | UnsetType, UNSET),
        ("state", msgspec.Raw | UnsetType, UNSET),
    ]
    return msgspec.defstruct("ComputeActionRequest", fields, forbid_unknown_fields=True, gc=False)


_PLACE = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)


def _invalid(exc: msgspec.ValidationError, space: BoxSpace) -> PolicyServingError:
    match = _PLACE.match(str(exc))
    what, path = (match["what"], match["path"] or "$") if match else (str(exc), "$")
    pointer = _pointer(path)
    if pointer.startswith("/observation"):
        return InvalidObservationError(
            f"{what} at {pointer}; an observation of this policy is {describe_space(space)}",
            pointer=pointer,
        )
    return InvalidRequestError(f"{what} at {pointer or 'the top level'}", pointer=pointer)


def _pointer(path: str) -> str:
    """A JSON pointer (RFC 6901) from msgspec's path: `$.observations[...][2]`.

    msgspec writes `[...]` where it does not count the index.
    """
    keys = re.findall(r"\.([A-Za-z_0-9]+)|\[(\d+|\.\.\.)\]", path)
    return "".join("/" + (name or ("-" if index == "..." else index)) for name, index in keys)
