"""The training step of notebook 10_benchmark: its time against the straightforward one, its memory in a process of its own (this module's
`__main__`), and what a GPU makes of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor

from .. import hardware
from ..losses import total_loss
from ..network import WMHNet
from ..precision import autocast, native_precision
from ..presets import preset
from ..ranks import Ranks
from ..settings import Recipe
from ..slicestore import CaseSlices
from ..tasks import Slices
from . import baselines
from .measures import CPU
from .roofline import machine, network_flops
from .table import alternate, each_alone, measured_apart, row

_SLICES = 1400  # that an epoch of the challenge's training cases draws: about 42 cases of 33 slices


def random_slices(recipe: Recipe, slices: int) -> list[CaseSlices]:
    """A case of noise with a disc of lesion in each slice: what a training step costs does not depend on what it sees."""
    size, generator = recipe.inputs.img_size, torch.Generator().manual_seed(recipe.seed)
    images = torch.randn(len(recipe.inputs.modalities), slices, size, size, generator=generator).half()
    y, x = torch.meshgrid(*[torch.arange(size) - size / 2] * 2, indexing="ij")
    return [CaseSlices("noise", images, ((x**2 + y**2) < (size / 16) ** 2).byte().expand(slices, -1, -1))]


class Step:
    """A training step on one micro-batch of the recipe, "ours" or "eager", from slices in memory to changed weights."""

    def __init__(self, recipe: Recipe, who: str, device: torch.device = CPU):
        self.recipe, self.who, self.device = recipe, who, device
        self.precision = native_precision(recipe.training.precision, device) if who == "ours" else "no"
        network = WMHNet(recipe)
        network = network.cast_frozen(self.precision) if who == "ours" else baselines.eager_network(network, recipe.inputs.img_size)
        self.network = network.train().to(device)
        self.ranks = Ranks(self.network)
        self.optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], recipe.training.lr)
        self.cases = random_slices(recipe, max(8, recipe.training.batch_size))
        self.places = [(0, z) for z in range(recipe.training.batch_size)]
        self.rng, self.generator = np.random.default_rng(recipe.seed), torch.Generator().manual_seed(recipe.seed)

    def load(self) -> tuple[Tensor, Tensor]:
        """The loader alone."""
        if self.who == "eager":
            return baselines.per_sample_batch(self.cases, self.places, self.recipe.augment, self.recipe.inputs.context, self.rng)
        return Slices(self.recipe).batch(self.cases, self.places, self.device, self.generator)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        with autocast(self.device, self.precision):
            return self.network(images)

    def run(self) -> float:
        """The step; its loss."""
        images, labels = self.load()
        fused, scales = self.forward(images)
        loss = total_loss(fused, scales, labels, self.recipe.loss)[0]
        if self.ranks.triplets:
            loss = loss + self.ranks.regulariser()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.training.clip_norm)
        self.optimizer.step()
        self.ranks.update(1, 2)  # while ranks are pruned
        self.optimizer.zero_grad()
        return float(loss.detach())

    def losses(self) -> Callable[[], None]:
        """The loss of the last pass with its gradient, as a work of its own."""
        images, labels = self.load()
        with torch.no_grad():
            given = self.forward(images)

        def work() -> None:
            fused, scales = (given[0].float().requires_grad_(), [z.float().requires_grad_() for z in given[1]])
            total_loss(fused, scales, labels, self.recipe.loss)[0].backward()

        return work


def step_rows(recipe: Recipe, repetitions: int, memory: dict[str, dict[str, float]] | None = None) -> list[dict]:
    """The step against the straightforward one, the loader and the loss against the step. `memory`: of "ours" and "eager", as
    `step_memories` gives it."""
    eager, ours = Step(recipe, "eager"), Step(recipe, "ours")
    what = f"batch {recipe.training.batch_size}, {recipe.inputs.img_size} px"
    times, _ = alternate({"eager": eager.run, "ours": ours.run}, repetitions)
    loaders, _ = alternate({"eager": eager.load, "ours": ours.load}, repetitions + 2)
    loss, _ = alternate({"ours": ours.losses()}, repetitions + 2)
    kept = [sum(memory[who].values()) if memory else np.nan for who in ("eager", "ours")]
    words = "loader, forward, backward, clipping, AdamW" + (f"; memory: the peak of a process of its own, of which {memory['eager']['loaded_mb']:.0f} and "
                                                            f"{memory['ours']['loaded_mb']:.0f} MB before the step" if memory else "")
    return [row(f"training step, {what}", times["eager"], times["ours"], 2, memory=kept, memory_target=0.5, note=words),
            row(f"loader alone, {what}", times["ours"], loaders["ours"], 5, note="against our whole step, which holds it"),
            row(f"augmentation, {what}", loaders["eager"], loaders["ours"], note="in a batch, against one slice after the other with scipy"),
            row(f"loss on all scales, {what}", times["ours"], loss["ours"], 2, note="forward and backward, against our whole step: more than half would dominate")]


def step_memories(recipes: Sequence[Recipe], who: str) -> list[dict[str, float]]:
    """Of each, MB of the process of `who` ("ours" or "eager") with the network loaded (`loaded_mb`) and what a step holds above that at
    its peak (`step_mb`), measured in a fresh process that has loaded the libraries and nothing else."""
    return measured_apart("wmhlib.bench.steps", who, [recipe.to_json() for recipe in recipes], CUDA_VISIBLE_DEVICES="")


def step_rates(recipe: Recipe, batches: Sequence[int], rate: float, device: torch.device, repetitions: int = 5) -> pd.DataFrame:
    """Our step on `device` at several batch sizes: `samples_per_s`, `mfu` (share of the matrix `rate` in GFLOP/s that the useful
    operations of forward and backward pass reach), `peak_mb` of memory, and `recipe_hours`: all epochs of the recipe on the challenge's
    training cases, extrapolated from these steps (about 1,400 slices an epoch; validation not counted), NaN for larger micro-batches than the recipe takes."""
    rows, flops = [], 1e-9 * network_flops(recipe, training=True)
    for size in batches:
        step = Step(replace(recipe, training=replace(recipe.training, batch_size=size)), "ours", device)
        step.run()
        hardware.reset_peak(device)
        times, _ = alternate({"ours": step.run}, repetitions)
        spent = float(np.median(times["ours"]))
        rows.append(dict(batch=size, step_s=spent, samples_per_s=size / spent, mfu=flops * size / spent / rate,
                         peak_mb=1e-6 * hardware.measured_peak(device), recipe_hours=recipe.training.epochs * _SLICES * spent / size / 3600 if size <= recipe.training.batch_size else np.nan))
        del step
    return pd.DataFrame(rows)


def gpu_rates(recipe: Recipe) -> tuple[pd.DataFrame, dict] | None:
    """`step_rates` on the GPU at those of batch 4, 16 and 64 that fit it, and what `machine` says of it; None where there is none."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda")
    measured = machine(8192 if hardware.device_memory(device)[1] > 12e9 else 4096, device=device)
    precision = native_precision(recipe.training.precision, device)
    limit = hardware.SHARE * hardware.device_memory(device)[1]
    sizes = [n for n in (4, 16, 64) if hardware.expected_peak(replace(recipe, training=replace(recipe.training, batch_size=n)), device) <= limit]
    return step_rates(recipe, sizes or [1], measured["fp32" if precision == "no" else precision], device), measured


def _measure(recipe: Recipe, who: str) -> dict[str, float]:
    """`step_memories` of one recipe, in this process."""
    Step(preset("smoke"), who).run()  # what the first step of all sets up
    step = Step(recipe, who)
    loaded = psutil.Process().memory_info().rss
    hardware.reset_peak(CPU)
    step.run()
    return {"loaded_mb": 1e-6 * loaded, "step_mb": 1e-6 * (hardware.measured_peak(CPU) - loaded)}


if __name__ == "__main__":
    threads, who, recipes = json.load(sys.stdin)
    print(json.dumps(each_alone(partial(_measure, who=who), [Recipe.from_json(text) for text in recipes], threads)))
