"""One epoch of training, and its validation, shared out over any number of processes.

What is random in a micro-batch follows from (seed, epoch, step, its number in the step), so that neither the number of
processes nor an interruption changes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor

from .checkpoints import Keeper
from .errors import WMHError
from .losses import total_loss
from .monitor import PARTS, Monitor
from .processes import Average, GradientSum, StepStatistics, sum_over_processes
from .ranks import Ranks
from .sections import Training
from .seeds import stable_seed
from .settings import Recipe
from .tasks import cut, task_of
from .trained import TrainedNet
from .weights import tensors_bytes
from .workspace import RunFolder

_DIVERGED, _COLLAPSED = 3.0, 0.5  # times the lowest and the first training loss of the epochs before: a network that collapsed, not a bad epoch
_Places = list[tuple[int, ...]]  # (case, and where in it)


@dataclass
class Job:
    """What an epoch works on; the same in every process. `recipe`: its batch as it fits the device."""

    run: RunFolder
    recipe: Recipe
    accelerator: Accelerator
    network: TrainedNet
    optimizer: torch.optim.Optimizer
    gradients: GradientSum
    statistics: StepStatistics
    average: Average
    ranks: Ranks
    keeper: Keeper | None  # of the main process

    @property
    def parts(self) -> tuple[str, ...]:
        """The training loss and what it is the sum of."""
        pretext = bool(self.network.pretext)
        there = {"tversky": self.recipe.loss.tversky, "edges": self.recipe.volume.borders, "tissue": pretext, "prompts": pretext, "orthogonality": self.ranks.triplets}
        return ("train_loss", *(name for name in PARTS if there.get(name, True)))

    @property
    def task(self):
        """How slices, or volumes, are drawn and scored."""
        return task_of(self.recipe)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], *tuple[Tensor, ...]]:
        with self.accelerator.autocast():
            return self.network(images)

    def mine(self, tasks: int) -> range:
        """The numbers, out of `tasks`, that this process does."""
        return range(self.accelerator.process_index, tasks, self.accelerator.num_processes)


def learning_rate(epoch: float, settings: Training) -> float:
    """Linear warm-up, then cosine with warm restarts (Loshchilov & Hutter 2017, eq. 5); `epoch` counts fractions too."""
    if epoch < settings.warmup_epochs:
        return settings.lr * epoch / settings.warmup_epochs
    phase = (epoch - settings.warmup_epochs) % settings.restart_epochs / settings.restart_epochs
    return settings.lr_min + 0.5 * (settings.lr - settings.lr_min) * (1 + math.cos(math.pi * phase))


def train_epoch(job: Job, monitor: Monitor, cases: list, epoch: int, before: list[float]) -> tuple[dict[str, float], int]:
    """Every slice or patch that `epoch` (from 1) draws, once. Returns the last learning rate with the means over these of the loss and
    its parts, and their number. Raises WMHError, with the step's micro-batch of the largest gradient in failed_batch.safetensors, for a
    loss or gradient that is not finite, and for a mean loss above three times the least of those `before`, of the earlier epochs, and
    above half of the first (where a warm restart ends in an overfitted network, it has not come so far)."""
    settings, accelerator = job.recipe.training, job.accelerator
    places = _order(job, cases, epoch)
    steps = cut(places, settings.batch_size * settings.accumulation)
    sums = torch.zeros(len(steps), len(job.parts), dtype=torch.float64, device=accelerator.device)
    job.network.train()
    if accelerator.scaler:  # a process without a micro-batch in the first step would not know the scale
        accelerator.scaler.scale(torch.zeros((), device=accelerator.device))
    for step in monitor.steps(epoch, len(steps)):
        lr = learning_rate(epoch - 1 + (step + 0.5) / len(steps), settings)
        for group in job.optimizer.param_groups:
            group["lr"] = lr
        micros = cut(steps[step], settings.batch_size)
        mine = job.mine(len(micros))
        several = accelerator.num_processes > 1 or len(micros) > 1
        job.statistics.begin()
        for i in mine:
            job.statistics.forward()
            values = _loss(job, cases, micros[i], epoch, step, i)
            loss = values[0] * (len(micros[i]) / len(steps[step]))
            (accelerator.scaler.scale(loss) if accelerator.scaler else loss).backward()
            if several:
                job.gradients.add()
            sums[step] += len(micros[i]) * values.detach()
        sum_over_processes(accelerator, [*job.gradients.total, *job.statistics.sums(len(mine)), sums[step]])
        if several:
            job.gradients.end()
        job.statistics.end(len(micros))
        norm = accelerator.clip_grad_norm_(job.gradients.trained, settings.clip_norm)
        overflow = accelerator.scaler and accelerator.scaler.get_scale() > 1  # fp16's scaler skips the step and lowers the scale
        if not torch.isfinite(sums[step, 0]) or not (overflow or torch.isfinite(norm)):
            _stop(job, cases, micros, epoch, step, f"the loss became {float(sums[step, 0]) / len(steps[step]):g}, its gradient {float(norm):g}")
        job.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            number = (epoch - 1) * len(steps) + step
            job.ranks.update(number + 1, settings.epochs * len(steps))
            job.average.update(number)
        job.optimizer.zero_grad()
    means = dict(zip(job.parts, (sums.sum(0) / len(places)).tolist()))
    if before and means["train_loss"] > max(_DIVERGED * min(before), _COLLAPSED * before[0]) and not settings.slices:  # of few slices the loss jumps
        worst = int((sums[:, 0].cpu() / torch.tensor([len(group) for group in steps])).argmax())
        _stop(job, cases, cut(steps[worst], settings.batch_size), epoch, worst,
              f"the loss rose to {means['train_loss']:.3g} from {min(before):.3g} in an epoch before")
    return {"lr": lr} | means, len(places)


@torch.inference_mode()
def validate(job: Job, cases: list, sites: list[str], places: _Places) -> dict[str, float]:
    """val_loss, the mean over `places`, and the mean over cases of the Dice at 0.5: val_dice, and val_dice <site> of each site. The work is
    spread over the processes; cases without a lesion in reference and result count nowhere."""
    job.network.eval()
    totals = [t.to(job.accelerator.device) for t in job.task.validate(job.forward, cases, places, job.mine, job.accelerator.device)]
    sum_over_processes(job.accelerator, totals)
    loss, overlap, size = (t.cpu() for t in totals)
    dice = pd.Series((2 * overlap / size).numpy())  # NaN where both are empty
    by_site = {f"val_dice {site}": float(mean) for site, mean in dice.groupby(pd.Series(sites)).mean().items()}
    return {"val_loss": float(loss) / len(places), "val_dice": float(dice.mean())} | by_site


def _order(job: Job, cases: list, epoch: int) -> _Places:
    places = job.task.places(cases, epoch)
    generator = torch.Generator().manual_seed(stable_seed(job.recipe.seed, "order", epoch))
    return [places[i] for i in torch.randperm(len(places), generator=generator)]


def _batch(job: Job, cases: list, micro: _Places, *number: int) -> tuple[Tensor, Tensor]:
    """The images and labels of micro-batch (epoch, step, i) as the network sees them; also seeds the dropout of its forward pass."""
    generator = torch.Generator().manual_seed(stable_seed(job.recipe.seed, "augment", *number))
    torch.manual_seed(stable_seed(job.recipe.seed, "dropout", *number))
    return job.task.batch(cases, micro, job.accelerator.device, generator)


def _loss(job: Job, cases: list, micro: _Places, *number: int) -> Tensor:
    """The loss of a micro-batch and its parts; only the first has a gradient."""
    images, labels = _batch(job, cases, micro, *number)
    edges, more = [], {}
    if job.network.pretext:
        generator = torch.Generator().manual_seed(stable_seed(job.recipe.seed, "prompts", *number))
        with job.accelerator.autocast():
            features = job.network.features(images)
            fused, scales = job.network.decode(features, images)
            more = job.network.pretext.losses(features, labels, generator)
    else:
        fused, scales, *edges = job.forward(images)
    if job.ranks.triplets:
        more["orthogonality"] = job.ranks.regulariser()
    loss, parts = total_loss(fused, scales, labels, job.recipe.loss, *edges)
    values = {"train_loss": sum(more.values(), loss)} | parts | {name: part.detach() for name, part in more.items()}
    return torch.stack([values[name] for name in job.parts])


def _stop(job: Job, cases: list, micros: list[_Places], epoch: int, step: int, reason: str) -> NoReturn:
    """Saves the micro-batch of the step with the largest gradient, and raises an error that names it in every process."""
    norms = torch.zeros(len(micros), dtype=torch.float64, device=job.accelerator.device)
    for i in job.mine(len(micros)):
        job.optimizer.zero_grad()
        _loss(job, cases, micros[i], epoch, step, i)[0].backward()
        norms[i] = torch.stack([torch.linalg.vector_norm(p.grad) for p in job.gradients.trained if p.grad is not None]).norm()
    sum_over_processes(job.accelerator, [norms])
    number = int(norms.nan_to_num(math.inf).argmax())
    one, many = job.task.one, job.task.many
    drawn = [{"case": cases[case].case, one: place[0] if len(place) == 1 else place} for case, *place in micros[number]]
    path = job.run.path / "failed_batch.safetensors"
    if job.keeper:
        images, labels = _batch(job, cases, micros[number], epoch, step, number)
        about = {"epoch": epoch, "step": step + 1, "reason": reason, many: drawn}
        job.keeper.write(path, tensors_bytes({"images": images.cpu(), "labels": labels.cpu()}, about))
    names = ", ".join(f"{row['case']} {one} {row[one]}" for row in drawn)
    fp16 = " or, since fp16 holds no large numbers, with training.precision=no" * (job.accelerator.mixed_precision == "fp16")
    raise WMHError(f"training stopped in epoch {epoch}, step {step + 1}: {reason}. The batch with the largest gradient ({names}) is in {path}: look at "
                   f"it, or train in another run folder with a lower training.lr (now {job.recipe.training.lr:g}){fp16}; this one would do the same again")
