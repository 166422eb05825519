"""Memory attention in SAM 2's manner (Ravi et al. 2024): the slabs of a map take the part of a video's frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_REACH = 3  # slabs that are remembered


class Attention(nn.Module):
    """Softmax attention of queries B x N x `dim` to keys and values made from B x M x `source` (`dim` where 0), with `heads` heads."""

    def __init__(self, dim: int, heads: int = 8, source: int = 0):
        super().__init__()
        self.heads = heads
        self.queries, self.keys, self.values = nn.Linear(dim, dim), nn.Linear(source or dim, dim), nn.Linear(source or dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.queries(x), self.keys(keys), self.values(values)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MemoryAttention(nn.Module):
    """A map B x `dim` x X x Y x Z -> the same. Its slabs along Z go one after another, from below: each attends to itself, then to the
    memories (a quarter of the channels) of up to 3 slabs below it, which say where in the slab and how many slabs below they are, then
    goes through an MLP; what comes out is the slab's own memory. The first slab, which has none below it, attends to a learned token."""

    def __init__(self, dim: int):
        super().__init__()
        narrow = dim // 4
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.within, self.below = Attention(dim), Attention(dim, source=narrow)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.remember = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, narrow))  # without the norm memories of memories grow without bound
        self.nothing = nn.Parameter(0.02 * torch.randn(1, 1, narrow))
        self.distance = nn.Parameter(0.02 * torch.randn(_REACH, narrow))  # the slab just below first

    def forward(self, x: Tensor) -> Tensor:
        place = position_code(*x.shape[2:4], x.shape[1]).to(x)
        narrow = position_code(*x.shape[2:4], x.shape[1] // 4).to(x)
        bank, slabs = [], []
        for slab in x.flatten(2, 3).permute(3, 0, 2, 1).unbind():
            y = self.norms[0](slab)
            slab = slab + self.within(y + place, y + place, y)
            memory = torch.cat(bank, 1) if bank else self.nothing.expand(len(slab), -1, -1)
            keys = torch.cat([m + narrow + code for m, code in zip(bank, self.distance)], 1) if bank else memory
            slab = slab + self.below(self.norms[1](slab) + place, keys, memory)
            slab = slab + self.mlp(self.norms[2](slab))
            bank = [self.remember(slab), *bank][:_REACH]
            slabs.append(slab)
        return torch.stack(slabs, -1).transpose(1, 2).reshape(x.shape)


def position_code(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of both coordinates of height x width places (Vaswani et al. 2017, section 3.5), half of the `channels` (a multiple
    of 4) each: height * width x channels."""
    rates = 10_000.0 ** -(torch.arange(channels // 4) / (channels // 4))
    rows, columns = (torch.arange(n)[:, None] * rates for n in (height, width))
    rows, columns = (torch.cat([a.sin(), a.cos()], 1) for a in (rows, columns))
    return torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], 2).flatten(0, 1)
