"""The Python client in a loop, as an environment loop would use it: one action after the other."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from loadtests.benchmark.http_driver import percentiles_ms, run_driver
from loadtests.benchmark.results import DriverResult
from loadtests.errors import LoadTestError
from serving.client import PolicyClient

_N_WARM_UP = 50


def drive_client(
    url: str,
    observations: Sequence[Sequence[float]],
    actions: Sequence[int],
    *,
    duration_s: float,
) -> DriverResult:
    """Ask for one action after the other, in a process of its own.

    Args:
        url: The policy's.
        observations: In turn.
        actions: What has to come back for each.
        duration_s: How long.

    Raises:
        LoadTestError: An action is another.
    """
    order = {
        "url": url,
        "observations": observations,
        "actions": actions,
        "duration_s": duration_s,
    }
    return run_driver("loadtests.benchmark.client_driver", order)


def drive(order: dict[str, Any]) -> DriverResult:
    """Do what `drive_client` asks for."""
    observations = np.array(order["observations"], dtype=np.float32)
    actions = order["actions"]
    latencies: list[float] = []
    with PolicyClient(order["url"]) as client:
        for index in range(_N_WARM_UP):
            found = client.compute_action(observations[index % len(observations)])
            if found != actions[index % len(actions)]:
                raise LoadTestError("the client's action is not ONNX Runtime's")
        started = time.perf_counter()
        deadline = started + order["duration_s"]
        last = started
        while last < deadline:
            index = len(latencies) % len(observations)
            client.compute_action(observations[index])
            now = time.perf_counter()
            latencies.append(now - last)
            last = now
    return DriverResult(len(latencies) / (last - started), *percentiles_ms(latencies), 0)


def main() -> None:
    """The driver as a process of its own: JSON in, JSON out."""
    try:
        print(json.dumps(asdict(drive(json.load(sys.stdin)))))
    except LoadTestError as exc:
        sys.exit(exc.message)


if __name__ == "__main__":
    main()
