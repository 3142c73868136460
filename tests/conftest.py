"""Real artifacts, each made once per run of the suite by the product's own commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.processes import Server, serving, succeed

# Two workers share two cores: a second thread of torch's only waits for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One directory for all of pytest's worker processes."""
    base = tmp_path_factory.getbasetemp()
    found = (base if worker_id == "master" else base.parent) / "artifacts"
    found.mkdir(exist_ok=True)
    return found


def made_once(path: Path, make: Callable[[], object]) -> Path:
    """Have one worker make `path`, while any other that wants it waits."""
    done = path.with_name(f"{path.name}.done")
    with FileLock(path.with_name(f"{path.name}.lock")):
        if not done.exists():
            make()
            done.touch()
    return path


@pytest.fixture(scope="session")
def cartpole_run(artifacts: Path) -> Path:
    """A run directory of a CartPole-v1 policy that was really trained."""
    run = artifacts / "cartpole-run"
    arguments = ("ppo-cartpole", "--run-dir", run, "--seed", "1", "--quiet")
    return made_once(run, lambda: succeed("train", *arguments))


@pytest.fixture(scope="session")
def cartpole_bundle(cartpole_run: Path, artifacts: Path) -> Path:
    """Its bundle, in every format."""
    bundle = artifacts / "cartpole"
    formats = ("--format", "onnx,torchscript,pt2")
    return made_once(bundle, lambda: succeed("export", cartpole_run, "-o", bundle, *formats))


@pytest.fixture(scope="session")
def pendulum_run(artifacts: Path) -> Path:
    """A run directory of a policy with Box actions, trained for a moment."""
    run = artifacts / "pendulum-run"
    arguments = ("--env", "Pendulum-v1", "--stop-timesteps", "4000", "--seed", "1", "--quiet")
    return made_once(run, lambda: succeed("train", *arguments, "--run-dir", run))


@pytest.fixture(scope="session")
def pendulum_bundle(pendulum_run: Path, artifacts: Path) -> Path:
    bundle = artifacts / "pendulum"
    return made_once(bundle, lambda: succeed("export", pendulum_run, "-o", bundle))


@pytest.fixture(scope="session")
def server(
    cartpole_bundle: Path, pendulum_bundle: Path, artifacts: Path, worker_id: str
) -> Iterator[Server]:
    """Real Ray Serve with both policies, in its own processes; the replica has the public port."""
    log = artifacts / f"serve-{worker_id}.log"
    with serving(cartpole_bundle, pendulum_bundle, "--port", "0", log=log) as running:
        yield running


@pytest.fixture(scope="session")
def haproxy_server(
    cartpole_bundle: Path, pendulum_bundle: Path, artifacts: Path, worker_id: str
) -> Iterator[Server]:
    """The same behind HAProxy."""
    log = artifacts / f"serve-haproxy-{worker_id}.log"
    bundles = (cartpole_bundle, pendulum_bundle)
    with serving(*bundles, "--port", "0", "--ingress", "haproxy", log=log) as running:
        yield running
