"""Softmax attention that never holds all of its scores: exact up to their rounding to the type of the queries.

A GPU has a fused kernel for it. On a CPU the products of oneDNN, a few heads at a time so that their scores stay in the
cache, are faster than torch's fused kernel, which computes bf16 in fp32 where there is no AMX (see notebook 10_benchmark).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORES = 1 << 21  # of a block: 4 MB in bf16


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v: B x heads x N x C, B x heads x M x C, B x heads x M x V -> B x heads x N x V. Scale q beforehand."""
    if q.device.type == "cpu":
        return _Blocks.apply(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, q.shape[:2])
    return _fused(q, k, v)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` by torch's kernels, which want one width for all, on GPUs before Ampere a multiple of 8."""
    width = -(-q.shape[-1] // 8) * 8
    return F.scaled_dot_product_attention(*(F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v)), scale=1.0)[..., : v.shape[-1]]


class _Blocks(torch.autograd.Function):
    """`attend` on (B heads) x N x C, block by block; the backward pass computes each block's scores again."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for heads, rows in _blocks(q, k):
            torch.bmm(_weights(q[heads, rows], k[heads]), v[heads], out=out[heads, rows])
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for heads, rows in _blocks(q, k):
            weights, d_block = _weights(q[heads, rows], k[heads]), d_out[heads, rows]
            d_v[heads] += weights.transpose(1, 2) @ d_block
            d_scores = torch._softmax_backward_data(d_block @ v[heads].transpose(1, 2), weights, -1, weights.dtype)
            torch.bmm(d_scores, k[heads], out=d_q[heads, rows])
            d_k[heads] += d_scores.transpose(1, 2) @ q[heads, rows]
        return d_q, d_k, d_v


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(1, 2), -1)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and of queries whose scores are about _SCORES."""
    heads = max(1, _SCORES // (q.shape[1] * k.shape[1]))
    rows = max(1, _SCORES // k.shape[1])
    for head in range(0, len(q), heads):
        for row in range(0, q.shape[1], rows):
            yield slice(head, head + heads), slice(row, row + rows)
