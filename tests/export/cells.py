"""The cells of the export matrix: which policy, and whether it is exported or refused.

The axes are dictionaries by name; a cell is a choice of one value from each. `every_cell` pairs
each two axes that can interact, `diagonal` takes few cells in which every value occurs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from ray.rllib.connectors.connector_v2 import ConnectorV2

from tests.export import custom_modules
from tests.export.axes import (
    ACTIONS,
    ALGORITHMS,
    CONNECTORS,
    CONV,
    FRAME,
    OBSERVATIONS,
    SETTINGS,
    UNEVEN,
)
from tests.export.checkpoints import Case

AGENTS = {"a0": "pA", "a1": "pA", "b": "pB"}


@dataclass(frozen=True)
class Cell:
    """One policy and what its export has to come to.

    Attributes:
        name: Unique, readable.
        group: The section of the table.
        case: Its checkpoint.
        refused: None if it is exported; else a regular expression that the refusal matches.
        module_id: Which module; None for the only one.
        spoil: What is done to the checkpoint after it was written.
    """

    name: str
    group: str
    case: Case
    refused: str | None = None
    module_id: str | None = None
    spoil: Callable[[Path], None] | None = None


def cell(
    algorithm: str,
    observation: str = "Box 1-D",
    action: str | None = None,
    connectors: str = "",
    settings: str = "unsquash",
    *,
    group: str,
) -> Cell:
    """One cell from the axes' names; what an observation space needs is put before it."""
    chosen = ALGORITHMS[algorithm]
    action = action or ("Discrete" if "discrete" in chosen.actions else "Box")
    pieces, needed = CONNECTORS[connectors] if connectors else ((), None)
    seen = FRAME if needed == "frame" else OBSERVATIONS[needed or observation]
    if not pieces and not seen.is_flat:
        pieces, connectors = ("flatten",), "Flatten"
    normalize, clip = SETTINGS[settings]
    # RLlib builds the convolutions only where the images reach the network as images.
    model = dict(chosen.model) if "flatten" in pieces else dict(chosen.model) | dict(seen.model)
    case = Case(
        seen.space,
        ACTIONS[action][1],
        algorithm=chosen.name,
        connectors=pieces,
        model_config=model,
        training=chosen.training,
        normalize_actions=normalize,
        clip_actions=clip,
        observation_scale=1.0 if "mean_std" in pieces else seen.scale,
    )
    what = "frames" if needed == "frame" else (needed or observation)
    parts = [algorithm, what, action, connectors, settings if settings != "unsquash" else ""]
    return Cell(" / ".join(part for part in parts if part), group, case)


def _takes(algorithm: str, action: str) -> bool:
    return ACTIONS[action][0] in ALGORITHMS[algorithm].actions


def _by_algorithm() -> Iterator[Cell]:
    for name, algorithm in ALGORITHMS.items():
        for action in ACTIONS:
            if _takes(name, action):
                yield cell(name, action=action, group="Algorithm x action space")
        is_paired = algorithm.has_own_module
        for observation in OBSERVATIONS if is_paired else ("Box rank 3", "Dict"):
            yield cell(name, observation, group="Algorithm x observation space")
        for connectors in CONNECTORS if is_paired else ("Flatten + MeanStdFilter",):
            if "Prev" not in connectors or "discrete" in algorithm.actions:
                yield cell(name, connectors=connectors, group="Algorithm x connectors")


def _by_space() -> Iterator[Cell]:
    for observation in OBSERVATIONS:
        for action in ("Box", "Tuple in Dict"):
            yield cell("PPO", observation, action, group="Observation space x action space")
        for connectors in ("Flatten + MeanStdFilter", "PrevActionsPrevRewards + Flatten"):
            yield cell(
                "PPO", observation, connectors=connectors, group="Observation space x connectors"
            )
    for action in (name for name, (kind, _) in ACTIONS.items() if kind != "discrete"):
        for name, settings in itertools.product(("PPO", "SAC"), SETTINGS):
            if _takes(name, action):
                group = "Action space x settings"
                yield cell(name, action=action, settings=settings, group=group)


def _special() -> Iterator[Cell]:
    box, discrete = OBSERVATIONS["Box 1-D"].space, ACTIONS["Discrete"][1]
    masked = gym.spaces.Dict(
        {"action_mask": Box(0, 1, (4,), np.float32), "observations": Box(-2, 2, (3,), np.float32)}
    )
    for module_class, space in (
        (custom_modules.PlainMlp, box),
        (custom_modules.DirectActions, box),
        (custom_modules.MaskedDict, masked),
        (custom_modules.NestedState, box),
    ):
        case = Case(space, discrete, module_class=module_class)
        yield Cell(f"custom {module_class.__name__}", "Custom modules", case)
    group = "Several agents and other layouts"
    for pieces in ((), ("flatten", "mean_std")):
        space = OBSERVATIONS["Dict"].space if pieces else box
        case = Case(space, UNEVEN, connectors=pieces, agents=AGENTS)
        suffix = " with MeanStdFilter" if pieces else ""
        yield Cell(f"agent b's module{suffix}", group, case, module_id="pB")
    yield Cell("agents a0 and a1's module", group, Case(box, UNEVEN, agents=AGENTS), module_id="pA")
    case = Case(box, discrete, has_env=False, has_local_runner=False)
    yield Cell("no environment here and no local env runner", group, case)


