"""Ray starts in a process of its own, where its warnings are no errors."""

from __future__ import annotations

import pytest

from tests.processes import python

pytestmark = pytest.mark.slow

CHECK = """
from training.ray_environment import set_ray_environment
set_ray_environment()
import psutil, ray
from training.cluster import ray_cluster
from ray._private.node import Node

before = Node.start_api_server
with ray_cluster(n_workers=1, n_gpus=0):
    commands = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    assert any("raylet" in command for command in commands), commands
    for service in ("dashboard/dashboard.py", "autoscaler/_private/monitor.py", "log_monitor.py"):
        assert not any(service in command for command in commands), (service, commands)

    @ray.remote
    def double(number):
        return 2 * number

    assert ray.get(double.remote(21)) == 42
assert Node.start_api_server is before
"""


def test_a_run_starts_no_service_of_ray_that_it_has_no_use_for_and_its_workers_work():
    done = python("-c", CHECK)
    assert done.returncode == 0, done.stderr[-3000:]
