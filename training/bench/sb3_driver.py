"""Stable-Baselines3's side, run as a script by the Python that has it; imports nothing of ours.

`python sb3_driver.py speed|solve SEED AMOUNT` prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from stable_baselines3 import PPO  # type: ignore[import-not-found]
from stable_baselines3.common.callbacks import BaseCallback  # type: ignore[import-not-found]
from stable_baselines3.common.env_util import make_vec_env  # type: ignore[import-not-found]
from stable_baselines3.common.evaluation import (  # type: ignore[import-not-found]
    evaluate_policy,
)

ENV, N_ENVS = "CartPole-v1", 8
# The settings that the speed is compared at; rllib_driver.py has the same.
EQUAL = {"n_steps": 128, "batch_size": 256, "n_epochs": 10, "learning_rate": 1e-3}
WARM_UP_ITERATIONS = 3
BAR, EVALUATION_EPISODES, STEPS_PER_LOOK = 475.0, 20, 2048
# RL Zoo's hyperparams/ppo.yml, CartPole-v1, which trains for 1e5 steps.
ZOO = {
    "n_steps": 32,
    "batch_size": 256,
    "gae_lambda": 0.8,
    "gamma": 0.98,
    "n_epochs": 20,
    "ent_coef": 0.0,
    "learning_rate": lambda left: left * 0.001,
    "clip_range": lambda left: left * 0.2,
}


class Clock(BaseCallback):  # type: ignore[misc]
    """Notes when each iteration starts."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[tuple[float, float]] = []

    def _on_rollout_start(self) -> None:
        self.starts.append((time.perf_counter(), time.process_time()))

    def _on_step(self) -> bool:
        return True


class Solved(BaseCallback):  # type: ignore[misc]
    """Plays greedy episodes from time to time, off the clock, and stops at the bar."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.env = make_vec_env(ENV, n_envs=EVALUATION_EPISODES, seed=seed + 1000)
        self.paused_s = self.paused_cpu_s = 0.0
        self.solved_s: float | None = None
        self.solved_cpu_s: float | None = None
        self.n_steps = 0
        self.started, self.cpu_before = time.perf_counter(), time.process_time()

    def _on_rollout_start(self) -> None:
        now, cpu_now = time.perf_counter(), time.process_time()
        if self.num_timesteps and self.num_timesteps % STEPS_PER_LOOK == 0:
            mean, _ = evaluate_policy(self.model, self.env, n_eval_episodes=EVALUATION_EPISODES)
            if mean >= BAR and self.solved_s is None:
                self.solved_s = now - self.started - self.paused_s
                self.solved_cpu_s = cpu_now - self.cpu_before - self.paused_cpu_s
                self.n_steps = self.num_timesteps
            self.paused_s += time.perf_counter() - now
            self.paused_cpu_s += time.process_time() - cpu_now

    def _on_step(self) -> bool:
        return self.solved_s is None


def speed(seed: int, n_iterations: int) -> dict[str, float]:
    """Environment steps per second over iterations, sampling and learning."""
    envs = make_vec_env(ENV, n_envs=N_ENVS, seed=seed)
    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", **EQUAL)
    clock = Clock()
    n_steps = EQUAL["n_steps"] * N_ENVS
    model.learn(int((WARM_UP_ITERATIONS + n_iterations) * n_steps), callback=clock)
    started, cpu_before = clock.starts[WARM_UP_ITERATIONS]
    duration_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_before
    n_steps *= n_iterations
    return {"env_steps_per_s": n_steps / duration_s, "env_steps_per_cpu_s": n_steps / cpu_s}


def solve(seed: int, budget: int) -> dict[str, float | None]:
    """Seconds of learning to the bar; None where the budget did not do."""
    model = PPO(
        "MlpPolicy", make_vec_env(ENV, n_envs=N_ENVS, seed=seed), seed=seed, device="cpu", **ZOO
    )
    solved = Solved(seed)
    model.learn(budget, callback=solved)
    return {
        "solved_s": solved.solved_s,
        "solved_cpu_s": solved.solved_cpu_s,
        "env_steps": solved.n_steps,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    what = {"speed": speed, "solve": solve}[sys.argv[1]]
    print(json.dumps(what(int(sys.argv[2]), int(sys.argv[3]))))
