"""RLlib's own answer: its connector pipelines around its own RLModule, nothing of ours between.

What the exported graph is measured against, and a `Policy` that `evaluate` can play.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from export.graph import PolicyGraph, copied
from export.policy import Checkpoint
from export.walk import Walk
from serving.spaces import flatten, leaves

Arrays = dict[str, NDArray[Any]]


class RLlibReference:
    """What RLlib answers, under the graph's output names."""

    def __init__(self, checkpoint: Checkpoint, graph: PolicyGraph) -> None:
        """Look up what is to be answered.

        Args:
            checkpoint: The policy.
            graph: Only its description is used: spaces, names, noise.
        """
        self._checkpoint = checkpoint
        self._graph = graph
        self._module = checkpoint.rl_module
        # RLlib's log-probability of nested deterministic actions fails for batches (ray issue
        # 53994), so those are asked for one by one.
        self.max_batch_size = 1 if graph.distribution_name == "multi" else 4096

    def answer(
        self, walk: Walk, noise: NDArray[np.float32], mask: NDArray[np.bool_] | None
    ) -> tuple[Arrays, dict[str, Any], dict[str, Any] | None]:
        """Everything that the graph computes, computed by RLlib.

        RLlib draws its samples itself; here the drawn sample is fixed by `noise` and goes through
        RLlib's log-probability and its module-to-env pipeline like one of its own.

        Args:
            walk: The episodes, at a step that was not answered yet.
            noise: (B, D) float32.
            mask: (B, M): forbidden actions, which RLlib does not know: its logits are masked.

        Returns:
            Arrays under the graph's output names; RLlib's columns for the greedy action; and for
            the sampled one, None without a distribution.
        """
        output = walk.forward()
        if self._graph.distribution is None:
            return self._answer_directly(walk, output, mask)
        inputs = self._without_time(output[Columns.ACTION_DIST_INPUTS])
        logits = inputs if mask is None else inputs.masked_fill(~torch.from_numpy(mask), -np.inf)
        dist = self._module.get_inference_action_dist_cls().from_logits(self._precise(logits))
        sample, sample_logp = draw(dist, torch.from_numpy(noise), self._graph)
        mode, is_rllibs_own = self._mode(dist, mask)
        own_choice = None if is_rllibs_own else self._with_time(_as_float32(mode))
        greedy, greedy_columns = walk.actions(own_choice)
        sampled, sampled_columns = walk.actions(self._with_time(_as_float32(sample)))
        answers = {
            **self._named("action", greedy),
            "action_logp": _numpy(self._mode_logp(dist, mode)),
            **self._named("sampled_action", sampled),
            "sampled_action_logp": _numpy(sample_logp),
            "action_dist_inputs": _numpy(inputs),
            **self._value(walk.batch),
            **self._next_state(output),
        }
        return answers, greedy_columns, sampled_columns

    def _answer_directly(
        self, walk: Walk, output: dict[str, Any], mask: NDArray[np.bool_] | None
    ) -> tuple[Arrays, dict[str, Any], None]:
        answers: Arrays = {}
        chosen = None
        if self._graph.answers_q_values:
            with torch.no_grad():
                found = self._module.compute_q_values(copied(walk.batch))["qf_preds"]
            answers["q_values"] = _numpy(self._without_time(found))
            if mask is not None:
                best = np.where(mask, answers["q_values"], -np.inf).argmax(axis=1)
                chosen = self._with_time(torch.from_numpy(best))
        actions, columns = walk.actions(chosen)
        answers |= self._named("action", actions)
        return answers | self._next_state(output), columns, None

    def _named(self, root: str, rows: Sequence[Any]) -> Arrays:
        """Actions as RLlib sends them, leaf by leaf, in the space's dtype and shape."""
        space = self._graph.action_space
        names = leaves(space, root)
        if len(names) == 1 and root in names:
            stacked = {root: np.stack([np.asarray(row) for row in rows])}
        else:
            batched = tree.map_structure(lambda *leaf: np.stack(leaf), *rows)
            stacked = flatten(space, root, batched)
        # RLlib narrows int64 to int32 on the way; the value is what the environment sees.
        return {
            name: stacked[name].astype(leaf.dtype).reshape(len(rows), *leaf.shape)
            for name, leaf in names.items()
        }

    def _precise(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same distribution, so that RLlib's formulas are not what limits the comparison."""
        precise = inputs.double()
        if self._graph.distribution_name == "categorical":
            # RLlib normalises by `logits - logsumexp`, which loses all digits for huge logits.
            precise = precise - precise.amax(dim=-1, keepdim=True)
        return precise

    def _mode(self, dist: Any, mask: NDArray[np.bool_] | None) -> tuple[Any, bool]:
        """The deterministic action, and whether RLlib chooses it without being told."""
        if self._graph.deterministic_action == "tanh" and hasattr(dist, "_squash"):
            return dist._squash(dist.loc), False
        return dist.to_deterministic().sample(), mask is None

    @staticmethod
    def _mode_logp(dist: Any, mode: Any) -> torch.Tensor:
        # RLlib's deterministic action of a squashed Gaussian, the mean, need not be an action that
        # it can draw; the density is taken at tanh of the mean, the most likely draw.
        children = getattr(dist, "_flat_child_distributions", None)
        if children is not None:
            pairs = zip(children, tree.flatten(mode), strict=True)
            return torch.stack([RLlibReference._mode_logp(*pair) for pair in pairs]).sum(dim=0)
        logp: torch.Tensor = (
            dist._squashed_logp(dist.loc) if hasattr(dist, "_squash") else dist.logp(mode)
        )
        return logp

    def _value(self, batch: dict[str, Any]) -> Arrays:
        if not self._graph.has_value:
            return {}
        with torch.no_grad():
            return {"value": _numpy(self._without_time(self._module.compute_values(copied(batch))))}

    def _next_state(self, output: dict[str, Any]) -> Arrays:
        """The RLModule's own memory; that of connectors shows in later steps only."""
        if Columns.STATE_OUT not in output:
            return {}
        return {
            f"next_state/{name}": _numpy(values)
            for name, values in self._graph.named_module_state(output[Columns.STATE_OUT]).items()
        }

    def _without_time(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.squeeze(1) if self._graph.is_recurrent else tensor

    def _with_time(self, nested: Any) -> Any:
        if not self._graph.is_recurrent:
            return nested
        return tree.map_structure(lambda leaf: leaf.unsqueeze(1), nested)


def draw(dist: Any, noise: torch.Tensor, graph: PolicyGraph) -> tuple[Any, torch.Tensor]:
    """The sample that `noise` draws from an RLlib distribution, and RLlib's logp of it."""
    assert graph.distribution is not None
    children = getattr(dist, "_flat_child_distributions", [dist])
    sizes = [segment.size for segment in graph.distribution.noise]
    parts = [
        _draw_leaf(child, own)
        for child, own in zip(children, torch.split(noise.double(), sizes, dim=1), strict=True)
    ]
    logp = torch.stack([logp for _, logp in parts]).sum(dim=0)
    if children == [dist]:
        return parts[0][0], logp
    return tree.unflatten_as(dist._original_struct, [sample for sample, _ in parts]), logp


def _draw_leaf(dist: Any, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(dist, "_cats"):
        sizes = [cat.logits.shape[-1] for cat in dist._cats]
        columns = [
            torch.argmax(cat.logits + own, dim=-1)
            for cat, own in zip(dist._cats, torch.split(noise, sizes, dim=1), strict=True)
        ]
        sample = torch.stack(columns, dim=-1)
        return sample, dist.logp(sample)
    if hasattr(dist, "logits"):
        sample = torch.argmax(dist.logits + noise, dim=-1)
        return sample, dist.logp(sample)
    sample = dist._dist.mean + dist._dist.stddev * noise
    if hasattr(dist, "_squashed_logp"):
        return dist._squash(sample), dist._squashed_logp(sample)
    return sample, dist.logp(sample)


def _as_float32(nested: Any) -> Any:
    return tree.map_structure(
        lambda leaf: leaf.float() if leaf.dtype == torch.float64 else leaf, nested
    )


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    array = tensor.detach().cpu().numpy()
    return array.astype(np.float32) if array.dtype == np.float64 else array
