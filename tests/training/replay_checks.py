"""What the quick training step must share with RLlib's own; run by test_fast_replay.py.

RLlib is the oracle: the same batches go through its buffers, connectors and learners, and the same
seed through its runner.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer
from ray.rllib.utils.replay_buffers.prioritized_episode_buffer import PrioritizedEpisodeReplayBuffer

from training.algorithm import build_algorithm, restore_algorithm, rllib_config, run_iteration
from training.config_files import config_from_mapping
from training.fast_replay.collecting import LeanCollector, add_chunk
from training.fast_replay.training_step import ReplayTrainingStep
from training.fast_replay.transition_buffer import Drawn, TransitionBuffer, Transitions
from training.fast_replay.update import ReplayUpdater
from training.fast_sampling import FastEnvRunner

N_UPDATES = 6
BATCH = 16
COUNTS = ("num_module_steps_trained", "num_module_steps_trained_lifetime", "num_target_updates")
STEPS = "num_env_steps_sampled_lifetime"
PENDULUM = {"env": "Pendulum-v1", "algo": "SAC"}
CARTPOLE = {"env": "CartPole-v1", "algo": "DQN"}


def config(document: dict[str, Any], **settings: Any) -> Any:
    whole = {
        "seed": 3,
        "model": {"fcnet_hiddens": [8]},
        "evaluation": {"interval": 0},
        "algo_config": {"train_batch_size_per_learner": BATCH, **settings},
        **document,
    }
    return config_from_mapping(whole, source="a test")


def learner(found: Any, logs_gradients: bool) -> Any:
    env = gymnasium.make(found.env)
    spaces = (env.observation_space, env.action_space)
    env.close()
    torch.manual_seed(0)
    names = ("__env__", "__env_single__", "default_policy")
    return (
        rllib_config(found)
        .reporting(log_gradients=logs_gradients)
        .build_learner(spaces=dict.fromkeys(names, spaces))
    )


def as_drawn(episodes: list[SingleAgentEpisode]) -> Drawn:
    """What RLlib's buffers gave, item by item, as columns."""

    def column(get: Any, dtype: Any) -> Any:
        return np.stack([get(episode) for episode in episodes]).astype(dtype)

    def extra(name: str, dtype: Any) -> Any:
        return column(lambda e: e.get_extra_model_outputs(name, 0), dtype)

    kind = np.float32 if episodes[0].get_actions(0).dtype.kind == "f" else np.int64
    transitions = Transitions(
        observations=column(lambda e: e.get_observations(0), np.float32),
        actions=column(lambda e: e.get_actions(0), kind),
        rewards=column(lambda e: e.get_rewards(0), np.float32),
        next_observations=column(lambda e: e.get_observations(-1), np.float32),
        terminateds=column(lambda e: e.is_terminated, np.bool_),
    )
    rows = np.arange(len(episodes))
    return Drawn(transitions, extra("n_step", np.int64), extra("weights", np.float32), rows)


class Given:
    """In a buffer's place: hands out one batch, and remembers its errors."""

    drawn: Drawn
    errors: Any

    def sample(self, *_: Any, **__: Any) -> Drawn:
        return self.drawn

    def update_priorities(self, rows: Any, errors: Any) -> None:
        self.rows, self.errors = rows, errors


def number(value: Any) -> float:
    return float(value.peek() if hasattr(value, "peek") else value)


def compare_learners(found: Any, *, logs_gradients: bool = True) -> None:
    """The same batches, the same weights after some steps, the same errors and reports."""
    rllib, ours = learner(found, logs_gradients), learner(found, logs_gradients)
    given = Given()
    is_prioritized = found.algo_config.replay_buffer_config.type.startswith("Prio")
    kind = PrioritizedEpisodeReplayBuffer if is_prioritized else EpisodeReplayBuffer
    buffer = kind(1000)
    buffer.rng = np.random.default_rng(5)
    runner = SingleAgentEnvRunner(config=rllib_config(found))
    buffer.add(runner.sample(num_timesteps=300))
    updater = ReplayUpdater(ours, given)
    for i in range(N_UPDATES):
        n_step, env_steps = found.algo_config.n_step, 300 + 10 * i
        episodes = buffer.sample(
            num_items=BATCH,
            n_step=n_step,
            batch_length_T=0,
            lookback=0,
            gamma=0.99,
            beta=0.4,
            sample_episodes=True,
        )
        given.drawn = as_drawn(episodes)
        torch.manual_seed(i)
        expected = rllib.update(
            training_data=TrainingData(episodes=episodes), timesteps={STEPS: env_steps}
        )["default_policy"]
        torch.manual_seed(i)
        updater.update(env_steps=env_steps, is_reported=i == N_UPDATES - 1)
        errors = np.concatenate([np.atleast_1d(e) for e in expected.pop("td_error").peek()])
        np.testing.assert_allclose(given.errors, errors, rtol=1e-4, atol=1e-5)
    reported = ours.metrics.reduce()["default_policy"]
    assert set(reported) == set(expected), set(reported) ^ set(expected)
    # A count since the last report: RLlib's are of each update.
    for name in set(reported) - {"num_trainable_parameters", "last_target_update_ts", *COUNTS}:
        value, wanted = number(reported[name]), number(expected[name])
        assert np.isclose(value, wanted, rtol=1e-3, atol=1e-5), (name, value, wanted)
    assert number(reported[COUNTS[0]]) == N_UPDATES * BATCH
    assert ours.last_update_ts_by_mid == rllib.last_update_ts_by_mid
    close(ours.get_state(), rllib.get_state(), "")


