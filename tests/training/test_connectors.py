"""RLlib runs in processes of its own, where its warnings are no errors."""

from __future__ import annotations

import pytest

from tests.processes import python

pytestmark = pytest.mark.slow

RUN = """
import runpy, sys
from training.ray_environment import set_ray_environment
set_ray_environment()
runpy.run_module(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("module", ["connector_checks", "space_checks"])
def test_rllib_does_what_this_project_takes_it_to_do(module):
    done = python("-c", RUN, f"tests.training.{module}")
    assert done.returncode == 0, done.stderr[-3000:]
