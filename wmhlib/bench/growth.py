"""How cost grows with cases, slices, resolution and views, each point measured; and what 10,000 scans would cost."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from .. import hardware
from ..canvas import from_canvas
from ..engine import WMHInferenceEngine
from ..nifti import save_like
from ..precision import autocast, native_precision
from ..sections import Operating
from ..settings import Recipe
from ..threads import one_thread
from ..volumes import Case, brain_slices, case_canvas, load_case
from . import baselines
from .measures import CPU, Plan, full_network, search_growth, slab
from .roofline import fastest, network_flops
from .steps import Step

SUSTAINED = {"one H100-class GPU": 150e12, "one A100-class GPU": 80e12, "one T4-class GPU": 12e12}  # FLOP/s assumed, not measured


def growth(plan: Plan, case: Case) -> pd.DataFrame:
    """Every point of `plan`, measured: `what`, `along` ("cases", "slices", "px" or "views"), `n`, `who`, `seconds`, `memory_mb` (NaN
    where not measured)."""
    points = [*case_growth(plan.small, case, plan.cases, plan.grid), *slice_growth(plan.small, case, plan.slices),
              *resolution_growth(plan.full, plan.sizes), *view_growth(plan.small, slab(case, max(plan.slices)), plan.views)]
    return pd.DataFrame(points).reindex(columns=["what", "along", "n", "who", "seconds", "memory_mb"])


def case_growth(recipe: Recipe, case: Case, numbers: Sequence[int], grid: Operating) -> Iterator[dict]:
    """The search over a number of cases, and an epoch of training (one micro-batch a case) over as many."""
    yield from search_growth(case, tuple(numbers), grid)
    step = Step(recipe, "ours")
    step.run()
    for n in numbers:
        yield dict(what="epoch, a batch a case", along="cases", n=n, who="ours", seconds=fastest(lambda n=n: [step.run() for _ in range(n)], 1))


def slice_growth(recipe: Recipe, case: Case, numbers: Sequence[int]) -> Iterator[dict]:
    """Prediction of the middle slices of a case with eight views, and the most bytes of tensors that it holds at once."""
    engine = WMHInferenceEngine(full_network(_views(recipe, 8)), CPU)
    engine.predict(slab(case, 2))
    for n in numbers:
        part, held = slab(case, n), hardware.Held()
        spent = fastest(lambda part=part: engine.predict(part), 1)
        with held:
            engine.predict(part)
        yield dict(what="prediction", along="slices", n=n, who="ours", seconds=spent, memory_mb=1e-6 * held.peak)


def view_growth(recipe: Recipe, case: Case, numbers: Sequence[int]) -> Iterator[dict]:
    """Prediction of a case with a number of views (1, 2, 4 or 8)."""
    network = full_network(recipe)
    WMHInferenceEngine(network, CPU).predict(slab(case, 2))
    for n in numbers:
        network.recipe = _views(recipe, n)
        engine = WMHInferenceEngine(network, CPU)
        yield dict(what="prediction", along="views", n=n, who="ours", seconds=fastest(lambda engine=engine: engine.predict(case), 1))


def resolution_growth(recipe: Recipe, sizes: Sequence[int]) -> Iterator[dict]:
    """The encoder on one image of a number of pixels a side: ours at the default precision, and segment_anything's."""
    precision = native_precision(recipe.training.precision, CPU)
    plain, ours = (full_network(recipe).for_inference(kind).encoder for kind in ("no", precision))

    def run(encoder, image, kind: str = "no") -> None:
        with torch.inference_mode(), autocast("cpu", kind):
            encoder(image)

    for px in sizes:
        image, sam = torch.randn(1, 3, px, px), baselines.sam_encoder(recipe.encoder, plain.state_dict(), px)
        for who, work in (("segment_anything", partial(run, sam, image)), ("ours", partial(run, ours, image, precision))):
            yield dict(what="encoder", along="px", n=px, who=who, seconds=fastest(work, 2))


def _views(recipe: Recipe, views: int) -> Recipe:
    return replace(recipe, operating=replace(recipe.operating, views=views))


def files_s(case: Case) -> float:
    """Seconds of one core for everything around the network of one case: reading, normalising, canvases, writing three maps."""
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        return fastest(lambda: _files(case, Path(folder)), 1)


def _files(case: Case, folder: Path) -> None:
    read = load_case(case.volume.path)
    back = from_canvas(case_canvas(read, 512)[0], read.grid)
    for name in ("mask", "probability", "uncertainty"):
        save_like(back, read.volume, folder / f"{name}.nii.gz")


def ten_thousand(recipe: Recipe, case: Case, rows: Sequence[dict], cpu_s: float) -> str:
    """A paragraph: what ten thousand scans like `case` cost with eight views. Operations are counted (`roofline.network_flops`), GPU
    rates assumed and named (`SUSTAINED`); the network's time on this machine is that of a slice in the benchmark's `rows`, and `cpu_s`
    the seconds of one core for a scan's files (`files_s`), both measured."""
    scans, slices = 10_000, len(brain_slices(case))
    case_s = slices * next(row["ours_s"] for row in reversed(rows) if row["what"].endswith(": a slice"))
    work = network_flops(recipe) * slices * 8
    hours = {name: scans * work / rate / 3600 for name, rate in SUSTAINED.items()}
    name, alone = next(iter(hours.items()))
    processes = math.ceil(1 + cpu_s * SUSTAINED[name] / work)
    guesses = ", ".join(f"{_hours(value)} on {gpu} ({SUSTAINED[gpu] / 1e12:g} TFLOP/s)" for gpu, value in hours.items())
    return (f"**{scans:,} scans (an estimate).** A scan of {slices} slices with brain and eight views is {work / 1e12:,.0f} TFLOP of the {recipe.name} "
            f"network ({network_flops(recipe) / 1e9:.0f} GFLOP a slice and view, counted). At assumed sustained rates, which were not measured here, the network needs {guesses}. "
            f"On this machine's processor one such scan takes the network {_seconds(case_s)}, so {scans:,} scans {_hours(scans * case_s / 3600)}. Reading and writing "
            f"take {_seconds(cpu_s)} of one core a scan (measured), {_hours(scans * cpu_s / 3600)} for all: a process does one after the other, so {processes} of them "
            f"keep {name} busy (one alone: {_hours(scans * (work / SUSTAINED[name] + cpu_s) / 3600)}). Scans are independent: `accelerate launch` (one process a GPU) or "
            f"`torchrun --nproc-per-node N` with `-m wmhlib.derivatives RUN FLAIR OUT` gives each process its share, and 8 such GPUs with {8 * processes} processes and cores "
            f"would need about {_hours(alone / 8)}, the slowest disk or network permitting. Two views cost a quarter of this, one an eighth.")


def _hours(value: float) -> str:
    steps = ((72, 1 / 24, "{:,.0f} days"), (10, 1, "{:.0f} hours"), (1, 1, "{:.1f} hours"), (1 / 30, 60, "{:.0f} minutes"))
    return next((words.format(value * factor) for least, factor, words in steps if value >= least), "under two minutes")


def _seconds(value: float) -> str:
    return f"{value / 60:.1f} minutes" if value > 120 else f"{value:.3g} s"
