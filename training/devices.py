"""The GPU that a config asks for: whether torch has it. Imports no Ray."""

from __future__ import annotations

import warnings

import torch

from training.errors import ConfigError


def check_gpus(num_gpus: int) -> None:
    """Make sure that torch sees as many CUDA GPUs as a config asks for.

    Raises:
        ConfigError: It sees fewer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a driver that it can't use
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < num_gpus:
        built = "" if torch.version.cuda else ", which is built without CUDA,"
        raise ConfigError(
            f"num_gpus is {num_gpus} and torch {torch.__version__}{built} sees {found} CUDA GPUs: "
            "train on the CPU with --num-gpus 0, or mend the driver or torch"
        )
