"""The steps of a request that need no socket, timed one inside the other. Run: FILE BUNDLE MODEL.

Prints JSON: {step: {batch size: microseconds of one batch}}, medians.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import uvloop

from serving.batching import BatchItem
from serving.config import PolicySource, ServingConfig
from serving.service import PolicyService, load_services

SIZES = (1, 16, 64)
ONNX_RUNTIME = "ONNX Runtime's call alone"
POLICY = "GraphPolicy.compute_conformed"
BATCHER = "+ Batcher"
LANE = "+ JSON, checks, metrics: bytes to bytes"
STEPS = (ONNX_RUNTIME, POLICY, BATCHER, LANE)
_REPEATS = 15
_REPEAT_S = 0.02
_BODY = b'{"observation":[0.054784674,-0.09208532,-0.18361059,-0.19338894]}'


class _Caller:
    """Stands for a connection."""

    body = _BODY
    is_gone = False

    def __init__(self) -> None:
        self.arrived = time.perf_counter()

    def succeed(self, body: bytes) -> None:
        """Take the answer."""
        self.answer = body

    def age_s(self) -> float:
        """Seconds since the request was read."""
        return time.perf_counter() - self.arrived


def time_steps(bundle: Path, model: Path) -> dict[str, dict[int, float]]:
    """Microseconds of one batch, by step and batch size."""
    source = PolicySource(name="cartpole", path=bundle)
    services = load_services([source], ServingConfig(), "cpu")
    return uvloop.run(_time_steps(services.require("cartpole"), model))


async def _time_steps(service: PolicyService, model: Path) -> dict[str, dict[int, float]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options)
    found: dict[str, dict[int, float]] = {step: {} for step in STEPS}
    for size in SIZES:
        calls = _calls(session, service, size)
        for step in STEPS:
            found[step][size] = await _median_us(calls[step])
    return found


def _calls(session: Any, service: PolicyService, size: int) -> dict[str, Any]:
    rows = np.random.default_rng(0).uniform(-0.2, 0.2, (size, 4)).astype(np.float32)
    inputs = {"observation": rows}
    lane = service.dialects[b"application/json"].lane

    async def run_session() -> None:
        session.run(["action"], inputs)

    async def run_policy() -> None:
        service.policy.compute_conformed(inputs)

    async def run_batcher() -> None:
        service.batcher.submit(BatchItem(inputs, size), _ignore, at_once=True)

    async def run_lane() -> None:
        callers = [_Caller() for _ in range(size)]
        for caller in callers:
            lane.add(lane.plain(_BODY), caller)
        await asyncio.sleep(0)  # the turn of the loop in which they are computed
        assert callers[-1].answer

    return dict(zip(STEPS, (run_session, run_policy, run_batcher, run_lane), strict=True))


def _ignore(_: Any) -> None:
    pass


async def _median_us(call: Callable[[], Awaitable[None]]) -> float:
    await call()
    once = await _mean_s(call, 20)
    n = max(1, round(_REPEAT_S / once))
    durations: Sequence[float] = [await _mean_s(call, n) for _ in range(_REPEATS)]
    return statistics.median(durations) * 1e6


async def _mean_s(call: Callable[[], Awaitable[None]], n: int) -> float:
    started = time.perf_counter()
    for _ in range(n):
        await call()
    return (time.perf_counter() - started) / n


if __name__ == "__main__":
    print(json.dumps(time_steps(Path(sys.argv[1]), Path(sys.argv[2]))))
