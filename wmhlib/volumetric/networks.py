"""The three networks of volumes, U-Nets of five scales with attention gates: the plain one; squeeze-and-excitation and GELU; state
spaces, memory attention and a gate at borders."""

from __future__ import annotations

import torch
from monai.networks.blocks import ChannelSELayer, Convolution
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..sections import Volume
from .memory import MemoryAttention
from .statespace import OverTokens, VisionMamba

_PRIOR = -4.0  # bias of the heads: lesions are rare
_NORM = ("instance", {"affine": True})  # a batch holds few patches


def build(settings: Volume, channels: int) -> UNet:
    """The network that `settings.network` names ("attention", "squeeze" or "mamba") for `channels` modalities, with weights from torch's
    generator as it stands."""
    if settings.network == "attention":
        return UNet(channels, (16, 32, 64, 128, 256))
    if settings.network == "squeeze":
        return UNet(channels, (16, 32, 64, 160, 288), "gelu", squeeze=True)
    if settings.network == "mamba":
        return UNet(channels, (16, 32, 64, 128, 256), context={
            3: OverTokens(VisionMamba(128), VisionMamba(128)),
            4: nn.Sequential(OverTokens(VisionMamba(256), VisionMamba(256)), MemoryAttention(256))}, borders=settings.borders)
    raise InputError(f"volume.network = {settings.network!r} names no network of volumes")


class UNet(nn.Module):
    """B x C x X x Y x Z -> (logits B x 1 x X x Y x Z, logits at 1/1, 1/2, 1/4 and 1/8, finest first, and with `borders` logits of
    lesions' borders B x 1 x X x Y x Z), all float32. Sides are multiples of 16 from 32 on; InputError otherwise.

    `widths` are the channels of the five scales, finest first. On the way down a scale is a convolution of stride 2 and another one (the finest
    one alone), then a layer of squeeze-and-excitation (Hu et al. 2018) with `squeeze`, then the module that `context` has for it (0 the
    finest). On the way up see `Up`. With `borders` a head on the decoder's finest map m gives the
    logits e of borders, which have a target of their own (`losses.total_loss`), and the network's logits are those of a last head on
    m (1 + sigmoid(e)); without, they are those of the finest scale. While `checkpointing`, the backward pass computes every scale again instead of keeping it.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], act: str = "relu", squeeze: bool = False,
                 context: dict[int, nn.Module] | None = None, borders: bool = False):
        super().__init__()
        self.checkpointing = False
        self.down = nn.ModuleList(
            nn.Sequential(*_convolutions(a, b, act, squeeze, 2 if i else 1, stride=2 if i else 1), *([context[i]] if context and i in context else []))
            for i, (a, b) in enumerate(zip((channels, *widths), widths)))
        self.up = nn.ModuleList(Up(b, a, act, squeeze, 2 if i else 1) for i, (a, b) in enumerate(zip(widths, widths[1:])))
        self.heads = nn.ModuleList(nn.Conv3d(width, 1, 1) for width in widths[:-1])
        self.edge, self.last = (nn.Conv3d(widths[0], 1, 1), nn.Conv3d(widths[0], 1, 1)) if borders else (None, None)
        for head in (*self.heads, self.edge, self.last):
            if head is not None:
                nn.init.constant_(head.bias, _PRIOR)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], *tuple[Tensor, ...]]:
        if any(side % 16 or side < 32 for side in x.shape[2:]):
            raise InputError(f"a volume of {' x '.join(map(str, x.shape[2:]))} voxels does not fit the network: sides must be multiples of 16, from 32 on")
        maps = []
        for down in self.down:
            x = self._run(down, x)
            maps.append(x)
        scales = []
        for up, skip, head in list(zip(self.up, maps, self.heads))[::-1]:
            x = self._run(up, x, skip)
            scales.insert(0, head(x).float())
        if self.edge is None:
            return scales[0], scales
        edges = self.edge(x)
        return self.last(x * (1 + torch.sigmoid(edges))).float(), scales, edges.float()

    def _run(self, part: nn.Module, *given: Tensor) -> Tensor:
        return checkpoint(part, *given, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else part(*given)


class Up(nn.Module):
    """A map of `a` channels and that of the next finer scale, of `b` channels -> `b` channels at the finer scale: a transposed convolution,
    beside which stand the finer map's voxels as far as the gate lets them through (Oktay et al. 2018, eq. 1, sigmoid(psi(relu(W x + V g))), g the
    map that came up), then `depth` convolutions."""

    def __init__(self, a: int, b: int, act: str, squeeze: bool, depth: int):
        super().__init__()
        self.rise = Convolution(3, a, b, strides=2, kernel_size=2, padding=0, output_padding=0, is_transposed=True, norm=_NORM, act=act, adn_ordering="NA", bias=False)
        self.skip, self.gate = nn.Conv3d(b, b // 2, 1, bias=False), nn.Conv3d(b, b // 2, 1)
        self.psi = nn.Conv3d(b // 2, 1, 1)
        self.merge = nn.Sequential(*_convolutions(2 * b, b, act, squeeze, depth))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.rise(x)
        attended = skip * torch.sigmoid(self.psi(torch.relu(self.skip(skip) + self.gate(x))))
        return self.merge(torch.cat([attended, x], 1))


def _convolutions(a: int, b: int, act: str, squeeze: bool, depth: int, stride: int = 1) -> list[nn.Module]:
    layers = [Convolution(3, a if i == 0 else b, b, strides=stride if i == 0 else 1, norm=_NORM, act=act, adn_ordering="NA", bias=False) for i in range(depth)]
    return layers + [ChannelSELayer(3, b, r=4, acti_type_1=act)] * squeeze