def close(value: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, dict):
        left_out = {"foreach", "fused", "metrics_logger"}
        for name in set(wanted) - left_out:
            close(value[name], wanted[name], f"{where}/{name}")
    elif isinstance(wanted, (list, tuple)) and len(wanted) and not np.isscalar(wanted[0]):
        for i, (one, other) in enumerate(zip(value, wanted, strict=True)):
            close(one, other, f"{where}/{i}")
    elif isinstance(wanted, (torch.Tensor, np.ndarray, float, int)):
        np.testing.assert_allclose(
            np.asarray(value), np.asarray(wanted), rtol=2e-4, atol=2e-6, err_msg=where
        )


def dqn_learns_as_rllib() -> None:
    compare_learners(config(CARTPOLE, target_network_update_freq=20, grad_clip=0.5))
    schedule = [[0, 1e-2], [1000, 1e-4]]
    uneven = {
        "num_atoms": 5,
        "v_max": 50,
        "tau": 0.5,
        "target_network_update_freq": 20,
        "double_q": False,
        "dueling": False,
    }
    compare_learners(
        config(
            CARTPOLE,
            **uneven,
            lr=schedule,
            n_step=3,
            grad_clip=0.05,
            grad_clip_by="norm",
            replay_buffer_config={"type": "PrioritizedEpisodeReplayBuffer"},
        )
    )
    compare_learners(config(CARTPOLE, td_error_loss_fn="mse", grad_clip=0.01, grad_clip_by="value"))


def sac_learns_as_rllib() -> None:
    compare_learners(config(PENDULUM, actor_lr=[[0, 1e-2], [1000, 1e-4]], grad_clip=1.0))
    compare_learners(config(PENDULUM, twin_q=False, tau=0.3, target_network_update_freq=20))
    compare_learners(
        config({**PENDULUM, "env": "CartPole-v1"}, initial_alpha=0.3), logs_gradients=False
    )


def the_same_seed_fills_the_same_buffer() -> None:
    """Episodes that end and episodes that are cut off, two environments, several fragments."""
    found = config(
        {
            **CARTPOLE,
            "env_config": {"max_episode_steps": 15},
            "num_envs_per_env_runner": 2,
            "rollout_fragment_length": 13,
        },
        epsilon=0.5,
    )
    states = []
    for is_lean in (True, False):
        kind = FastEnvRunner if is_lean else SingleAgentEnvRunner
        torch.manual_seed(0)
        runner = kind(config=rllib_config(found))
        buffer = TransitionBuffer(
            500, observation=((4,), np.float32), action=((), np.int64), seed=0
        )
        collector = LeanCollector(runner) if is_lean else None
        torch.manual_seed(1)
        for _ in range(5):
            if collector:
                collector.collect(buffer, env_steps=0)
            else:
                for episode in runner.sample():
                    add_chunk(buffer, episode)
        states.append(transitions(buffer.get_state()))
        runner.stop()
    lean, rllib = states
    assert any(step[-1] for step in rllib)
    assert not all(step[-1] for step in rllib)
    assert sorted(lean) == sorted(rllib)


def a_long_episode_is_forgotten_and_counted_whole() -> None:
    """Pendulum's episodes of 200 steps, against RLlib's runner, which keeps all of them."""
    found = config({**PENDULUM, "num_envs_per_env_runner": 2, "rollout_fragment_length": 115})
    reports = []
    for kind in (FastEnvRunner, SingleAgentEnvRunner):
        torch.manual_seed(0)
        runner: Any = kind(config=rllib_config(found))
        torch.manual_seed(1)
        if kind is FastEnvRunner:
            buffer = TransitionBuffer(
                500, observation=((3,), np.float32), action=((1,), np.float32), seed=0
            )
            collector, metrics = LeanCollector(runner), MetricsLogger()
            for _ in range(4):
                collector.collect(buffer, env_steps=0)
                assert max(len(episode) for episode in runner._ongoing_episodes) <= 100
            collector.log(metrics)
            reports.append(metrics.peek("env_runners"))
        else:
            for _ in range(4):
                runner.sample()
            metrics = MetricsLogger()
            metrics.aggregate([runner.get_metrics()], key="env_runners")
            reports.append(metrics.peek("env_runners"))
        runner.stop()
    lean, rllib = reports
    assert len(rllib["policyserve_episodes"]) == 4
    np.testing.assert_allclose(lean["policyserve_episodes"], rllib["policyserve_episodes"])
    for name in ("episode_return_mean", "episode_return_max", "episode_len_mean"):
        np.testing.assert_allclose(lean[name], rllib[name])


