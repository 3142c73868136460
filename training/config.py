"""TrainingConfig: every setting of a training run, checked before anything starts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from training.algorithm_settings import (
    AlgorithmSettings,
    APPOSettings,
    DQNSettings,
    IMPALASettings,
    PPOSettings,
    SACSettings,
)
from training.model_config import ModelConfig, QModelConfig, SACModelConfig
from training.settings import (
    Count,
    ImportPath,
    NonNegativeCount,
    Number,
    PositiveCount,
    PositiveNumber,
    Section,
    Switch,
)

DEFAULT_TIMESTEPS = 150_000
"""The budget of environment steps where neither `stop.timesteps` nor `stop.time_s` is given."""


class StopConfig(Section):
    """When training ends; whichever comes first."""

    episode_return: Number | None = Field(default=None, alias="return")
    """Mean return of the last `window_episodes` training episodes, sampled actions, that ends the
    run as reached. Spelt `return`."""

    evaluation_return: Number | None = None
    """Mean return of an evaluation that ends the run as reached."""

    timesteps: PositiveCount | None = None
    """Environment steps over all environments, counted from the run's first start. Where neither
    this nor `time_s` is given it is 150,000."""

    time_s: PositiveNumber | None = None
    """Seconds of training, without Ray's start; a resumed run goes on counting."""

    window_episodes: PositiveCount = 20
    """Episodes that the mean return is taken over; before so many have ended there is none to stop
    on. More is steadier and later."""


class CheckpointConfig(Section):
    """When checkpoints are written. The best and the last are always kept."""

    every: PositiveCount = 10
    """Iterations between checkpoints; one more is written at the end."""

    keep: PositiveCount = 3
    """How many of the newest checkpoints stay, besides the best."""

    best_window_episodes: PositiveCount = 100
    """Without evaluation: training episodes that a checkpoint is judged by. The best is the latest
    whose mean return lies at most one standard error below the highest: of equals the later one
    has learned longer, and the highest of many noisy means is mostly a lucky one."""


class EvaluationConfig(Section):
    """Whole episodes of the policy of now, in environments of their own, apart from training."""

    interval: NonNegativeCount = 10
    """Iterations between evaluations; one more is made at the end. 0 makes none: then the best
    checkpoint is judged by training episodes."""

    episodes: PositiveCount = 10
    """Episodes of an evaluation."""

    deterministic: Switch = True
    """The most likely actions; false samples them as in training."""

    num_env_runners: NonNegativeCount = 0
    """Processes that play them. 0 plays them in the training process."""

    max_episode_steps: PositiveCount = 10_000
    """An episode that is longer is cut off here, as truncated: some environments have no end."""

    env_config: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment that differ from training's."""


Wrapper = (
    ImportPath
    | Annotated[dict[ImportPath, dict[str, Any] | None], Field(min_length=1, max_length=1)]
)


class TrainingConfig(Section):
    """A training run, whole. Order: default, then YAML, then flags, then `--set`.

    Each algorithm has a subclass: `ALGORITHMS`.
    """

    env: Annotated[str, Field(min_length=1)]
    """A registered Gymnasium environment id; `module:EnvId`, which imports the module first; or
    `module:factory`, a class or function that is called with `env_config`."""

    env_config: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the environment, as `gymnasium.make` takes them."""

    wrappers: tuple[Wrapper, ...] = ()
    """Wrappers around each environment, the innermost first: "module:Class", or
    {"module:Class": {argument: value}}."""

    algo: str = "PPO"
    """The algorithm: PPO, DQN, SAC, IMPALA or APPO."""

    seed: Annotated[Count, Field(ge=0, lt=2**31)] | None = None
    """Makes a run reproducible with `num_env_runners: 0`. Where it is null one is drawn and
    written into the run's config."""

    num_env_runners: NonNegativeCount = 0
    """Extra processes that step environments. 0 steps them in the training process, which is
    fastest for environments that cost little."""

    num_envs_per_env_runner: PositiveCount = 8
    """Environments stepped together as one vector in each process."""

    vectorize_mode: Literal["sync", "async"] = "sync"
    """async gives each environment of a vector a process of its own, for environments that take
    milliseconds a step."""

    rollout_fragment_length: Literal["auto"] | PositiveCount = "auto"
    """Steps that each environment is stepped at a time. PPO: "auto" shares out
    `train_batch_size_per_learner`; a number has to fill a batch to within 10 %. DQN and SAC: "auto"
    is `n_step`. IMPALA and APPO: "auto" is 50."""

    num_gpus: Annotated[Count, Field(ge=0, le=1)] = 0
    """1 trains the networks on a CUDA GPU."""

    normalize_actions: Switch = True
    """Box actions with both bounds: the policy acts in [-1, 1], and RLlib scales its actions to the
    environment's bounds."""

    clip_actions: Switch = False
    """Without `normalize_actions`: Box actions are cut at the environment's bounds."""

    flatten_observations: Literal["auto"] | Switch = "auto"
    """auto flattens what RLlib's networks don't take to one float32 array; false leaves every
    observation as it is, for an RLModule of your own."""

    observation_filter: Literal["none", "mean_std"] = "none"
    """mean_std: observations are shifted and scaled by their running mean and deviation, each
    component by its own, and cut at 10 deviations. The statistics are part of the policy."""

    prev_actions: NonNegativeCount = 0
    """Discrete actions: the policy also sees so many of its last actions, one-hot."""

    prev_rewards: NonNegativeCount = 0
    """Discrete actions: the policy also sees so many of its last rewards."""

    frame_stack: PositiveCount = 1
    """Images with one channel: the policy sees so many of the last ones as channels."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """The networks."""

    algo_config: AlgorithmSettings
    """The algorithm's settings. `--set lr=1e-3` is short for `--set algo_config.lr=1e-3`."""

    stop: StopConfig = Field(default_factory=StopConfig)
    """When training ends."""

    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Whole episodes of the policy of now, apart from training."""

    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """When checkpoints are written."""

    @model_validator(mode="after")
    def _somebody_takes_the_observations(self) -> TrainingConfig:
        if self.flatten_observations is False and self.model.module is None:
            raise ValueError(
                "`flatten_observations: false` is for an RLModule of your own (`model.module`); "
                "RLlib's networks take float arrays with one axis, or images"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_is_there_to_stop_on(self) -> TrainingConfig:
        if self.stop.evaluation_return is not None and not self.evaluation.interval:
            raise ValueError(
                "`stop.evaluation_return` needs evaluations: give `evaluation.interval`"
            )
        return self

    def complete(self) -> TrainingConfig:
        """Fill in what a run decides at its start: a budget where there is none, and a seed."""
        config = self
        if config.stop.timesteps is None and config.stop.time_s is None:
            stop = config.stop.model_copy(update={"timesteps": DEFAULT_TIMESTEPS})
            config = config.model_copy(update={"stop": stop})
        if config.seed is None:
            config = config.model_copy(update={"seed": random.SystemRandom().randrange(2**31)})
        return config

    def wrapper_calls(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each wrapper's import path and keyword arguments, the innermost first."""
        for wrapper in self.wrappers:
            if isinstance(wrapper, str):
                yield wrapper, {}
            else:
                yield from ((path, dict(kwargs or {})) for path, kwargs in wrapper.items())


