"""SAM's image encoder (Kirillov et al. 2023, a ViTDet backbone): any size, segment_anything's parameter names, fused attention.

A map of 16 x 16-pixel patches goes through transformer blocks, most of them attending within windows, and through a neck
to 256 channels. Relative positions enter as the decomposed bias of MViTv2 (Li et al. 2022, eq. 4): a dot product of the
query with one vector per row offset and one per column offset. Written as extra query and key components,
[q s, q R_h, q R_w] . [k, onehot(row), onehot(column)], the exact logits come out of a plain fused attention.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attend
from .sections import Encoder
from .weights import check_state, read_state

PATCH = 16  # pixels
CHANNELS = 256  # of the feature map
_BESIDE = ("prompt_encoder.", "mask_decoder.", "channel_adapter.", "decoder.", "skip.")  # the encoder, in a base file


class Attention(nn.Module):
    """Multi-head attention over a B x H x W x C map, with relative positions of up to `size` tokens a side."""

    def __init__(self, dim: int, heads: int, size: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))

    def forward(self, x: Tensor, window: int = 0) -> Tensor:
        """`window`: side in tokens of the windows that attend within themselves; 0: the whole map does."""
        qkv = self.qkv(x)
        if not window:
            return self.proj(self._attend(qkv, qkv))
        # SAM pads the map with zeros, whose keys and values are one and the same vector: only tokens of the map are projected and ask.
        padding, strips = self.qkv(x.new_zeros(x.shape[-1])), []

        def within(rows: slice, columns: slice) -> Tensor:
            part = _to_windows(qkv[:, rows, columns], window)
            return _from_windows(self._attend(part, _pad(part, window, padding)), len(x), rows.stop - rows.start)

        for rows in _cut(x.shape[1], window):
            strips.append(torch.cat([within(rows, columns) for columns in _cut(x.shape[2], window)], 2))
        return self.proj(torch.cat(strips, 1))

    def _attend(self, asking: Tensor, asked: Tensor) -> Tensor:
        """Queries of B x h x w x 3C, keys and values of B x H x W x 3C, of which the former is the upper left part -> B x h x w x C."""
        (b, h, w, _), (height, width) = asking.shape, asked.shape[1:3]
        q = asking.unflatten(-1, (3, self.heads, -1))[:, :, :, 0].permute(0, 3, 1, 2, 4)
        k, v = asked.unflatten(-1, (3, self.heads, -1)).flatten(1, 2)[:, :, 1:].permute(2, 0, 3, 1, 4)
        rows = torch.einsum("bnhwc,hkc->bnhwk", q, _offsets(self.rel_pos_h, height)[:h].to(q.dtype))
        columns = torch.einsum("bnhwc,wkc->bnhwk", q, _offsets(self.rel_pos_w, width)[:w].to(q.dtype))
        q = torch.cat([q * q.shape[-1] ** -0.5, rows, columns], -1).flatten(2, 3)
        rows, columns = (torch.eye(n, dtype=k.dtype, device=k.device) for n in (height, width))
        places = torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], -1)
        k = torch.cat([k, places.expand(b, self.heads, -1, -1)], -1)
        return attend(q, k, v).transpose(1, 2).reshape(b, h, w, -1)


class Block(nn.Module):
    """Pre-norm transformer block; `window` 0 attends to the whole map."""

    def __init__(self, dim: int, heads: int, window: int, grid: int):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, window or grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("lin1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("lin2", nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.window)
        return x + self.mlp(self.norm2(x))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a B x C x H x W map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ImageEncoder(nn.Module):
    """B x 3 x S x S image -> B x 256 x S/16 x S/16 feature map, S any multiple of 16. With `checkpointing` the backward pass
    computes each block again instead of keeping what is inside: the same gradients for less memory and a third more time."""

    def __init__(self, settings: Encoder):
        super().__init__()
        self.checkpointing = False
        dim = settings.dim
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, PATCH, PATCH)
        self.pos_embed = nn.Parameter(torch.zeros(1, settings.grid, settings.grid, dim))
        self.blocks = nn.ModuleList(
            Block(dim, settings.heads, 0 if i in settings.global_blocks else settings.window, settings.grid)
            for i in range(settings.depth))
        self.neck = nn.Sequential(nn.Conv2d(dim, CHANNELS, 1, bias=False), LayerNorm2d(CHANNELS, eps=1e-6),
                                  nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), LayerNorm2d(CHANNELS, eps=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).permute(0, 2, 3, 1).contiguous()
        x = x + positions(self.pos_embed, x.shape[1], x.shape[2])
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else block(x)
        return self.neck(x.permute(0, 3, 1, 2))


def linear_places(encoder: ImageEncoder) -> list[tuple[str, nn.Module, str]]:
    """The linear layers of every block, which adapters and quantisation take: "attn" or "mlp", the module that holds it, its name there."""
    return [(part, getattr(block, part), name) for block in encoder.blocks
            for part, names in (("attn", ("qkv", "proj")), ("mlp", ("lin1", "lin2"))) for name in names]


def build_encoder(settings: Encoder, seed: int) -> ImageEncoder:
    """The encoder with the weights of `settings.checkpoint`, or random ones drawn from `seed` where none is named."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ImageEncoder(settings)
        for name, parameter in encoder.named_parameters():
            if "pos" in name:
                nn.init.uniform_(parameter, -0.035, 0.035)
    if settings.checkpoint:
        load_checkpoint(encoder, settings.checkpoint)
    return encoder


