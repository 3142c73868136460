"""Trained policies act as well from the bundle alone as in RLlib.

RLlib's half of the comparison is its own evaluation loop (`SingleAgentEnvRunner.sample`), restored
from the checkpoint; the bundle's half runs in a process in which Ray and torch cannot be imported.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.processes import python, succeed
from training.run_directory import find_checkpoint

pytestmark = pytest.mark.slow

N_EPISODES = 100
POLICIES = {
    "lstm": (
        "tests.environments:StatelessCartPole-v1",
        ("model.use_lstm=true", "model.lstm_cell_size=32", "model.fcnet_hiddens=[32]", "lr=3e-3"),
        "60",
    ),
    "mean-std filter": (
        "tests.environments:ShiftedCartPole-v1",
        ("observation_filter=mean_std", "model.fcnet_hiddens=[32,32]", "lr=1e-3"),
        "100",
    ),
}

_RLLIB = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import tests.environments
import torch
from ray import cloudpickle
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

checkpoint, n_episodes = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)  # two threads wait for each other on a busy machine
with open(checkpoint + "/class_and_ctor_args.pkl", "rb") as file:
    content = cloudpickle.load(file)
(config, *_), _ = content["ctor_args_and_kwargs"]
config = content["class"].get_default_config().from_dict(config)
# One environment: of several, the first hundred episodes to end would be the short ones.
config.env_runners(num_env_runners=0, num_envs_per_env_runner=1).debugging(seed=7)
runner = SingleAgentEnvRunner(config=config)
runner.restore_from_path(checkpoint + "/env_runner")
module = checkpoint + "/learner_group/learner/rl_module/default_policy"
runner.module.restore_from_path(module)
for piece in runner._env_to_module.connectors:
    if hasattr(piece, "_update_stats"):
        piece._update_stats = False
episodes = runner.sample(num_episodes=n_episodes, explore=False)
print(json.dumps([episode.get_return() for episode in episodes][:n_episodes]))
"""

_BUNDLE = """
import json, sys
for name in ("ray", "torch", "onnx"):
    sys.modules[name] = None  # an import of it fails
import tests.environments
from serving.environments import make_env
from serving.rollout import evaluate_policy
from serving.verification import load_verified_policy

bundle, env_id, n_episodes = sys.argv[1], sys.argv[2], int(sys.argv[3])
result = evaluate_policy(
    load_verified_policy(bundle), lambda: make_env(env_id), n_episodes=n_episodes, num_envs=20
)
print(json.dumps(result.returns.tolist()))
"""


def returns_of(code: str, *arguments: str | Path) -> np.ndarray:
    # Only RLlib's half may find RLlib imported.
    done = python("-c", code, *arguments, in_new_interpreter=code is not _RLLIB)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", POLICIES)
def test_a_bundle_without_ray_reaches_the_return_of_rllibs_own_evaluation(
    name: str, tmp_path: Path
) -> None:
    env_id, settings, stop_return = POLICIES[name]
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    succeed(
        *("train", "--env", env_id, "--run-dir", run, "--quiet", "--seed", "1"),
        *(part for setting in settings for part in ("--set", setting)),
        *("--set", "train_batch_size_per_learner=512"),
        *("--stop-return", stop_return, "--stop-timesteps", "30000"),
    )
    succeed("export", run, "-o", bundle)
    checkpoint = find_checkpoint(run).resolve()
    rllib = returns_of(_RLLIB, checkpoint, N_EPISODES)
    served = returns_of(_BUNDLE, bundle, env_id, N_EPISODES)
    assert len(rllib) == len(served) == N_EPISODES
    # Welch's interval of the difference at 99.9 %: right policies fail once in a thousand seeds,
    # and the seeds are fixed.
    half_width = 3.29 * math.sqrt((rllib.var(ddof=1) + served.var(ddof=1)) / N_EPISODES)
    assert abs(rllib.mean() - served.mean()) <= half_width, (rllib.mean(), served.mean())
    # Random actions reach about 22: what was compared has learnt something.
    assert served.mean() > 40
