"""The model that every server of the comparison runs, and what it answers. Run: FILE BUNDLE OUT.

A bundle's graph also computes what a greedy action does not need (log-probabilities, sampling, the
critic), and policyserve runs it without them. So do the others, from a file cut down in the same
way: nobody computes more than policyserve does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from serving.bundle import ONNX, read_bundle
from serving.engines.onnx_model import subgraph, without_mask
from serving.manifest import ACTION_MASK

MODEL = "model.onnx"
ANSWERS = "answers.json"
_N_OBSERVATIONS = 16


def write_greedy_model(bundle: Path, out: Path) -> None:
    """Write `model.onnx` (observation -> action) and `answers.json`.

    Args:
        bundle: A bundle whose observations are one float32 vector.
        out: An existing directory.
    """
    model = read_bundle(bundle).file(ONNX).read_bytes()
    free = without_mask(model, ACTION_MASK)
    cut = subgraph(model if free is None else free, ["action"])
    (out / MODEL).write_bytes(cut)
    session = onnxruntime.InferenceSession(cut)
    width = session.get_inputs()[0].shape[1]
    rng = np.random.default_rng(0)
    observations = rng.uniform(-0.2, 0.2, (_N_OBSERVATIONS, width)).astype(np.float32)
    actions = session.run(["action"], {"observation": observations})[0]
    # Rounded as a client would send them: the shortest decimals that read back as these float32.
    rows = [[float(str(value)) for value in row] for row in observations]
    answers = {"observations": rows, "actions": actions.tolist()}
    (out / ANSWERS).write_text(json.dumps(answers))


if __name__ == "__main__":
    write_greedy_model(Path(sys.argv[1]), Path(sys.argv[2]))
