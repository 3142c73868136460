"""The algorithms' settings: RLlib's `training()` arguments, by their RLlib names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from training.settings import (
    Fraction,
    NonNegativeCount,
    NonNegativeNumber,
    Number,
    PositiveCount,
    PositiveNumber,
    Schedule,
    Section,
    Switch,
)


class AlgorithmSettings(Section):
    """What every algorithm has."""

    gamma: Fraction = 0.99
    """Discount of future rewards per step."""

    train_batch_size_per_learner: PositiveCount = 1024
    """Environment steps per update."""


class PPOSettings(AlgorithmSettings):
    """RLlib's PPO `training()` settings, by their RLlib names; the defaults are this project's.

    docs/training.md says where the defaults come from and what was measured.
    """

    lr: Schedule | None = None
    """Adam's learning rate, or a schedule [[timestep, rate], ...] interpolated linearly; null
    falls linearly from 1e-3 to 0 over the budget `stop.timesteps` (constant 3e-4 where the
    budget is a time alone)."""

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
    def _minibatch_fits(self) -> PPOSettings:
        if self.minibatch_size > self.train_batch_size_per_learner:
            raise ValueError(
                f"minibatch_size ({self.minibatch_size}) is larger than "
                f"train_batch_size_per_learner ({self.train_batch_size_per_learner})"
            )
        return self


class ReplayBufferSettings(Section):
    """RLlib's episode replay buffers."""

    type: Literal["EpisodeReplayBuffer", "PrioritizedEpisodeReplayBuffer"] = "EpisodeReplayBuffer"
    """Uniform, or by the last error of each step (Schaul et al., 2016)."""

    capacity: PositiveCount = 100_000
    """Environment steps that the buffer holds; the oldest episodes go first."""

    alpha: NonNegativeNumber = 0.6
    """Prioritized: how much the priorities count; 0 is uniform."""

    beta: NonNegativeNumber = 0.4
    """Prioritized: how far the importance weights correct it."""


class ReplaySettings(AlgorithmSettings):
    """What DQN and SAC share: they learn from a buffer of steps."""

    replay_buffer_config: ReplayBufferSettings = Field(default_factory=ReplayBufferSettings)
    """The buffer that updates are drawn from."""

    num_steps_sampled_before_learning_starts: NonNegativeCount = 1000
    """Environment steps before the first update."""

    training_intensity: PositiveNumber | None = None
    """Steps learned from per step gathered; null makes one update for each time that the
    environments are stepped (`rollout_fragment_length` steps of each)."""

    n_step: PositiveCount | tuple[PositiveCount, PositiveCount] = 1
    """Rewards that a target sums before it bootstraps; [low, high] draws it for each step."""

    store_buffer_in_checkpoints: Switch = True
    """Keep the buffer beside the newest checkpoint, so that a resumed run goes on with it."""

    min_sample_timesteps_per_iteration: PositiveCount = 1000
    """Environment steps between two rows of progress.csv."""


class DQNSettings(ReplaySettings):
    """RLlib's DQN `training()` settings; dueling and double as in Rainbow."""

    lr: Schedule = 5e-4
    """Adam's learning rate, or a schedule [[timestep, rate], ...] interpolated linearly."""

    train_batch_size_per_learner: PositiveCount = 64
    """Steps per gradient step."""

    epsilon: Schedule = ((0, 1.0), (10_000, 0.05))
    """Share of random actions, or a schedule [[timestep, share], ...] interpolated linearly."""

    target_network_update_freq: PositiveCount = 500
    """Environment steps between updates of the target network."""

    tau: Fraction = 1.0
    """Share of the online network that each update moves the target network by."""

    double_q: Switch = True
    """The online network chooses the target's action (van Hasselt et al., 2016)."""

    dueling: Switch = True
    """Separate heads for the state's value and the actions' advantages (Wang et al., 2016)."""

    num_atoms: PositiveCount = 1
    """More than 1 learns the return's distribution over so many values (Bellemare et al., 2017)."""

    v_min: Number = -10.0
    """Lowest return of the distribution."""

    v_max: Number = 10.0
    """Highest return of the distribution."""

    td_error_loss_fn: Literal["huber", "mse"] = "huber"
    """Loss of the difference from the target."""

    burn_in_len: NonNegativeCount = 0
    """With an LSTM: steps of each sequence that only warm its state up."""

    grad_clip: PositiveNumber | None = 40.0
    """Gradients are clipped at this norm; null leaves them as they are."""

    grad_clip_by: Literal["value", "norm", "global_norm"] = "global_norm"
    """What `grad_clip` bounds: each value, the norm of each parameter tensor, or of all."""

    @model_validator(mode="after")
    def _values_rise(self) -> DQNSettings:
        if self.num_atoms > 1 and self.v_min >= self.v_max:
            raise ValueError(f"v_min ({self.v_min:g}) is not below v_max ({self.v_max:g})")
        return self


