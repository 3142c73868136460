"""`policyserve demo`: the chain, and that it leaves nothing behind when it is cut short."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.processes import READY_S, alive, command, refuse, succeed, wait_until

pytestmark = pytest.mark.slow


def test_the_demo_trains_exports_serves_and_plays_perfectly(tmp_path: Path) -> None:
    output = succeed("demo", "-o", tmp_path / "demo")
    for row in ("training", "parity error", "served return", "step latency", "load test"):
        assert row in output
    manifest = json.loads((tmp_path / "demo" / "cartpole" / "manifest.json").read_text())
    assert manifest["environment"]["id"] == "CartPole-v1"
    summary = json.loads((tmp_path / "demo" / "loadtest" / "summary.json").read_text())
    assert summary["n_errors"] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    refuse("demo", "-o", tmp_path / "mine", exit_code=2)


def test_a_demo_that_is_ended_leaves_nothing_running(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        demo = subprocess.Popen(
            command(["demo", "-o", tmp_path / "demo"]), stdout=file, stderr=file
        )
    family: list[psutil.Process] = []
    try:
        wait_until(lambda: "iteration" in log.read_text(), "the demo trains", READY_S)
        family = psutil.Process(demo.pid).children(recursive=True)
        assert any(process.name() == "raylet" for process in family)
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60.0) == 128 + signal.SIGTERM
        wait_until(lambda: not alive(family), "nothing is left")
    finally:
        demo.kill()
        demo.wait()
        for process in alive(family):
            process.kill()
