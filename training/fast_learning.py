"""RLlib's PPO learner with less around each gradient step.

RLlib 2.60 builds the train batch item by item, logs a dozen metrics for each minibatch, of which
the last one's are reported, and clips and updates tensor by tensor. `FastPPOLearner` makes the same
gradient steps on the same minibatches in the same order, bit by bit, with whole columns and a flat
Adam; each update's last minibatch goes RLlib's own way, so that all it reports is RLlib's own. A
test compares the two. What it does not know it leaves to RLlib.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core import ALL_MODULES, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import (
    NUM_ENV_STEPS_TRAINED,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
    NUM_MODULE_STEPS_TRAINED,
    NUM_MODULE_STEPS_TRAINED_LIFETIME,
)

from training.fast_batches import (
    ADVANTAGES,
    VALUE_TARGETS,
    Batch,
    Minibatch,
    TrainRows,
    advantages_and_targets,
    minibatches,
    rows_of,
    to_tensors,
)
from training.flat_adam import FlatAdam

logger = logging.getLogger("policyserve.training")

_PIPELINE = [
    "AddOneTsToEpisodesAndTruncate",
    "AddObservationsFromEpisodesToBatch",
    "AddColumnsFromEpisodesToTrainBatch",
    "AddTimeDimToBatchAndZeroPad",
    "AddStatesFromEpisodesToBatch",
    "BatchIndividualItems",
    "NumpyToTensor",
    "GeneralAdvantageEstimation",
]


class FastPPOLearner(PPOTorchLearner):
    """RLlib's PPO learner, with the lean update where it is known to fit.

    Attributes:
        why_not_lean: What the lean update does not know; None where it is used.
    """

    # RLlib types these as optional, or as what all its algorithms have in common.
    config: Any
    module: Any
    _module: Any
    _learner_connector: Any

    why_not_lean: str | None = None

    def build(self) -> None:
        """Build RLlib's learner, and look whether the lean update fits it."""
        super().build()
        self.complete_pipeline()
        self.why_not_lean = self._find_reason()
        if self.why_not_lean:
            logger.info("gradient steps are taken RLlib's own way: %s", self.why_not_lean)

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """RLlib's Adam, flat."""
        if self.config.num_learners > 1:  # the parameters are torch's to share out
            super().configure_optimizers_for_module(module_id, config)
            return
        params = self.get_parameters(self._module[module_id])
        self.register_optimizer(
            module_id=module_id,
            optimizer=FlatAdam(params),
            params=params,
            lr_or_lr_schedule=config.lr,
        )

    def update(  # type: ignore[override]  # RLlib calls it with keywords alone
        self,
        *,
        training_data: TrainingData | None = None,
        timesteps: dict[str, Any] | None = None,
        num_epochs: int = 1,
        minibatch_size: int | None = None,
        shuffle_batch_per_epoch: bool = False,
        **kwargs: Any,
    ) -> Any:
        """RLlib's update; see `Learner.update`."""
        rows = None
        if training_data and minibatch_size and not (self.why_not_lean or any(kwargs.values())):
            rows = rows_of(training_data.episodes or [])
        if rows is None or minibatch_size is None:
            return super().update(
                training_data=training_data,
                timesteps=timesteps,
                num_epochs=num_epochs,
                minibatch_size=minibatch_size,
                shuffle_batch_per_epoch=shuffle_batch_per_epoch,
                **kwargs,
            )
        self.before_gradient_based_update(timesteps=timesteps or {})
        self._weights_seq_no += 1
        batch = self._lean_batch(rows)
        walk = minibatches(
            batch,
            rows.is_step,
            size=minibatch_size,
            n_epochs=num_epochs,
            # The generator that RLlib's minibatches are drawn from.
            shuffle=np.random.permutation if shuffle_batch_per_epoch and num_epochs > 1 else None,
        )
        self._take_steps(walk, n_rows=len(rows.is_step))
        self.after_gradient_based_update(timesteps=timesteps or {})
        return self.metrics.reduce()

    def complete_pipeline(self) -> None:
        """What a subclass adds to RLlib's learner connectors; here nothing."""

    def scale_rewards(self, rewards: torch.Tensor, episodes: list[Any]) -> torch.Tensor:
        """What a subclass does to rewards (R,), given each episode's own; here nothing."""
        del episodes
        return rewards

    def _find_reason(self) -> str | None:
        config = self.config
        module = self.module.get(DEFAULT_MODULE_ID) if len(self.module) == 1 else None
        pipeline = self._learner_connector
        pieces = [type(piece).__name__ for piece in pipeline.connectors] if pipeline else []
        own_loss = type(self).compute_loss_for_module is not PPOTorchLearner.compute_loss_for_module
        reasons = {
            "several learners": config.num_learners > 1,
            "several policies": module is None,
            "a policy with memory": module is not None and module.is_stateful(),
            "connectors before the learner": pieces != self.lean_pipeline(),
            "a loss of one's own": own_loss,
            "a penalty on the KL divergence": config.use_kl_loss,
            "no value network": not config.use_critic,
            "scaled gradients": self._grad_scalers is not None,
            "torch's learning rate schedules": self._lr_scheduler_classes is not None,
            "torch.compile": config.torch_compile_learner,
            "gradients that are not checked": config.torch_skip_nan_gradients,
            "policies that are not trained": config.policies_to_train is not None,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def lean_pipeline(self) -> list[str]:
        """The class names of the learner connectors that the lean update stands for."""
        return _PIPELINE

    def _lean_batch(self, rows: TrainRows) -> Batch:
        batch = to_tensors(rows.columns, self._device)
        rewards = self.scale_rewards(batch[Columns.REWARDS], rows.rewards)
        with torch.no_grad():
            values = self.module[DEFAULT_MODULE_ID].unwrapped().compute_values(batch)
        advantages, targets = advantages_and_targets(
            values.cpu().numpy(),
            rewards.cpu().numpy(),
            rows,
            gamma=self.config.gamma,
            lambda_=self.config.lambda_,
        )
        found = {
            ADVANTAGES: advantages,
            VALUE_TARGETS: targets,
            Columns.LOSS_MASK: rows.is_step,
        }
        return {**batch, **to_tensors(found, self._device)}

    def _take_steps(self, walk: Iterator[Minibatch], *, n_rows: int) -> None:
        module = self.module[DEFAULT_MODULE_ID].unwrapped()
        optimizer = self.get_optimizer(DEFAULT_MODULE_ID)
        module.train()
        n_trained = n_minibatches = 0
        pending = next(walk)
        for following in walk:
            self._take_step(module, optimizer, pending)
            n_trained += len(pending.batch[Columns.OBS])
            n_minibatches += 1
            pending = following
        self._log_steps(n_trained, n_minibatches * n_rows)
        last = MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(pending.batch)}, env_steps=n_rows)
        _, losses, _ = self._update(last.policy_batches)
        self._log_metrics(batch=last)
        self._log_steps_trained_metrics(last)
        key = (DEFAULT_MODULE_ID, self.TOTAL_LOSS_KEY)
        self.metrics.log_value(key=key, value=losses[DEFAULT_MODULE_ID], window=1)

    def _take_step(self, module: Any, optimizer: torch.optim.Optimizer, taken: Minibatch) -> None:
        optimizer.zero_grad(set_to_none=True)
        self._lean_loss(module, taken).backward()
        gradients = {ref: param.grad for ref, param in self._params.items()}
        if self._clip(gradients):
            optimizer.step()
        else:
            self.apply_gradients(gradients)

    def _clip(self, gradients: dict[Any, Any]) -> bool:
        # Clip in place as RLlib does, and say whether all the gradients are finite.
        limit = self.config.grad_clip
        tensors = list(gradients.values())
        norms = torch.stack(torch._foreach_norm(tensors))
        if limit and self.config.grad_clip_by == "norm":
            for i, is_over in enumerate((norms > limit).tolist()):
                if is_over:
                    tensors[i].mul_(limit / norms[i].nan_to_num(neginf=-10e8, posinf=10e8))
        elif limit:
            self._get_clip_function()(
                gradients, grad_clip=limit, grad_clip_by=self.config.grad_clip_by
            )
            for ref, gradient in gradients.items():
                self._params[ref].grad = gradient
        return math.isfinite(norms.sum().item())

    def _lean_loss(self, module: Any, taken: Minibatch) -> torch.Tensor:
        # RLlib's `compute_loss_for_module`, without what is only reported.
        config, batch = self.config, taken.batch
        found = module._forward_train(batch)
        logits = found[Columns.ACTION_DIST_INPUTS]
        entropy_coeff = self.entropy_coeff_schedulers_per_module[
            DEFAULT_MODULE_ID
        ].get_current_value()
        kind = module.get_train_action_dist_cls()
        distribution = None
        if kind is TorchCategorical and not entropy_coeff:
            logp = _categorical_logp(logits, batch[Columns.ACTIONS])
        else:
            distribution = kind.from_logits(logits)
            logp = distribution.logp(batch[Columns.ACTIONS])
        ratio = torch.exp(logp - batch[Columns.ACTION_LOGP])
        clipped_ratio = torch.clamp(ratio, 1 - config.clip_param, 1 + config.clip_param)
        advantages = batch[ADVANTAGES]
        surrogate = torch.min(advantages * ratio, advantages * clipped_ratio)
        values = module.compute_values(batch, embeddings=found.get(Columns.EMBEDDINGS))
        value_loss = torch.pow(values - batch[VALUE_TARGETS], 2.0)
        value_loss = torch.clamp(value_loss, 0, config.vf_clip_param)
        loss = -surrogate + config.vf_loss_coeff * value_loss
        if entropy_coeff and distribution is not None:
            loss = loss - entropy_coeff * distribution.entropy()
        total: torch.Tensor = loss.index_select(0, taken.steps).sum() / len(taken.steps)
        return total

    def _log_steps(self, n_module_steps: int, n_env_steps: int) -> None:
        # What RLlib counts minibatch by minibatch, at once.
        for name, steps in (
            (NUM_MODULE_STEPS_TRAINED, n_module_steps),
            (NUM_ENV_STEPS_TRAINED, n_env_steps),
        ):
            key = (ALL_MODULES, name)
            self.metrics.log_value(key, steps, reduce="sum", with_throughput=True)
        for name, steps in (
            (NUM_MODULE_STEPS_TRAINED_LIFETIME, n_module_steps),
            (NUM_ENV_STEPS_TRAINED_LIFETIME, n_env_steps),
        ):
            key = (ALL_MODULES, name)
            self.metrics.log_value(key, steps, reduce="lifetime_sum", with_throughput=True)
        key = (DEFAULT_MODULE_ID, NUM_MODULE_STEPS_TRAINED)
        self.metrics.log_value(key, n_module_steps, reduce="sum")
        key = (DEFAULT_MODULE_ID, NUM_MODULE_STEPS_TRAINED_LIFETIME)
        self.metrics.log_value(key, n_module_steps, reduce="lifetime_sum", with_throughput=True)


def _categorical_logp(logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    # torch.distributions.Categorical's log_prob, operation by operation, without building one.
    normalized = logits - logits.logsumexp(dim=-1, keepdim=True)
    return normalized.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
