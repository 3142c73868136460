"""`--safe`: what a checkpoint's states give, and that nothing in a checkpoint is ever run.

The checkpoints are real: RLlib's env runner and learner write them, without Ray and training.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgpack
import numpy as np
import pytest
import ray
import torch

from export.errors import CheckpointError, ExportError, UnsupportedPolicyError
from export.safe_arrays import MAX_ARRAY_BYTES, decode_array, encode_array
from export.safe_pickle import load_state
from serving.errors import UsageError
from training.config_files import dump_config, load_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # RLlib's own
]

MODULE = "learner_group/learner/rl_module/default_policy"
IS_ARRAY = b"nd"  # codespell:ignore nd
FILTER = "env_runner/env_to_module_connector/MeanStdFilter/state.pkl"

USER_CODE = '''
"""What a user has beside a checkpoint: the code that built its config."""
import gymnasium as gym
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.examples.envs.classes.multi_agent import MultiAgentCartPole

def filtered(config, multi_agent=False):
    return config.env_runners(
        env_to_module_connector=lambda env, spaces, device: MeanStdFilter(multi_agent=multi_agent)
    )

def small(config, env="Pendulum-v1", **model):
    return config.environment(env).rl_module(model_config={"fcnet_hiddens": [16, 16]} | model)

def ppo(): return filtered(small(PPOConfig()))
def lstm(): return filtered(small(PPOConfig(), use_lstm=True, lstm_cell_size=8))
def dqn(): return filtered(small(DQNConfig(), "CartPole-v1"))
def sac(): return filtered(small(SACConfig()))
def appo(): return filtered(small(APPOConfig()))
def wide(): return filtered(small(PPOConfig(), fcnet_hiddens=[32, 16]))
def bare(): return small(PPOConfig())
def cartpole(): return filtered(small(PPOConfig(), "CartPole-v1"))
def twice():
    return small(PPOConfig()).env_runners(
        env_to_module_connector=lambda env, spaces, device: [MeanStdFilter(), MeanStdFilter()]
    )

class Counter(ConnectorV2):
    """A connector with a state that nobody knows."""
    def __call__(self, *, rl_module, batch, episodes, **kwargs): return batch
    def get_state(self, *args, **kwargs): return {"count": 3}
    def set_state(self, state): raise AssertionError

def counting():
    return small(PPOConfig()).env_runners(
        env_to_module_connector=lambda env, spaces, device: Counter()
    )

def needs_env():
    return small(PPOConfig()).env_runners(
        env_to_module_connector=lambda env, spaces, device: MeanStdFilter(**env.options)
    )

def spaces_given():
    pendulum = gym.make("Pendulum-v1")
    config = filtered(small(PPOConfig(), "only-the-trainer-had-this"))
    return config.environment(
        observation_space=pendulum.observation_space, action_space=pendulum.action_space
    )

def agents():
    config = small(PPOConfig(), MultiAgentCartPole).environment(env_config={"num_agents": 2})
    return filtered(config, multi_agent=True).multi_agent(
        policies={"left", "right"},
        policy_mapping_fn=lambda agent, *args, **kwargs: ("left", "right")[agent],
    )

old_stack = PPOConfig().api_stack(
    enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False
)
object_of_ppo = ppo()
nothing = 3
'''


@pytest.fixture(scope="module")
def user_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("user")
    (directory / "safe_user_code.py").write_text(USER_CODE)
    yield directory
    sys.modules.pop("safe_user_code", None)


@pytest.fixture(autouse=True)
def _at_home(user_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_directory)


@pytest.fixture(scope="module")
def make(user_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint by the name of the user's function; each is written once."""
    written: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in written:
            sys.path.insert(0, str(user_directory))
            try:
                config = getattr(importlib.import_module("safe_user_code"), name)()
            finally:
                sys.path.remove(str(user_directory))
            written[name] = write_checkpoint(config, tmp_path_factory.mktemp(name))
        return written[name]

    return write


