"""Whose processes are the server's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from loadtests.server_facts import ServerWatch, machine_facts, server_heads, server_processes

# A server with one more process that it has started; both wait for their input's end.
_LISTEN = """
import socket, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"])
print(listener.getsockname()[1], child.pid, flush=True)
sys.stdin.read()
child.wait()
"""


@pytest.fixture
def other_server() -> Iterator[tuple[int, set[int]]]:
    """Its port and its processes."""
    with subprocess.Popen(
        [sys.executable, "-c", _LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        port, child = map(int, process.stdout.readline().split())
        yield port, {process.pid, child}


def test_a_server_is_the_process_that_listens_and_all_that_it_started(
    other_server: tuple[int, set[int]],
) -> None:
    port, pids = other_server
    heads = server_heads("127.0.0.1", port)
    assert {process.pid for process in server_processes(heads)} == pids
    assert {process.pid for process in server_processes(server_heads("localhost", port))} == pids


@pytest.mark.usefixtures("other_server")
def test_a_server_in_this_process_is_this_process_alone() -> None:
    """What a load test starts beside it, its driver, is no part of the server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heads = server_heads("127.0.0.1", listener.getsockname()[1])
    assert {process.pid for process in server_processes(heads)} == {os.getpid()}


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_server_on_another_machine_is_unknown(host: str) -> None:
    assert server_heads(host, 80) == []
    with ServerWatch(host, 80, interval_s=0.01) as watch:
        _wait_for_samples(watch)
    assert not watch.samples.is_known
    assert watch.samples.machine_cpu_percent[0] >= 0.0


def test_a_watch_measures_the_cpu_that_a_server_takes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        before = time.process_time()
        started = time.perf_counter()
        with ServerWatch("127.0.0.1", port, interval_s=0.05) as watch:
            while len(watch.samples.at_s) < 5:
                sum(range(20_000))  # this process is the server, and busy
        share = 100.0 * (time.process_time() - before) / (time.perf_counter() - started)
    samples = watch.samples
    # The kernel counts in hundredths of a second.
    mean = sum(samples.cpu_percent) / len(samples.cpu_percent)
    assert mean == pytest.approx(share, abs=60.0)
    assert mean > 0.0
    assert samples.rss_mb[0] == pytest.approx(psutil.Process().memory_info().rss / 1e6, rel=0.2)
    assert len(samples.at_s) == len(samples.cpu_percent) == len(samples.rss_mb)


def test_the_machine_is_named() -> None:
    facts = machine_facts()
    assert facts["cores"] == psutil.cpu_count()
    assert facts["versions"]["numpy"]
    assert facts["cpu"]


def _wait_for_samples(watch: ServerWatch) -> None:
    deadline = time.monotonic() + 20.0
    while not watch.samples.at_s:
        assert time.monotonic() < deadline
        time.sleep(0.01)
