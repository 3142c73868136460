"""Real artifacts, each made once per run of the suite by the product's own commands.

And the order of the tests: those of the shared servers first and on one worker, then the other
slow ones, the longest first, and at last the many fast ones, which fill both workers to the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.processes import Server, serving, succeed

# Two workers share two cores: a second thread of torch's only waits for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job ignores it, and so would every process that a test ends by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests that have to be on one worker, as they share what takes long to start: files or functions.
TOGETHER = {
    "shared servers": (
        "tests/end_to_end/test_serve.py",
        "tests/end_to_end/test_open_inference.py",
        "tests/test_docs.py::test_the_readmes_python_plays_against_a_served_policy",
        "tests/test_docs.py::test_the_examples_run",
        "tests/loadtests/test_loadtest.py::test_a_load_test_leaves_a_report_whose_numbers_agree",
        "tests/loadtests/test_loadtest.py::test_haproxy_belongs_to_the_server",
    ),
    "lone server": (
        (
            "tests/end_to_end/test_start_and_stop.py"
            "::test_while_the_only_replica_is_replaced_callers_are_told_to_come_again"
        ),
        (
            "tests/end_to_end/test_start_and_stop.py"
            "::test_an_open_connection_does_not_keep_the_server_from_stopping"
        ),
    ),
    "short run": (
        "tests/training/test_train.py::test_a_run_leaves_what_the_contract_names",
        "tests/training/test_train.py::test_ray_leaves_nothing_in_the_users_home",
        "tests/training/test_train.py::test_episode_lengths_of_cartpole_equal_its_returns",
        (
            "tests/training/test_train.py"
            "::test_a_seed_makes_the_same_curve_and_a_config_in_force_the_same_run"
        ),
    ),
}
# Files of which each other test may go to any worker, as it takes long; the longest first. A file
# that is not here stays together.
SPREAD = (
    "tests/end_to_end/test_demo.py",
    "tests/export/test_trained_returns.py",
    "tests/training/test_train.py",
    "tests/training/test_algorithms.py",
    "tests/training/test_search.py",
    "tests/training/test_resume.py",
    "tests/training/test_video.py",
    "tests/training/test_storage.py",
    "tests/training/test_failures.py",
    "tests/training/test_fast_replay.py",
    "tests/training/test_fast_training.py",
    "tests/end_to_end/test_start_and_stop.py",
    "tests/end_to_end/test_overload.py",
    "tests/training/test_connectors.py",
    "tests/export/test_matrix.py",
    "tests/export/test_export.py",
    "tests/export/test_bench_graphs.py",
)


def group_of(nodeid: str) -> str:
    """The tests with the same group run on one worker."""
    file, _, name = nodeid.partition("::")
    function = f"{file}::{name.partition('[')[0]}"
    for group, members in TOGETHER.items():
        if file in members or function in members:
            return group
    return nodeid if file in SPREAD else file


def _uses_shared_servers(item: pytest.Item | None) -> bool:
    return "shared_servers" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> tuple[int, int]:
        is_shared = group_of(item.nodeid) == "shared servers"
        if is_shared != _uses_shared_servers(item):
            raise pytest.UsageError(
                f"{item.nodeid}: a test of the shared servers belongs into TOGETHER in "
                "tests/conftest.py, and no other test does"
            )
        if is_shared:
            return 0, 0
        file = item.nodeid.partition("::")[0]
        is_slow = item.get_closest_marker("slow") is not None
        return 2 - is_slow, SPREAD.index(file) if file in SPREAD else len(SPREAD)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadscope` by the groups above (xdist's own marks do nothing with pytest 9.2)."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)  # after the fixtures of this test
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    # A cluster of Ray's takes a fifth of a core also when nobody asks it anything.
    if _uses_shared_servers(item) and not _uses_shared_servers(nextitem):
        item.config.stash[_SHARED_SERVERS].stop()


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
    arguments = (*arguments, "--run-dir", run)
    return made_once(run, lambda: succeed("train", *arguments, in_new_interpreter=True))


@pytest.fixture(scope="session")
def pendulum_bundle(pendulum_run: Path, artifacts: Path) -> Path:
    bundle = artifacts / "pendulum"
    arguments = (pendulum_run, "-o", bundle)
    return made_once(bundle, lambda: succeed("export", *arguments, in_new_interpreter=True))


class SharedServers:
    """Servers of both policies for all tests that need no server of their own."""

    def __init__(self, bundles: tuple[Path, ...], directory: Path) -> None:
        self._bundles = bundles
        self._directory = directory
        self._running: dict[str, tuple[Server, contextlib.ExitStack]] = {}

    def running(self, ingress: str) -> Server:
        """The one with this ingress; it is started if it does not run."""
        if ingress not in self._running:
            stack = contextlib.ExitStack()
            log = self._directory / f"serve-{ingress}.log"
            options = ("--port", "0", "--ingress", ingress)
            self._running[ingress] = (
                stack.enter_context(serving(*self._bundles, *options, log=log)),
                stack,
            )
        return self._running[ingress][0]

    def stop(self) -> None:
        """End those that run, all at once."""
        stacks = [stack for _, stack in self._running.values()]
        self._running.clear()
        with ThreadPoolExecutor(max_workers=2) as pool:
            for ended in [pool.submit(stack.close) for stack in stacks]:
                ended.result()


_SHARED_SERVERS = pytest.StashKey[SharedServers]()


@pytest.fixture(scope="session")
def shared_servers(
    cartpole_bundle: Path,
    pendulum_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Iterator[SharedServers]:
    """Real Ray Serve, in processes of its own.

    A test that asks for this, whichever way, belongs to the group that shares the servers; when
    the last of them is over, they are stopped.
    """
    directory = tmp_path_factory.mktemp("shared-servers")
    servers = SharedServers((cartpole_bundle, pendulum_bundle), directory)
    pytestconfig.stash[_SHARED_SERVERS] = servers
    yield servers
    servers.stop()


@pytest.fixture
def server(shared_servers: SharedServers) -> Server:
    """Its replica has the public port."""
    return shared_servers.running("direct")


@pytest.fixture
def haproxy_server(shared_servers: SharedServers) -> Server:
    """The same behind HAProxy."""
    return shared_servers.running("haproxy")
