"""A gradient step of RLlib's learners with little around it.

The forward passes, the losses, their gradients and the clipping are the module's and the learner's
own functions. What goes is what RLlib 2.60 does between them: it logs two dozen metrics for each
step, of which the last one's are reported, checks each gradient three times, and copies whole state
dicts for the target networks. A test compares the weights after some steps with RLlib's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from ray.rllib.core import ALL_MODULES, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import LR_KEY
from ray.rllib.utils.metrics import (
    LAST_TARGET_UPDATE_TS,
    MODULE_TRAIN_BATCH_SIZE_MEAN,
    NUM_ENV_STEPS_TRAINED,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
    NUM_MODULE_STEPS_TRAINED,
    NUM_MODULE_STEPS_TRAINED_LIFETIME,
    NUM_TARGET_UPDATES,
    TD_ERROR_KEY,
    WEIGHTS_SEQ_NO,
)

from training.fast_replay.transition_buffer import Array, Drawn, TransitionBuffer

Batch = dict[str, torch.Tensor]


class ReplayUpdater:
    """Updates a local learner of DQN or SAC from a transition buffer.

    Args:
        learner: RLlib's `DQNTorchLearner` or `SACTorchLearner` with one default module, which goes
            on holding all state: weights, optimizers, targets, counters.
        buffer: What to learn from.
    """

    def __init__(self, learner: Any, buffer: TransitionBuffer) -> None:
        self._learner: Any = learner
        self._buffer = buffer
        self._config = learner.config.get_config_for_module(DEFAULT_MODULE_ID)
        self._n_trained = self._n_target_updates = 0
        self._optimizers = dict(learner.get_optimizers_for_module(DEFAULT_MODULE_ID))
        self._module = learner.module[DEFAULT_MODULE_ID].unwrapped()
        # Restoring a checkpoint writes into these tensors.
        self._targets = _target_tensors(self._module)
        self._acting: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
        if learner._device.type == "cpu":
            for optimizer in self._optimizers.values():
                _fuse(optimizer)

    def update(self, *, env_steps: int, is_reported: bool = False) -> None:
        """Take one gradient step on a new batch, and move the targets if it is time.

        Args:
            env_steps: Of the run so far: schedules and target updates go by them.
            is_reported: Log the metrics that RLlib logs.
        """
        config, learner = self._config, self._learner
        drawn = self._buffer.sample(
            config.train_batch_size_per_learner,
            n_step=config.n_step,
            gamma=config.gamma,
            beta=config.replay_buffer_config.get("beta") or 0.0,
        )
        metrics = learner.metrics
        learner.metrics = _LossLogger(metrics if is_reported else None)
        try:
            loss = self._step(to_batch(drawn, learner._device))
            errors = learner.metrics.errors
        finally:
            learner.metrics = metrics
        self._after_step(env_steps)
        self._buffer.update_priorities(drawn.rows, errors)
        self._n_trained += len(drawn.rows)
        if is_reported:
            self._log(loss, len(drawn.rows))

    def copy_weights(self, runner: Any) -> None:
        """Give the training process's own runner the newest weights."""
        if self._acting is None:
            learned = self._module.state_dict()
            acting = runner.module.state_dict()
            self._acting = list(acting.values()), [learned[name] for name in acting]
        with torch.no_grad():
            torch._foreach_copy_(*self._acting)
        runner._weights_seq_no = self._learner._weights_seq_no

    def _step(self, batch: Batch) -> torch.Tensor:
        learner = self._learner
        learner._weights_seq_no += 1
        loss: torch.Tensor = learner.compute_loss_for_module(
            module_id=DEFAULT_MODULE_ID,
            config=self._config,
            batch=batch,
            fwd_out=self._module._forward_train(batch),
        )
        learner.compute_gradients({DEFAULT_MODULE_ID: loss})
        are_finite = [
            self._clip(name, [tensor.grad for tensor in optimizer.param_groups[0]["params"]])
            for name, optimizer in self._optimizers.items()
        ]
        if all(are_finite):
            for optimizer in self._optimizers.values():
                optimizer.step()
        else:  # RLlib's own way of saying so and going on
            gradients = {ref: tensor.grad for ref, tensor in learner._params.items()}
            learner.apply_gradients(learner.postprocess_gradients(gradients))
        return loss

    def _clip(self, name: str, gradients: list[torch.Tensor]) -> bool:
        # One optimizer's gradients; whether they are all finite.
        limit, limit_by = self._config.grad_clip, self._config.grad_clip_by
        norm = clip_gradients(gradients, limit=limit, limit_by=limit_by)
        is_global = limit_by == "global_norm"
        if self._config.log_gradients or (limit and is_global):
            # RLlib reports the norm before it is clipped where it is what is clipped.
            reported = norm if is_global or not limit else global_norm(gradients)
            key = (DEFAULT_MODULE_ID, f"gradients_{name}_global_norm")
            self._learner.metrics.log_value(key, reported, window=1)
        return math.isfinite(norm)

    def _after_step(self, env_steps: int) -> None:
        learner, config = self._learner, self._config
        for optimizer, schedule in learner._optimizer_lr_schedules.items():
            if schedule.use_schedule:
                learner._set_optimizer_lr(optimizer, lr=schedule.update(timestep=env_steps))
        since = env_steps - learner.last_update_ts_by_mid[DEFAULT_MODULE_ID]
        if since < config.target_network_update_freq:
            return
        move_towards(*self._targets, tau=config.tau)
        learner.last_update_ts_by_mid[DEFAULT_MODULE_ID] = env_steps
        self._n_target_updates += 1

    def _log(self, loss: torch.Tensor, n_items: int) -> None:
        # What RLlib logs beside the loss's own metrics, with the counts of the quiet updates.
        learner, module = self._learner, DEFAULT_MODULE_ID
        metrics, n_trained = learner.metrics, self._n_trained
        metrics.log_value((module, learner.TOTAL_LOSS_KEY), loss.detach(), window=1)
        metrics.log_value((module, WEIGHTS_SEQ_NO), learner._weights_seq_no, window=1)
        metrics.log_value((module, MODULE_TRAIN_BATCH_SIZE_MEAN), n_items, reduce="mean")
        for name, optimizer in self._optimizers.items():
            rate = learner._get_optimizer_lr(optimizer)
            metrics.log_value((module, f"{name}_{LR_KEY}"), rate, reduce="mean")
        metrics.log_value((module, NUM_MODULE_STEPS_TRAINED), n_trained, reduce="sum")
        counted = {
            (module, NUM_MODULE_STEPS_TRAINED_LIFETIME): n_trained,
            (ALL_MODULES, NUM_MODULE_STEPS_TRAINED_LIFETIME): n_trained,
            (ALL_MODULES, NUM_ENV_STEPS_TRAINED_LIFETIME): n_trained,
        }
        for key, count in counted.items():
            metrics.log_value(key, count, reduce="lifetime_sum", with_throughput=True)
        for name in (NUM_MODULE_STEPS_TRAINED, NUM_ENV_STEPS_TRAINED):
            metrics.log_value((ALL_MODULES, name), n_trained, reduce="sum", with_throughput=True)
        if self._n_target_updates:
            last = learner.last_update_ts_by_mid[module]
            metrics.log_value((module, LAST_TARGET_UPDATE_TS), last, reduce="max")
            key = (module, NUM_TARGET_UPDATES)
            metrics.log_value(key, self._n_target_updates, reduce="lifetime_sum")
        self._n_trained = self._n_target_updates = 0


