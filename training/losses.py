"""What each learner reports: progress.csv's columns to RLlib's learner metrics. No Ray."""

from __future__ import annotations

from collections.abc import Mapping

_GRADIENT_AND_LR = {
    "gradient_norm": "gradients_default_optimizer_global_norm",
    "lr": "default_optimizer_learning_rate",
}
_POLICY_GRADIENT = {"policy_loss": "policy_loss", "vf_loss": "vf_loss", "entropy": "entropy"}
_TARGETS = {"qf_loss": "qf_loss", "qf_mean": "qf_mean", "td_error_mean": "td_error_mean"}

LOSSES: Mapping[str, Mapping[str, str]] = {
    "PPO": {**_POLICY_GRADIENT, "vf_explained_var": "vf_explained_var", **_GRADIENT_AND_LR},
    "DQN": {**_TARGETS, **_GRADIENT_AND_LR},
    "SAC": {
        "policy_loss": "policy_loss",
        **_TARGETS,
        "alpha": "alpha_value",
        "alpha_loss": "alpha_loss",
    },
    "IMPALA": {
        **_POLICY_GRADIENT,
        "policy_loss": "mean_pi_loss",
        "vf_loss": "mean_vf_loss",
        **_GRADIENT_AND_LR,
    },
    "APPO": {**_POLICY_GRADIENT, "importance_weight_mean": "mean_IS", **_GRADIENT_AND_LR},
}