def write_checkpoint(config: Any, directory: Path) -> Path:
    from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    torch.manual_seed(0)
    runner_class = MultiAgentEnvRunner if config.is_multi_agent else SingleAgentEnvRunner
    runner = runner_class(config=config)
    runner.sample(num_timesteps=60, explore=True)
    runner.save_to_path(directory / "env_runner")
    runner.stop()
    # APPO's learner starts a thread that polls for batches until the process ends.
    with mock.patch("ray.rllib.algorithms.impala.impala_learner._LearnerThread.start"):
        learner = config.build_learner(env=None, spaces=runner.get_spaces())
    learner.save_to_path(directory / "learner_group/learner")
    marker = {"ray_version": ray.__version__, "checkpoint_version": "2.1"}
    (directory / "rllib_checkpoint.json").write_text(json.dumps(marker))
    return directory


@pytest.fixture
def copy(make: Callable[[str], Path], tmp_path: Path) -> Path:
    """A PPO checkpoint with a filter, to be spoilt."""
    return Path(shutil.copytree(make("ppo"), tmp_path / "checkpoint"))


def read(path: Path, name: str | None = "ppo", module_id: str = "default_policy") -> Any:
    from export.safe_checkpoint import load_safe_checkpoint

    config = f"safe_user_code:{name}" if name else None
    return load_safe_checkpoint(path, config=config, module_id=module_id)


def refused(path: Path, *parts: str, name: str | None = "ppo") -> str:
    """Reading has to be refused by one clear sentence with these parts in it."""
    with pytest.raises(ExportError) as caught:
        read(path, name)
    for part in parts:
        assert part in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


# --- the same policy as RLlib's own reading gives ---------------------------------------------


def ordinary(path: Path, module_id: str = "default_policy") -> tuple[Any, Any]:
    """RLlib's own way: everything is unpickled."""
    from ray.rllib.connectors.env_to_module import EnvToModulePipeline
    from ray.rllib.core.rl_module.rl_module import RLModule

    module = RLModule.from_checkpoint(path / "learner_group/learner/rl_module" / module_id)
    pipeline = EnvToModulePipeline.from_checkpoint(path / "env_runner/env_to_module_connector")
    pipeline.connectors[0]._update_stats = False
    return module, pipeline


def network_input(pipeline: Any, module: Any, observation: Any, checkpoint: Any) -> Any:
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode

    episode = SingleAgentEpisode(
        observation_space=checkpoint.observation_space, action_space=checkpoint.action_space
    )
    episode.add_env_reset(observation=observation)
    return pipeline(rl_module=module, batch={}, episodes=[episode], explore=False, shared_data={})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "lstm", "dqn", "sac", "appo"])
def test_a_policy_read_safely_answers_as_one_read_by_rllib(
    make: Callable[[str], Path], name: str
) -> None:
    path = make(name)
    checkpoint = read(path, name)
    module, pipeline = ordinary(path)
    assert checkpoint.algorithm.lower() == name.replace("lstm", "ppo")
    for key, weight in module.get_state().items():
        np.testing.assert_array_equal(checkpoint.rl_module.get_state()[key], weight)
    checkpoint.observation_space.seed(3)
    for _ in range(20):
        observation = checkpoint.observation_space.sample()
        batches = [
            network_input(pipeline, module, observation, checkpoint),
            network_input(checkpoint.env_to_module, checkpoint.rl_module, observation, checkpoint),
        ]
        np.testing.assert_array_equal(batches[0]["obs"].numpy(), batches[1]["obs"].numpy())
        # The filter counts: RLlib's formula divides by the deviation, so observations change.
        assert not np.allclose(batches[0]["obs"].numpy().ravel(), observation)
        outputs = [
            module.forward_inference(batches[0]),
            checkpoint.rl_module.forward_inference(batches[1]),
        ]
        for key in {"actions", "action_dist_inputs"} & set(outputs[0]):
            np.testing.assert_array_equal(
                outputs[0][key].detach().numpy(), outputs[1][key].detach().numpy()
            )
    assert not checkpoint.rl_module.training


