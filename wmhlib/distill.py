"""Distillation: a frozen teacher's image encoder teaches a smaller one, on embeddings it computed once.

The student matches the teacher's embeddings, and the masks that the teacher's own frozen prompt encoder and mask decoder make
of them for points and boxes drawn on lesions and tissues. Its file is a base like the teacher's: its encoder beside whatever
else the teacher's file holds, so that prompts, channel adapter and decoder go on working.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import draw_slices, few_slices, stack_slices
from .checkpoints import Keeper
from .embeddings import Embeddings, cached
from .epochs import learning_rate
from .errors import InputError, WMHError
from .files import table_bytes
from .medsam import build_encoder
from .precision import autocast, best_device, native_precision
from .pretext import draw_parts
from .promptable import draw_prompts
from .seeds import stable_seed
from .settings import merge
from .slicestore import CaseSlices
from .tasks import cut
from .teacher import Distillation, Teacher
from .weights import half, tensors_bytes
from .workspace import RunFolder

STUDENT = "student.safetensors"
_STATE = ("origin", "history", "student", "optimizer", "scaler")


def feature_loss(student: Tensor, teacher: Tensor, mean: Tensor, std: Tensor, kind: str) -> Tensor:
    """Mean squared ("mse") or Huber (delta 1) difference of embeddings B x 256 x h x w, each channel normalised by the mean and
    standard deviation that the teacher's have: the share of their variance that is not explained. The student's map is
    resized to the teacher's grid where they differ."""
    if student.shape != teacher.shape:
        student = _resized(student, teacher.shape[-1])
    student, teacher = ((x.float() - mean) / std for x in (student, teacher))
    return F.mse_loss(student, teacher) if kind == "mse" else F.huber_loss(student, teacher)


def mask_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of mask logits, p = sigmoid(logit / T), the mean over pixels (Hinton et al. 2015, with two classes)."""
    student, teacher = student.float() / temperature, teacher.float() / temperature
    target = torch.sigmoid(teacher)
    entropy = F.binary_cross_entropy_with_logits(teacher, target)
    return temperature**2 * (F.binary_cross_entropy_with_logits(student, target) - entropy)


def distill(settings: Distillation, train: list[CaseSlices], val: list[CaseSlices], folder: str | Path, progress: bool = True) -> pd.DataFrame:
    """Train the student on the slices of `train`; go on from the newest checkpoint in `folder`, ending as if never interrupted.

    Writes embeddings.npy (the cache), history.csv, checkpoints and at the end student.safetensors. Returns the history, a row an
    epoch: `lr`; `loss`, `feature` and `mask`, means over training slices (`mask` over batches with something to ask for); the same of validation slices as val_*;
    `val_agreement`, the mean Dice of student's and teacher's masks at the same prompts; `val_dice` and `val_teacher_dice`, those
    against the prompted objects. Raises CheckpointError where the folder belongs to another distillation, InputError without slices,
    WMHError for a loss that is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = best_device()
    job = _Job(settings, train, val, device)
    placeless = dataclasses.replace(settings, teacher=dataclasses.replace(settings.teacher, checkpoint=""))  # the file may have moved
    origin = {"settings": json.dumps(dataclasses.asdict(placeless)), "teacher": job.teacher.sha256, "data": job.data}
    with Keeper(RunFolder(folder)) as keeper:
        state = keeper.newest(lambda state: _differing(state, origin, placeless))
        history = job.load(state) if state else []
        keeper.claim()
        job.embed(folder / "embeddings.npy", progress)
        if progress and state:
            print(f"going on from {keeper.source.name}", flush=True)
        while len(history) < settings.training.epochs:
            epoch = len(history) + 1
            history.append({"epoch": epoch} | job.epoch(epoch) | job.validate())
            keeper.hold()
            keeper.write(folder / "history.csv", table_bytes(pd.DataFrame(history)))
            if epoch % settings.training.checkpoint_epochs == 0 or epoch == settings.training.epochs:
                keeper.checkpoint(epoch, {"origin": origin, "history": history, "student": job.student.state_dict(), "optimizer": job.optimizer.state_dict(),
                                          "scaler": job.scaler.state_dict()})
            if progress:
                print("  ".join([f"epoch {epoch:3d}/{settings.training.epochs}"] +
                                [f"{name.replace('_', ' ')} {history[-1][name]:.3f}" for name in ("feature", "mask", "val_feature", "val_agreement")]), flush=True)
        keeper.write(folder / STUDENT, student_bytes(job.student, job.teacher, origin))
        keeper.release()
    return pd.DataFrame(history)


