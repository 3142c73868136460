from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from training.config import DEFAULT_TIMESTEPS, ModelConfig, PPOSettings, PPOTrainingConfig
from training.config_files import dump_config, load_config, shipped_configs, shipped_for
from training.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def error(config_file=None, *, flags=None, sets=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, flags=flags or {}, sets=sets)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    return caught.value.message


def test_flags_beat_yaml_and_set_beats_flags(tmp_path):
    path = write(
        tmp_path / "c.yaml",
        "env: Acrobot-v1\nseed: 1\nnum_env_runners: 3\nalgo_config: {gamma: 0.5, lr: 1}\n",
    )
    config = load_config(
        path,
        flags={"seed": 2, "num_env_runners": 4, "env": None},
        sets=["num_env_runners=5", "lr=1e-3"],
    )
    assert config.env == "Acrobot-v1"  # from the file: the flag wasn't given
    assert config.algo_config.gamma == 0.5
    assert config.seed == 2
    assert config.num_env_runners == 5
    assert config.algo_config.lr == 0.001
    assert config.algo_config.lambda_ == PPOSettings().lambda_


@pytest.mark.parametrize(
    ("text", "read", "expected"),
    [
        ("lr=1e-3", lambda c: c.algo_config.lr, 0.001),
        ("lr=.5", lambda c: c.algo_config.lr, 0.5),
        ("algo_config.lr=2.5E-4", lambda c: c.algo_config.lr, 0.00025),
        ("lr=[[0, 1e-3], [1e5, 0]]", lambda c: c.algo_config.lr, ((0, 0.001), (100_000, 0.0))),
        ("model.fcnet_hiddens=[32,16]", lambda c: c.model.fcnet_hiddens, (32, 16)),
        ("stop.return=-100", lambda c: c.stop.episode_return, -100.0),
        ("stop.timesteps=1e5", lambda c: c.stop.timesteps, 100_000),
        ("grad_clip=null", lambda c: c.algo_config.grad_clip, None),
        ("env_config.gravity=3.5", lambda c: c.env_config, {"g": 1, "gravity": 3.5}),
        ("normalize_actions=false", lambda c: c.normalize_actions, False),
        ("clip_actions=true", lambda c: c.clip_actions, True),
        ("rollout_fragment_length=64", lambda c: c.rollout_fragment_length, 64),
        ("rollout_fragment_length=auto", lambda c: c.rollout_fragment_length, "auto"),
        ("use_kl_loss=true", lambda c: c.algo_config.use_kl_loss, True),
        ("model={fcnet_hiddens: [8]}", lambda c: c.model.fcnet_hiddens, (8,)),
        ("model.use_lstm=true", lambda c: c.model.use_lstm, True),
        (
            "model.conv_filters=[[16,4,2],[32,[3,5],1]]",
            lambda c: c.model.conv_filters,
            ((16, 4, 2), (32, (3, 5), 1)),
        ),
        ("observation_filter=mean_std", lambda c: c.observation_filter, "mean_std"),
        ("prev_actions=2", lambda c: c.prev_actions, 2),
    ],
)
def test_set_reads_values_as_yaml(tmp_path, text, read, expected):
    path = write(tmp_path / "c.yaml", "env: CartPole-v1\nenv_config: {g: 1}\n")
    assert read(load_config(path, sets=[text])) == expected


