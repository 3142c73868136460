"""The twin of `memory_policy` in torch, written in torch's own formats."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch


class Memory(torch.nn.Module):
    def forward(
        self, observation: Any, h: Any, previous: Any, reward: Any, action_mask: Any, noise: Any
    ) -> tuple[torch.Tensor, ...]:
        h = 0.5 * h + observation
        logits = h + 0.25 * reward[:, None] + 0.5 * previous
        masked = torch.where(action_mask, logits, torch.finfo(torch.float32).min)
        logp = torch.log_softmax(masked, dim=1)
        found = []
        for scores in (masked, masked + noise):
            action = scores.argmax(dim=1)
            found += [action, logp.gather(1, action[:, None])[:, 0]]
        states = [torch.nn.functional.one_hot(found[i], 2).to(torch.float32) for i in (0, 2)]
        return (*found, logits, h, *states)


def example() -> tuple[torch.Tensor, ...]:
    mask = torch.ones(3, 2, dtype=torch.bool)
    return (*(torch.ones(3, 2) for _ in range(3)), torch.ones(3), mask, torch.zeros(3, 2))


def write_torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Memory(), example()).save(str(path))


def write_pt2(path: Path) -> None:
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in range(6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Memory(), example(), dynamic_shapes=shapes), path)
