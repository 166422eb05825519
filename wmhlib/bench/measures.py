"""What notebook 10_benchmark measures: each claim as a ratio of two ways to the same result, taken in turns in one process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ..canvas import from_canvas
from ..engine import WMHInferenceEngine
from ..errors import WMHError
from ..medsam import CHANNELS, PATCH
from ..metrics import challenge_scores, filter_components, lesion_table
from ..network import WMHNet, load_network
from ..nifti import Volume, save_like
from ..phantom import make_case, write_cohort
from ..precision import PRECISIONS, autocast, dtype_of, native_precision
from ..presets import preset
from ..search import PER_CASE, search
from ..sections import Operating
from ..settings import Recipe
from ..uncertainty import entropy
from ..volumes import Case, brain_slices, case_canvas, load_case
from ..workspace import RunFolder
from . import baselines
from .roofline import encoder_flops, fastest, part_seconds, points
from .table import alternate, row

CPU = torch.device("cpu")
GRID = Operating(sizes=(1, 2, 3, 5, 8, 12, 16, 20), sizes_mm3=(9.0,))  # 17 thresholds x 9 sizes x 2


@dataclass(frozen=True)
class Plan:
    """What is measured and how often: `full`, the recipe at full size on random weights; `small`, that of whole volumes; how many
    slices of a case the full network predicts (`slab`); points of the growth curves; `scale` of the synthetic case."""

    full: Recipe
    small: Recipe
    repetitions: int = 5
    few: int = 2  # of what takes many seconds
    matrix: int = 2048
    slab: int = 2
    scale: float = 1.0
    depth: int | None = None  # slices of the synthetic cases; None: all
    grid: Operating = GRID
    cases: tuple[int, ...] = (1, 3, 9)
    slices: tuple[int, ...] = (6, 12, 24, 48)
    sizes: tuple[int, ...] = (256, 384, 512, 768, 1024)
    views: tuple[int, ...] = (1, 2, 4, 8)
    quick: bool = False  # without trained weights and the memory of a step


def plan(small: str = "demo", quick: bool = False) -> Plan:
    """All of it at full size on recipe "colab" and on `small`, or with `quick` every measurement at toy size, which says nothing."""
    if not quick:
        return Plan(preset("colab", "encoder.random=true"), preset(small))
    toy = preset("smoke", "training.precision=bf16")
    return Plan(toy, toy, repetitions=1, few=1, matrix=256, slab=1, scale=4.0, depth=6, grid=Operating(thresholds=(0.3, 0.6), sizes=(1, 3), sizes_mm3=(9.0,)),
                cases=(1, 2), slices=(2, 4), sizes=(64, 96), views=(1, 2), quick=True)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def full_network(recipe: Recipe) -> WMHNet:
    """A WMHNet whose adapters do something, as after training."""
    network, generator = WMHNet(recipe).eval(), torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return network


def encoder_rows(recipe: Recipe, size: int, repetitions: int) -> list[dict]:
    """The encoder against segment_anything's on one image: forward, and with the gradients of the adapters; in fp32 and in the
    recipe's precision as this machine has it; and the share that useful operations reach of the rate of a `size`^3 matrix product
    taken in turns with it."""
    px, precision = recipe.inputs.img_size, native_precision(recipe.training.precision, CPU)
    network = full_network(recipe)
    eager = baselines.eager_network(network, px)
    generator = torch.Generator().manual_seed(0)
    image, direction = (torch.randn(1, channels, side, side, generator=generator) for channels, side in ((3, px), (CHANNELS, px // PATCH)))
    kinds = ["no"] if precision == "no" else ["no", precision]
    sam = baselines.sam_encoder(recipe.encoder, network.for_inference("no").encoder.state_dict(), px)
    merged = {kind: network.for_inference(kind).encoder for kind in kinds}
    adapted = {kind: full_network(recipe).cast_frozen(kind).encoder for kind in kinds}

    def run(encoder, kind: str) -> Tensor:
        with torch.inference_mode(), autocast("cpu", kind):
            return encoder(image)

    def gradients(encoder, kind: str) -> dict[str, Tensor]:
        encoder.zero_grad()
        with autocast("cpu", kind):
            features = encoder(image)
        (features.float() * direction).mean().backward()
        return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}

    square = {k: torch.randn(size, size).to(dtype_of(k)) for k in kinds}
    times, outs = alternate({"sam": lambda: run(sam, "no")} | {k: lambda k=k: run(merged[k], k) for k in kinds} |
                            {f"product {k}": lambda k=k: F.linear(square[k], square[k]) for k in kinds}, repetitions, warm=True)
    both, grads = alternate({"sam": lambda: gradients(eager.encoder, "no")} |
                            {k: lambda k=k: gradients(adapted[k], k) for k in kinds}, max(1, repetitions - 2), warm=True)
    rows, useful = [], sum(encoder_flops(recipe.encoder, px).values())
    for kind in kinds:
        name, fp32 = PRECISIONS[kind], kind == "no"
        rows.append(row(f"encoder, {px} px, {name}", times["sam"], times[kind], 1.25 if fp32 else 2.5, relative(outs[kind], outs["sam"]),
                        1e-4 if fp32 else 1e-2, note="against segment_anything, eager, fp32; the same weights"))
        error = max(float((grads[kind][n] - g).norm() / g.norm()) for n, g in grads["sam"].items() if g.any())
        rows.append(row(f"encoder with gradients, {px} px, {name}", both["sam"], both[kind], error=error, error_target=1e-4 if fp32 else np.nan,
                        note="forward and backward pass of one image; error: of the adapters' gradients, relative L2, the worst"))
        rows.append(row(f"matrix rate, encoder, {name}", [t * useful / (2 * size**3) for t in times[f"product {kind}"]], times[kind], 0.5,
                        note=f"{1e-9 * useful:.0f} useful GFLOP as fast as a {size}^3 matrix product, against the time taken: the ratio is the share"))
    return rows


def _segments_slices(run: RunFolder) -> bool:
    """Whether `run` has weights, of a network for slices of scans."""
    return run.best.exists() and not (run.recipe().volume.network or run.recipe().inputs.images)


def roofline_table(recipe: Recipe, repetitions: int) -> pd.DataFrame:
    """`roofline.points` of the merged network on one slice, ours in each precision and with segment_anything's encoder."""
    px, network = recipe.inputs.img_size, full_network(recipe)
    eager = baselines.eager_network(network, px)
    eager.encoder = baselines.sam_encoder(recipe.encoder, network.for_inference("no").encoder.state_dict(), px)
    measured = {("segment_anything", "no"): eager}
    measured |= {("ours", kind): network.for_inference(kind) for kind in {"no": 0, native_precision(recipe.training.precision, CPU): 0}}
    image = torch.randn(1, recipe.inputs.channels, px, px)
    spent = {name: part_seconds(net, image, dtype_of(name[1]), repetitions) for name, net in measured.items()}
    return points(recipe, {(who, PRECISIONS[kind]): parts for (who, kind), parts in spent.items()})


