"""What the lean loops must share with RLlib's own, bit by bit; run by test_fast_training.py.

RLlib is the oracle: the same seeds go through its runner and its learner.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import gymnasium
import numpy as np
import torch
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.connectors.learner import GeneralAdvantageEstimation
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from training.evaluation_episodes import play_episodes
from training.fast_learning import FastPPOLearner
from training.fast_sampling import FastEnvRunner
from training.flat_adam import FlatAdam
from training.reward_scaling import ScaledRewardPPOLearner, ScaleRewards

MODULE = "default_policy"


class ScaledOracle(PPOTorchLearner):
    """RLlib's learner with the scaling of rewards in its pipeline, and nothing else of ours."""

    def build(self) -> None:
        super().build()
        scaling = ScaleRewards(gamma=self.config.gamma)
        self._learner_connector.insert_before(GeneralAdvantageEstimation, scaling)


class TwoLengths(gymnasium.Env[Any, Any]):
    """Episodes of 1 or of 40 steps, by the toss of a coin; cut after 30 where `limit` says so."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:  # noqa: ARG002
        super().reset(seed=seed)
        self.left = 1 if self.np_random.random() < 0.5 else 40
        return self.np_random.random(2).astype(np.float32), {}

    def step(self, action: Any) -> Any:  # noqa: ARG002
        self.left -= 1
        return self.np_random.random(2).astype(np.float32), 1.0, self.left == 0, False, {}


gymnasium.register("TwoLengths-v0", entry_point=TwoLengths, max_episode_steps=30)


def config(env: str, n_envs: int, *, model: Any = None, base: Any = None, **runners: Any) -> Any:
    made = (base or PPOConfig()).environment(env).debugging(seed=3, log_level="ERROR")
    made.env_runners(num_env_runners=0, num_envs_per_env_runner=n_envs, **runners)
    return made.rl_module(model_config={"fcnet_hiddens": [16, 16], **(model or {})})


def assert_same_episodes(expected: list[Any], found: list[Any]) -> None:
    assert len(expected) == len(found)
    names: dict[str, str] = {}
    for one, other in zip(expected, found, strict=True):
        assert names.setdefault(one.id_, other.id_) == other.id_
        pairs = [(getattr(one, name), getattr(other, name)) for name in ("observations", "actions")]
        pairs.append((one.rewards, other.rewards))
        assert one.extra_model_outputs.keys() == other.extra_model_outputs.keys()
        for name, buffer in one.extra_model_outputs.items():
            pairs.append((buffer, other.extra_model_outputs[name]))
        for left, right in pairs:
            assert left.lookback == right.lookback
            assert left.data.dtype == right.data.dtype
            np.testing.assert_array_equal(left.data, right.data)
        assert one.infos.data == other.infos.data
        for name in ("t", "t_started", "is_terminated", "is_truncated"):
            assert getattr(one, name) == getattr(other, name), name


def samples_of(runner_class: Any, made: Any, calls: list[dict[str, int]]) -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    np.random.seed(0)
    runner = runner_class(config=made.copy())
    return runner, [runner.sample(**call) for call in calls]


def the_same_seed_gives_the_same_episodes() -> None:
    steps = [{"num_timesteps": n} for n in (40, 1, 7, 600)]
    mixed = [*steps, {"num_episodes": 3}, {"num_timesteps": 30}]
    for made, calls in (
        (config("CartPole-v1", 8), mixed),
        (config("CartPole-v1", 3, episode_lookback_horizon=3), steps),
        (config("Pendulum-v1", 3), mixed),  # Box actions, scaled to their bounds
        (config("CartPole-v1", 1, base=DQNConfig()), [{"num_timesteps": 4}] * 60),
    ):
        oracle, expected = samples_of(SingleAgentEnvRunner, made, calls)
        lean, found = samples_of(FastEnvRunner, made, calls)
        assert lean.why_not_lean is None
        for one, other in zip(expected, found, strict=True):
            assert_same_episodes(one, other)
        counts = [runner.get_metrics() for runner in (oracle, lean)]
        for name in ("num_env_steps_sampled", "num_episodes", "episode_return_mean"):
            first, second = (count[name].peek() for count in counts)
            assert first == second, name


def what_is_not_known_goes_rllibs_way() -> None:
    lstm = config("CartPole-v1", 2, model={"use_lstm": True})
    filtered = config("CartPole-v1", 2, env_to_module_connector=lambda *_, **__: MeanStdFilter())
    watched = config("CartPole-v1", 2).callbacks(on_episode_step=lambda **_: None)
    for made, why in ((lstm, "memory"), (filtered, "connectors"), (watched, "callbacks")):
        runner, (episodes,) = samples_of(FastEnvRunner, made, [{"num_timesteps": 50}])
        assert why in runner.why_not_lean
        assert sum(map(len, episodes)) >= 50


def an_ended_episode_is_reported_once_and_whole() -> None:
    seen: list[tuple[str, int, float]] = []

    def note(*, episode: Any, prev_episode_chunks: Any, **_: Any) -> None:
        chunks = [*prev_episode_chunks, episode]
        seen.append((episode.id_, episode.t, sum(chunk.get_return() for chunk in chunks)))

    made = config("CartPole-v1", 4).callbacks(on_episode_end=note)
    _, samples = samples_of(FastEnvRunner, made, [{"num_timesteps": 64}] * 10)
    ended = [chunk.id_ for sample in samples for chunk in sample if chunk.is_done]
    assert [id_ for id_, _, _ in seen] == ended
    assert len(set(ended)) == len(ended) > 5
    assert all(length == episode_return for _, length, episode_return in seen)  # CartPole pays 1


def updated(learner_class: Any, runner_class: Any, made: Any, n_updates: int = 2) -> Any:
    """Sample and learn; returns the learner, its weights and what it reported last."""
    torch.manual_seed(1)
    np.random.seed(1)
    runner = runner_class(config=made.copy())
    learner = learner_class(config=made.copy(), module_spec=module_spec(made, runner))
    learner.build()
    for i in range(n_updates):
        runner.set_state({"rl_module": learner.module[MODULE].get_state(inference_only=True)})
        reported = learner.update(
            training_data=TrainingData(episodes=runner.sample()),
            timesteps={"num_env_steps_sampled_lifetime": 256 * i},
            num_epochs=3,
            minibatch_size=64,
            shuffle_batch_per_epoch=True,
        )
    return learner, weights_of(learner), plain(reported)


def module_spec(made: Any, runner: Any) -> Any:
    return made.copy().get_multi_rl_module_spec(spaces=runner.get_spaces())


def weights_of(learner: Any) -> dict[str, Any]:
    return {name: w.copy() for name, w in learner.module[MODULE].get_state().items()}


def plain(reported: Any, prefix: str = "") -> dict[str, float]:
    found = {}
    for name, value in reported.items():
        if isinstance(value, dict):
            found.update(plain(value, f"{prefix}{name}/"))
        elif "connector" not in prefix + name and "timer" not in prefix + name:
            found[prefix + name] = float(value.peek())
    return found


def ppo(env: str, **settings: Any) -> Any:
    common = {"use_kl_loss": False, "grad_clip": 0.5, "grad_clip_by": "norm", "lr": 1e-3}
    made = config(env, 4, model={"fcnet_activation": "tanh", "vf_share_layers": False})
    return made.training(train_batch_size_per_learner=256, **{**common, **settings})


def the_same_episodes_give_the_same_weights_and_reports() -> None:
    shared = ppo("CartPole-v1", grad_clip=None)
    shared.rl_module(model_config={"fcnet_hiddens": [16], "vf_share_layers": True})
    for made, oracle, lean in (
        (ppo("CartPole-v1"), ScaledOracle, ScaledRewardPPOLearner),
        (
            ppo("CartPole-v1", entropy_coeff=0.01, grad_clip_by="global_norm"),
            PPOTorchLearner,
            FastPPOLearner,
        ),
        (ppo("Pendulum-v1", grad_clip_by="value"), PPOTorchLearner, FastPPOLearner),
        (shared, PPOTorchLearner, FastPPOLearner),
        # Not known to the lean update: RLlib's own.
        (ppo("CartPole-v1", use_kl_loss=True), PPOTorchLearner, FastPPOLearner),
    ):
        _, weights, reported = updated(oracle, SingleAgentEnvRunner, made)
        learner, lean_weights, lean_reported = updated(lean, FastEnvRunner, made)
        assert (learner.why_not_lean is None) is not made.use_kl_loss, learner.why_not_lean
        assert weights.keys() == lean_weights.keys()
        for name, expected in weights.items():
            np.testing.assert_array_equal(expected, lean_weights[name], err_msg=name)
        assert reported.keys() == lean_reported.keys(), reported.keys() ^ lean_reported.keys()
        for name, value in reported.items():
            assert np.isclose(value, lean_reported[name], rtol=1e-6, equal_nan=True), name


def rllib_goes_on_from_a_lean_learners_state() -> None:
    made = ppo("CartPole-v1")
    lean, weights, _ = updated(FastPPOLearner, FastEnvRunner, made)
    state = lean.get_state()
    runner = FastEnvRunner(config=made.copy())
    after = []
    for kind in (PPOTorchLearner, FastPPOLearner):
        learner = kind(config=made.copy(), module_spec=module_spec(made, runner))
        learner.build()
        learner.set_state(copy.deepcopy(state))  # which the optimizer would go on in, in place
        for name, expected in weights.items():
            np.testing.assert_array_equal(expected, weights_of(learner)[name], err_msg=name)
        np.random.seed(2)
        _, (episodes,) = samples_of(FastEnvRunner, made, [{"num_timesteps": 256}])
        data = TrainingData(episodes=episodes)
        learner.update(training_data=data, num_epochs=2, minibatch_size=64, timesteps={})
        after.append(weights_of(learner))
    for name, expected in after[0].items():
        np.testing.assert_array_equal(expected, after[1][name], err_msg=name)


def flat_adam_is_adam() -> None:
    def network() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))

    one, other = network(), network()
    adam, flat = torch.optim.Adam(one.parameters()), FlatAdam(other.parameters())
    for step in range(6):
        for net, optimizer in ((one, adam), (other, flat)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            net(torch.randn(5, 3)).pow(2).mean().backward()
            if step == 3:  # torch leaves out what has no gradient, and counts its steps apart
                net[2].bias.grad = None
            optimizer.step()
        for expected, found in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(expected, found), step
    states = [optimizer.state_dict()["state"] for optimizer in (adam, flat)]
    for i, state in states[0].items():
        assert all(torch.equal(state[name], states[1][i][name]) for name in state)


def each_environment_plays_a_share_fixed_beforehand() -> None:
    runner = FastEnvRunner(config=config("TwoLengths-v0", 3))
    played = play_episodes(runner, n_episodes=20, seed=5)
    expected = []
    for i, share in enumerate((7, 7, 6)):  # Gymnasium alone, one environment after the other
        env = gymnasium.make("TwoLengths-v0")
        for k in range(share):
            env.reset(seed=5 + i if k == 0 else None)
            length, ends = 0, (False, False)
            while not any(ends):
                _, _, *ends, _ = env.step(0)
                length += 1
            expected.append((float(length), length, *ends))
    found = [(e.episode_return, e.episode_length, e.terminated, e.truncated) for e in played]
    assert found == expected
    assert {e.truncated for e in played} == {True, False}
    assert all(e.terminated is not e.truncated for e in played)
    # The first to end, which RLlib would take: next to no long ones.
    first = runner.sample(num_episodes=20)
    assert np.mean([len(e) for e in first]) < np.mean([e.episode_length for e in played])


def evaluations_leave_no_trace() -> None:
    made = config("CartPole-v1", 2, env_to_module_connector=lambda *_, **__: MeanStdFilter())
    runner = FastEnvRunner(config=made)
    runner.sample(num_timesteps=50)
    before = repr(runner._env_to_module.get_state())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    sampled = [play_episodes(runner, n_episodes=3, deterministic=False, seed=1) for _ in range(2)]
    assert sampled[0] == sampled[1]
    assert len(sampled[0]) == 3
    assert torch.equal(expected, torch.rand(3))
    assert repr(runner._env_to_module.get_state()) == before
    assert "num_episodes_lifetime" not in runner.get_metrics() or runner.sample(num_timesteps=4)


def recurrent_policies_are_played_with_their_memory() -> None:
    made = config("CartPole-v1", 2, model={"use_lstm": True, "lstm_cell_size": 8, "max_seq_len": 5})
    runner = FastEnvRunner(config=made)
    (played,) = play_episodes(runner, n_episodes=1, seed=3)
    env, module = gymnasium.make("CartPole-v1"), runner.module
    observation, _ = env.reset(seed=3)
    initial = module.get_initial_state()
    state = torch.utils._pytree.tree_map(lambda leaf: leaf.unsqueeze(0), initial)
    length, ended = 0, False
    while not ended:
        batch = {"obs": torch.tensor(observation)[None, None], "state_in": state}
        out = module.forward_inference(batch)
        state = out["state_out"]
        action = int(out["action_dist_inputs"][0, 0].argmax())
        observation, _, terminated, truncated, _ = env.step(action)
        length, ended = length + 1, terminated or truncated
    assert played.episode_length == length


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
