"""Weights and filter statistics from a checkpoint's files into what the config built.

Every name, shape and dtype has to agree: RLlib's own `set_state` ignores what it doesn't know.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.connectors.connector_pipeline_v2 import ConnectorPipelineV2
from ray.rllib.connectors.env_to_module import MeanStdFilter

from export.errors import CheckpointError, UnsupportedPolicyError
from export.safe_arrays import decode_array, encode_array
from export.safe_pickle import load_state

_N_NAMED = 4


def _state_file(directory: Path, stem: str) -> Path:
    packed = directory / f"{stem}.msgpack"  # RLlib prefers it too
    return packed if packed.is_file() else directory / f"{stem}.pkl"


def restore_weights(rl_module: Any, directory: Path) -> None:
    """Give a module the weights that lie in its directory of a checkpoint.

    Args:
        rl_module: The TorchRLModule to fill; left in evaluation mode, without gradients.
        directory: Where RLlib wrote a module of the same kind.

    Raises:
        CheckpointError: The weights are not plain data, or have other names, shapes or dtypes
            than the module's.
        UnsupportedPolicyError: The module changes the weights that it is given.
    """
    if not directory.is_dir():
        parent = directory.parent
        entries = parent.iterdir() if parent.is_dir() else ()
        found = sorted(entry.name for entry in entries if entry.is_dir())
        raise CheckpointError(
            f"{parent} holds no RLModule {directory.name!r}; it holds: {', '.join(found) or 'none'}"
        )
    path = _state_file(directory, "module_state")
    state = load_state(path)
    found_arrays = _arrays(state, path)
    _check_fit(_arrays(rl_module.get_state(), path), found_arrays, path)
    rl_module.set_state(state)
    for name, array in _arrays(rl_module.get_state(), path).items():
        if not np.array_equal(array, found_arrays[name], equal_nan=array.dtype.kind == "f"):
            raise UnsupportedPolicyError(
                f"the RLModule {type(rl_module).__name__} did not take {name} from {path}: its "
                "set_state changes what it is given"
            )
    rl_module.eval()
    rl_module.requires_grad_(False)


def _arrays(state: Any, path: Path, prefix: str = "") -> dict[str, NDArray[Any]]:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected names and arrays")
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            arrays |= _arrays(value, path, f"{prefix}{name}/")
        else:
            arrays[f"{prefix}{name}"] = np.asarray(value)
    return arrays


def _check_fit(
    expected: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]], path: Path
) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown to the config" for name in found if name not in expected]
    problems += [
        f"{name} is {array.dtype} {found[name].shape} in the file, {expected[name].dtype} "
        f"{expected[name].shape} by the config"
        for name, array in found.items()
        if name in expected
        and (array.shape, array.dtype) != (expected[name].shape, expected[name].dtype)
    ]
    if problems:
        more = len(problems) - _N_NAMED
        raise CheckpointError(
            f"{path} doesn't fit the config: {'; '.join(problems[:_N_NAMED])}"
            + (f"; and {more} more" if more > 0 else "")
            + ". Give --config the config that this checkpoint was trained with"
        )


def restore_connectors(pipeline: ConnectorPipelineV2, directory: Path) -> None:
    """Give a pipeline the filter statistics that lie in its directory of a checkpoint.

    Args:
        pipeline: As the config builds it.
        directory: Where RLlib wrote the same pipeline.

    Raises:
        CheckpointError: The statistics are not plain data, or the directory holds other filters
            than the pipeline does.
        UnsupportedPolicyError: A connector other than RLlib's MeanStdFilter has a state.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is missing: the checkpoint is incomplete")
    if load_state(_state_file(directory, "state")):
        raise UnsupportedPolicyError(
            f"the connector pipeline in {directory} has a state of its own, which --safe can't "
            "restore; use --trust-checkpoint"
        )
    names = [type(piece).__name__ for piece in pipeline.connectors]
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and entry.name not in names:
            raise CheckpointError(
                f"{directory} holds the state of a connector {entry.name}, which the config "
                "doesn't have: give --config the config that this checkpoint was trained with"
            )
    for piece in pipeline.connectors:
        _restore_piece(piece, directory / type(piece).__name__, names)


def _restore_piece(piece: Any, directory: Path, names: list[str]) -> None:
    name = type(piece).__name__
    # A subclass may hold more than RLlib's filter does.
    if type(piece) is MeanStdFilter:
        if names.count(name) > 1:
            raise UnsupportedPolicyError(
                f"the config has {names.count(name)} connectors {name}, and RLlib keeps the state "
                "of the last alone"
            )
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory} is missing: the checkpoint is incomplete, or was trained without "
                "the MeanStdFilter that the config has"
            )
        path = _state_file(directory, "state")
        piece.set_state(_filter_state(load_state(path), piece.get_state(), path))
    elif not directory.is_dir():
        return  # RLlib writes no directory for a connector without state
    elif isinstance(piece, ConnectorPipelineV2):
        restore_connectors(piece, directory)
    elif load_state(_state_file(directory, "state")):
        raise UnsupportedPolicyError(
            f"the connector {name} has a state ({directory}), and --safe restores only that of "
            "RLlib's MeanStdFilter; use --trust-checkpoint"
        )


def _filter_state(found: Any, expected: Mapping[Any, Any], path: Path) -> dict[Any, Any]:
    """A MeanStdFilter's state, checked and written anew.

    RLlib decodes the texts of its arrays with pickles allowed, so it is given none that came from
    the file.
    """
    if not isinstance(found, dict) or set(found) != set(expected):
        shown = sorted(map(repr, found)) if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(
            f"{path} has filters of the agents {shown}, the config of {sorted(map(repr, expected))}"
        )
    try:
        return {agent: _agent_filter(found[agent], expected[agent]) for agent in found}
    except CheckpointError as exc:
        raise CheckpointError(f"{path}: {exc.message}") from exc
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(
            f"{path} is no state of a MeanStdFilter ({type(exc).__name__}: {exc}): damaged, or "
            "of another Ray version"
        ) from exc


def _agent_filter(state: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    shape = np.asarray(expected["shape"])
    if shape.dtype.kind != "i":
        raise CheckpointError("a MeanStdFilter over a Dict or Tuple, which RLlib can't run")
    if not np.array_equal(state["shape"], shape):
        raise CheckpointError(
            f"the filter is of observations of shape {tuple(map(int, state['shape']))}, by the "
            f"config they have {tuple(map(int, shape))}"
        )
    (statistics,) = state["running_stats"]
    (names,) = expected["running_stats"]
    clip = state["clip_by_value"]
    return {
        "shape": shape,
        "de_mean_to_zero": bool(state["de_mean_to_zero"]),
        "de_std_to_one": bool(state["de_std_to_one"]),
        "clip_by_value": None if clip is None else float(clip),
        "running_stats": [
            {
                name: _count(statistics[name])
                if isinstance(value, int)
                else _statistic(statistics[name], tuple(shape))
                for name, value in names.items()
            }
        ],
    }


def _count(value: Any) -> int:
    count = operator.index(value)
    if count < 0:
        raise ValueError(f"a count of {count}")
    return count


def _statistic(value: Any, shape: tuple[int, ...]) -> str:
    array = decode_array(value)
    if array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
        raise ValueError(f"statistics {array.dtype} {array.shape}, expected finite float64 {shape}")
    return encode_array(array)