def transitions(state: dict[str, Any]) -> list[tuple[Any, ...]]:
    # Each with the one that follows, so that the order in which episodes come in doesn't matter.
    names = ("observations", "next_observations", "actions", "rewards", "terminateds")
    rows = [
        tuple(np.ravel(state[name][i]).tolist() for name in names)
        for i in range(len(state["rewards"]))
    ]
    return [
        (*row, rows[follows] if follows >= 0 else (), bool(row[-1][0]))
        for row, follows in zip(rows, state["following"], strict=True)
    ]


def a_run_repeats_itself_and_resumes() -> None:
    """With Ray: the same seed gives the same curve, and a checkpoint goes on from where it was."""
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    found = config(
        {**CARTPOLE, "observation_filter": "none"},
        num_steps_sampled_before_learning_starts=50,
        min_sample_timesteps_per_iteration=100,
    )
    curves = []
    for _ in range(2):
        algorithm = build_algorithm(found)
        assert isinstance(algorithm.training_step, ReplayTrainingStep)
        results = [run_iteration(algorithm, "DQN") for _ in range(3)]
        curves.append([(r.env_steps, r.episodes, r.losses) for r in results])
        with tempfile.TemporaryDirectory() as directory:
            algorithm.save_to_path(directory)
            buffer = algorithm.local_replay_buffer.get_state()
            acting = algorithm.env_runner.module.get_state()
            algorithm.stop()
            restored = restore_algorithm(found, Path(directory))
            if len(curves) == 2:
                check_changed_rates(found, Path(directory), buffer)
            else:
                check_empty_buffer(restored)
    restored.local_replay_buffer.set_state(buffer)
    assert curves[0] == curves[1]
    assert [steps for steps, _, _ in curves[0]] == [100, 200, 300]
    assert all(np.isfinite(list(losses.values())).all() for _, _, losses in curves[0])
    # Episodes: each step of CartPole is worth 1, and those that go on are not reported yet.
    lengths = [episode.episode_length for _, episodes, _ in curves[0] for episode in episodes]
    returns = [episode.episode_return for _, episodes, _ in curves[0] for episode in episodes]
    assert lengths == returns
    assert 300 - 200 < sum(lengths) <= 300
    for name, value in acting.items():
        np.testing.assert_array_equal(value, restored.env_runner.module.get_state()[name])
    following = run_iteration(restored, "DQN")
    assert (following.iteration, following.env_steps) == (4, 400)
    assert len(restored.local_replay_buffer) == 400
    learned = restored.learner_group._learner.module["default_policy"].get_state()
    for name, value in restored.env_runner.module.get_state().items():
        np.testing.assert_array_equal(value, learned[name])
    restored.stop()
    with_memory = config({**CARTPOLE, "model": {"fcnet_hiddens": [8], "use_lstm": True}})
    algorithm = build_algorithm(with_memory)
    assert not isinstance(algorithm.training_step, ReplayTrainingStep)
    algorithm.stop()
    ray.shutdown()


def check_empty_buffer(resumed: Any) -> None:
    """After 300 steps, without its buffer: as a new run, it learns from 50 steps at the least."""
    buffer, sizes = resumed.local_replay_buffer, []
    sample = buffer.sample

    def watched(*args: Any, **kwargs: Any) -> Drawn:
        sizes.append(len(buffer))
        drawn: Drawn = sample(*args, **kwargs)
        return drawn

    buffer.sample = watched
    run_iteration(resumed, "DQN")
    assert (sizes[0], sizes[-1], len(sizes)) == (50, 100, 51), sizes
    resumed.stop()


def check_changed_rates(found: Any, checkpoint: Path, buffer: dict[str, Any]) -> None:
    """A resumed run's first update is made at the config's rate, not at the checkpoint's."""
    moves = []
    # At 300 steps the schedule has come to ten times the first.
    for lr in (1e-3, ((0, 2e-2), (600, 0.0))):
        settings = found.algo_config.model_copy(update={"lr": lr})
        algorithm: Any = restore_algorithm(
            found.model_copy(update={"algo_config": settings}), checkpoint
        )
        algorithm.local_replay_buffer.set_state(buffer)
        weights = algorithm.learner_group._learner.module["default_policy"].parameters
        before = torch.cat([tensor.detach().ravel().clone() for tensor in weights()])
        algorithm.training_step._updater.update(env_steps=300)
        after = torch.cat([tensor.detach().ravel() for tensor in weights()])
        moves.append((after - before).norm().item())
        algorithm.stop()
    # Adam's step is its rate times what the gradients give.
    np.testing.assert_allclose(moves[1], 10 * moves[0], rtol=1e-3)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