def to_batch(drawn: Drawn, device: Any) -> Batch:
    """The columns that RLlib's learner connectors make, as tensors on a device.

    B transitions: obs and new_obs (B, *observation_shape), actions (B, *action_shape), rewards
    (B,) float32, terminateds (B,) bool, n_step (B,) int64, weights (B,) float32.
    """
    steps = drawn.transitions
    columns: dict[str, Array] = {
        Columns.OBS: steps.observations,
        Columns.NEXT_OBS: steps.next_observations,
        Columns.ACTIONS: steps.actions,
        Columns.REWARDS: steps.rewards,
        Columns.TERMINATEDS: steps.terminateds,
        "n_step": drawn.n_steps,
        "weights": drawn.weights,
    }
    return {name: torch.from_numpy(column).to(device) for name, column in columns.items()}


@torch.no_grad()
def move_towards(targets: list[torch.Tensor], learned: list[torch.Tensor], *, tau: float) -> None:
    """Move tensors by a share of the way to others, in place.

    target = tau * learned + (1 - tau) * target: RLlib's `update_target_network`.
    """
    if tau == 1.0:
        torch._foreach_copy_(targets, learned)
        return
    torch._foreach_mul_(targets, 1.0 - tau)
    torch._foreach_add_(targets, learned, alpha=tau)


def clip_gradients(gradients: list[torch.Tensor], *, limit: float | None, limit_by: str) -> float:
    """Clip gradients in place, as RLlib's `clip_gradients` does.

    Args:
        gradients: Of one optimizer's parameters.
        limit: Nothing is clipped without.
        limit_by: "value" bounds each number, "norm" each tensor's norm, "global_norm" that of all.

    Returns:
        The norm of all before; not finite where a gradient is not.
    """
    norms = torch._foreach_norm(gradients)
    total: float = torch.linalg.vector_norm(torch.stack(norms)).item()
    if limit is None or not math.isfinite(total):
        return total
    if limit_by == "value":
        torch._foreach_clamp_max_(gradients, limit)
        torch._foreach_clamp_min_(gradients, -limit)
    elif limit_by == "norm":
        torch._foreach_mul_(gradients, [limit / max(norm.item(), limit) for norm in norms])
    elif total > limit:
        torch._foreach_mul_(gradients, limit / (total + 1e-6))
    return total


def global_norm(tensors: list[torch.Tensor]) -> float:
    """The Euclidean norm of all numbers in some tensors."""
    norm: float = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).item()
    return norm


def _target_tensors(module: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    targets: list[torch.Tensor] = []
    learned: list[torch.Tensor] = []
    for main, target in module.get_target_network_pairs():
        news, olds = main.state_dict(), target.state_dict()
        targets += olds.values()
        learned += [news[name] for name in olds]
    return targets, learned


class _LossLogger:
    # In place of a learner's logger during a step: keeps the loss's errors, and passes the rest on
    # to the learner's where it is to be reported.

    def __init__(self, metrics: Any) -> None:
        self._metrics = metrics
        self._errors: torch.Tensor | None = None

    @property
    def errors(self) -> Array:
        assert self._errors is not None  # both algorithms' losses log them
        errors: Array = self._errors.detach().cpu().numpy()
        return errors

    def log_value(self, key: Any, value: Any, **kwargs: Any) -> None:
        if key[-1] == TD_ERROR_KEY:
            self._errors = value
        elif self._metrics is not None:
            self._metrics.log_value(key, value, **kwargs)

    def log_dict(self, value: Any, **kwargs: Any) -> None:
        if self._metrics is not None:
            self._metrics.log_dict(value, **kwargs)


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    # One call for all of Adam's tensors instead of a dozen for each.
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, None
