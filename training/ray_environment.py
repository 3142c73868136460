"""Ray's switches in the environment, which it reads once: when it is imported. Imports no Ray."""

from __future__ import annotations

import os
import secrets
import sys


def set_ray_environment() -> None:
    """Set what a short local run wants of Ray; whatever the user has set stays.

    Does nothing once Ray is imported: from then on a change would divide this process, which has
    read the old values, from the processes that it starts.
    """
    if "ray" in sys.modules:
        return
    if "RAY_AUTH_MODE" not in os.environ and "RAY_ADDRESS" not in os.environ:
        # Ray would write a token into the user's home; this one lives as long as the process.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Otherwise Ray starts idle workers at once, which take the CPUs while training begins.
    os.environ.setdefault("RAY_enable_worker_prestart", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own warning asks so
    # Threads cost a small network more than they bring.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