def trained_network(run: RunFolder, plan: Plan) -> tuple[WMHNet, str]:
    """The network of whole volumes and what to call it: that of `run`, or random weights where it has none for slices of scans or the plan is a quick
    one."""
    if not plan.quick and _segments_slices(run):
        network = load_network(run.best, run.recipe().encoder.checkpoint)[0]
        return network, f"{network.recipe.name} network, trained"
    return full_network(plan.small), f"{plan.small.name} network, random weights"


def volume_rows(network: WMHNet, case: Case, repetitions: int, what: str, device: torch.device = CPU, whole: Case | None = None) -> list[dict]:
    """A case with eight views on `device`: the engine against one slice and one view at a time on the same weights; and the same
    a slice looked at, without the gain of the slices that are skipped. Where `case` is a slab of the case `whole`, a third row
    says what these slices make of all of it."""
    recipe, target, place = network.recipe, *((10, ", on the GPU") if device.type == "cuda" else (4, ""))
    network.recipe = replace(recipe, operating=replace(recipe.operating, views=8))
    engine = WMHInferenceEngine(network, device)
    eager = baselines.eager_network(network, recipe.inputs.img_size).to(device)
    times, results = alternate({"baseline": lambda: baselines.slice_by_slice(eager, case), "ours": lambda: engine.predict(case)}, repetitions,
                               warm=device.type == "cuda")
    found, depth = results["ours"], case.grid.depth
    seen = found.prob_tta > 0
    error = float(np.abs(found.prob_tta - results["baseline"])[seen].max())
    words = (f"{depth} slices, {found.skipped} without brain skipped; at most {recipe.operating.batch_size} in a pass; {PRECISIONS[engine.precision]} with merged adapters against fp32 with "
             "adapters beside; error: of the probabilities of slices looked at, absolute")
    rows = [row(f"{what}{place}", times["baseline"], times["ours"], np.nan if whole else target, error, note=words)]
    each = [[t / depth for t in times["baseline"]], [t / (depth - found.skipped) for t in times["ours"]]]
    rows.append(row(f"{what}: a slice{place}", *each, note="the same times, each divided by the slices it looked at"))
    if whole:
        depth, brain = whole.grid.depth, len(brain_slices(whole))
        rows.append(row(f"{what}: all slices{place}", [t * depth for t in each[0]], [t * brain for t in each[1]], target,
                        note=f"extrapolated from the slab to {depth} slices, {depth - brain} without brain skipped"))
    return rows


