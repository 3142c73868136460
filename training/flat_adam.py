"""torch's Adam over one flat vector instead of a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adam import adam

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdam(torch.optim.Adam):
    """Adam with its defaults, for many small tensors: the same numbers in a tenth of the calls.

    The parameters become views of one vector, and so do Adam's moments, so that each of its
    operations runs once and not once per tensor. Every operation is elementwise, which is why the
    result is the same to the last bit. `state_dict` and `load_state_dict` are torch's own: states
    go from one to the other and back.

    Args:
        params: Tensors of one dtype on one device.
    """

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        super().__init__(params)
        self._tensors: list[torch.Tensor] = self.param_groups[0]["params"]
        with torch.no_grad():
            self._weights = _flatten([tensor.data for tensor in self._tensors])
            for tensor, view in zip(self._tensors, self._split(self._weights), strict=True):
                tensor.data = view
        self._moments: list[torch.Tensor] = []
        self._n_steps = torch.tensor(0.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of torch's Adam or of this one."""
        super().load_state_dict(state_dict)
        self._moments = []  # joined again at the next step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; a parameter without a gradient makes it torch's own, tensor by tensor."""
        gradients = [tensor.grad for tensor in self._tensors if tensor.grad is not None]
        if closure is not None or len(gradients) < len(self._tensors) or not self._join():
            self._part()
            super().step(closure)
            return
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        adam(
            [self._weights],
            [_flatten(gradients)],
            [self._moments[0]],
            [self._moments[1]],
            [],
            [self._n_steps],
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _join(self) -> bool:
        # Whether weights and moments are views of one vector each, after making them so.
        if self._moments:
            return True
        states = [self.state.get(tensor, {}) for tensor in self._tensors]
        counts = {float(state.get("step", 0.0)) for state in states}
        if len(counts) > 1 or not self._owns_weights():
            return False
        self._n_steps = torch.tensor(counts.pop())
        self._moments = [
            _flatten(
                [
                    state.get(name, torch.zeros_like(tensor))
                    for tensor, state in zip(self._tensors, states, strict=True)
                ]
            )
            for name in _MOMENTS
        ]
        views = zip(*(self._split(moment) for moment in self._moments), strict=True)
        for tensor, (mean, square) in zip(self._tensors, views, strict=True):
            self.state[tensor] = {
                "step": self._n_steps,
                "exp_avg": mean,
                "exp_avg_sq": square,
            }
        return True

    def _part(self) -> None:
        # torch's own step counts each tensor's steps by itself.
        for state in self.state.values():
            state["step"] = state["step"].clone()
        self._moments = []

    def _owns_weights(self) -> bool:
        # False once something has put other tensors in place of the views, as `module.to` does.
        views = self._split(self._weights)
        return all(
            tensor.data_ptr() == view.data_ptr()
            for tensor, view in zip(self._tensors, views, strict=True)
        )

    def _split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        pieces = vector.split([tensor.numel() for tensor in self._tensors])
        return [piece.view_as(old) for piece, old in zip(pieces, self._tensors, strict=True)]


def _flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
