from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from ray.rllib.core.columns import Columns
from torch import nn

from tests.export import custom_modules
from training.exportability import why_not_exportable

# Which of them `export` exports or refuses is shown in tests/export by the real command.
VECTOR = Box(-1.0, 1.0, (4,), np.float32)
MASKED = Dict({"observations": VECTOR, "action_mask": Box(0.0, 1.0, (3,), np.float32)})


class Forgetful(custom_modules.PlainMlp):
    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.EMBEDDINGS: self.body(batch[Columns.OBS])}


def reason_for(module_class: Any, observation_space: Any = VECTOR) -> str | None:
    module = module_class(
        observation_space=observation_space, action_space=Discrete(3), model_config={}
    )
    assert isinstance(module, nn.Module)
    algorithm = SimpleNamespace(get_module=lambda _: module)
    return why_not_exportable(algorithm)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["PlainMlp", "DirectActions", "NestedState"])
def test_a_module_of_tensor_code_can_be_exported(name):
    assert reason_for(getattr(custom_modules, name)) is None


def test_a_module_may_take_observations_of_several_parts():
    assert reason_for(custom_modules.MaskedDict, MASKED) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("UnknownDistribution", "HalfTemperature"),
        ("DataDependent", "torch.export refuses DataDependent"),
        ("FixedBatch", "torch.export refuses FixedBatch"),
        ("NumpyInside", "torch.export refuses NumpyInside"),
    ],
)
def test_a_module_that_export_refuses_is_named_before_it_is_trained(name, expected):
    reason = reason_for(getattr(custom_modules, name))
    assert reason is not None
    assert expected in reason


def test_a_module_without_an_action_is_named():
    reason = reason_for(Forgetful)
    assert reason is not None
    assert reason.startswith("Forgetful's _forward_inference answers embeddings, expected")