@pytest.mark.slow
def test_every_module_of_several_agents_gets_its_own_weights_and_filters(
    make: Callable[[str], Path],
) -> None:
    from export.safe_checkpoint import load_safe_checkpoints

    path = make("agents")
    checkpoints = load_safe_checkpoints(path, config="safe_user_code:agents")
    assert {c.module_id: list(c.members) for c in checkpoints} == {"left": [0], "right": [1]}
    assert all(c.agents == {0: "left", 1: "right"} for c in checkpoints)
    for checkpoint in checkpoints:
        module, pipeline = ordinary(path, checkpoint.module_id)
        for key, weight in module.get_state().items():
            np.testing.assert_array_equal(checkpoint.rl_module.get_state()[key], weight)
        found = checkpoint.env_to_module.connectors[0]._filters[checkpoint.agent_id]
        expected = pipeline.connectors[0]._filters[checkpoint.agent_id]
        np.testing.assert_array_equal(found.running_stats.mean, expected.running_stats.mean)
        np.testing.assert_array_equal(found.running_stats.std, expected.running_stats.std)
        assert checkpoint.observation_space.shape == (4,)


def as_msgpack(value: Any) -> Any:
    """What msgpack_numpy, which RLlib uses, makes of arrays."""
    if isinstance(value, np.ndarray):
        return {
            IS_ARRAY: True,
            b"type": value.dtype.str,
            b"kind": b"",
            b"shape": value.shape,
            b"data": value.tobytes(),
        }
    raise TypeError(value)


def test_a_checkpoint_written_with_msgpack_gives_the_same_policy(copy: Path) -> None:
    expected = read(copy)
    for path in [*copy.glob("**/*state.pkl")]:
        state = pickle.loads(path.read_bytes())
        path.with_suffix(".msgpack").write_bytes(msgpack.packb(state, default=as_msgpack))
        path.unlink()
    found = read(copy)
    for key, weight in expected.rl_module.get_state().items():
        np.testing.assert_array_equal(found.rl_module.get_state()[key], weight)
    statistics = [c.env_to_module.connectors[0]._filters[None] for c in (expected, found)]
    np.testing.assert_array_equal(*[s.running_stats.mean for s in statistics])


# --- where the config and the spaces come from -------------------------------------------------


def own_run(directory: Path, env: str = "Pendulum-v1") -> Path:
    """A run directory as `train` writes it, with one checkpoint; the checkpoint."""
    from training.algorithm import rllib_config

    config = load_config(flags={"env": env}).complete()
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "run.json").write_text("{}")
    (directory / "config.yaml").write_text(dump_config(config))
    return write_checkpoint(rllib_config(config), directory / "checkpoints/iteration_000001")


def test_a_run_of_train_needs_no_config(tmp_path: Path) -> None:
    checkpoint = own_run(tmp_path / "run")
    facts = {"iteration": 7, "env_steps": 900, "files": {}, "env": "x"}
    (checkpoint / "policyserve.json").write_text(json.dumps(facts))
    for path in (tmp_path / "run", checkpoint):
        found = read(path, None)
        assert (found.env_id, found.algorithm) == ("Pendulum-v1", "PPO")
        assert (found.facts["iteration"], found.facts["env_steps"]) == (7, 900)


def test_a_runs_own_config_imports_no_module_that_it_names(tmp_path: Path) -> None:
    checkpoint = own_run(tmp_path / "run", "gymnasium.envs.classic_control:Pendulum-v1")
    message = refused(checkpoint, "imports a module by name", name=None)
    assert f"--config {tmp_path / 'run/config.yaml'}" in message
    from export.safe_checkpoint import load_safe_checkpoint

    found = load_safe_checkpoint(checkpoint, config=str(tmp_path / "run/config.yaml"))
    assert found.env_id == "gymnasium.envs.classic_control:Pendulum-v1"