@pytest.mark.parametrize(
    ("yaml_text", "sets", "expected"),
    [
        ("enf: CartPole-v1\n", ["env=X-v0"], ["`enf`", "line 1", "`env`"]),
        ("env: X\nstop:\n  retturn: 3\n", [], ["`stop.retturn`", "line 3", "`stop.return`"]),
        ("env: X\nmodel: {fcnet_hidens: [3]}\n", [], ["line 2", "`model.fcnet_hiddens`"]),
        ("env: X\nalgo_config: {gama: 0.9}\n", [], ["line 2", "`algo_config.gamma`"]),
        ("env: X\nlr: 0.1\n", [], ["`lr`", "line 2", "under `algo_config`"]),
        ("env: X\n", ["gama=0.9"], ["--set gama=0.9", "`algo_config.gamma`"]),
        ("env: X\n", ["model.fcnet_activatoin=relu"], ["`model.fcnet_activation`"]),
        ("env: X\n", ["fcnet_hiddens=[4]"], ["belongs under `model`"]),
        ("env: X\ncheckpoint: {evvery: 3}\n", [], ["`checkpoint.every`"]),
        ("env: X\n", ["train_batch_size=512"], ["train_batch_size_per_learner"]),
        ("env: X\n", ["num_sgd_iter=5"], ["num_epochs"]),
        ("env: X\n", ["use_lstm=true"], ["`use_lstm` belongs under `model`"]),
        ("env: X\nmodel: {lstm_use_prev_action: true}\n", [], ["`prev_actions`"]),
    ],
)
def test_a_misspelt_key_names_the_nearest_and_where_it_stood(tmp_path, yaml_text, sets, expected):
    path = write(tmp_path / "c.yaml", yaml_text)
    message = error(path, sets=sets)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("yaml_text", "sets", "expected"),
    [
        ("env: X\nnum_env_runners: two\n", [], ["'two'", "integer", "line 2"]),
        ("env: X\n", ["lr=fast"], ["'fast'", "algo_config.lr", "--set lr=fast"]),
        ("env: X\n", ["gamma=1.5"], ["1.5", "less than or equal to 1"]),
        ("env: X\n", ["model.fcnet_activation=tanhh"], ["'tanhh'", "'tanh'", "'relu'"]),
        ("env: X\n", ["seed=true"], ["True", "integer"]),
        ("env: X\n", ["minibatch_size=5000"], ["5000", "train_batch_size_per_learner (1024)"]),
        ("env: X\n", ["rollout_fragment_length=300"], ["300", "2400 steps", "give 128"]),
        ("env: X\n", ["rollout_fragment_length=some"], ["'some'", "'auto'"]),
        ("env: X\n", ["normalize_actions=1"], ["1", "boolean"]),
        ("env: X\n", ["lr=[[5, 0.1], [10, 0.2]]"], ["start at 0"]),
        ("env: X\n", ["observation_filter=MeanStdFilter"], ["'MeanStdFilter'", "'mean_std'"]),
        ("env: X\n", ["model.conv_filters=[[16, 4]]"], ["[[channels, kernel", "--set"]),
        ("env: X\n", ["model.fcnet_hiddens=[]"], ["fcnet_hiddens", "at least 1"]),
        (
            "env: X\nmodel: {use_lstm: true}\n",
            ["model.max_seq_len=50", "minibatch_size=40"],
            ["model.max_seq_len (50)", "minibatch_size (40)"],
        ),
        ("env: X\nmodel: 3\n", [], ["`model` is a section", "3"]),
        ("env: X\n", ["stop.timesteps=0"], ["0", "greater than or equal to 1"]),
        ("env: X\n", ["lr"], ["key=value"]),
        ("env: X\nalgo: A2C\n", [], ["'A2C'", "supported: PPO", "line 2"]),
        (
            "env: X\nalgo: DQN\n",
            ["clip_param=0.1"],
            ["`algo_config.clip_param` of DQN", "PPO, APPO"],
        ),
        ("env: X\nalgo: sac\n", ["lr=0.1"], ["`algo_config.lr` of SAC"]),
        ("env: X\n", ["wrappers=[Flat]"], ["Flat", "module:Name"]),
        ("env: X\nenv_config: {2: 1.0}\n", [], ["keys that are text", "found 2"]),
        ("env: X\nenv_config: {a: {b: 2020-01-01}}\n", [], ["date", "/a/b", "line 2"]),
        ("env: X\nenv_config: {a: [.inf]}\n", [], ["finite", "/a/0"]),
        ("env: X\nwrappers: [{a:B: {c: .nan}}]\n", [], ["finite", "nan"]),
        ("env: X\nenv: Y\n", [], ["`env` stands twice"]),
        ("env: [X\n", [], ["not valid YAML", "line"]),
        ("- env\n", [], ["list", "key: value"]),
        ("", [], ["nothing"]),
        ("seed: 3\n", [], ["no environment", "--env"]),
    ],
)
def test_a_wrong_value_says_found_expected_and_where(tmp_path, yaml_text, sets, expected):
    path = write(tmp_path / "c.yaml", yaml_text)
    message = error(path, sets=sets)
    for part in expected:
        assert part in message


def test_a_wrong_flag_is_named_as_a_flag():
    message = error(flags={"env": "X", "stop.timesteps": 2.5})
    assert "2.5" in message
    assert "--stop-timesteps" in message


def test_an_algorithm_is_found_whatever_its_case():
    assert load_config(flags={"env": "X", "algo": "ppo"}).algo == "PPO"


def test_the_config_in_force_reads_back_equal(tmp_path):
    config = load_config(
        flags={"env": "CartPole-v1", "stop.return": 3.5},
        sets=[
            *("lr=[[0,1e-3],[100,1e-5]]", "env_config={a: {b: [1, x]}}", "grad_clip=null"),
            *("model.conv_filters=[[4,[3,2],1]]", "observation_filter=mean_std", "frame_stack=2"),
        ],
    ).complete()
    assert load_config(write(tmp_path / "config.yaml", dump_config(config))) == config


def test_a_run_without_a_budget_gets_one_and_a_seed():
    config = load_config(flags={"env": "X", "stop.return": 10}).complete()
    assert config.stop.timesteps == DEFAULT_TIMESTEPS
    assert config.seed is not None
    timed = load_config(flags={"env": "X", "stop.time_s": 10, "seed": 0}).complete()
    assert timed.stop.timesteps is None
    assert timed.seed == 0


def test_shipped_configs_are_valid_and_found_by_name_and_environment():
    for name, path in shipped_configs().items():
        if name.startswith("tune-"):
            assert f"policyserve tune {name}" in error(name)
        else:
            assert load_config(name) == load_config(path)
        # A key of the file that the config would ignore could not be told from one that counts.
        text = path.read_text(encoding="utf-8")
        assert all("#" in line for line in text.splitlines() if line.startswith("  "))
    assert "ppo-cartpole" in shipped_for("CartPole-v1")
    assert shipped_for("NoSuchEnv-v0") == []
    assert load_config("ppo-cartpole").stop.episode_return == 475


def test_an_unknown_config_names_the_shipped_one_that_is_nearest():
    assert "ppo-cartpole" in error("ppo-cartpol")


def test_every_setting_has_a_docstring():
    for model in (PPOTrainingConfig, PPOSettings, ModelConfig):
        missing = [name for name, field in model.model_fields.items() if not field.description]
        assert missing == []


def test_dumped_yaml_spells_the_stop_return_as_the_user_does():
    config = load_config(flags={"env": "X", "stop.return": 10})
    assert yaml.safe_load(dump_config(config))["stop"]["return"] == 10
