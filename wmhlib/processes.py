"""What keeps a training the same for any number of processes, and the averaged weights.

Every process holds all weights and works on its share of a step's micro-batches. One sum over processes a step then gives
each of them the gradients, BatchNorm statistics and loss of the whole step.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from .errors import WMHError

_GRACE_S = 60.0  # longer than the main process delivers after an error


@contextlib.contextmanager
def main_speaks_first(main: bool) -> Iterator[None]:
    """After an error in all processes the launcher ends every one as soon as the first has ended: let that be the `main` one, which
    has files to deliver and the message to print."""
    try:
        yield
    except WMHError:
        if not main:
            time.sleep(_GRACE_S)
        raise


def sum_over_processes(accelerator: Accelerator, tensors: list[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes, which must call this with the same shapes; one exchange in float64."""
    if accelerator.num_processes > 1:
        flat = accelerator.reduce(torch.cat([t.detach().flatten().double() for t in tensors]), "sum")
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))


def from_main(accelerator: Accelerator, state: dict | None) -> dict | None:
    """What the main process has as `state` (as a checkpoint holds it), in every process; no pickled code is run."""
    if accelerator.num_processes == 1:
        return state
    buffer = io.BytesIO()
    torch.save(state, buffer)
    length = int(broadcast(torch.tensor(buffer.tell(), device=accelerator.device)))
    data = torch.zeros(length, dtype=torch.uint8)
    if accelerator.is_main_process:
        data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    data = broadcast(data.to(accelerator.device))
    return torch.load(io.BytesIO(data.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


class GradientSum:
    """Sums the gradients of a step's micro-batches in float64, where the order of the terms leaves no trace in float32. The
    order is the number of processes, and AdamW would make steps of full size out of what rounding leaves of a gradient that is
    zero (a bias before BatchNorm). `add` after each backward pass, the sum of `total` over processes, `end`."""

    def __init__(self, network: nn.Module):
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.total = [torch.zeros_like(p, dtype=torch.float64) for p in self.trained]

    def add(self) -> None:
        for total, parameter in zip(self.total, self.trained):
            if parameter.grad is not None:
                total += parameter.grad
                parameter.grad = None

    def end(self) -> None:
        for total, parameter in zip(self.total, self.trained):
            parameter.grad = total.to(parameter.dtype)
            total.zero_()


class StepStatistics:
    """Lets BatchNorm's running statistics move once an optimiser step, by the mean over the step's micro-batches:
    running = (1 - momentum) running + momentum mean. `begin`, `forward` before each forward pass, `sums` (to be summed over processes), `end`."""

    def __init__(self, network: nn.Module):
        self.norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.weight.requires_grad]
        self.momenta = [m.momentum for m in self.norms]

    def begin(self) -> None:
        self.before = [(m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in self.norms]
        self.passes = 0

    def forward(self) -> None:
        """Lets the next pass take its share of a mean over all since `begin`; torch's own (momentum None) waits for the GPU in every layer."""
        self.passes += 1
        for norm in self.norms:
            norm.momentum = 1 / self.passes

    def sums(self, micro_batches: int) -> list[Tensor]:
        """The statistics of this process's `micro_batches`, summed in place."""
        return [b.mul_(micro_batches) for m in self.norms for b in (m.running_mean, m.running_var)]

    def end(self, micro_batches: int) -> None:
        """`micro_batches`: of all processes."""
        for norm, momentum, (mean, variance, steps) in zip(self.norms, self.momenta, self.before):
            norm.running_mean.copy_(mean.lerp_(norm.running_mean / micro_batches, momentum))
            norm.running_var.copy_(variance.lerp_(norm.running_var / micro_batches, momentum))
            norm.num_batches_tracked.copy_(steps + 1)


class Average:
    """Exponential moving average of `live` tensors: average = d average + (1 - d) live after each step, with
    d = min(decay, (1 + step) / (10 + step)), so that the first steps do not hold on to the start; singular values that AdaLoRA has pruned are
    0 in it too. With decay 0 it does nothing."""

    def __init__(self, live: dict[str, Tensor], decay: float):
        self.decay, self.live = decay, live if decay else {}
        self.state = {name: tensor.clone() for name, tensor in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self.live.items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor, share)
                if "lora_E" in name:
                    self.state[name].masked_fill_(tensor == 0, 0.0)
            else:
                self.state[name].copy_(tensor)

    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state.items():
            tensor.copy_(state[name])

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the live tensors have the averages' values."""
        kept = {name: tensor.clone() for name, tensor in self.live.items()}
        for name, tensor in self.live.items():
            tensor.copy_(self.state[name])
        try:
            yield
        finally:
            for name, tensor in self.live.items():
                tensor.copy_(kept[name])
