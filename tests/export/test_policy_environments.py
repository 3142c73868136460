"""Which environment a policy is played in when nobody says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from export.policy_environments import environments_for
from serving.environments import NamedEnvironment, described_environment, parse_wrappers
from serving.errors import UsageError
from tests.bundles import discrete_policy
from training.provenance import describe_checkpoint

LABELLED = ("tests.export.test_policy_environments:Labelled", {"label": "from the run"})


class Labelled(gym.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: gym.Env[Any, Any], label: str) -> None:
        super().__init__(env)
        self.label = label


def a_checkpoint(path: Path, facts: Mapping[str, Any]) -> str:
    """What `train` puts beside RLlib's files, which are not needed to say it."""
    path.mkdir()
    (path / "rllib_checkpoint.json").write_text("{}")
    describe_checkpoint(path, facts)
    return str(path)


def a_bundle(path: Path, environment: Mapping[str, Any] | None) -> str:
    return str(discrete_policy().save(path, facts={"environment": environment}))


def environment_for(policies: Sequence[str], *asked: Any, **reading: Any) -> NamedEnvironment:
    return environments_for(policies, *asked, **reading)[0]


def test_a_checkpoint_names_its_environment_with_arguments_and_wrappers(tmp_path: Path) -> None:
    facts = {"env": "Pendulum-v1", "env_config": {"g": 5.0}, "wrappers": [list(LABELLED)]}
    named = environment_for([a_checkpoint(tmp_path / "a", facts)], None, {}, trust=True)
    assert named == NamedEnvironment("Pendulum-v1", {"g": 5.0}, (LABELLED,))
    env = named.make(render_mode="rgb_array")
    assert isinstance(env, Labelled)
    assert env.label == "from the run"
    assert env.get_wrapper_attr("g") == 5.0
    assert env.render_mode == "rgb_array"
    env.close()


def test_what_the_user_says_comes_first(tmp_path: Path) -> None:
    facts = {"env": "Pendulum-v1", "env_config": {"g": 5.0}}
    checkpoint = a_checkpoint(tmp_path / "a", facts)
    assert environment_for([checkpoint], None, {"g": 1.0}).kwargs == {"g": 1.0}
    assert environment_for([checkpoint], "CartPole-v1", {}) == NamedEnvironment("CartPole-v1", {})


def test_random_plays_where_the_others_do(tmp_path: Path) -> None:
    bundle = a_bundle(tmp_path / "b", {"id": "CartPole-v1", "kwargs": {}})
    assert environment_for(["random", bundle], None, {}).id == "CartPole-v1"


def test_each_policy_plays_with_the_arguments_and_wrappers_of_its_own(tmp_path: Path) -> None:
    light = a_bundle(tmp_path / "b", {"id": "Pendulum-v1", "kwargs": {"g": 1.0}})
    facts = {"env": "Pendulum-v1", "env_config": {"g": 9.0}, "wrappers": [list(LABELLED)]}
    heavy = a_checkpoint(tmp_path / "a", facts)
    asked = parse_wrappers(['gymnasium.wrappers:TimeLimit={"max_episode_steps": 3}'])
    found = environments_for(["random", light, heavy], None, {}, asked, trust=True)
    gravities = [each.kwargs["g"] for each in found]
    assert gravities == [1.0, 1.0, 9.0]
    assert [each.wrappers for each in found] == [asked, asked, (LABELLED, *asked)]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"wrappers": 5}, r"policyserve.json\) says `wrappers` 5, expected a list of pairs"),
        ({"wrappers": ["a:B"]}, "says `wrappers`"),
        ({"wrappers": [["a:B", 3]]}, "says `wrappers`"),
        ({"env_config": "x"}, r"policyserve.json\) says `env_config` 'x', expected names and"),
    ],
)
def test_a_checkpoint_whose_words_cannot_be_read_is_refused(
    tmp_path: Path, facts: Mapping[str, Any], said: str
) -> None:
    checkpoint = a_checkpoint(tmp_path / "a", {"env": "CartPole-v1", **facts})
    for trust in (False, True):
        with pytest.raises(UsageError, match=said):
            environments_for([checkpoint], None, {}, trust=trust)
    with pytest.raises(UsageError, match="says `wrappers`"):
        described_environment({"environment": {"id": "CartPole-v1", "wrappers": 5}})
    with pytest.raises(UsageError, match="says `environment`"):
        described_environment({"environment": "CartPole-v1"})


def test_policies_of_different_environments_are_refused(tmp_path: Path) -> None:
    one = a_bundle(tmp_path / "b", {"id": "CartPole-v1", "kwargs": {}})
    other = a_checkpoint(tmp_path / "a", {"env": "Pendulum-v1", "env_config": {}})
    with pytest.raises(UsageError, match=r"CartPole-v1 and .* for Pendulum-v1"):
        environment_for([one, other], None, {})


def test_a_bundle_without_an_environment_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give one: --env ID"):
        environment_for([a_bundle(tmp_path / "b", None)], None, {})


def test_nobodys_checkpoint_and_no_bundle_has_code_run_here(tmp_path: Path) -> None:
    (tmp_path / "made").write_text("")
    code = {"id": "os:remove", "kwargs": {"path": str(tmp_path / "made")}, "wrappers": []}
    facts = {"env": code["id"], "env_config": code["kwargs"]}
    wrapped = {"id": "CartPole-v1", "kwargs": {}, "wrappers": [list(LABELLED)]}
    for policy in (
        a_bundle(tmp_path / "b", code),
        a_checkpoint(tmp_path / "a", facts),
        a_bundle(tmp_path / "c", wrapped),
    ):
        with pytest.raises(UsageError, match=r"if it is yours, say so with --env (os|CartPole)"):
            environment_for([policy], None, {})
    assert (tmp_path / "made").exists()


def test_the_wrappers_that_come_with_the_product_may_be_named_by_a_bundle(tmp_path: Path) -> None:
    select = ["training.wrappers:SelectComponents", {"components": [0, 2]}]
    environment = {"id": "CartPole-v1", "kwargs": {}, "wrappers": [select]}
    env = environment_for([a_bundle(tmp_path / "b", environment)], None, {}).make()
    assert env.observation_space.shape == (2,)


def test_wrappers_that_the_user_names_go_around_the_policys_own(tmp_path: Path) -> None:
    bundle = a_bundle(tmp_path / "b", {"id": "CartPole-v1", "kwargs": {}})
    asked = parse_wrappers(['gymnasium.wrappers:TimeLimit={"max_episode_steps": 3}'])
    env = environment_for([bundle], None, {}, asked).make()
    env.reset()
    assert [env.step(0)[3] for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("text", ["Labelled", ":Labelled", "a:b-c", "a:B={", "a:B=3"])
def test_a_wrapper_that_cannot_be_read_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="--wrapper"):
        parse_wrappers([text])


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (NamedEnvironment("NoSuchEnv-v0", {}), "NoSuchEnv-v0"),
        (NamedEnvironment("NoSuchEnv-v0", {}, (LABELLED,)), "NoSuchEnv-v0"),
        (NamedEnvironment("CartPole-v1", {}, (("nowhere:X", {}),)), "nowhere"),
        (NamedEnvironment("CartPole-v1", {"no_such": 1}, (LABELLED,)), "no_such"),
        (
            NamedEnvironment("CartPole-v1", {}, (("gymnasium.wrappers:ClipRewrd", {}),)),
            "'gymnasium.wrappers' has no 'ClipRewrd'; did you mean ClipReward",
        ),
    ],
)
def test_an_environment_that_cannot_be_made_is_wrong_usage(
    named: NamedEnvironment, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        named.make()