class SACSettings(ReplaySettings):
    """RLlib's SAC `training()` settings."""

    actor_lr: Schedule = 3e-4
    """Adam's learning rate of the policy, or a schedule [[timestep, rate], ...]."""

    critic_lr: Schedule = 3e-4
    """Adam's learning rate of the Q-networks, or a schedule."""

    alpha_lr: Schedule = 3e-4
    """Adam's learning rate of the entropy coefficient, or a schedule."""

    train_batch_size_per_learner: PositiveCount = 256
    """Steps per gradient step."""

    twin_q: Switch = True
    """Two Q-networks, of whose values the lower counts."""

    tau: Fraction = 5e-3
    """Share of the Q-networks that each update moves their targets by."""

    target_network_update_freq: NonNegativeCount = 0
    """Environment steps between updates of the targets; 0 is after each gradient step."""

    initial_alpha: PositiveNumber = 1.0
    """First weight of the entropy."""

    target_entropy: Literal["auto"] | Number = "auto"
    """Entropy that alpha is learned for; auto is minus the number of action components."""

    grad_clip: PositiveNumber | None = None
    """Gradients are clipped at this norm; null leaves them as they are."""

    grad_clip_by: Literal["value", "norm", "global_norm"] = "global_norm"
    """What `grad_clip` bounds: each value, the norm of each parameter tensor, or of all."""


class IMPALASettings(AlgorithmSettings):
    """RLlib's IMPALA `training()` settings; the environments never wait for the learner."""

    lr: Schedule = 5e-4
    """Adam's learning rate, or a schedule [[timestep, rate], ...] interpolated linearly."""

    train_batch_size_per_learner: PositiveCount = 500
    """Environment steps per update."""

    vtrace_clip_rho_threshold: PositiveNumber = 1.0
    """V-trace's clip of the importance weights in the value targets (Espeholt et al., 2018)."""

    vtrace_clip_pg_rho_threshold: PositiveNumber = 1.0
    """V-trace's clip of the importance weights in the policy gradient."""

    vf_loss_coeff: NonNegativeNumber = 0.5
    """Weight of the value loss."""

    entropy_coeff: Schedule = 0.01
    """Weight of the entropy bonus, or a schedule."""

    grad_clip: PositiveNumber | None = 40.0
    """Gradients are clipped at this norm; null leaves them as they are."""

    grad_clip_by: Literal["value", "norm", "global_norm"] = "global_norm"
    """What `grad_clip` bounds: each value, the norm of each parameter tensor, or of all."""

    broadcast_interval: PositiveCount = 1
    """Updates between two broadcasts of the weights to the environments' processes."""

    min_sample_timesteps_per_iteration: PositiveCount = 2000
    """Environment steps between two rows of progress.csv."""


class APPOSettings(IMPALASettings):
    """RLlib's APPO `training()` settings: IMPALA with PPO's clipped objective."""

    lambda_: Fraction = 1.0
    """Decay of V-trace's products of importance weights."""

    clip_param: PositiveNumber = 0.4
    """PPO's clip range of the probability ratio."""

    use_kl_loss: Switch = False
    """Add RLlib's adaptive KL penalty to the clipped objective."""

    kl_coeff: NonNegativeNumber = 1.0
    """The penalty's first coefficient; counts only with `use_kl_loss`."""

    kl_target: PositiveNumber = 0.01
    """The KL divergence that the penalty aims at; counts only with `use_kl_loss`."""

    use_circular_buffer: Switch = True
    """Learn from recent batches more than once."""

    circular_buffer_num_batches: PositiveCount = 8
    """Batches that the circular buffer holds."""

    circular_buffer_iterations_per_batch: PositiveCount = 2
    """How often each batch is learned from."""

    target_network_update_freq: PositiveCount = 2
    """Updates between two updates of the target network."""

    tau: Fraction = 1.0
    """Share of the online network that each update moves the target network by."""