def test_a_checkpoint_of_elsewhere_says_how_to_give_a_config(copy: Path) -> None:
    refused(copy, "lies in no run directory", "--config", "module:attribute", name=None)


@pytest.mark.parametrize("name", ["object_of_ppo", "spaces_given"])
def test_a_config_is_an_object_or_a_function_and_may_hold_the_spaces(copy: Path, name: str) -> None:
    assert read(copy, name).observation_space.shape == (3,)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("no_such_module:ppo", "No module named 'no_such_module'"),
        ("safe_user_code:no_such_name", "no_such_name"),
        ("safe_user_code:nothing", "is a int"),
        ("safe_user_code:old_stack", "old API stack"),
        ("ray.rllib.algorithms.algorithm_config:AlgorithmConfig", "names no algorithm"),
        ("ray.rllib.algorithms.ppo:PPOConfig", "neither an environment nor both spaces"),
        ("no_such_file.yaml", "no config file"),
    ],
)
def test_a_wrong_source_is_wrong_usage_and_says_why(copy: Path, source: str, part: str) -> None:
    from export.safe_checkpoint import load_safe_checkpoint

    with pytest.raises(UsageError, match=part):
        load_safe_checkpoint(copy, config=source)


# --- a config that is not the checkpoint's ----------------------------------------------------


def test_other_hidden_sizes_are_named_with_both_shapes(copy: Path) -> None:
    refused(copy, "mlp.0.weight", "(16, 3)", "(32, 3)", "module_state.pkl", name="wide")


def test_another_algorithm_is_noticed_by_the_names_of_its_weights(copy: Path) -> None:
    refused(copy, "is missing", "more", name="sac")


def test_a_filter_that_the_config_lacks_is_noticed(copy: Path) -> None:
    refused(copy, "MeanStdFilter", "the config doesn't have", name="bare")


def test_a_filter_that_the_checkpoint_lacks_is_noticed(make: Callable[[str], Path]) -> None:
    refused(make("bare"), "MeanStdFilter", "is missing")


def test_a_filter_of_other_observations_is_noticed(make: Callable[[str], Path], copy: Path) -> None:
    shutil.copy(make("cartpole") / FILTER, copy / FILTER)
    refused(copy, "observations of shape (4,)", "(3,)")


def test_two_filters_are_refused(copy: Path) -> None:
    refused(copy, "2 connectors MeanStdFilter", name="twice")


def test_a_connector_with_another_state_is_refused_by_name(make: Callable[[str], Path]) -> None:
    message = refused(make("counting"), "connector Counter", name="counting")
    assert "--trust-checkpoint" in message


def test_connectors_that_need_an_environment_say_so(copy: Path) -> None:
    with pytest.raises(UnsupportedPolicyError, match="take the spaces from `spaces`"):
        read(copy, "needs_env")


def test_an_unknown_module_is_refused_with_the_known_ones(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="'hunter'; it has: default_policy"):
        read(copy, "ppo", module_id="hunter")


# --- hostile files ----------------------------------------------------------------------------


class Bomb:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Path]:
    """A file that every bomb makes; the test fails if it is there in the end."""
    path = tmp_path / "witness"
    yield path
    assert not path.exists()


