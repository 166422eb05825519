"""VolumeNet: a network of volumes with what training, checkpoints and engine ask of any network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..settings import Recipe
from ..trained import TrainedNet
from .networks import build


class VolumeNet(TrainedNet):
    """B x M x X x Y x Z normalised volumes (sides multiples of 16) -> (B x 1 x X x Y x Z logits, logits at the scales, finest first, and a
    map of borders of networks that have one: see `networks.UNet`). All of it is trained, from the weights of the recipe's seed."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe, self.base_sha256, self.started, self.pretext = recipe, "", [], None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.network = build(recipe.volume, recipe.inputs.channels)
        self.checkpoint_gradients(recipe.training.gradient_checkpointing)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], *tuple[Tensor, ...]]:
        return self.network(x)

    def checkpoint_gradients(self, on: bool) -> None:
        """Let the backward pass compute the stages again, or not."""
        self.network.checkpointing = on

    def cast_frozen(self, precision: str) -> VolumeNet:
        """Nothing is frozen."""
        return self

    def for_inference(self, precision: str) -> VolumeNet:
        """A copy that predicts and cannot be trained."""
        return copy.deepcopy(self).eval().requires_grad_(False)
