"""What networks of volumes cost: a state space against softmax attention over the number of tokens, and the three networks against MONAI's
UNet and SegResNet of as many parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from monai.networks.nets import SegResNet
from monai.networks.nets import UNet as MonaiUNet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..figures import BLUE, LEGEND, VERMILLION, page
from ..hardware import Held
from ..precision import autocast, dtype_of, native_precision
from ..sections import NETWORKS, Volume
from ..volumetric.memory import Attention
from ..volumetric.networks import build
from ..volumetric.statespace import VisionMamba
from .measures import CPU
from .table import alternate, row

_STYLES = {"state space": (BLUE, "o", "-"), "softmax attention": (VERMILLION, "s", "--")}
_PANELS = {"seconds": "seconds", "gflop": "GFLOP", "memory_mb": "MB of tensors at once"}


class _SelfAttention(nn.Module):
    """x + softmax attention of norm x to itself, as `VisionMamba` is x + state spaces of norm x."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), Attention(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y)


def token_costs(tokens: Sequence[int] = (512, 1024, 2048, 4096, 8192, 16384), dim: int = 256, repetitions: int = 5) -> pd.DataFrame:
    """One block of width `dim` forward on 1 x n x dim in fp32 on the CPU, for each n of `tokens`: `what` ("state space", both directions, or
    "softmax attention", torch's fused one with 8 heads), `tokens`, `seconds` (the least of `repetitions`, both in turns), `gflop` (products, as
    torch's FlopCounterMode counts them) and `memory_mb` (the most bytes of tensors at once but for weights)."""
    blocks, rows = {"state space": VisionMamba(dim).eval(), "softmax attention": _SelfAttention(dim).eval()}, []
    with torch.inference_mode():
        for n in tokens:
            x = torch.randn(1, n, dim, generator=torch.Generator().manual_seed(n))
            times, _ = alternate({what: partial(block, x) for what, block in blocks.items()}, repetitions, warm=True)
            for what, block in blocks.items():
                with Held() as held:
                    block(x)
                rows.append(dict(what=what, tokens=n, seconds=min(times[what]), gflop=_gflop(block, x), memory_mb=1e-6 * held.peak))
    return pd.DataFrame(rows)


def _gflop(block: nn.Module, x: Tensor) -> float:
    """10^9 operations of a pass, on tensors without data; of fused attention those of its two products."""
    block = copy.deepcopy(block).to("meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
        block(x.to("meta"))
    return 1e-9 * count.get_total_flops()


def exponents(costs: pd.DataFrame) -> pd.DataFrame:
    """By which power of the tokens each cost of `token_costs` grows, a row for each `what`: the slope on log scales over the upper half of the
    tokens (two at least), where what grows fastest shows."""
    numbers = np.sort(costs.tokens.unique())
    upper = costs[costs.tokens >= numbers[min(len(numbers) // 2, len(numbers) - 2)]]
    return pd.DataFrame({what: {cost: np.polyfit(np.log(part.tokens.astype(float)), np.log(part[cost]), 1)[0] for cost in _PANELS}
                         for what, part in upper.groupby("what", sort=False)}).T.rename_axis("what")


def token_figure(costs: pd.DataFrame) -> Figure:
    """Seconds, operations and memory over tokens, log scales, with the `exponents`; `costs` as `token_costs` gives it."""
    fig, axes = page(1, 3, (10, 3.6))
    powers = exponents(costs)
    for ax, (cost, label) in zip(axes.flat, _PANELS.items()):
        for what, line in costs.groupby("what", sort=False):
            colour, marker, style = _STYLES[what]
            ax.plot(line.tokens, line[cost], color=colour, marker=marker, linestyle=style, markersize=5, label=f"{what} (n^{powers.loc[what, cost]:.2f})")
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        ax.set_xticks(sorted(costs.tokens.unique()), [f"{n:g}" for n in sorted(costs.tokens.unique())], rotation=45)
        ax.minorticks_off()
        ax.set_ylim(costs[cost].min() / 2, costs[cost].max() * 6)
        ax.yaxis.set_major_locator(LogLocator())
        ax.yaxis.set_major_formatter("{x:g}")
        ax.legend(loc="upper left", **LEGEND)
    return fig


def speed(side: int = 64, batch: int = 2, repetitions: int = 3, precision: str = "bf16", networks: Sequence[str] = NETWORKS) -> pd.DataFrame:
    """Our `networks` against MONAI's UNet and SegResNet, all in turns on batch x 1 x side^3 on the CPU in `precision` ("no" or "bf16", where it is
    native): rows of `table.row` for a prediction and for a forward and backward pass, MONAI's the baseline. Memory is the most bytes of tensors at
    once, weights and gradients among them, counted on tensors without data. `note` has the parameters of both."""
    precision = native_precision(precision, CPU)
    ours = {name: build(Volume(network=name), 1) for name in networks}
    pairs = [(name, other, rival(other, parameters(net))) for name, net in ours.items() for other in RIVALS]
    every = ours | {f"{other} of {name}": net for name, other, net in pairs}
    image, rows = torch.randn(batch, 1, side, side, side, generator=torch.Generator().manual_seed(0)), []
    for what, run in (("prediction", _predict), ("forward and backward", _train)):
        times, _ = alternate({name: partial(run, net, image, precision) for name, net in every.items()}, repetitions, warm=True)
        for name, other, net in pairs:
            counts = f"{1e-6 * parameters(net):.2f} M parameters against {1e-6 * parameters(ours[name]):.2f} M; batch {batch}, {side}^3 voxels, {dtype_of(precision)}"
            rows.append(row(f"{name} against MONAI's {other}, {what}", times[f"{other} of {name}"], times[name],
                            memory=(_held(net, image.shape, run, precision), _held(ours[name], image.shape, run, precision)), note=counts.replace("torch.", "")))
    return pd.DataFrame(rows)


def rival(name: str, size: int) -> nn.Module:
    """MONAI's "UNet" (five scales, two units each) or "SegResNet" (four scales) for one channel, as wide as brings it nearest to `size` parameters."""
    with torch.device("meta"):
        about = round(16 * (size / parameters(RIVALS[name](16))) ** 0.5)  # parameters grow with the square of the width
        found = {width: abs(parameters(RIVALS[name](width)) - size) for width in range(max(1, about - 1), about + 2)}
    return RIVALS[name](min(found, key=found.get))


RIVALS: dict[str, Callable[[int], nn.Module]] = {
    "UNet": lambda width: MonaiUNet(3, 1, 1, [width << i for i in range(5)], [2] * 4, num_res_units=2),
    "SegResNet": lambda width: SegResNet(init_filters=width, norm="instance")}  # its groups of 8 channels would allow few widths


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _predict(network: nn.Module, image: Tensor, precision: str) -> None:
    with torch.no_grad(), autocast("cpu", precision):
        network(image)


def _train(network: nn.Module, image: Tensor, precision: str) -> None:
    with autocast("cpu", precision):
        given = network(image)
    (given if isinstance(given, Tensor) else given[0] + sum(z.mean() for z in given[1])).mean().backward()
    network.zero_grad()


def _held(network: nn.Module, shape: Sequence[int], run: Callable, precision: str) -> float:
    """MB of tensors at the worst moment of a run."""
    held, network = Held(), copy.deepcopy(network).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, image = network.to_empty(device="cpu"), torch.empty(tuple(shape))
        for tensor in (*network.parameters(), *network.buffers(), image):
            held.add(tensor)
        with held:
            run(network, image, precision)
    return 1e-6 * held.peak