class UnknownConnector(ConnectorV2):
    """A user's own connector, without a twin."""

    def __call__(self, *, batch: Any, **_: Any) -> Any:
        return batch


def _unknown_connector(*, multi_agent: bool) -> Any:  # noqa: ARG001
    return UnknownConnector()


def _take_class_away(checkpoint: Path) -> None:
    """Name a module that is not importable, as on a machine without the user's code."""
    for path in checkpoint.rglob("class_and_ctor_args.pkl"):
        content = path.read_bytes()
        # Of equal length, so that the pickle's own lengths stay right.
        path.write_bytes(content.replace(b"export.custom_modules", b"export.absent_modules"))


def _refusals() -> Iterator[Cell]:
    group = "Refused"
    box, discrete = OBSERVATIONS["Box 1-D"].space, ACTIONS["Discrete"][1]
    image = Box(0, 255, (16, 16, 3), np.uint8)
    for module_class, reason in (
        (custom_modules.UnknownDistribution, "HalfTemperature"),
        (custom_modules.DataDependent, r"(?i)data|branch|control flow"),
        (custom_modules.NumpyInside, r"(?i)numpy|convert"),
        (custom_modules.FixedBatch, r"(?i)batch"),
    ):
        case = Case(box, discrete, module_class=module_class)
        yield Cell(f"custom {module_class.__name__}", group, case, refused=reason)
    yield Cell(
        "custom module that is not importable",
        group,
        Case(box, discrete, module_class=custom_modules.PlainMlp),
        refused=r"absent_modules",
        spoil=_take_class_away,
    )
    yield Cell(
        "unknown connector",
        group,
        Case(box, discrete, connectors=(_unknown_connector,)),
        refused="UnknownConnector",
    )
    yield Cell(
        "uint8 image straight into a network",
        group,
        Case(image, discrete, model_config=CONV),
        refused=r"(?i)uint8|unsigned char|byte",
    )
    # Agents that share a module have filters of their own: one graph cannot hold both.
    yield Cell(
        "two agents' filters before one module",
        group,
        Case(box, discrete, connectors=("mean_std",), agents=AGENTS),
        refused=r"a0.*a1",
        module_id="pA",
    )


@functools.cache
def every_cell() -> tuple[Cell, ...]:
    """The full matrix, each cell once."""
    cells = [*_by_algorithm(), *_by_space(), *_special(), *_refusals()]
    found: dict[str, Cell] = {}
    for each in cells:
        found.setdefault(each.name, each)
    return tuple(found.values())


# Algorithm, observation space, action space, connectors, settings. PPO's module in the other
# algorithms' names (IMPALA LSTM and so on) is left to the full matrix.
DIAGONAL = (
    ("PPO", "Box rank 3", "Box", "", "clip"),
    ("PPO", "uint8 image", "Box half-bounded", "Flatten", "clip"),
    ("PPO shared", "Dict", "Tuple in Dict", "Flatten + MeanStdFilter", "unsquash"),
    ("PPO LSTM", "MultiDiscrete", "Discrete", "PrevActionsPrevRewards + Flatten", "unsquash"),
    ("PPO LSTM shared", "Box rank 0", "Dict", "Flatten", "neither"),
    ("PPO free log std", "Box 1-D int32", "Box float64", "Flatten", "both"),
    ("IMPALA", "Tuple", "MultiDiscrete", "Flatten", "unsquash"),
    ("APPO", "Dict in Tuple in Dict", "Tuple", "Flatten", "unsquash"),
    ("DQN plain", "Discrete", "Discrete start 5", "Flatten", "unsquash"),
    ("DQN dueling double", "", "Discrete", "FrameStacking", "unsquash"),
    ("DQN dueling distributional", "Box 1-D float64", "Discrete", "", "unsquash"),
    ("DQN LSTM", "MultiBinary", "Discrete", "Flatten", "unsquash"),
    ("SAC", "Box rank 2", "Box", "Flatten", "unsquash"),
    ("SAC discrete", "Box 1-D", "Discrete", "", "unsquash"),
    ("CQL", "Box 1-D unbounded", "Box", "", "unsquash"),
    ("IQL", "Box 1-D float16", "Box", "Flatten", "clip"),
    ("TQC", "", "Box unbounded", "MeanStdFilter", "unsquash"),
    ("BC", "Box 1-D", "Box", "", "unsquash"),
    (
        "MARWIL",
        "Box 1-D",
        "Discrete",
        "PrevActionsPrevRewards + Flatten + MeanStdFilter",
        "unsquash",
    ),
)


@functools.cache
def diagonal() -> tuple[Cell, ...]:
    """Few cells in which every value of every axis occurs, and the special and refused ones."""
    cells = [
        cell(algorithm, observation or "Box 1-D", action, connectors, settings, group="Diagonal")
        for algorithm, observation, action, connectors, settings in DIAGONAL
    ]
    return (*cells, *_special(), *_refusals())
