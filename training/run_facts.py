"""What `run.json` says about a run: the environment, the versions and the machine it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from training.config import TrainingConfig

_PACKAGES = ("policyserve", "ray", "torch", "gymnasium", "numpy")


def run_facts(config: TrainingConfig) -> dict[str, Any]:
    """Gather the facts of a run that starts now, without importing Ray or torch."""
    return {
        "env": config.env,
        "env_config": dict(config.env_config),
        "wrappers": [[path, kwargs] for path, kwargs in config.wrapper_calls()],
        "algo": config.algo,
        "seed": config.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "n_cpus": os.cpu_count(),
            "num_gpus": config.num_gpus,
        },
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout that isn't installed