def bombs(witness: Path) -> dict[str, bytes]:
    """What the message has to name -> a pickle that makes the witness when it is loaded."""
    touch = f"touch {witness}"
    code = f"open({str(witness)!r}, 'w').close()"
    bomb = Bomb(os.system, touch)
    array = np.array([bomb, 2], dtype=object)
    return {
        "posix.system": pickle.dumps(bomb),
        "builtins.eval": pickle.dumps({"weight": Bomb(eval, code)}),
        "builtins.exec": pickle.dumps(OrderedDict(weight=Bomb(exec, code)), protocol=4),
        "__builtin__.eval": pickle.dumps(Bomb(eval, code), protocol=0),
        "subprocess.check_call": pickle.dumps([Bomb(subprocess.check_call, touch.split())]),
        "_pickle.loads": pickle.dumps(Bomb(pickle.loads, pickle.dumps(bomb))),
        "torch.storage._load_from_bytes": pickle.dumps(Bomb(torch.storage._load_from_bytes, b"x")),
        "dtype O8": pickle.dumps({"weight": array}),
        "INST": f"(S'{touch}'\nios\nsystem\n.".encode(),
        "OBJ": b"(cos\nsystem\nS'" + touch.encode() + b"'\no.",
    }


BOMB_NAMES = list(bombs(Path("unused")))


def test_the_bombs_are_live(tmp_path: Path) -> None:
    for name in ("posix.system", "builtins.eval", "_pickle.loads", "dtype O8", "INST"):
        path = tmp_path / "live"
        pickle.loads(bombs(path)[name])
        path.unlink()


def test_no_class_and_ctor_args_is_read(copy: Path, witness: Path) -> None:
    files = [*copy.glob("**/class_and_ctor_args.pkl")]
    assert len(files) >= 7
    for path in files:
        path.write_bytes(bombs(witness)["posix.system"])
    expected = read(copy).rl_module.get_state()
    for path in files:
        path.unlink()
    for key, weight in read(copy).rl_module.get_state().items():
        np.testing.assert_array_equal(weight, expected[key])


@pytest.mark.parametrize("name", BOMB_NAMES)
def test_a_bomb_in_the_weights_is_refused_by_name(copy: Path, witness: Path, name: str) -> None:
    (copy / MODULE / "module_state.pkl").write_bytes(bombs(witness)[name])
    message = refused(copy, "module_state.pkl", "--trust-checkpoint")
    assert name in message.replace("'O8'", "O8") or name == "OBJ"


@pytest.mark.parametrize(
    "file",
    [
        FILTER,
        "env_runner/env_to_module_connector/state.pkl",
        "env_runner/module_to_env_connector/state.pkl",
    ],
)
def test_a_bomb_in_any_file_that_is_read_is_refused(copy: Path, witness: Path, file: str) -> None:
    (copy / file).write_bytes(bombs(witness)["posix.system"])
    refused(copy, file, "posix.system")


def test_bombs_in_the_files_that_are_not_needed_stay_unread(copy: Path, witness: Path) -> None:
    for name in ("algorithm_state.pkl", "learner_group/learner/state.pkl", "env_runner/state.pkl"):
        (copy / name).write_bytes(bombs(witness)["posix.system"])
    read(copy)


