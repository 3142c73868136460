"""The commands in this process: what they print, for policies of every kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import policyserve
from serving.config import ServingConfig
from tests.bundles import discrete_policy
from tests.serving.conftest import LiveServer, serving_services
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    MEMORY,
    OBSERVATION_SPACES,
    services_of,
    summing_policy,
)
from tests.tiny_policies import memory_policy, q_policy


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; returns its exit status and what it printed."""

    def call(*arguments: Any) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as caught:
            policyserve.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return caught.value.code, printed.out + printed.err

    return call


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    vector = OBSERVATION_SPACES["vector"]
    discrete = gym.spaces.Discrete(3)
    policies = {
        "nested": summing_policy(OBSERVATION_SPACES["dict"], ACTION_SPACES["tuple"]),
        "memory": summing_policy(vector, discrete, state=MEMORY, has_reward=True, has_mask=True),
        "taxi": summing_policy(gym.spaces.Discrete(500), gym.spaces.Discrete(6), has_mask=True),
        "blackjack": summing_policy(
            gym.spaces.Tuple([gym.spaces.Discrete(n) for n in (32, 11, 2)]),
            gym.spaces.Discrete(2),
        ),
    }
    with serving_services(services_of(policies), ServingConfig()) as running:
        yield running


def test_inspect_shows_inputs_memory_noise_and_every_warning(tmp_path: Path, run):
    facts = {"warnings": ["the first", "the second"], "agents": {"left": "default_policy"}}
    bundle = memory_policy().save(tmp_path / "memory", facts=facts)
    code, text = run("inspect", bundle)
    assert code == 0
    rows = [line.strip("│").split() for line in text.splitlines()]
    keys = [" ".join(row[:2]) for row in rows]
    for key in ("input observation", "input state/h", "input reward", "state previous"):
        assert key in keys
    assert "starts as 0.25" in text
    assert "gumbel 2" in text
    assert "deterministic action" in text
    assert "agent left" in text
    assert "the first" in text
    assert "the second" in text
    assert keys.count("warning │") == 2


def test_inspect_says_that_a_policy_has_no_noise(tmp_path: Path, run):
    _, text = run("inspect", q_policy().save(tmp_path / "q"))
    assert "none: the policy is deterministic" in text


def test_verify_counts_the_golden_observations(tmp_path: Path, run):
    bundle = discrete_policy().save(tmp_path / "d")
    code, text = run("verify", bundle, "--json")
    assert (code, json.loads(text)["n_observations"]) == (0, 70)


def test_act_takes_a_nested_observation_and_prints_a_nested_action(server: LiveServer, run):
    row = {"z/last": 0, "a.b[0] `c` ~": [0, 0], "class": {"self": [0, 0], "0": 0}}
    url = server.policy_url("nested")
    code, text = run("act", url, "--observation", json.dumps(row))
    assert (code, json.loads(text)) == (0, [0, {"grip": [0, 1]}])


def test_act_sends_state_reward_and_mask(server: LiveServer, run):
    url = server.policy_url("memory")
    arguments = ["act", url, "--observation", "[0,0,0]"]
    state = {"total": 1.0, "frames": [[0, 0, 0], [0, 0, 0]]}
    arguments += ["--state", json.dumps(state), "--reward", "0.1", "--json"]
    code, text = run(*arguments)
    answer = json.loads(text)
    # 1 + 10 * 0.1 = 2, which wants the last of three actions.
    assert (code, answer["action"], answer["state"]["total"]) == (0, 2, 2.0)
    code, text = run(*arguments[:-1], "--action-mask", "[1,0,0]")
    assert (code, text.strip()) == (0, "0")


@pytest.mark.parametrize("option", ["--state", "--action-mask", "--observation"])
def test_what_is_no_json_is_a_usage_error(server: LiveServer, run, option: str):
    arguments = {"--observation": "[0,0,0]", option: "{"}
    flat = [part for pair in arguments.items() for part in pair]
    code, text = run("act", server.policy_url("memory"), *flat)
    assert code == 2
    assert option in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(("name", "env"), [("taxi", "Taxi-v3"), ("blackjack", "Blackjack-v1")])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_play_steps_environments_of_discrete_and_tuple_observations(
    server: LiveServer, run, name: str, env: str, num_envs: int
):
    returns = []
    for protocol in ("http", "ws"):
        arguments = ["--episodes", 3, "--num-envs", num_envs, "--protocol", protocol, "--json"]
        code, text = run("play", server.policy_url(name), "--env", env, *arguments)
        assert code == 0, text
        found = json.loads(text)
        assert (found["n_episodes"], found["protocol"]) == (3, protocol)
        returns.append([found["mean_return"], found["min_return"], found["env_steps"]])
    assert returns[0] == returns[1]


def test_play_shows_returns_latency_and_how_it_spoke(server: LiveServer, run):
    url = server.policy_url("blackjack")
    arguments = ["--episodes", 2, "--num-envs", 2, "--protocol", "ws"]
    code, text = run("play", url, "--env", "Blackjack-v1", *arguments)
    assert code == 0, text
    for words in ("return", "step latency (ws, 2 at a time)", "p50", "environment steps/s"):
        assert words in text


@pytest.mark.parametrize("protocol", ["http", "ws"])
def test_evaluate_plays_a_served_policy_either_way(server: LiveServer, run, protocol: str):
    url = server.policy_url("blackjack")
    arguments = ["--episodes", 4, "--protocol", protocol, "--json"]
    code, text = run("evaluate", url, "--env", "Blackjack-v1", *arguments)
    assert code == 0, text
    assert json.loads(text)["n_episodes"] == 4


@pytest.mark.parametrize("command", ["play", "evaluate"])
def test_an_environment_of_other_spaces_is_refused_over_a_stream_too(
    server: LiveServer, run, command: str
):
    url = server.policy_url("blackjack")
    code, text = run(command, url, "--env", "CartPole-v1", "--protocol", "ws")
    assert code == 2
    assert "CartPole-v1 has the observation space" in text
    assert len(text.splitlines()) == 1


def test_play_gives_the_environment_s_mask_when_asked(server: LiveServer, run):
    url = server.policy_url("taxi")
    policy = server.services.require("taxi").policy
    policy.graph.seen.clear()
    arguments = ["--episodes", 1, "--json", "--seed", 1]
    run("play", url, "--env", "Taxi-v3", *arguments)
    assert all(batch["action_mask"].all() for batch in policy.graph.seen)
    policy.graph.seen.clear()
    code, _ = run("play", url, "--env", "Taxi-v3", *arguments, "--action-mask")
    assert code == 0
    _, info = gym.make("Taxi-v3").reset(seed=1)
    np.testing.assert_array_equal(policy.graph.seen[0]["action_mask"][0], info["action_mask"])


def test_play_refuses_a_mask_that_the_environment_does_not_state(server: LiveServer, run):
    url = server.policy_url("blackjack")
    code, text = run("play", url, "--env", "Blackjack-v1", "--action-mask")
    assert code == 2
    assert "action_mask" in text
