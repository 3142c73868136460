"""Our side and plain RLlib's, each measurement in a process of its own.

`python -m training.bench.rllib_driver ours|rllib speed|solve SEED AMOUNT` prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from training.config import TrainingConfig
from training.config_files import load_config
from training.ray_environment import set_ray_environment

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm

# The settings that the speed is compared at; sb3_driver.py has the same, and its defaults.
EQUAL = (
    "num_envs_per_env_runner=8",
    "train_batch_size_per_learner=1024",
    "minibatch_size=256",
    "num_epochs=10",
    "lr=1e-3",
    "gamma=0.99",
    "lambda_=0.95",
)
WARM_UP_ITERATIONS = 3
BAR, EVALUATION_EPISODES, STEPS_PER_LOOK = 475.0, 20, 2048


def speed(algorithm: Algorithm, n_iterations: int) -> dict[str, float]:
    """Environment steps per second over iterations, sampling and learning."""
    for _ in range(WARM_UP_ITERATIONS):
        before = _env_steps(algorithm.train())
    started, cpu_before = time.perf_counter(), time.process_time()
    for _ in range(n_iterations):
        result = algorithm.train()
    duration_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_before
    n_steps = _env_steps(result) - before
    return {"env_steps_per_s": n_steps / duration_s, "env_steps_per_cpu_s": n_steps / cpu_s}


def solve(algorithm: Algorithm, config: TrainingConfig, budget: int) -> dict[str, float | None]:
    """Seconds of learning to the bar; None where the budget did not do."""
    from training.evaluation import evaluate

    learning_s, cpu_s, n_steps, looked_at = 0.0, 0.0, 0, 0
    while n_steps < budget:
        started, cpu_before = time.perf_counter(), time.process_time()
        n_steps = _env_steps(algorithm.train())
        learning_s += time.perf_counter() - started
        cpu_s += time.process_time() - cpu_before
        if n_steps // STEPS_PER_LOOK > looked_at:
            looked_at = n_steps // STEPS_PER_LOOK
            seed = (config.seed or 0) + 1000
            if evaluate(algorithm, config.evaluation, seed=seed).return_mean >= BAR:
                return {"solved_s": learning_s, "solved_cpu_s": cpu_s, "env_steps": n_steps}
    return {"solved_s": None, "solved_cpu_s": None, "env_steps": n_steps}


def main(system: str, what: str, seed: int, amount: int) -> dict[str, Any]:
    """Measure once; see the module's docstring."""
    set_ray_environment()
    sets = [f"evaluation.episodes={EVALUATION_EPISODES}", *(EQUAL if what == "speed" else ())]
    config = load_config("ppo-cartpole", flags={"seed": seed}, sets=sets).complete()
    from training.cluster import ray_cluster

    with ray_cluster(n_workers=0, n_gpus=0):
        algorithm = _build(config, is_plain=system == "rllib")
        try:
            if what == "speed":
                return speed(algorithm, amount)
            return solve(algorithm, config, amount)
        finally:
            algorithm.stop()


def _build(config: TrainingConfig, *, is_plain: bool) -> Algorithm:
    from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    from training.algorithm import rllib_config

    rllib = rllib_config(config)
    if is_plain:
        rllib.env_runners(env_runner_cls=SingleAgentEnvRunner)
        rllib.training(learner_class=PPOTorchLearner)
    return rllib.build_algo()


def _env_steps(result: dict[str, Any]) -> int:
    return int(result["env_runners"]["num_env_steps_sampled_lifetime"])


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
