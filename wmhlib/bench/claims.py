"""What a small student costs beside ViT-H, counted and measured: the rows (teacher, student, px, precision, batch) of notebook 08_distill.

Every row is about the image encoder: what a teacher and its student differ in.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from statistics import median

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .. import hardware
from ..medsam import build_encoder
from ..precision import best_device, native_precision
from ..quantised import quantise, weight_bytes
from ..sections import Encoder
from ..settings import Recipe
from ..teacher import ENCODERS
from .roofline import convolution_flops
from .table import alternate, each_alone, measured_apart

TARGETS = {  # of each claim: column, limit, whether more is better; how a table's head says it
    "at least 90 % of the teacher's Dice": ("dice_ratio", 0.9, True, "Dice 90 %"),
    "at least 90 % less weight memory than ViT-H in fp32": ("weight_saved", 0.9, True, "weights -90 %"),
    "below 1 GB at inference": ("peak_mb", 1000, False, "< 1 GB"),
    "below 10 GFLOP at 256 px": ("gflop_256", 10, False, "< 10 GFLOP"),
    "at least 7x lower latency than ViT-H": ("reference_ratio", 7, True, "7x faster"),
}
REFERENCE = "vit_h"
NAMES = {"vit_h": "ViT-H", "vit_b": "ViT-B"}


@dataclass(frozen=True)
class Subject:
    """An encoder in one `precision` ("fp32", "bf16", "nf4") on `batch` images of px x px."""

    name: str
    encoder: Encoder
    px: int
    precision: str = "fp32"
    batch: int = 1

    def build(self, device: torch.device) -> nn.Module:
        """The encoder, frozen, its matrices in the precision; with random weights, which cost the same."""
        encoder = build_encoder(dataclasses.replace(self.encoder, checkpoint=""), 0).eval().requires_grad_(False)
        if self.precision == "nf4":
            return quantise(encoder).to(device)
        if self.precision == "bf16":
            for module in encoder.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(torch.bfloat16)
        return encoder.to(device)

    def run(self, encoder: nn.Module, image: Tensor) -> Tensor:
        """A pass; the products of "bf16" and "nf4" in bf16 where the device has it."""
        kind = image.device.type
        half = self.precision == "bf16" or (self.precision == "nf4" and native_precision("bf16", image.device) == "bf16")
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=half):
            return encoder(image)

    def image(self, device: torch.device) -> Tensor:
        return torch.randn(self.batch, 3, self.px, self.px, generator=torch.Generator().manual_seed(0)).to(device)


def gflop(encoder: Encoder, px: int) -> float:
    """10^9 operations of one image, as torch's FlopCounterMode counts the products this code runs (1 MAC = 2 FLOP; norms, softmax and
    activations are not counted), on tensors without data."""
    with torch.device("meta"):
        module = build_encoder(dataclasses.replace(encoder, checkpoint=""), 0)
    count = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = module.to_empty(device="cpu")
        with count, torch.no_grad():
            module(torch.empty(1, 3, px, px))
    return 1e-9 * count.get_total_flops()


def inference_memory(subjects: list[Subject]) -> list[dict[str, float]]:
    """Of each, MB of a fresh process: `libraries_mb` before the encoder is built (on a GPU 0, whose tensors alone count), `peak_mb` the
    most while a pass runs."""
    return measured_apart("wmhlib.bench.claims", [dataclasses.asdict(subject) for subject in subjects])


def latencies(subjects: list[Subject], built: dict[tuple[str, str], nn.Module], repetitions: int, device: torch.device) -> dict[Subject, float]:
    """Median seconds of a pass of each, taken in turns in one run after a round that does not count; `built`: the encoders by name and precision."""
    images = {s: s.image(device) for s in subjects}
    works = {s: lambda s=s: s.run(built[s.name, s.precision], images[s]) for s in subjects}
    times, _ = alternate(works, repetitions, warm=True)
    return {subject: median(spent) for subject, spent in times.items()}


def lineup(teacher: Encoder, student: Encoder, px: int, quick: bool = False, large: bool = False) -> tuple[dict[str, Encoder], list[tuple[str, Subject]]]:
    """Who is compared: encoders by name, "vit_h" (the reference), "vit_b", "teacher" and "student"; and pairs of a teacher's name and
    a student. At 256 and 512 px (`large`: 1024 too) against ViT-H, at `px`, where both have a Dice, against the teacher. `quick`:
    toys in the place of ViT-H and ViT-B, at 64 px alone, which says nothing."""
    toy = Encoder(64, 2, 2, (1,), 4, 4, random=True)
    encoders = {name: toy if quick else ENCODERS[name] for name in ("vit_h", "vit_b")} | {"teacher": teacher, "student": student}
    every = ("fp32", "bf16", "nf4")
    wanted = [("vit_b", 256, every), ("vit_b", 512, every), ("student", 256, every), ("student", 512, ("fp32",))]
    if quick:
        wanted = [("vit_b", 64, ("nf4",)), ("student", 64, ("fp32",))]
    wanted += [(name, 1024, ("fp32", "nf4")) for name in ("vit_b", "student")] * large
    pairs = [("vit_h", Subject(name, encoders[name], side, kind)) for name, side, kinds in wanted for kind in kinds]
    return encoders, pairs + [("teacher", Subject("student", student, px, kind)) for kind in ("fp32", "nf4")]


def claims(encoders: dict[str, Encoder], pairs: list[tuple[str, Subject]], repetitions: int = 3,
           dice: dict[tuple[str, int, str], tuple[float, float]] | None = None, progress: bool = True) -> pd.DataFrame:
    """The table: a row for each pair of `lineup`, after one for each teacher itself at each size.

    dice: of a student's (name, px, precision) its Dice and its teacher's, same cases and threshold. A student in fp32 is
    compared with the teacher in fp32, one in bf16 or NF4 with the teacher in bf16 (where the device has it), at the same size and
    batch. Columns: teacher, student, px, precision, batch, parameters, weight_mb, weight_saved (share of ViT-H's in fp32), libraries_mb,
    peak_mb, gflop, gmac, network_gflop (with decoder and image skip), gflop_256 (at 256 px), seconds, teacher_seconds,
    latency_ratio, reference_ratio (the same where the teacher is ViT-H), operations_ratio, dice, teacher_dice, dice_ratio; NaN where
    something was not measured. Without bf16 instructions there are no rows in bf16.
    """
    device = best_device()
    native = native_precision("bf16", device) == "bf16"
    asked = {(name, s): Subject(name, encoders[name], s.px, "fp32" if s.precision == "fp32" or not native else "bf16", s.batch)
             for name, s in pairs if native or s.precision != "bf16"}
    order = list(encoders)
    teachers = sorted(dict.fromkeys(asked.values()), key=lambda s: (order.index(s.name), s.px, s.precision != "fp32"))
    lines = [("", s) for s in teachers] + list(asked)
    subjects = list(dict.fromkeys(s for _, s in lines))
    if progress:
        print(f"{len(subjects)} encoders in turns on {device}, {repetitions} times", flush=True)
    built = {(s.name, s.precision): s.build(device) for s in subjects}
    sizes, spent = {key: weight_bytes(module) for key, module in built.items()}, latencies(subjects, built, repetitions, device)
    del built
    torch.cuda.empty_cache()  # for the processes that follow
    whole, peaks = 4 * _parameters(encoders[REFERENCE]), dict(zip(subjects, inference_memory(subjects)))
    operations = {(name, px): gflop(encoders[name], px) for name, px in {(s.name, px) for s in subjects for px in (s.px, 256)}}
    rows = []
    for teacher, s in lines:
        counted, against = operations[s.name, s.px], asked.get((teacher, s))
        own, its = (dice or {}).get((s.name, s.px, s.precision), (np.nan, np.nan)) if teacher not in ("", REFERENCE) else (np.nan, np.nan)
        ratio = spent[against] / spent[s] if against else np.nan
        rows.append(dict(
            teacher=f"{against.name}, {against.precision}" if against else "", student=s.name, px=s.px, precision=s.precision, batch=s.batch,
            parameters=_parameters(s.encoder), weight_mb=1e-6 * sizes[s.name, s.precision], weight_saved=1 - sizes[s.name, s.precision] / whole,
            libraries_mb=peaks[s]["libraries_mb"], peak_mb=peaks[s]["peak_mb"], gflop=counted, gmac=counted / 2, network_gflop=counted + _decoder_gflop(s.px),
            gflop_256=operations[s.name, 256], seconds=spent[s], teacher_seconds=spent[against] if against else np.nan, latency_ratio=ratio,
            reference_ratio=ratio if teacher == REFERENCE else np.nan, operations_ratio=operations[teacher, s.px] / counted if against else np.nan,
            dice=own, teacher_dice=its, dice_ratio=own / its))
    return pd.DataFrame(rows)


def reached(table: pd.DataFrame) -> pd.DataFrame:
    """Of each student's row whether each claim of TARGETS holds, "yes", "no" or "" where it was not measured, and `why` not."""
    rows = table[table.teacher != ""]
    found = pd.DataFrame({claim: np.where(rows[column].isna(), "", np.where(rows[column] >= limit if more else rows[column] < limit, "yes", "no"))
                          for claim, (column, limit, more, _) in TARGETS.items()}, rows.index)
    keys = rows[["student", "px", "precision", "batch", "teacher"]]
    return pd.concat([keys, found, pd.Series([_why(row, found.loc[row.Index]) for row in rows.itertuples()], rows.index, name="why not")], axis=1)


def _why(row, held: pd.Series) -> str:
    """Why the claims that do not hold do not, one sentence each."""
    reasons = (
        f"Dice {row.dice:.3f} against {row.teacher_dice:.3f}",
        f"{row.weight_mb:.0f} MB in {row.precision} are {100 * (1 - row.weight_saved):.0f} % of ViT-H's in fp32" + ("; in NF4 it holds or comes nearest" if row.precision != "nf4" else ""),
        f"the peak is {row.peak_mb:.0f} MB" + (f", {row.libraries_mb:.0f} of them libraries" if row.libraries_mb else ""),
        f"{row.gflop_256:.0f} GFLOP at 256 px, which no precision changes: only a smaller encoder does",
        f"{row.operations_ratio:.1f}x fewer operations are {row.latency_ratio:.1f}x less time at equal technique"
        + ("; NF4 unpacks its weights in every pass: it saves memory, not time" if row.precision == "nf4" else ""))
    return "; ".join(reason for reason, claim in zip(reasons, TARGETS) if held[claim] == "no")


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table ready to read."""
    def text(column: str, form: str, scale: float = 1.0) -> pd.Series:
        return (table[column] * scale).map(form.format).where(table[column].notna(), "")

    return _named(table).assign(**{
        "M parameters": text("parameters", "{:.1f}", 1e-6), "weights (MB)": text("weight_mb", "{:.1f}"), "saved": text("weight_saved", "{:.1f} %", 100),
        "peak (MB)": text("peak_mb", "{:.0f}"), "GFLOP": text("gflop", "{:.1f}"), "GMAC": text("gmac", "{:.1f}"), "+ decoder": text("network_gflop", "{:.1f}"),
        "ms": text("seconds", "{:.1f}", 1e3), "faster": text("latency_ratio", "{:.1f}x"), "Dice ratio": text("dice_ratio", "{:.2f}")}).set_index("encoder")


def verdicts(reached: pd.DataFrame) -> pd.DataFrame:
    """What `reached` found, ready to read."""
    heads = {claim: head for claim, (*_, head) in TARGETS.items()}
    return pd.concat([_named(reached), reached[[*heads, "why not"]].rename(columns=heads)], axis=1).set_index("encoder")


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """Columns `encoder` (its size of image and precision with it) and `against`."""
    encoder = table.student.map(lambda name: NAMES.get(name, name)) + " " + table.px.astype(str) + " px " + table.precision
    return pd.DataFrame({"encoder": encoder, "against": table.teacher.replace({f"^{name}": shown for name, shown in NAMES.items()}, regex=True)})


def _parameters(encoder: Encoder) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_encoder(dataclasses.replace(encoder, checkpoint=""), 0).parameters())


def _decoder_gflop(px: int) -> float:
    """Of channel adapter, decoder and image skip of a WMHNet on one FLAIR slice."""
    recipe = Recipe()
    return 1e-9 * convolution_flops(dataclasses.replace(recipe, inputs=dataclasses.replace(recipe.inputs, img_size=px)))


def _measure(given: dict) -> dict[str, float]:
    """`inference_memory` of one subject (as a dict), in this process."""
    process, device = psutil.Process(), best_device()
    libraries, encoder = process.memory_info().rss if device.type == "cpu" else 0, given["encoder"]
    subject = Subject(**given | {"encoder": Encoder(**encoder | {"global_blocks": tuple(encoder["global_blocks"])})})
    module, image = subject.build(device), subject.image(device)
    hardware.reset_peak(device)
    subject.run(module, image)
    return {"libraries_mb": 1e-6 * libraries, "peak_mb": 1e-6 * hardware.measured_peak(device)}


if __name__ == "__main__":
    threads, subjects = json.load(sys.stdin)
    print(json.dumps(each_alone(_measure, subjects, threads)))