class PPOTrainingConfig(TrainingConfig):
    """A run of PPO."""

    algo: Literal["PPO"] = "PPO"
    """The algorithm."""

    scale_rewards: Switch = True
    """Learn from rewards divided by the running deviation of the discounted return, so that the
    same settings fit environments of any reward scale. Reported returns and the policy's inputs
    and outputs are not touched."""

    algo_config: PPOSettings = Field(default_factory=PPOSettings)
    """PPO's settings."""

    @model_validator(mode="after")
    def _fragments_fill_a_batch(self) -> PPOTrainingConfig:
        # RLlib's rule (validate_train_batch_size_vs_rollout_fragment_length), said before Ray runs.
        if self.rollout_fragment_length == "auto":
            return self
        n_envs = self.num_envs_per_env_runner * max(self.num_env_runners, 1)
        steps = n_envs * self.rollout_fragment_length
        batch = self.algo_config.train_batch_size_per_learner
        if -batch % steps > 0.1 * batch:
            raise ValueError(
                f"rollout_fragment_length ({self.rollout_fragment_length}) over {n_envs} "
                f"environments gives {steps} steps at a time, which don't fill "
                f"train_batch_size_per_learner ({batch}) to within 10 %: give "
                f"{max(batch // n_envs, 1)}, or auto"
            )
        return self

    @model_validator(mode="after")
    def _sequences_fit(self) -> PPOTrainingConfig:
        # RLlib shares minibatches out in whole sequences, and with none in one it never ends.
        length, size = self.model.max_seq_len, self.algo_config.minibatch_size
        if self.model.use_lstm and length > size:
            raise ValueError(
                f"model.max_seq_len ({length}) is larger than minibatch_size ({size}), which has "
                "to hold a sequence"
            )
        return self


class _ReplayTrainingConfig(TrainingConfig):
    num_envs_per_env_runner: PositiveCount = 1
    """Environments stepped together as one vector in each process."""

    model: QModelConfig = Field(default_factory=QModelConfig)
    """The networks."""


class DQNTrainingConfig(_ReplayTrainingConfig):
    """A run of DQN."""

    algo: Literal["DQN"] = "DQN"
    """The algorithm."""

    algo_config: DQNSettings = Field(default_factory=DQNSettings)
    """DQN's settings."""

    @model_validator(mode="after")
    def _burn_in_leaves_something(self) -> DQNTrainingConfig:
        length, burn_in = self.model.max_seq_len, self.algo_config.burn_in_len
        if self.model.use_lstm and burn_in >= length:
            raise ValueError(
                f"burn_in_len ({burn_in}) leaves nothing of model.max_seq_len ({length}) to learn "
                "from"
            )
        return self


class SACTrainingConfig(_ReplayTrainingConfig):
    """A run of SAC."""

    algo: Literal["SAC"] = "SAC"
    """The algorithm."""

    model: SACModelConfig = Field(default_factory=SACModelConfig)
    """The networks."""

    algo_config: SACSettings = Field(default_factory=SACSettings)
    """SAC's settings."""


class IMPALATrainingConfig(TrainingConfig):
    """A run of IMPALA."""

    algo: Literal["IMPALA"] = "IMPALA"
    """The algorithm."""

    algo_config: IMPALASettings = Field(default_factory=IMPALASettings)
    """IMPALA's settings."""


class APPOTrainingConfig(TrainingConfig):
    """A run of APPO."""

    algo: Literal["APPO"] = "APPO"
    """The algorithm."""

    algo_config: APPOSettings = Field(default_factory=APPOSettings)
    """APPO's settings."""


ALGORITHMS: dict[str, type[TrainingConfig]] = {
    "PPO": PPOTrainingConfig,
    "DQN": DQNTrainingConfig,
    "SAC": SACTrainingConfig,
    "IMPALA": IMPALATrainingConfig,
    "APPO": APPOTrainingConfig,
}
"""RLlib's name of each algorithm to the config of a run of it."""


def settings_of(algo: str) -> type[AlgorithmSettings]:
    """The class of an algorithm's own settings."""
    annotation = ALGORITHMS[algo].model_fields["algo_config"].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, AlgorithmSettings)
    return annotation