def slab(case: Case, slices: int) -> Case:
    """The `slices` middle slices (of the last axis) of a case."""
    first = (case.images.shape[-1] - slices) // 2
    part = np.s_[..., first : first + slices]
    volume = Volume(case.volume.data[part], case.volume.image.slicer[part], case.volume.path)
    grid = replace(case.grid, shape=(*case.grid.shape[:2], slices))
    return replace(case, volume=volume, images=case.images[part], inner=case.inner[part], grid=grid, mask=None if case.mask is None else case.mask[part])


def challenge_cases(folder: str | Path, recipe: Recipe, scale: float = 1.0, slices: int | None = None) -> dict[str, Case]:
    """A synthetic case of each of the challenge's sites (Utrecht 240 x 240 x 48, GE3T 132 x 256 x 83 down to the neck), or its
    middle `slices`, by the site's name; written to `folder` and read as the recipe wants it."""
    files = write_cohort(folder, 3, recipe.seed, scale, progress=False)
    cases = {row.site: load_case(row.flair, row.t1, row.mask, recipe.inputs) for row in files.itertuples()}
    return {site: slab(case, slices) if slices else case for site, case in cases.items()}


def predicted(case: Case, number: int) -> dict:
    """What `search` reads of a case: two probabilities around the lesions of its mask, blurred and with some false ones."""
    rng = np.random.default_rng(number)
    lesion = ndimage.gaussian_filter((case.mask == 1).astype(np.float32), (1, 1, 0.3))
    grain = ndimage.gaussian_filter(rng.standard_normal(case.mask.shape, np.float32), (2, 2, 0.7)) * case.inner
    prob, prob_tta = (1 / (1 + np.exp(-(12 * lesion + level * grain / grain.std() - 5))) for level in (0.8, 0.6))
    return {"case": f"synthetic_{number}", "split": "val", "spacing": case.volume.spacing, "reference": case.mask, "prob": prob,
            "prob_tta": prob_tta, "flair_z": case.images[0], "inner": case.inner}


