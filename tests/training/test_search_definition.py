"""Search files: what they mean, and what is wrong with them, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.processes import refuse
from training.config_files import load_config, shipped_configs
from training.errors import ConfigError
from training.tuning.definition import load_search

SEARCH = """
env: CartPole-v1
model:
  fcnet_hiddens: {grid: [[8], [16, 16]]}
algo_config:
  lr: {loguniform: [1e-4, 1e-2]}
  num_epochs: {randint: [2, 4]}
stop: {return: 475, timesteps: 5000}
tune: {num_samples: 50, seed: 7}
"""


@pytest.fixture
def search_file(tmp_path: Path) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(SEARCH)
    return path


def test_each_sample_has_every_point_of_the_grid_and_values_inside_the_ranges(search_file):
    trials = load_search(search_file).draw_trials()
    assert len(trials) == 50 * 2
    hiddens = [trial.values["model.fcnet_hiddens"] for trial in trials]
    assert hiddens == [[8], [16, 16]] * 50
    rates = [trial.values["algo_config.lr"] for trial in trials]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    # A log-uniform draw is below the geometric mean as often as above: 50 of 100, deviation 5.
    assert 30 <= sum(rate < 1e-3 for rate in rates) <= 70
    assert {trial.values["algo_config.num_epochs"] for trial in trials} == {2, 3, 4}
    assert len({trial.seed for trial in trials}) == 100
    assert [trial.name for trial in trials[:2]] == ["trial_0001", "trial_0002"]


def test_the_same_seed_draws_the_same_trials_and_another_seed_others(search_file):
    first = load_search(search_file).draw_trials()
    assert load_search(search_file).draw_trials() == first
    assert load_search(search_file, ["tune.seed=8"]).draw_trials() != first


def test_the_search_in_force_reads_back_equal_and_draws_the_same(search_file, tmp_path):
    # Without a seed in the file, the one that was drawn is in what is written.
    search = load_search(search_file, ["tune.seed=null"])
    (tmp_path / "again.yaml").write_text(search.dump())
    again = load_search(tmp_path / "again.yaml")
    assert again.settings == search.settings
    assert again.draw_trials() == search.draw_trials()


def test_a_trials_config_has_its_values_and_its_seed(search_file):
    search = load_search(search_file)
    trial = search.draw_trials()[1]
    config = search.trial_config(trial)
    assert config.model.fcnet_hiddens == (16, 16)
    assert config.algo_config.lr == trial.values["algo_config.lr"]
    assert config.seed == trial.seed
    assert config.evaluation.interval == 0  # nobody asked for evaluations


def test_a_seed_in_the_file_is_every_trials(search_file):
    assert {trial.seed for trial in load_search(search_file, ["seed=3"]).draw_trials()} == {3}


def test_the_objective_follows_from_the_stop_unless_it_is_given(search_file):
    def objective(*sets: str) -> str | None:
        return load_search(search_file, sets).settings.objective

    assert objective() == "timesteps_to_stop_return"
    assert objective("stop.return=null") == "episode_return"
    assert objective("tune.objective=time_to_stop_return") == "time_to_stop_return"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("tune.num_sample=3", "did you mean `tune.num_samples`?"),
        ("tune.asha={grace_perid: 3}", "did you mean `tune.asha.grace_period`?"),
        ("tune.scheduler=pbtt", "`tune.scheduler` is 'pbtt'"),
        ("tune.num_samples=0", "`tune.num_samples` is 0"),
        ("tune=3", "`tune` is 3"),
        ("lr={log_uniform: [1e-4, 1e-2]}", "did you mean `loguniform`?"),
        ("lr={loguniform: [0, 1e-2]}", "a low end above 0"),
        ("lr={uniform: [1e-2, 1e-4]}", "low below high"),
        ("lr={uniform: [1e-2]}", "two numbers"),
        ("num_epochs={randint: [1.5, 3]}", "two whole numbers"),
        ("num_epochs={grid: []}", "expected [value, ...]"),
        ("num_epochs={grid: [3, 3]}", "3 twice"),
        ("num_epochs={grid: [1, 2], choice: [1]}", "a search space and other keys"),
        ("gamma={uniform: [0.9, 1.1]}", "`algo_config.gamma` is 1.1"),
        ("model.fcnet_activation={choice: [tanh, tan]}", "`model.fcnet_activation` is 'tan'"),
        ("algo_config.lrr={uniform: [0, 1]}", "did you mean `algo_config.lr`?"),
        ("tau={uniform: [0, 1]}", "no setting `algo_config.tau` of PPO"),
        ("stop.timestep=3", "did you mean `stop.timesteps`?"),
        ("minibatch_size={choice: [64, 4096]}", "minibatch_size (4096) is larger"),
        ("tune.scheduler=pbt", "is a grid, and pbt changes values"),
        ("tune.objective=evaluation_return", ""),
        ("tune.num_samples=100000", "trials, at most"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(search_file, setting, expected):
    if setting == "tune.objective=evaluation_return":  # which turns evaluations on by itself
        assert load_search(search_file, [setting]).draw_trials()
        return
    with pytest.raises(ConfigError) as caught:
        load_search(search_file, [setting]).draw_trials()
    assert expected in caught.value.message
    assert "\n" not in caught.value.message


def test_what_is_wrong_in_the_file_is_said_with_its_line(search_file):
    search_file.write_text(SEARCH.replace("[1e-4, 1e-2]", "[1e-4, high]"))
    with pytest.raises(ConfigError, match=r"search\.yaml line 6"):
        load_search(search_file)


def test_a_stop_return_to_count_steps_to_has_to_be_there(search_file):
    sets = ["stop.return=null", "tune.objective=timesteps_to_stop_return"]
    with pytest.raises(ConfigError, match=r"give `stop\.return`"):
        load_search(search_file, sets)


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["model.vf_share_layers={choice: [true, false]}"], "can't vary under pbt"),
        (["tune.num_samples=1"], "needs a population"),
        (["tune.objective=timesteps_to_stop_return"], "several trials' together"),
    ],
)
def test_pbt_refuses_what_it_cannot_do(search_file, sets, expected):
    base = ["tune.scheduler=pbt", "model.fcnet_hiddens=[8]", "tune.objective=episode_return"]
    assert load_search(search_file, base).draw_trials()
    with pytest.raises(ConfigError, match=expected):
        load_search(search_file, [*base, *sets])


def test_asha_needs_to_know_how_long_a_trial_can_last(search_file):
    asha = load_search(search_file, ["tune.scheduler=asha"]).settings.asha
    assert (asha.max_time, asha.grace_period) == (5000, 500)
    with pytest.raises(ConfigError, match=r"give `stop\.timesteps`"):
        load_search(search_file, ["tune.scheduler=asha", "stop={return: 475, time_s: 9}"])
    with pytest.raises(ConfigError, match="below the highest rung"):
        load_search(search_file, ["tune.scheduler=asha", "tune.asha.grace_period=9000"])


def test_the_users_own_mappings_may_hold_keys_named_like_search_spaces(search_file):
    search = load_search(search_file, ["env_config={sutton_barto_reward: {choice: [true]}}"])
    assert search.parameters[-1].key == "env_config.sutton_barto_reward"
    search = load_search(search_file, ["env_config={map: {choice: 1, other: 2}}"])
    assert [item.path[0] for item in search.parameters] == ["model", "algo_config", "algo_config"]


def test_a_search_and_a_config_are_told_apart():
    with pytest.raises(ConfigError, match="run it with `policyserve tune"):
        load_config("tune-cartpole")
    with pytest.raises(ConfigError, match="train it with `policyserve train`"):
        load_search("ppo-cartpole")


def test_the_shipped_search_is_the_tutorials():
    search = load_search("tune-cartpole")
    trials = search.draw_trials()
    assert len(trials) == 20
    assert search.settings.objective == "timesteps_to_stop_return"
    widths = {str(trial.values["model.fcnet_hiddens"]) for trial in trials}
    activations = {trial.values["model.fcnet_activation"] for trial in trials}
    assert (len(widths), len(activations)) == (2, 2)
    assert len({trial.values["algo_config.lr"] for trial in trials}) == 20
    # What does not vary is what ppo-cartpole has.
    mine = yaml.safe_load(shipped_configs()["tune-cartpole"].read_text())
    base = yaml.safe_load(shipped_configs()["ppo-cartpole"].read_text())
    varied = {"lr"}
    assert {k: v for k, v in mine["algo_config"].items() if k not in varied} == {
        k: v for k, v in base["algo_config"].items() if k not in varied
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "no search"),
        (("nowhere.yaml",), "no config file"),
        (("tune-cartpole", "--retry-failed"), "--retry-failed goes with --resume"),
        (("tune-cartpole", "--set", "env=CartPole-v9"), "did you mean CartPole-v1"),
        (("--resume", "tests", "--num-samples", "3"), "give it alone"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments, expected, tmp_path):
    options = () if "--resume" in arguments else ("--run-dir", tmp_path / "search")
    line = refuse("tune", *arguments, *options, exit_code=2, in_new_interpreter=True)
    assert expected in line
    assert not (tmp_path / "search").exists()


def test_a_directory_that_holds_no_search_cannot_be_resumed(tmp_path):
    line = refuse("tune", "--resume", tmp_path, exit_code=1, in_new_interpreter=True)
    assert "is not a search directory (no search.json)" in line
