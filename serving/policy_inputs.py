"""The graph's inputs beside the observation: checked where a caller gives them, else the default.

Needs a manifest and no engine, so a codec can check a request before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.conforming import conform_leaf
from serving.errors import InvalidRequestError
from serving.manifest import InputSpec, PolicyManifest, StateSpec
from serving.spaces import (
    BoxSpace,
    DiscreteSpace,
    LeafSpace,
    MultiDiscreteSpace,
    describe_space,
    escape,
    graph_dtype,
    leaves,
)

Arrays = dict[str, NDArray[Any]]
# The defaults of so many rows are kept; smaller batches share them.
_N_CACHED_ROWS = 64


class PolicyInputs:
    """State, rewards, action masks and noise of one policy."""

    def __init__(self, manifest: PolicyManifest) -> None:
        self._manifest = manifest
        self._unseeded = np.random.default_rng()
        self._noise_size = manifest.noise.size
        self._mask_size = manifest.mask_size
        self._has_reward = manifest.has_reward
        self._state_leaves = {name: _leaf(spec) for name, spec in manifest.state.items()}
        self._defaults = {
            spec.name: _default(spec, manifest.state)
            for spec in manifest.inputs
            if spec.role != "observation"
        }
        self._cached: dict[int, Arrays] = {}

    def draw_noise(self, n: int, seed: int | None) -> NDArray[np.float32]:
        """The noise of n sampled actions, (n, D) float32; the same for the same seed.

        Raises:
            InvalidRequestError: The policy has no distribution to sample from.
        """
        if not self._noise_size:
            raise InvalidRequestError(
                f"this policy ({self._manifest.algorithm}) has no distribution to sample from; ask "
                "for deterministic actions",
                pointer="/deterministic",
            )
        generator = self._unseeded if seed is None else np.random.default_rng(seed)
        return self._manifest.noise.draw(generator, n)

    def conform_state(self, values: Any, n: int, *, pointer: str = "/state") -> Arrays:
        """Check what n episodes remember.

        Args:
            values: Name to (n, *shape) array; or a sequence of n entries, each name to one row's
                array, or None where an episode starts.
            n: Rows.
            pointer: Where it stands in the request.

        Returns:
            The graph's state inputs, `state/<name>` to (n, *shape).

        Raises:
            InvalidRequestError: Another name, shape, type or length, or not finite; or the policy
                has no memory.
        """
        if isinstance(values, Mapping):
            self._check_state_names(values, pointer)
            columns = {name: values[name] for name in self._state_leaves}
        else:
            entries = self._state_rows(values, n, pointer)
            initial = {name: spec.initial for name, spec in self._manifest.state.items()}
            columns = {
                name: [(initial if entry is None else entry)[name] for entry in entries]
                for name in self._state_leaves
            }
        found = {}
        for name, leaf in self._state_leaves.items():
            array = conform_leaf(
                columns[name],
                leaf,
                pointer=pointer,
                path=f"/{escape(name)}",
                error=InvalidRequestError,
            )
            _check_length(len(array), n, f"{pointer}/{escape(name)}")
            found[f"state/{name}"] = array
        return found

    def _state_rows(self, values: Any, n: int, pointer: str) -> list[Mapping[str, Any] | None]:
        if isinstance(values, str) or not isinstance(values, list | tuple):
            raise InvalidRequestError(
                f"found {type(values).__name__}, expected the state's arrays by name, or one such "
                "object (or null) per row",
                pointer=pointer,
            )
        _check_length(len(values), n, pointer)
        for row, entry in enumerate(values):
            if entry is not None:
                self._check_state_names(entry, f"{pointer}/{row}")
        return list(values)

    def _check_state_names(self, entry: Any, pointer: str) -> None:
        if isinstance(entry, Mapping) and entry.keys() == self._state_leaves.keys():
            return
        if not self._state_leaves:
            raise InvalidRequestError(
                "this policy has no memory, so it takes no state", pointer=pointer
            )
        expected = ", ".join(
            f"{name} ({describe_space(leaf)})" for name, leaf in self._state_leaves.items()
        )
        found = list(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise InvalidRequestError(
            f"found the state {found}, expected {expected}: the `state` of the last answer",
            pointer=pointer,
        )

    def conform_masks(self, values: Any, n: int, *, pointer: str = "/action_mask") -> Arrays:
        """Check the action masks of n rows.

        Args:
            values: (n, M) of bool, 0 or 1; or a sequence of rows, None where all are allowed.
            n: Rows.
            pointer: Where they stand in the request.

        Returns:
            The graph's `action_mask` input, (n, M) bool.

        Raises:
            InvalidRequestError: Another shape or length, other values, or a row that allows
                nothing; or the policy takes no mask.
        """
        space = self._manifest.action_space
        if not self._mask_size:
            raise InvalidRequestError(
                f"this policy takes no action_mask; its actions are {describe_space(space)}",
                pointer=pointer,
            )
        if isinstance(values, list | tuple) and any(row is None for row in values):
            values = [[1] * self._mask_size if row is None else row for row in values]
        leaf = BoxSpace((self._mask_size,), "bool", np.zeros(()), np.ones(()))
        masks = conform_leaf(values, leaf, pointer=pointer, error=InvalidRequestError)
        _check_length(len(masks), n, pointer)
        for start, end in _components(space):
            allowed = masks[:, start:end].any(axis=1)
            if not allowed.all():
                raise InvalidRequestError(
                    f"the mask allows none of the actions {start}..{end - 1}, expected at least "
                    "one that is allowed",
                    pointer=f"{pointer}/{int(np.argmin(allowed))}",
                )
        return {"action_mask": masks}

    def conform_rewards(self, values: Any, n: int, *, pointer: str = "/rewards") -> Arrays:
        """Check the rewards of the step before.

        A policy that reads none takes them all the same, so that one loop can drive any policy.

        Args:
            values: n numbers.
            n: Rows.
            pointer: Where they stand in the request.

        Returns:
            The graph's `reward` input, (n,) float32, or nothing where it has none.

        Raises:
            InvalidRequestError: Not n finite numbers.
        """
        leaf = BoxSpace((), "float32", np.array(-np.inf), np.array(np.inf))
        rewards = conform_leaf(values, leaf, pointer=pointer, error=InvalidRequestError)
        _check_length(len(rewards), n, pointer)
        return {"reward": rewards} if self._has_reward else {}

    def complete(self, inputs: Mapping[str, NDArray[Any]], n: int) -> Arrays:
        """The inputs with the default for each that is missing.

        Defaults: initial state, a reward of 0, all actions allowed, noise of zeros. They are
        shared by all calls and must not be written to.
        """
        defaults = self._cached.get(n)
        if defaults is None:
            if n > _N_CACHED_ROWS:
                return {**self._make_defaults(n), **inputs}
            if not self._cached:
                self._cached[_N_CACHED_ROWS] = self._make_defaults(_N_CACHED_ROWS)
            shared = self._cached[_N_CACHED_ROWS]
            defaults = self._cached[n] = {name: rows[:n] for name, rows in shared.items()}
        return {**defaults, **inputs}

    def example(self, n: int) -> Arrays:
        """Equal observations that the space holds: integers at their lowest, floats at 0.

        Zeros alone would not do: a table with a row for each element of Discrete(3, start=10) has
        none for 0.

        Returns:
            The graph's observation inputs, (n, *shape) each.
        """
        return {
            name: np.array(np.broadcast_to(_lowest(leaf), (n, *leaf.shape)), graph_dtype(leaf))
            for name, leaf in leaves(self._manifest.observation_space, "observation").items()
        }

    def _make_defaults(self, n: int) -> Arrays:
        return {name: make(n) for name, make in self._defaults.items()}


def _leaf(spec: StateSpec) -> BoxSpace:
    return BoxSpace(spec.shape, spec.dtype, np.array(-np.inf), np.array(np.inf))


def _lowest(leaf: LeafSpace) -> Any:
    """The lowest element of an integer space, each component by itself; 0 where there is none."""
    if isinstance(leaf, DiscreteSpace | MultiDiscreteSpace):
        return leaf.start
    if isinstance(leaf, BoxSpace) and not leaf.is_float:
        return np.where(np.isfinite(leaf.low), leaf.low, 0.0)
    return 0


def _default(spec: InputSpec, state: Mapping[str, StateSpec]) -> Callable[[int], NDArray[Any]]:
    """What makes n rows of an input's default."""
    if spec.role == "state":
        initial = state[spec.name.removeprefix("state/")].initial
        return lambda n: np.array(np.broadcast_to(initial, (n, *spec.shape)))
    if spec.role == "action_mask":
        return lambda n: np.ones((n, *spec.shape), dtype=np.bool_)
    return lambda n: np.zeros((n, *spec.shape), dtype=np.float32)


def _components(space: Any) -> Iterator[tuple[int, int]]:
    """Where the actions of each component of a Discrete or MultiDiscrete space stand in a mask."""
    sizes = [space.n] if isinstance(space, DiscreteSpace) else []
    if isinstance(space, MultiDiscreteSpace):
        sizes = space.nvec.ravel().tolist()
    start = 0
    for size in sizes:
        yield start, start + size
        start += size


def _check_length(found: int, expected: int, pointer: str) -> None:
    if found != expected:
        raise InvalidRequestError(
            f"found {found} rows, expected {expected}, one per observation", pointer=pointer
        )