def search_rows(case: Case, grid: Operating = GRID, repetitions: int = 3) -> list[dict]:
    """The search over all of `grid` on one case against labelling each mask anew; the error is that of the two tables."""
    item = predicted(case, 0)
    naive, found = alternate({"naive": lambda: baselines.naive_search([item], grid)}, 1)
    ours, tables = alternate({"ours": lambda: search([item], grid)[0]}, repetitions)
    column = tables["ours"][PER_CASE + item["case"]].to_numpy()
    expected = np.array(found["naive"][item["case"]])
    error = 0.0 if np.array_equal(column, expected, equal_nan=True) else float(np.nanmax(np.abs(column - expected)))
    components = ndimage.label(item["prob"] >= min(grid.thresholds), np.ones((3, 3, 3)))[1]
    return [row(f"search, {len(column)} points, one case", naive["naive"], ours["ours"], 100, error, 0.0,
                note=f"against scipy's labelling at each point and a pass for each component (up to {components}); error: of the table")]


def search_growth(case: Case, numbers: tuple[int, ...], grid: Operating = GRID) -> Iterator[dict]:
    """Seconds of a search over `numbers` of cases, which come one at a time (making them is not counted), and the most memory
    that Python's arrays held meanwhile, the scan itself apart."""
    for n in numbers:
        waited = [0.0]

        def cases(n=n, waited=waited) -> Iterator[dict]:
            for number in range(n):
                start = time.perf_counter()
                item = predicted(case, number)
                waited[0] += time.perf_counter() - start
                yield item

        start = time.perf_counter()
        search(cases(), grid)
        spent = time.perf_counter() - start - waited[0]
        tracemalloc.start()  # on another pass, since it slows Python
        search(cases(), grid)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        yield dict(what="search", along="cases", n=n, who="ours", seconds=spent, memory_mb=1e-6 * peak)


def around(case: Case, folder: str | Path, scale: float, size: int) -> pd.DataFrame:
    """Seconds, the least of three runs, of each step around the network that one case passes: a phantom of `scale`, a canvas of `size` pixels."""
    item, out = predicted(case, 0), Path(folder, "map.nii.gz")
    found = item["prob"] >= 0.5
    works = {"phantom: one case": lambda: make_case("Utrecht", 0, scale), "reading and normalising a scan": lambda: load_case(case.volume.path),
             f"onto the canvas of {size} px and back": lambda: from_canvas(case_canvas(case, size)[0], case.grid),
             "component filter": lambda: filter_components(found, 3), "the challenge's five metrics": lambda: challenge_scores(case.mask, found, case.volume.spacing),
             "table of lesions": lambda: lesion_table(found, item["prob"], case.volume.affine), "entropy": lambda: entropy(item["prob"]),
             "a map written": lambda: save_like(item["prob"].astype(np.float32), case.volume, out)}
    return pd.DataFrame({"step": list(works), "seconds": [fastest(work, 3) for work in works.values()]})


def predict_row(run: RunFolder) -> dict:
    """One challenge-sized scan through `wmhlib.suite predict` in a process of its own, from starting Python to files written,
    against 15 seconds. Without weights for slices of scans in `run` the row says that it was left out."""
    what, limit = "one scan, start to files", 15.0
    if not _segments_slices(run):
        return row(what, [limit], [np.nan], note=f"left out: no weights for slices of scans in {run.path}; make demo trains some")
    with tempfile.TemporaryDirectory() as folder:
        flair = write_cohort(Path(folder, "data"), 1, 0, progress=False).flair[0]
        command = [sys.executable, "-m", "wmhlib.suite", "predict", "--run", str(run.path), "--flair", flair, "--out", f"{folder}/out"]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        spent = time.perf_counter() - start
    if done.returncode:
        raise WMHError(f"prediction of a scan with the weights of {run.path} failed: {(done.stderr or done.stdout)[-2000:]}")
    return row(what, [limit], [spent], 1, note=f"against {limit:g} s; wmhlib.suite predict with the weights of {run.path}")
