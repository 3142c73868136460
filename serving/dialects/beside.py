"""What a request holds beside its observations: state, action masks and rewards.

Their rows stand in fields of the same name for one observation and for many, so they are parsed
in a second step, when it is known which of the two came.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from serving.dialects.rows import RowCodec, place, placed, state_space, what_and_where
from serving.errors import InvalidRequestError, PolicyServingError
from serving.manifest import PolicyManifest
from serving.policy_inputs import PolicyInputs
from serving.spaces import MultiBinarySpace


class _Part:
    """A field that holds one row for `observation`, and a list of rows for `observations`."""

    def __init__(self, name: str, rows: RowCodec) -> None:
        self.name = name
        self.rows = rows
        row: Any = rows.row_type | None
        self._one = msgspec.json.Decoder(row)
        self._many = msgspec.json.Decoder(list.__class_getitem__(row))

    def decode(self, raw: msgspec.Raw, n: int, is_single: bool) -> list[Any]:
        """The n rows; None for one that was given as null.

        Raises:
            InvalidRequestError: Of another type, or not one for each observation.
        """
        try:
            rows = [self._one.decode(raw)] if is_single else self._many.decode(raw)
        except msgspec.ValidationError as exc:
            what, path = what_and_where(exc)
            pointer = place(self.name, path[1:], self.rows, not is_single)
            raise InvalidRequestError(f"{what} at {pointer}", pointer=pointer) from exc
        if len(rows) != n:
            raise InvalidRequestError(
                f"found {len(rows)} rows of `{self.name}` for {n} observations, expected one each "
                "(null where there is none)",
                pointer=f"/{self.name}",
            )
        return rows


class BesideCodec:
    """A request's state, action masks and rewards to the graph's inputs."""

    def __init__(self, manifest: PolicyManifest, inputs: PolicyInputs) -> None:
        self._manifest = manifest
        self._inputs = inputs
        mask = MultiBinarySpace((manifest.mask_size,))
        self._mask = _Part("action_mask", RowCodec(mask, ["action_mask"], "ActionMask"))
        names = [f"state/{name}" for name in sorted(manifest.state)]
        self._state = _Part("state", RowCodec(state_space(manifest.state), names, "State"))

    @property
    def row_types(self) -> dict[str, Any]:
        """The msgspec types of one row of the fields that this policy takes."""
        found = {}
        if self._manifest.mask_size:
            found["action_mask"] = self._mask.rows.row_type
        if self._manifest.state:
            found["state"] = self._state.rows.row_type
        return found

    def decode(self, request: Any, n: int, is_single: bool) -> dict[str, NDArray[Any]]:
        """What came beside the observations: state, action masks and rewards."""
        found: dict[str, NDArray[Any]] = {}
        if request.action_mask is not UNSET:
            if not self._manifest.mask_size:
                raise InvalidRequestError(
                    "this policy takes no action_mask", pointer="/action_mask"
                )
            rows = self._mask.decode(request.action_mask, n, is_single)
            try:
                found |= self._inputs.conform_masks(rows, n)
            except PolicyServingError as exc:
                raise placed(exc, is_single) from None
        if request.state is not UNSET:
            if not self._manifest.state:
                raise InvalidRequestError(
                    "this policy has no memory, so it takes no state", pointer="/state"
                )
            found |= self._state_rows(self._state.decode(request.state, n, is_single), is_single)
        if request.reward is not UNSET or request.rewards is not UNSET:
            found |= self._rewards(request, n, is_single)
        return found

    def _state_rows(self, rows: list[Any], is_single: bool) -> dict[str, NDArray[Any]]:
        given = [row for row in rows if row is not None]
        if not given:
            return {}
        arrays = self._state.rows.arrays(given)
        if arrays is None:
            try:
                return self._inputs.conform_state(msgspec.to_builtins(rows), len(rows))
            except PolicyServingError as exc:
                raise placed(exc, is_single) from None
        if len(given) == len(rows):
            return arrays
        goes_on = np.array([row is not None for row in rows])
        for name, spec in self._manifest.state.items():
            start = np.broadcast_to(spec.initial, (len(rows), *spec.shape)).astype(spec.dtype)
            start[goes_on] = arrays[f"state/{name}"]
            arrays[f"state/{name}"] = start
        return arrays

    def _rewards(self, request: Any, n: int, is_single: bool) -> dict[str, NDArray[Any]]:
        right, wrong = ("reward", "rewards") if is_single else ("rewards", "reward")
        if not self._manifest.has_reward:
            name = "reward" if request.rewards is UNSET else "rewards"
            raise InvalidRequestError(f"this policy takes no {name}", pointer=f"/{name}")
        if getattr(request, wrong) is not UNSET:
            raise InvalidRequestError(
                f"found `{wrong}`; `{right}` belongs to "
                f"`{'observation' if is_single else 'observations'}`",
                pointer=f"/{wrong}",
            )
        rewards = [request.reward] if is_single else request.rewards
        try:
            return self._inputs.conform_rewards(rewards, n)
        except PolicyServingError as exc:
            raise placed(exc, is_single) from None