def load_checkpoint(encoder: ImageEncoder, path: str | Path) -> dict[str, Tensor]:
    """Load a Sam state dict (segment_anything, MedSAM; "minisam": the one that comes with the suite), or that of its image encoder
    alone, into `encoder`. Returns what else the file holds.

    No code in the file can run. Raises CheckpointError listing every missing, unexpected and misshapen key.
    """
    state, rest = read_state(path), {}
    if any(key.startswith("image_encoder.") for key in state):
        rest = {key: value for key, value in state.items() if key.startswith(_BESIDE)}
        state = {key.removeprefix("image_encoder."): value for key, value in state.items() if key not in rest}
    check_state(encoder.state_dict(), state, f"checkpoint {path} does not fit the encoder")
    encoder.load_state_dict(state)
    return rest


def positions(embedding: Tensor, h: int, w: int) -> Tensor:
    """A position embedding, 1 x n x m x C, on a map of h x w."""
    if embedding.shape[1:3] == (h, w):
        return embedding
    return F.interpolate(embedding.permute(0, 3, 1, 2), (h, w), mode="bicubic", antialias=True).permute(0, 2, 3, 1)


def _offsets(table: Tensor, size: int) -> Tensor:
    """Rows of a (2 n - 1) x C table for every pair of places: size x size x C, stretched linearly where n is not `size`."""
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.T[None], 2 * size - 1, mode="linear")[0].T
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places[None, :] + size - 1]


def _cut(length: int, window: int) -> list[slice]:
    """The part of a side that whole windows fill, and the rest."""
    whole = length // window * window
    return [part for part in (slice(0, whole), slice(whole, length)) if part.start < part.stop]


def _to_windows(x: Tensor, size: int) -> Tensor:
    """B x H x W x C -> (B n) x h x w x C: windows of `size`, or all there is along a side that is shorter."""
    return x.unflatten(2, (-1, min(size, x.shape[2]))).unflatten(1, (-1, min(size, x.shape[1]))).transpose(2, 3).flatten(0, 2)


def _from_windows(x: Tensor, batch: int, height: int) -> Tensor:
    """(B n) x h x w x C -> B x H x W x C, the inverse for a map of `height`."""
    return x.unflatten(0, (batch, height // x.shape[1], -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _pad(x: Tensor, size: int, fill: Tensor) -> Tensor:
    """B x h x w x C -> B x size x size x C with `fill` (C) below and to the right."""
    if x.shape[1:3] == (size, size):
        return x
    full = fill.expand(len(x), size, size, -1).clone()
    full[:, : x.shape[1], : x.shape[2]] = x
    return full