def _differing(state: dict, origin: dict[str, str], settings: Distillation) -> list[str]:
    """What of `origin` is another in a checkpoint; settings that came later had their defaults. KeyError for a file that is not ours."""
    there = {name: state[name] for name in _STATE}["origin"]
    known = merge(Distillation(settings.teacher, settings.student), json.loads(there["settings"]))
    return [name for name in origin if (known != settings if name == "settings" else there[name] != origin[name])]


def student_bytes(student: nn.Module, teacher: Teacher, origin: dict[str, str]) -> bytes:
    """A base file (safetensors, matrices in half precision): the student's encoder and everything else of the teacher's file."""
    state = {f"image_encoder.{name}": value for name, value in student.state_dict().items()} | teacher.others
    return tensors_bytes({name: half(value) for name, value in state.items()}, origin)


class _Job:
    """Teacher, student and data of a distillation; everything random follows from (seed, epoch, step)."""

    def __init__(self, settings: Distillation, train: list[CaseSlices], val: list[CaseSlices], device: torch.device):
        self.settings, self.device, self.cases = settings, device, train + val
        self.precision = native_precision(settings.training.precision, device)
        self.teacher = Teacher(settings).to(device)
        self.student = build_encoder(settings.student, stable_seed(settings.seed, "student")).to(device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), settings.training.lr, settings.training.betas, weight_decay=settings.training.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        few, negatives = settings.training.slices, settings.training.train_negatives
        drawn = few_slices(train, few, negatives, settings.seed) if few else draw_slices(train, negatives, settings.seed)
        checked = [(len(train) + i, z) for i, z in draw_slices(val, settings.training.val_negatives, settings.seed)]
        if not drawn or not checked:
            raise InputError(f"{len(drawn)} slices to learn from and {len(checked)} to check with: expected at least one of each, add cases with lesions")
        self.count = len(drawn)
        self.items = [(place, False) for place in drawn] + [(place, True) for place in drawn] * settings.mirror + [(place, False) for place in checked]
        self.checked = range(len(self.items) - len(checked), len(self.items))
        digest = hashlib.sha256(str((self.items, settings.inputs)).encode())
        for place in dict.fromkeys(place for place, _ in self.items):
            for part in stack_slices(self.cases, [place], settings.inputs.context):
                digest.update(part.contiguous().numpy().data)
        self.data = digest.hexdigest()

    def embed(self, path: Path, progress: bool) -> None:
        """The teacher's embeddings, from the file or into it."""
        settings = self.settings
        key = {"teacher": f"{self.teacher.embeds_sha256}, {settings.teacher.bits} bits, {self.precision}, pixels as {settings.teacher.pixels}",
               "px": settings.inputs.img_size, "data": self.data}
        self.kept: Embeddings = cached(path, key, len(self.items), self._embed, settings.training.batch_size, progress)
        self.mean, self.std = self.kept.mean.to(self.device), self.kept.std.to(self.device)
        self.teacher.encoder = None  # has done its part

    def load(self, state: dict) -> list[dict]:
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:  # it may go on in another precision, on another GPU
            self.scaler.load_state_dict(state["scaler"])
        return state["history"]

    def epoch(self, epoch: int) -> dict[str, float]:
        """Every training slice once, each in one of its views."""
        settings, training = self.settings, self.settings.training
        generator = torch.Generator().manual_seed(stable_seed(settings.seed, "epoch", epoch))
        order = torch.randperm(self.count, generator=generator)
        order = order + self.count * torch.randint(1 + settings.mirror, (self.count,), generator=generator)
        steps, found, lr = order.split(training.batch_size), [], 0.0
        self.student.train()
        for step, some in enumerate(steps):
            lr = learning_rate(epoch - 1 + (step + 0.5) / len(steps), training)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            losses, _ = self._losses(some.tolist(), generator)
            self.scaler.scale(losses[0]).backward()
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.student.parameters(), training.clip_norm)
            if not torch.isfinite(losses[0]) or not (self.scaler.is_enabled() or torch.isfinite(norm)):  # fp16's scaler skips the step
                raise WMHError(f"the loss became {float(losses[0].detach()):g}, its gradient {float(norm):g} in epoch {epoch}, step {step + 1} of {len(steps)}: "
                               f"lower the learning rate ({training.lr:g})")
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            found.append((len(some), torch.stack(losses).detach().cpu()))
        return dict(lr=lr) | dict(zip(("loss", "feature", "mask"), _means(found)))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The losses on validation slices and the Dice of their masks, always at the same prompts."""
        self.student.eval()
        generator, found, dice = torch.Generator().manual_seed(stable_seed(self.settings.seed, "validation")), [], []
        for some in cut(list(self.checked), self.settings.training.batch_size):
            losses, masks = self._losses(some, generator)
            found.append((len(some), torch.stack(losses).cpu()))
            if masks:
                student, teacher, objects = masks
                dice.append(torch.stack([_dice(student, teacher), _dice(student, objects), _dice(teacher, objects)], 1))
        scores = torch.cat(dice).nanmean(0).tolist() if dice else [float("nan")] * 3
        return dict(zip(("val_loss", "val_feature", "val_mask"), _means(found))) | dict(
            zip(("val_agreement", "val_dice", "val_teacher_dice"), scores))

    def _losses(self, places: list[int], generator: torch.Generator) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor] | None]:
        """Loss, feature and mask loss (NaN where no mask was asked for) of the items at `places`, and the masks of student, teacher and truth (bool N x S x S), where there are any."""
        settings = self.settings
        images, labels = self._slices(places)
        target, seen = self.kept[places].to(self.device), self._three(images)  # outside of autocast, as the teacher saw it
        with autocast(self.device, self.precision):
            features = self.student(seen)
        feature = feature_loss(features, target, self.mean, self.std, settings.feature)
        if settings.alpha == 1 or not ((labels == 1) | (labels > 2)).any():  # nothing to ask for
            return [settings.alpha * feature, feature, feature.new_tensor(torch.nan)], None
        objects, owner = draw_parts(labels, generator, settings.prompts)
        prompts = draw_prompts(objects, owner, generator).to(self.device)
        with autocast(self.device, self.precision):
            student = self.teacher.promptable(_resized(features, target.shape[-1]), prompts)[0]
            with torch.no_grad():
                teacher = self.teacher.promptable(target, prompts)[0]
        mask = mask_loss(student, teacher, settings.temperature)
        losses = [settings.alpha * feature + (1 - settings.alpha) * mask, feature, mask]
        if self.student.training:
            return losses, None
        found = (_resized(x.detach().float(), objects.shape[-1])[:, 0] > 0 for x in (student, teacher))
        return losses, (*found, objects.to(self.device))

    def _slices(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """Images B x C x S x S and labels B x 1 x S x S of items, mirrored where they are."""
        images, labels = stack_slices(self.cases, [self.items[i][0] for i in places], self.settings.inputs.context)
        mirrored = torch.tensor([self.items[i][1] for i in places])[:, None, None, None]
        return torch.where(mirrored, images.flip(-1), images), torch.where(mirrored, labels.flip(-1), labels)

    @torch.no_grad()
    def _three(self, images: Tensor) -> Tensor:
        return self.teacher.three(images.to(self.device))

    @torch.no_grad()
    def _embed(self, places: range) -> Tensor:
        images = self._three(self._slices(list(places))[0])
        with autocast(self.device, self.precision):
            return self.teacher.encoder(images)


def _means(found: list[tuple[int, Tensor]]) -> list[float]:
    """Means of losses, of which `found` has the number of slices and their values for each batch; NaNs do not count."""
    values = torch.stack([losses for _, losses in found]).double()
    weights = torch.tensor([[n] for n, _ in found]) * ~values.isnan()
    return ((weights * values.nan_to_num()).sum(0) / weights.sum(0)).tolist()


def _resized(x: Tensor, side: int) -> Tensor:
    """A B x C x h x w map resized to `side`, bilinear."""
    return x if x.shape[-1] == side else F.interpolate(x.float(), (side, side), mode="bilinear")


def _dice(a: Tensor, b: Tensor) -> Tensor:
    """Dice of each of N masks; NaN where both are empty."""
    a, b = a.flatten(1), b.flatten(1)
    return 2 * (a & b).sum(1) / (a.sum(1) + b.sum(1)).float()
