"""TrainingConfig: every setting of a training run, checked before anything starts."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator

DEFAULT_TIMESTEPS = 150_000
"""The budget of environment steps where neither `stop.timesteps` nor `stop.time_s` is given."""

SUPPORTED_ALGORITHMS = ("PPO",)


def _whole(value: Any) -> Any:
    # `--stop-timesteps 1e5` is a float to YAML and a count to its user.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Count = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
PositiveCount = Annotated[Count, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NonNegativeNumber = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Switch = Annotated[bool, Field(strict=True)]
Layers = tuple[Annotated[StrictInt, Field(ge=1)], ...]
Activation = Literal["tanh", "relu", "swish", "silu", "linear"]
SchedulePoint = tuple[Count, NonNegativeNumber]


def _check_schedule(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    points = [point for point in value if isinstance(point, (list, tuple)) and len(point) == 2]
    if len(points) != len(value) or len(points) < 2:
        raise ValueError("expected a number or a schedule [[0, value], [timestep, value], ...]")
    timesteps = [point[0] for point in points]
    if timesteps[0] != 0 or any(a >= b for a, b in pairwise(timesteps)):
        raise ValueError("a schedule's timesteps start at 0 and rise")
    return value


def _check_filters(value: Any) -> Any:
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    if is_list and all(isinstance(item, (list, tuple)) and len(item) == 3 for item in value):
        return value
    raise ValueError("expected [[channels, kernel, stride], ...], e.g. [[16, 4, 2], [32, 4, 2]]")


ConvSize = PositiveCount | tuple[PositiveCount, PositiveCount]
ConvFilters = Annotated[
    tuple[tuple[PositiveCount, ConvSize, ConvSize], ...], BeforeValidator(_check_filters)
]
Schedule = Annotated[
    NonNegativeNumber | tuple[SchedulePoint, ...], BeforeValidator(_check_schedule)
]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True
    )


class ModelConfig(_Section):
    """The networks: a multilayer perceptron each for policy and value (RLlib's default modules).

    The names are those of RLlib's `DefaultModelConfig`.
    """

    fcnet_hiddens: Annotated[Layers, Field(min_length=1)] = (64, 64)
    """Units of each hidden layer. Two of 64 is the usual size for vector observations."""

    fcnet_activation: Activation = "tanh"
    """Activation of the hidden layers."""

    fcnet_use_layernorm: Switch = False
    """Put a layer norm behind each hidden layer."""

    fcnet_kernel_initializer: str | None = None
    """A `torch.nn.init` name, e.g. "orthogonal_"; null is torch's default for linear layers."""

    fcnet_kernel_initializer_kwargs: dict[str, Any] | None = None
    """Arguments of the initializer, e.g. {"gain": 1.41}."""

    head_fcnet_hiddens: Layers = ()
    """Units of hidden layers of the policy's and value's own heads, behind `fcnet_hiddens`."""

    head_fcnet_activation: Activation = "relu"
    """Activation of the heads' hidden layers."""

    head_fcnet_use_layernorm: Switch = False
    """Put a layer norm behind each hidden layer of the heads."""

    head_fcnet_kernel_initializer: str | None = None
    """A `torch.nn.init` name for the heads."""

    head_fcnet_kernel_initializer_kwargs: dict[str, Any] | None = None
    """Arguments of the heads' initializer."""

    vf_share_layers: Switch = False
    """Whether policy and value share their hidden layers. Separate needs no balance of losses."""

    free_log_std: Switch = False
    """Box actions: one learned deviation per action instead of one computed from the state."""

    log_std_clip_param: PositiveNumber = 20.0
    """Box actions: the log of the deviation is clipped to plus and minus this."""

    conv_filters: ConvFilters | None = None
    """Image observations: [[channels, kernel, stride], ...], one per convolution; kernel and stride
    are a number or [height, width]. Null takes RLlib's where it has some: for images of 10, 42, 64,
    84 or 96 pixels square."""

    conv_activation: Activation = "relu"
    """Image observations: activation of the convolutions."""

    use_lstm: Switch = False
    """Put an LSTM behind the hidden layers (or the convolutions): a policy with memory."""

    lstm_cell_size: PositiveCount = 64
    """Units of the LSTM, and numbers in each of its two states."""

    max_seq_len: Annotated[Count, Field(ge=2)] = 20
    """Steps that gradients go back through the LSTM. Batches are cut into sequences of this length,
    the last of each episode padded."""


class AlgorithmSettings(_Section):
    """RLlib's PPO `training()` settings, by their RLlib names; the defaults are this project's.

    docs/training.md says where the defaults come from and what was measured.
    """

    lr: Schedule | None = None
    """Adam's learning rate, or a schedule [[timestep, rate], ...] interpolated linearly; null
    falls linearly from 1e-3 to 0 over the budget `stop.timesteps` (constant 3e-4 where the
    budget is a time alone)."""

    gamma: Fraction = 0.99
    """Discount of future rewards per step."""

    lambda_: Fraction = 0.95
    """Generalised advantage estimation's lambda."""

    train_batch_size_per_learner: PositiveCount = 1024
    """Environment steps gathered per iteration, over all environments."""

    minibatch_size: PositiveCount = 256
    """Steps per gradient step."""

    num_epochs: PositiveCount = 10
    """Passes over each batch."""

    shuffle_batch_per_epoch: Switch = True
    """Shuffle the batch before each pass."""

    clip_param: PositiveNumber = 0.2
    """PPO's clip range of the probability ratio."""

    use_kl_loss: Switch = False
    """Add RLlib's adaptive KL penalty to the clipped objective."""

    kl_coeff: NonNegativeNumber = 0.2
    """The penalty's first coefficient; counts only with `use_kl_loss`."""

    kl_target: PositiveNumber = 0.01
    """The KL divergence that the penalty aims at; counts only with `use_kl_loss`."""

    use_critic: Switch = True
    """Use the value network as baseline."""

    use_gae: Switch = True
    """Use generalised advantage estimation."""

    vf_loss_coeff: NonNegativeNumber = 0.5
    """Weight of the value loss."""

    vf_clip_param: PositiveNumber = 10_000.0
    """The squared value error is clipped at this. Out of the way: where `scale_rewards` is off,
    RLlib's 10 stops the value network from learning wherever returns are large."""

    entropy_coeff: Schedule = 0.0
    """Weight of the entropy bonus, or a schedule."""

    grad_clip: PositiveNumber | None = 0.5
    """Gradients are clipped at this norm; null leaves them as they are."""

    grad_clip_by: Literal["value", "norm", "global_norm"] = "norm"
    """What `grad_clip` bounds: each value, the norm of each parameter tensor, or the norm of all.
    Not of all by default: where returns are large, the value loss would shrink the policy's
    gradients with its own."""

    @model_validator(mode="after")
    def _minibatch_fits(self) -> AlgorithmSettings:
        if self.minibatch_size > self.train_batch_size_per_learner:
            raise ValueError(
                f"minibatch_size ({self.minibatch_size}) is larger than "
                f"train_batch_size_per_learner ({self.train_batch_size_per_learner})"
            )
        return self


class StopConfig(_Section):
    """When training ends; whichever comes first."""

    episode_return: Number | None = Field(default=None, alias="return")
    """Mean return of the last `window_episodes` training episodes, sampled actions, that ends the
    run as reached. Spelt `return`."""

    timesteps: PositiveCount | None = None
    """Environment steps over all environments, counted from the run's first start. Where neither
    this nor `time_s` is given it is 150,000."""

    time_s: PositiveNumber | None = None
    """Seconds of training, without Ray's start; a resumed run goes on counting."""

    window_episodes: PositiveCount = 20
    """Episodes that the mean return is taken over; before so many have ended there is none to stop
    on. More is steadier and later."""


class CheckpointConfig(_Section):
    """When checkpoints are written. The best and the last are always kept."""

    every: PositiveCount = 10
    """Iterations between checkpoints; one more is written at the end."""

    keep: PositiveCount = 3
    """How many of the newest checkpoints stay, besides the best."""

    best_window_episodes: PositiveCount = 100
    """Training episodes that a checkpoint is judged by. The best is the latest whose mean return
    lies at most one standard error below the highest: of equals the later one has learned longer,
    and the highest of many noisy means is mostly a lucky one."""


class TrainingConfig(_Section):
    """A training run, whole. Order: default, then YAML, then flags, then `--set`."""

    env: Annotated[str, Field(min_length=1)]
    """A registered Gymnasium environment id, or `module:EnvId`, which imports the module first."""

    env_config: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the environment, as `gymnasium.make` takes them."""

    algo: str = "PPO"
    """The algorithm. PPO is the only one so far."""

    seed: Annotated[Count, Field(ge=0, lt=2**31)] | None = None
    """Makes a run reproducible with `num_env_runners: 0`. Where it is null one is drawn and
    written into the run's config."""

    num_env_runners: Annotated[Count, Field(ge=0)] = 0
    """Extra processes that step environments. 0 steps them in the training process, which is
    fastest for environments that cost little."""

    num_envs_per_env_runner: PositiveCount = 8
    """Environments stepped together as one vector in each process."""

    rollout_fragment_length: Literal["auto"] | PositiveCount = "auto"
    """Steps that each environment is stepped at a time. "auto" shares out
    `train_batch_size_per_learner`; a number has to fill a batch to within 10 %."""

    num_gpus: Annotated[Count, Field(ge=0, le=1)] = 0
    """1 trains the networks on a CUDA GPU."""

    scale_rewards: Switch = True
    """Learn from rewards divided by the running deviation of the discounted return, so that the
    same settings fit environments of any reward scale. Reported returns and the policy's inputs
    and outputs are not touched."""

    normalize_actions: Switch = True
    """Box actions with both bounds: the policy acts in [-1, 1], and RLlib scales its actions to the
    environment's bounds."""

    clip_actions: Switch = False
    """Without `normalize_actions`: Box actions are cut at the environment's bounds."""

    observation_filter: Literal["none", "mean_std"] = "none"
    """mean_std: observations are shifted and scaled by their running mean and deviation, each
    component by its own, and cut at 10 deviations. The statistics are part of the policy."""

    prev_actions: Annotated[Count, Field(ge=0)] = 0
    """Discrete actions: the policy also sees so many of its last actions, one-hot."""

    prev_rewards: Annotated[Count, Field(ge=0)] = 0
    """Discrete actions: the policy also sees so many of its last rewards."""

    frame_stack: PositiveCount = 1
    """Images with one channel: the policy sees so many of the last ones as channels."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """The networks."""

    algo_config: AlgorithmSettings = Field(default_factory=AlgorithmSettings)
    """The algorithm's settings. `--set lr=1e-3` is short for `--set algo_config.lr=1e-3`."""

    stop: StopConfig = Field(default_factory=StopConfig)
    """When training ends."""

    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """When checkpoints are written."""

    @model_validator(mode="after")
    def _fragments_fill_a_batch(self) -> TrainingConfig:
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
    def _sequences_fit(self) -> TrainingConfig:
        # RLlib shares minibatches out in whole sequences, and with none in one it never ends.
        length, size = self.model.max_seq_len, self.algo_config.minibatch_size
        if self.model.use_lstm and length > size:
            raise ValueError(
                f"model.max_seq_len ({length}) is larger than minibatch_size ({size}), which has "
                "to hold a sequence"
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
