"""`make bench-bundles`: three bundles to time, for `python -m serving.bench` on any machine.

Drawn weights, as the times do not depend on what was learnt, and every format, so that each engine
has its file. The bundles are made where RLlib is and copied to where inference is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np

from export.convert import export_policy
from tests.export.checkpoints import Case, write_checkpoint

_VECTOR = gym.spaces.Box(-2.0, 2.0, (4,), np.float32)
# What the usual Atari wrappers give: four grey frames, 84 x 84.
_FRAMES = gym.spaces.Box(-1.0, 1.0, (84, 84, 4), np.float32)
CASES: Mapping[str, Case] = {
    "mlp-64-64": Case(
        _VECTOR,
        gym.spaces.Discrete(2),
        model_config={"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh"},
    ),
    # The convolutions that RLlib builds for 84 x 84 where nothing is said.
    "cnn-84x84x4": Case(_FRAMES, gym.spaces.Discrete(6), model_config={"vf_share_layers": True}),
    "lstm-64": Case(
        _VECTOR,
        gym.spaces.Discrete(2),
        model_config={
            "fcnet_hiddens": [64],
            "use_lstm": True,
            "lstm_cell_size": 64,
            "max_seq_len": 16,
        },
    ),
}


def write_bench_bundles(directory: Path, names: Sequence[str] = tuple(CASES)) -> None:
    """Export the named policies into bundles of these names under `directory`."""
    for name in names:
        with tempfile.TemporaryDirectory(prefix="bench-bundles-") as scratch:
            checkpoint = write_checkpoint(Path(scratch) / "checkpoint", CASES[name])
            export_policy(
                checkpoint,
                directory / name,
                formats=("onnx", "torchscript", "pt2"),
                trust_checkpoint=True,
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the bundles that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.export.bench_bundles", description=__doc__
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("build/bench-bundles"))
    parser.add_argument("--only", choices=CASES, action="append", help="repeatable [all]")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    write_bench_bundles(options.output, options.only or tuple(CASES))
    print(f"wrote {', '.join(options.only or CASES)} to {options.output}")


if __name__ == "__main__":
    main()
