"""AdaLoRA's budget of ranks (Zhang et al. 2023): singular values that matter little are set to zero while training.

The layers are peft's, W + P diag(E) Q. Importance is smoothed for every number they train (eq. 8 to 10); the budget of singular values
falls with the third power of the steps (eq. 12) from all of them to two thirds, what the paper starts and ends with. A tenth of the steps
come before that, three tenths after: there importance stands still, and with it the choice.
"""

from __future__ import annotations

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

_SMOOTHING = 0.85  # beta 1 and 2
_WEIGHT = 0.5  # of the regulariser, as in peft


class Ranks:
    """Does nothing for a network without AdaLoRA. `state` is what a checkpoint needs beside the network's."""

    def __init__(self, network: nn.Module):
        layers = [module for module in network.modules() if isinstance(module, AdaLoraLayer)]
        self.triplets = [(layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]) for layer in layers]
        trained = [parameter for triplet in self.triplets for parameter in triplet]
        self.state = {name: [torch.zeros_like(p) for p in trained] for name in ("importance", "uncertainty")}

    def load(self, state: dict[str, list[Tensor]]) -> None:
        for name, tensors in self.state.items():
            for tensor, value in zip(tensors, state[name], strict=True):
                tensor.copy_(value)

    def regulariser(self) -> Tensor:
        """How far P and Q are from orthogonal (eq. 4): the mean of || P^T P - I || and || Q Q^T - I || over all layers, weighted."""
        grams = [gram for q, _, p in self.triplets for gram in (p.T @ p, q @ q.T)]
        return _WEIGHT * torch.stack([torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]).mean()

    @torch.no_grad()
    def update(self, step: int, steps: int) -> None:
        """After optimiser step number `step` (from 1) of `steps`, with its gradients still there."""
        first, last = steps // 10, steps - 3 * steps // 10
        if step < last:
            trained = (parameter for triplet in self.triplets for parameter in triplet)
            for parameter, importance, uncertainty in zip(trained, self.state["importance"], self.state["uncertainty"]):
                sensitivity = (parameter * parameter.grad).abs()
                importance.lerp_(sensitivity, 1 - _SMOOTHING)
                uncertainty.lerp_((sensitivity - importance).abs(), 1 - _SMOOTHING)
        if self.triplets and step > first:
            self._prune(max(0.0, (last - step) / (last - first)) ** 3)

    def _prune(self, share: float) -> None:
        """Keep the singular values of highest score (eq. 7), two thirds of all and `share` of the third; the others become zero."""
        scores = [importance * uncertainty for importance, uncertainty in zip(self.state["importance"], self.state["uncertainty"])]
        triplets = torch.cat([q.mean(1) + values[:, 0] + p.mean(0) for q, values, p in zip(scores[::3], scores[1::3], scores[2::3])])
        least = 2 * len(triplets) // 3
        kept = torch.zeros_like(triplets)
        kept[triplets.argsort(descending=True, stable=True)[: least + int(share * (len(triplets) - least))]] = 1
        for (_, values, _), mine in zip(self.triplets, kept.split([len(values) for _, values, _ in self.triplets])):
            values.mul_(mine[:, None])
