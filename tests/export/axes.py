"""The axes of the export matrix: algorithms, spaces, connectors and settings, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

CONV = {"conv_filters": [[6, 4, 2], [8, 3, 2]]}
LSTM = {"use_lstm": True, "max_seq_len": 8, "lstm_cell_size": 12}


@dataclass(frozen=True)
class Algorithm:
    """An algorithm with one of its settings.

    Attributes:
        name: RLlib's.
        actions: Kinds of action spaces that it takes: `discrete`, `box`, `other`.
        training: Keywords of `AlgorithmConfig.training`.
        model: The RLModule's config.
        has_own_module: Its RLModule or setting is the first of its kind here, so that it is paired
            with every observation space and connector.
    """

    name: str
    actions: tuple[str, ...] = ("discrete", "box", "other")
    training: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    has_own_module: bool = False


_DQN = {"double_q": False, "dueling": False}
ALGORITHMS = {
    "PPO": Algorithm("PPO", has_own_module=True),
    "PPO shared": Algorithm("PPO", model={"vf_share_layers": True}),
    "PPO LSTM": Algorithm("PPO", model=LSTM, has_own_module=True),
    "PPO LSTM shared": Algorithm("PPO", model=LSTM | {"vf_share_layers": True}),
    "PPO free log std": Algorithm("PPO", ("box",), model={"free_log_std": True}),
    "IMPALA": Algorithm("IMPALA"),
    "IMPALA LSTM": Algorithm("IMPALA", model=LSTM),
    "APPO": Algorithm("APPO"),
    "APPO LSTM": Algorithm("APPO", model=LSTM),
    "DQN plain": Algorithm("DQN", ("discrete",), _DQN),
    "DQN dueling double": Algorithm("DQN", ("discrete",), has_own_module=True),
    "DQN distributional": Algorithm(
        "DQN", ("discrete",), _DQN | {"num_atoms": 11, "v_min": -5.0, "v_max": 9.0}
    ),
    "DQN dueling distributional": Algorithm(
        "DQN", ("discrete",), {"num_atoms": 11, "v_min": -5.0, "v_max": 9.0}
    ),
    "DQN LSTM": Algorithm("DQN", ("discrete",), model=LSTM, has_own_module=True),
    "SAC": Algorithm("SAC", ("box",), has_own_module=True),
    "SAC discrete": Algorithm("SAC", ("discrete",)),
    "CQL": Algorithm("CQL", ("box",)),
    "IQL": Algorithm("IQL", ("box",)),
    "TQC": Algorithm("TQC", ("box",)),
    "BC": Algorithm("BC", has_own_module=True),
    "BC LSTM": Algorithm("BC", model=LSTM),
    "MARWIL": Algorithm("MARWIL"),
    "MARWIL LSTM": Algorithm("MARWIL", model=LSTM),
}

_DICT = gym.spaces.Dict(
    {
        # Not in sorted order: RLlib sorts the keys.
        "velocity": Box(-1, 1, (2,), np.float32),
        "gear": Discrete(4),
        "angle": Box(-3, 3, (), np.float32),
    }
)


@dataclass(frozen=True)
class Observation:
    """An observation space, and whether RLlib can take it without `FlattenObservations`."""

    space: gym.Space[Any]
    is_flat: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0


OBSERVATIONS = {
    "Box 1-D": Observation(Box(-2, 2, (4,), np.float32), is_flat=True),
    "Box 1-D float64": Observation(Box(-2, 2, (4,), np.float64), is_flat=True),
    "Box 1-D float16": Observation(Box(-2, 2, (4,), np.float16)),
    "Box 1-D int32": Observation(Box(-9, 9, (4,), np.int32), scale=5.0),
    "Box 1-D unbounded": Observation(
        Box(np.array([-np.inf, 0.0, -1.0], np.float32), np.inf, (3,), np.float32), is_flat=True
    ),
    "Box rank 0": Observation(Box(-2, 2, (), np.float32)),
    "Box rank 2": Observation(Box(-2, 2, (3, 2), np.float32)),
    "Box rank 3": Observation(Box(-1, 1, (16, 16, 3), np.float32), is_flat=True, model=CONV),
    "uint8 image": Observation(Box(0, 255, (6, 5, 1), np.uint8), scale=150.0),
    "Discrete": Observation(Discrete(5)),
    "MultiDiscrete": Observation(MultiDiscrete([3, 2, 4])),
    "MultiBinary": Observation(MultiBinary(6)),
    "Dict": Observation(_DICT),
    "Tuple": Observation(gym.spaces.Tuple([Discrete(3), Box(-1, 1, (2, 2), np.float64)])),
    "Dict in Tuple in Dict": Observation(
        gym.spaces.Dict(
            {
                "z": MultiBinary(2),
                "a": gym.spaces.Tuple(
                    [
                        gym.spaces.Dict({"q": MultiDiscrete([2, 2]), "b/c~d": Discrete(2)}),
                        Box(0, 255, (2, 2), np.uint8),
                    ]
                ),
            }
        ),
        scale=20.0,
    ),
}

# Bounds that differ by component.
UNEVEN = Box(np.array([-2, 0, -5], np.float32), np.array([1, 10, -4], np.float32))
ACTIONS: dict[str, tuple[str, gym.Space[Any]]] = {
    "Discrete": ("discrete", Discrete(4)),
    "Discrete start 5": ("discrete", Discrete(3, start=5)),
    "MultiDiscrete": ("other", MultiDiscrete([3, 2, 4])),
    "Box": ("box", UNEVEN),
    "Box float64": ("box", Box(-1.5, 4.0, (2,), np.float64)),
    "Box unbounded": ("box", Box(-np.inf, np.inf, (2,), np.float32)),
    "Box half-bounded": (
        "box",
        Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32)),
    ),
    "Dict": (
        "other",
        gym.spaces.Dict({"turn": Discrete(3), "gas": Box(-1, 3, (2,), np.float32)}),
    ),
    "Tuple": (
        "other",
        gym.spaces.Tuple([Box(-1, 1, (1,), np.float32), MultiDiscrete([2, 3]), Discrete(2)]),
    ),
    "Tuple in Dict": (
        "other",
        gym.spaces.Dict(
            {
                "pair": gym.spaces.Tuple([Discrete(2), UNEVEN]),
                "flag": gym.spaces.Dict({"on": Discrete(2)}),
            }
        ),
    ),
}

# Connectors by name, with the observation space that they need (None: any that is flat or not).
CONNECTORS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "Flatten": (("flatten",), None),
    "Flatten + MeanStdFilter": (("flatten", "mean_std"), None),
    "MeanStdFilter": (("mean_std",), "Box 1-D"),
    "FrameStacking": (("frames",), "frame"),
    "PrevActionsPrevRewards + Flatten": (("prev", "flatten"), None),
    "PrevActionsPrevRewards + Flatten + MeanStdFilter": (("prev", "flatten", "mean_std"), None),
}
FRAME = Observation(Box(-1, 1, (12, 12, 1), np.float32), is_flat=True, model=CONV)

SETTINGS = {
    "unsquash": (True, False),
    "clip": (False, True),
    "neither": (False, False),
    "both": (True, True),
}
