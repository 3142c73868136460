"""Starts Ray, so it runs in a process of its own, where Ray's warnings are no errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

pytestmark = pytest.mark.slow

PROBE = """
import stat
from pathlib import Path
from training.ray_environment import set_ray_environment
set_ray_environment()
from training.cluster import ray_cluster
with ray_cluster(n_workers=0, n_gpus=0):
    import ray
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    closed = session.parents[1]
    print(closed, oct(stat.S_IMODE(closed.stat().st_mode)))
"""


def test_rays_directory_is_closed_to_other_users_and_gone_afterwards() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    path, mode = done.stdout.split()[-2:]
    assert Path(path).name.startswith("psv-train-")
    assert mode == "0o700"
    assert not Path(path).exists()