def npy(array: np.ndarray[Any, Any]) -> str:
    """As RLlib's `_serialize_ndarray` writes an array, pickles allowed."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return base64.b64encode(zlib.compress(file.getvalue())).decode()


@pytest.mark.parametrize("name", ["mean_array", "sum_sq_diff_delta_array"])
def test_a_bomb_in_a_filters_array_is_refused(copy: Path, witness: Path, name: str) -> None:
    state = pickle.loads((copy / FILTER).read_bytes())
    bomb = np.array([Bomb(os.system, f"touch {witness}")] * 3, dtype=object)
    state[None]["running_stats"][0][name] = npy(bomb)
    (copy / FILTER).write_bytes(pickle.dumps(state))
    refused(copy, FILTER, "dtype |O")


@pytest.mark.parametrize(
    "change",
    [
        {"mean_array": npy(np.full(3, np.nan))},
        {"mean_array": npy(np.zeros(4))},
        {"mean_array": npy(np.zeros(3, np.float32))},
        {"mean_array": 5},
        {"mean_array": "!"},
        {"num_pushes": -1},
        {"num_pushes": "9"},
    ],
)
def test_statistics_that_are_none_are_refused(copy: Path, change: dict[str, Any]) -> None:
    state = pickle.loads((copy / FILTER).read_bytes())
    state[None]["running_stats"][0].update(change)
    (copy / FILTER).write_bytes(pickle.dumps(state))
    refused(copy, FILTER)


@pytest.mark.parametrize("state", [{}, {"agent": {}}, [], {None: {"shape": np.array([3])}}])
def test_a_filter_state_of_another_kind_is_refused(copy: Path, state: Any) -> None:
    (copy / FILTER).write_bytes(pickle.dumps(state))
    refused(copy, FILTER)


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [f"{MODULE}/module_state.pkl", FILTER])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_file_cut_short_is_refused(copy: Path, file: str, share: float) -> None:
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: int(len(content) * share)])
    refused(copy, file, "damaged or half-written")


@pytest.mark.parametrize("file", [f"{MODULE}/module_state.pkl", FILTER])
def test_a_file_that_is_not_there_is_named(copy: Path, file: str) -> None:
    (copy / file).unlink()
    refused(copy, file, "missing")


def test_a_marker_of_another_ray_is_refused_with_the_version_to_install(copy: Path) -> None:
    (copy / "rllib_checkpoint.json").write_text('{"ray_version": "2.44.1"}')
    refused(copy, "Ray 2.44.1", "ray==2.44.1")


def test_a_damaged_marker_is_refused(copy: Path) -> None:
    (copy / "rllib_checkpoint.json").write_text('{"ray_')
    refused(copy, "rllib_checkpoint.json", "damaged")


def test_weights_of_another_dtype_are_refused(copy: Path) -> None:
    path = copy / MODULE / "module_state.pkl"
    state = {key: value.astype("f2") for key, value in pickle.loads(path.read_bytes()).items()}
    path.write_bytes(pickle.dumps(state))
    refused(copy, "float16", "float32")


# --- load_state alone ---------------------------------------------------------------------------

BOX = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
PLAIN = OrderedDict(
    c=BOX,
    fortran=np.asfortranarray(BOX),
    permuted=BOX.transpose(1, 0, 2),
    empty=np.zeros((0, 3), np.float32),
    scalar=np.float32(1.5),
    integer=np.int64(-7),
    rank_0=np.array(3, np.uint8),
    booleans=np.array([True, False]),
    big_endian=BOX.astype(">f4"),
    half=BOX.astype(np.float16),
)
OTHERS = {"nested": [1, None, ("text", b"bytes", 2.5, True)], 0: {"a": {}}}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("numpy_module", ["numpy._core", "numpy.core"])
def test_plain_data_of_every_protocol_is_read_as_it_was_written(
    tmp_path: Path, protocol: int, numpy_module: str
) -> None:
    content = pickle.dumps({"arrays": PLAIN, "others": OTHERS}, protocol)
    if protocol <= 3:  # names are lines of text there; NumPy 1 wrote the other one
        content = content.replace(b"numpy._core", numpy_module.encode())
    (tmp_path / "state.pkl").write_bytes(content)
    found = load_state(tmp_path / "state.pkl")
    assert found["others"] == OTHERS
    assert list(found["arrays"]) == list(PLAIN)
    for name, array in PLAIN.items():
        np.testing.assert_array_equal(found["arrays"][name], array)
        assert found["arrays"][name].dtype == array.dtype.newbyteorder("=")


def load(tmp_path: Path, content: bytes, name: str = "state.pkl") -> Any:
    (tmp_path / name).write_bytes(content)
    return load_state(tmp_path / name)


@pytest.mark.parametrize(
    "array",
    [
        np.array(["text"]),
        np.array([b"bytes"]),
        np.zeros(2, [("a", "f4")]),
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros(2, np.complex64),
        np.array([None]),
        np.array([[1, 2]], dtype=object),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path: Path, array: Any) -> None:
    for protocol in range(6):
        with pytest.raises(CheckpointError, match="dtype"):
            load(tmp_path, pickle.dumps(array, protocol))


def pickle_of(*parts: bytes) -> bytes:
    return b"".join((b"\x80\x04", *parts, b"."))


def name_of(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def test_what_a_file_names_cannot_be_altered_for_the_next_file(tmp_path: Path) -> None:
    state = b"N}" + text("__defaults__") + b"N" + b"s" + b"\x86"  # (None, {"__defaults__": None})
    for module, name in [
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "dtype"),
        ("collections", "OrderedDict"),
    ]:
        with pytest.raises(CheckpointError, match="alters an object"):
            load(tmp_path, pickle_of(name_of(module, name), state, b"b"))


def test_a_name_stands_for_nothing_but_itself(tmp_path: Path) -> None:
    # Each of these is allowed to be called, and refused as a value.
    for module, name in [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]:
        with pytest.raises(CheckpointError, match="where plain data belongs"):
            load(tmp_path, pickle_of(name_of(module, name)))
    with pytest.raises(
        CheckpointError, match=r"names the Python object collections\.OrderedDict\."
    ):
        load(tmp_path, pickle_of(text("collections"), text("OrderedDict.fromkeys"), b"\x93"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (pickle_of(b"N", b"r\xff\xff\xff\x7f"), "memo index"),
        (pickle_of(b"\x8e" + (2**40).to_bytes(8, "little"), b"x"), "not readable"),
        (pickle_of(b"\x96" + (2**40).to_bytes(8, "little"), b"x"), "not readable"),
        (pickle_of(text("persistent"), b"Q"), "BINPERSID"),
        (pickle_of(b"\x82\x01"), "EXT1"),
        (pickle_of(b"\x97"), "NEXT_BUFFER"),
    ],
)
def test_instructions_that_no_state_needs_are_refused(
    tmp_path: Path, content: bytes, part: str
) -> None:
    with pytest.raises(CheckpointError, match=part):
        load(tmp_path, content)


def test_a_list_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CheckpointError, match="deep"):
        load(tmp_path, pickle.dumps(endless))


def test_lists_shared_over_and_over_are_refused(tmp_path: Path) -> None:
    laughs: list[Any] = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    with pytest.raises(CheckpointError, match="values"):
        load(tmp_path, pickle.dumps(laughs))


def test_bytes_copied_again_and_again_are_refused(tmp_path: Path) -> None:
    call = b"h\x00h\x01h\x02\x86R0"  # _encode(memo 1, memo 2), thrown away
    content = pickle_of(
        name_of("_codecs", "encode"),
        b"q\x000",
        b"X" + (100_000).to_bytes(4, "little") + b"x" * 100_000,
        b"q\x010",
        text("latin1"),
        b"q\x020",
        call * 50,
        b"N",
    )
    with pytest.raises(CheckpointError, match="again and again"):
        load(tmp_path, content)


def test_an_array_that_claims_more_than_is_there_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps(np.zeros(5, np.float32), 2).replace(
        b"K\x05\x85", b"J\x00\x00\x00\x7f\x85"
    )
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path, content)


def test_a_pipe_or_a_directory_is_no_state_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pkl")
    for path in (tmp_path / "pipe.pkl", tmp_path, tmp_path / "none.pkl"):
        with pytest.raises(CheckpointError, match="missing"):
            load_state(path)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_gives_an_error_or_plain_data(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    content = pickle.dumps({"arrays": PLAIN, "others": OTHERS}, seed + 3)
    for _ in range(300):
        damaged = bytearray(content)
        for position in generator.integers(0, len(content), size=3):
            damaged[position] = generator.integers(256)
        with contextlib.suppress(CheckpointError):
            load(tmp_path, bytes(damaged))


# --- msgpack ------------------------------------------------------------------------------------


def test_msgpack_arrays_are_read_as_they_were_written(tmp_path: Path) -> None:
    arrays = {name: np.asarray(array) for name, array in PLAIN.items()}
    state = {
        **arrays,
        "one": {IS_ARRAY: False, b"type": "<f4", b"data": b"\0\0\xc0?"},
        3: [None, "x"],
    }
    found = load(tmp_path, msgpack.packb(state, default=as_msgpack), "state.msgpack")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert (found["one"], found[3]) == (1.5, [None, "x"])


def test_a_bomb_in_msgpack_is_refused(tmp_path: Path, witness: Path) -> None:
    bomb = pickle.dumps(Bomb(os.system, f"touch {witness}"))
    # Both ways in which msgpack_numpy comes to unpickle.
    for kind, text_of_dtype in ((b"O", [["", "|O"]]), (b"", "|O")):
        hidden = {
            IS_ARRAY: True,
            b"type": text_of_dtype,
            b"kind": kind,
            b"shape": [1],
            b"data": bomb,
        }
        with pytest.raises(CheckpointError, match="holds an array"):
            load(tmp_path, msgpack.packb({"weight": hidden}), "state.msgpack")
    extension = msgpack.packb({"weight": msgpack.ExtType(5, bomb)})
    with pytest.raises(CheckpointError, match="extension of type 5"):
        load(tmp_path, extension, "state.msgpack")


@pytest.mark.parametrize("n_bytes", [0, 1, 10, 30])
def test_damaged_msgpack_is_refused(tmp_path: Path, n_bytes: int) -> None:
    content = msgpack.packb({"weight": np.zeros(9)}, default=as_msgpack)
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path, content[:n_bytes], "state.msgpack")


# --- decode_array -------------------------------------------------------------------------------


def test_a_filters_array_is_decoded_as_rllib_encodes_it() -> None:
    from ray.rllib.utils.serialization import _deserialize_ndarray, _serialize_ndarray

    for array in (BOX, np.asfortranarray(BOX), np.array(2.5), np.zeros((0, 2))):
        np.testing.assert_array_equal(decode_array(_serialize_ndarray(array)), array)
        np.testing.assert_array_equal(_deserialize_ndarray(encode_array(array)), array)


def packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


def header(shape: str, descr: str = "<f8", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"bytes",
        "not base64!",
        base64.b64encode(b"not zlib").decode(),
        packed(b"not npy"),
        packed(b"PK\x03\x04 a zip archive, which np.load would open"),
        packed(header("(3,)")),
        packed(header("(1000000000000,)")),
        packed(header("(-1,)") + b"\0" * 8),
        packed(header("(1,)", version=b"\x09\x00") + b"\0" * 8),
        packed(header("(1,)", "|O") + b"\0" * 8),
        packed(header("(" * 5000)),
        packed(header("(1,)") + b"\0" * 8)[:-8],
    ],
)
def test_a_text_that_is_no_array_of_numbers_is_refused(text: Any) -> None:
    with pytest.raises(CheckpointError, match="statistics"):
        decode_array(text)


def test_a_small_text_does_not_become_a_large_array() -> None:
    compressor = zlib.compressobj()
    block = b"\0" * 2**20
    parts = [compressor.compress(header(f"({MAX_ARRAY_BYTES // 8},)"))]
    parts += [compressor.compress(block) for _ in itertools.repeat(None, MAX_ARRAY_BYTES // 2**20)]
    text = base64.b64encode(b"".join([*parts, compressor.flush()])).decode()
    assert len(text) < 2**20
    with pytest.raises(CheckpointError, match="64 MiB"):
        decode_array(text)


# --- a checkpoint from real training ------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_run_read_safely_has_the_weights_that_rllib_reads(cartpole_run: Path) -> None:
    from ray.rllib.core.rl_module.rl_module import RLModule

    checkpoint = read(cartpole_run, None)
    module = RLModule.from_checkpoint(checkpoint.path / MODULE)
    for key, weight in module.get_state().items():
        np.testing.assert_array_equal(checkpoint.rl_module.get_state()[key], weight)
    assert checkpoint.env_id == "CartPole-v1"
