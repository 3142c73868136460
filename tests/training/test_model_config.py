"""The networks' settings: names that are found wrong before anything starts."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from training.config_files import load_config
from training.errors import ConfigError
from training.model_config import Initializer


def test_the_initializers_are_those_of_torch() -> None:
    of_torch = {
        name for name in dir(torch.nn.init) if name.endswith("_") and not name.startswith("_")
    }
    assert set(get_args(Initializer)) == of_torch


@pytest.mark.parametrize("name", ["fcnet_kernel_initializer", "head_fcnet_kernel_initializer"])
def test_an_initializer_that_torch_does_not_have_is_wrong_usage(name: str) -> None:
    flags = {"env": "CartPole-v1"}
    config = load_config(flags=flags, sets=[f"model.{name}=orthogonal_"])
    assert getattr(config.model, name) == "orthogonal_"
    for wrong in ("orthogonl_", "orthogonal", "_no_grad_fill_"):
        with pytest.raises(ConfigError, match=rf"model\.{name}.*'orthogonal_'"):
            load_config(flags=flags, sets=[f"model.{name}={wrong}"])
