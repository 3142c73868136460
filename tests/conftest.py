"""Real artifacts, each made once per run of the suite by the product's own commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import Server, serving, succeed


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="session")
def cartpole_run(artifacts: Path) -> Path:
    """A run directory of a CartPole-v1 policy that was really trained."""
    run = artifacts / "cartpole-run"
    succeed("train", "ppo-cartpole", "--run-dir", run, "--seed", "1", "--quiet")
    return run


@pytest.fixture(scope="session")
def cartpole_bundle(cartpole_run: Path, artifacts: Path) -> Path:
    """Its bundle, in both formats."""
    bundle = artifacts / "cartpole"
    succeed("export", cartpole_run, "-o", bundle, "--format", "onnx,torchscript")
    return bundle


@pytest.fixture(scope="session")
def pendulum_run(artifacts: Path) -> Path:
    """A run directory of a policy with Box actions, trained for a moment."""
    run = artifacts / "pendulum-run"
    arguments = ("--env", "Pendulum-v1", "--stop-timesteps", "4000", "--seed", "1", "--quiet")
    succeed("train", *arguments, "--run-dir", run)
    return run


@pytest.fixture(scope="session")
def pendulum_bundle(pendulum_run: Path, artifacts: Path) -> Path:
    bundle = artifacts / "pendulum"
    succeed("export", pendulum_run, "-o", bundle)
    return bundle


@pytest.fixture(scope="session")
def server(cartpole_bundle: Path, pendulum_bundle: Path, artifacts: Path) -> Iterator[Server]:
    """Real Ray Serve with both policies, in its own processes."""
    log = artifacts / "serve.log"
    with serving(cartpole_bundle, pendulum_bundle, "--port", "0", log=log) as running:
        yield running
