"""Whether a policy of the user's own module can be exported, asked before it is trained.

RLlib's own modules with the connectors that a config can name are all exported (docs/export.md).
What may fail is an RLModule of the user's own: Python that depends on its data or on the batch
size, or an action distribution that nobody else knows.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from torch import nn
from torch.utils._pytree import tree_map

_EXAMPLE_ROWS = 2


def why_not_exportable(algorithm: Algorithm) -> str | None:
    """Say why `policyserve export` would refuse an algorithm's module, None if it would not.

    Args:
        algorithm: Built, not necessarily trained; its module has tensors of a fixed shape for
            observations and states.
    """
    module = algorithm.get_module(DEFAULT_MODULE_ID)
    if module is None or type(module).__module__.startswith("ray.rllib."):
        return None
    name = type(module).__name__
    try:
        answer = _trace(module)
    except Exception as exc:  # torch.export and a user's module can raise anything
        reason = str(exc).strip().splitlines()
        return f"torch.export refuses {name}: {reason[0] if reason else type(exc).__name__}"
    if Columns.ACTIONS in answer:
        return None
    if Columns.ACTION_DIST_INPUTS not in answer:
        return (
            f"{name}'s _forward_inference answers {', '.join(answer) or 'nothing'}, expected "
            "`action_dist_inputs` or `actions`"
        )
    distribution = module.get_inference_action_dist_cls()
    if not getattr(distribution, "__module__", "").startswith("ray.rllib."):
        found = getattr(distribution, "__name__", distribution)
        return f"{name} has an action distribution of its own, {found}"
    return None


class _Inference(nn.Module):
    def __init__(self, rl_module: Any) -> None:
        super().__init__()
        self.rl_module = rl_module

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        answer = self.rl_module._forward_inference(tree_map(lambda rows: rows, batch))
        wanted = (Columns.ACTIONS, Columns.ACTION_DIST_INPUTS, Columns.STATE_OUT)
        return {key: answer[key] for key in wanted if key in answer}


def _trace(module: Any) -> dict[str, Any]:
    # One batch size in, any batch size out: what depends on the size fails here as in `export`.
    batch = _example(module)
    # Modules may take what they need out of the batch's own dicts.
    answer: dict[str, Any] = module._forward_inference(tree_map(lambda rows: rows, batch))
    n_rows = torch.export.Dim("n_rows", min=1)
    shapes = tree_map(lambda _: {0: n_rows}, batch)
    level = logging.getLogger("torch").level
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapper = _Inference(module).eval()
            torch.export.export(wrapper, (batch,), dynamic_shapes=(shapes,))
    finally:
        logging.getLogger("torch").setLevel(level)
    return answer


def _example(module: Any) -> dict[str, Any]:
    observation = tree_map(_rows, module.observation_space.sample())
    if not module.is_stateful():
        return {Columns.OBS: observation}
    with_time_axis = tree_map(lambda rows: rows[:, None], observation)
    return {
        Columns.OBS: with_time_axis,
        Columns.STATE_IN: tree_map(_rows, module.get_initial_state()),
    }


def _rows(value: Any) -> torch.Tensor:
    tensor = torch.as_tensor(value)
    # As RLlib does with float64 observations.
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    return torch.stack([tensor] * _EXAMPLE_ROWS)
