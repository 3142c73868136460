from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from export.bench_graphs import candidates, compare_times, write_bare_network
from export.checkpoint import load_checkpoint
from export.convert import ExportOptions, write_bundle
from tests.export.checkpoints import Case, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    # Ray's and torch's own, while they are imported.
    pytest.mark.filterwarnings("ignore"),
]

LSTM = {"use_lstm": True, "max_seq_len": 8, "lstm_cell_size": 12}


def test_times_are_compared_with_the_first() -> None:
    def spin(duration_s: float) -> None:
        until = time.thread_time() + duration_s
        while time.thread_time() < until:
            pass

    found = compare_times({"one": lambda: spin(2e-4), "nine": lambda: spin(18e-4)}, rounds=5)
    assert found["one"]["ratio"] == 1.0
    assert found["nine"]["ratio"] > 2.0  # nine times as long, on however noisy a machine


@pytest.mark.parametrize("model", [{}, LSTM], ids=["MLP", "LSTM"])
def test_the_bare_network_answers_as_the_bundle_does(tmp_path: Path, model: Any) -> None:
    space = gym.spaces.Box(-2, 2, (4,), np.float32)
    case = Case(space, gym.spaces.Discrete(3), model_config=model)
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "checkpoint", case), trust=True)
    write_bundle(checkpoint, tmp_path / "bundle", ExportOptions())
    bare = write_bare_network(checkpoint, tmp_path / "bare.onnx")
    calls = candidates(checkpoint, tmp_path / "bundle", bare, 1)
    greedy = calls["greedy"]()
    logits, *state = calls["bare network"]()
    whole = calls["all outputs"]()
    assert greedy["action"] == whole["action"]
    np.testing.assert_allclose(logits, whole["action_dist_inputs"], rtol=1e-5, atol=1e-6)
    names = [name for name in whole if name.startswith("next_state/")]
    assert len(names) == len(state) == (2 if model else 0)
    for values, name in zip(state, names, strict=True):
        np.testing.assert_allclose(values, whole[name], rtol=1e-5, atol=1e-6)
    assert calls["RLlib's whole path"]().actions.shape == (1,)
    assert "sampled_action" in calls["sampled"]()
