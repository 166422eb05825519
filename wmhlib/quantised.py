"""QLoRA (Dettmers et al. 2023): the encoder's matrices in NF4 with double quantisation, under adapters of full precision.

bitsandbytes keeps the numbers and gives them back; the product is ours, for its own layer is no drop-in for nn.Linear: without
autocast it stays with the type of its first input, and once in eval() it repacks the weights on a CPU with AVX512-BF16 and
computes 0.3 % beside what was trained. Here training and inference are the same function, on every device that of a dense
layer of the values NF4 stands for (`dequantised`).

Importing this module raises RecipeError where bitsandbytes is missing: import it where an encoder of 4 bits is wanted.
"""

from __future__ import annotations

import copy
import math

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import adapters
from .errors import RecipeError
from .medsam import ImageEncoder, linear_places
from .threads import one_thread

try:
    import bitsandbytes
except ImportError:
    raise RecipeError("encoder.bits = 4 needs the package bitsandbytes, which is not installed: pip install bitsandbytes, or set "
                      "encoder.bits to 16") from None

_BLOCK = 64  # weights that share a scale
_BITS = 4 + 8 / _BLOCK + 32 / (256 * _BLOCK)  # a weight: its own, its share of a scale, and of the scale of 256 scales


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """A linear layer of frozen weights in 4 bits; computes, and gives back, what nn.Linear would under autocast. Without
    autocast it computes in `compute_dtype` and gives back the type of its input."""

    hollow = False  # has sizes and no values

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights that the 4 bits stand for, out x in."""
        if self.hollow:
            return torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        state = copy.copy(self.weight.quant_state)
        state.dtype = dtype
        return bitsandbytes.functional.dequantize_4bit(self.weight.data, state).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        given, device = x.dtype, x.device.type
        dtype = self.compute_dtype
        if torch.is_autocast_enabled(device):
            dtype = given = torch.get_autocast_dtype(device)
        return _Product.apply(x.to(dtype), None if self.bias is None else self.bias.to(dtype), self).to(given)


class _Product(torch.autograd.Function):
    """A layer's output; its backward pass makes the dense weights again, so that none are kept between the passes."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        return (gradient @ ctx.layer.dense(gradient.dtype) if wanted[0] else None,
                gradient.reshape(-1, gradient.shape[-1]).sum(0) if wanted[1] else None, None)


def quantise(encoder: ImageEncoder) -> ImageEncoder:
    """`encoder` itself, frozen, with qkv, proj, lin1 and lin2 of every block in NF4, which compute in fp32 where no autocast
    says otherwise. Patches, positions, norms and neck stay as they are.

    Quantised on the CPU, by one thread: the same weights give the same bits, wherever the encoder lies. They cannot be loaded from
    a state dict: keep the base and quantise it again. peft puts adapters on it (`is_loaded_in_4bit`); its own merge would round
    them to NF4, so take `dequantised` first. Of an encoder on the meta device only the sizes are set.
    """
    with one_thread():  # the mean of the scales is a sum
        for _, parent, name in linear_places(encoder):
            setattr(parent, name, _quantised(getattr(parent, name)))
    encoder.is_loaded_in_4bit = True
    return encoder.requires_grad_(False)


def _quantised(layer: nn.Linear) -> Linear4bit:
    weight, count = layer.weight.data, layer.weight.numel()
    with torch.device("meta"):
        small = Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4")
    small.bias, small.training, small.hollow = layer.bias, layer.training, weight.is_meta
    if small.hollow:
        small.weight = bitsandbytes.nn.Params4bit(weight.new_empty(math.ceil(count * _BITS / 8), 1, dtype=torch.uint8), quant_type="nf4")
        return small
    # bitsandbytes reads wrong scales on a CPU where a block goes on in the next row: there all weights are one row.
    flat = weight.float().cpu().reshape((-1, layer.in_features) if layer.in_features % _BLOCK == 0 else (1, count))
    small.weight = bitsandbytes.nn.Params4bit(flat, blocksize=_BLOCK, quant_type="nf4").to("cpu").to(weight.device)
    return small


def dequantised(encoder: nn.Module) -> nn.Module:
    """A copy of `encoder` (with adapters or without) whose matrices are dense fp32 with the values NF4 stands for: the same outputs,
    faster on a CPU, and adapters can be merged into it without being rounded to NF4."""
    dense = copy.deepcopy(encoder)
    for module in list(dense.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Linear4bit):
                setattr(module, name, _dense(layer))
        if isinstance(module, peft.tuners.lora.Linear4bit):
            module.__class__, module.is_target_conv_1d_layer = adapters.Linear, False
        if isinstance(module, peft.tuners.adalora.SVDLinear4bit):
            module.__class__, module.fan_in_fan_out = peft.tuners.adalora.SVDLinear, False
    for module in dense.modules():
        if isinstance(module, ImageEncoder):
            module.is_loaded_in_4bit = False
    return dense


def _dense(layer: Linear4bit) -> nn.Linear:
    with torch.device("meta"):
        dense = nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
    dense.weight, dense.bias = nn.Parameter(layer.dense(torch.float32), requires_grad=False), layer.bias
    return dense.train(layer.training)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all weights and buffers as they lie in memory, the scales of NF4 included; what is shared counts once."""
    tensors = [*module.parameters(), *module.buffers()]
    for state in filter(None, (getattr(weight, "quant_state", None) for weight in tensors)):
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum({storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}.values())
