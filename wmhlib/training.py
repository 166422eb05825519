"""`fit`: the training loop, its schedule, checkpoints and resume.

Everything random in an epoch follows from (seed, epoch), and the learning rate from the step alone. A run that was killed
therefore needs nothing but weights, optimiser and fp16's loss scale to go on as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from tqdm import tqdm

from .adapters import budget
from .batches import CaseSlices, augment, draw_slices, drop_modalities, load_slices, stack_slices
from .errors import CheckpointError, WMHError
from .losses import total_loss
from .network import WMHNet, native_precision, save_weights
from .settings import Recipe, Training
from .splits import check_split
from .workspace import RunFolder, atomic, read_table, stable_seed, write_table

_GENERATIONS = 2  # checkpoints kept


def learning_rate(epoch: float, settings: Training) -> float:
    """Linear warm-up, then cosine with warm restarts (Loshchilov & Hutter 2017, eq. 5); `epoch` counts fractions too."""
    if epoch < settings.warmup_epochs:
        return settings.lr * epoch / settings.warmup_epochs
    phase = (epoch - settings.warmup_epochs) % settings.restart_epochs / settings.restart_epochs
    return settings.lr_min + 0.5 * (settings.lr - settings.lr_min) * (1 + math.cos(math.pi * phase))


def fit(run: RunFolder, progress: bool = True) -> pd.DataFrame:
    """Train the recipe of `run` on its split; go on from the newest checkpoint there is.

    Writes history.csv each epoch, checkpoints every `checkpoint_epochs`, and best.safetensors whenever the validation
    Dice rises. Returns the history: one row an epoch with lr, the training loss and its parts, the validation loss, and
    val_dice, the mean over validation cases of the Dice at 0.5 over a case's drawn slices.
    """
    recipe = run.recipe()
    settings, inputs = recipe.training, recipe.inputs
    cases = run.cases()
    check_split(read_table(run.split_csv), cases)

    AcceleratorState._reset_state()  # the precision of an earlier run in this process
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = Accelerator(mixed_precision=native_precision(settings.precision, device))
    network = WMHNet(recipe)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=settings.lr,
                                  betas=settings.betas, weight_decay=settings.weight_decay)
    origin = {"recipe": recipe.to_json(), "base_sha256": network.base_sha256, "split": run.split_text()}
    history = _resume(run, origin, network, optimizer, accelerator.scaler, progress)
    if len(history) == settings.epochs:
        run.need(run.best, "03_train, after deleting the checkpoints of this run,")
        return pd.DataFrame(history)
    if progress:
        counts = budget(network)
        print(f"training {counts['trainable']:,} of {counts['total']:,} parameters ({counts['share_percent']:.2f} %) "
              f"on {accelerator.device} in {'fp32' if accelerator.mixed_precision == 'no' else accelerator.mixed_precision}"
              f" ({settings.precision} asked for)", flush=True)
    model, optimizer = accelerator.prepare(network, optimizer)
    train, val = (load_slices(cases[cases.split == name], inputs, progress) for name in ("train", "val"))
    val_places = draw_slices(val, settings.val_negatives, recipe.seed)

    for epoch in range(len(history) + 1, settings.epochs + 1):
        start = time.perf_counter()
        row = {"epoch": epoch} | _train_epoch(accelerator, model, optimizer, train, recipe, epoch, progress)
        if epoch % settings.validate_epochs == 0 or epoch == settings.epochs:
            row |= _validate(accelerator, model, val, val_places, recipe)
        better = _dice(row) > max(map(_dice, history), default=-2.0)
        history.append(row)
        if accelerator.is_main_process:
            if better:
                save_weights(network, origin, run.best)
            write_table(pd.DataFrame(history), run.history_csv)
            if epoch % settings.checkpoint_epochs == 0 or epoch == settings.epochs:
                _save_checkpoint(run, origin, network, optimizer, accelerator.scaler, history)
            if progress:
                print(f"epoch {epoch:3d}/{settings.epochs}  loss {row['train_loss']:.3f}  "
                      f"val loss {row.get('val_loss', math.nan):.3f}  val Dice {row.get('val_dice', math.nan):.3f}"
                      f"{' *' if better else '  '}  lr {row['lr']:.1e}  {time.perf_counter() - start:.0f} s", flush=True)
    return pd.DataFrame(history)


def _train_epoch(accelerator: Accelerator, model, optimizer, cases: list[CaseSlices], recipe: Recipe, epoch: int,
                 progress: bool) -> dict[str, float]:
    settings, device = recipe.training, accelerator.device
    torch.manual_seed(stable_seed(recipe.seed, "dropout", epoch))
    generator = torch.Generator().manual_seed(stable_seed(recipe.seed, "batches", epoch))
    places = draw_slices(cases, settings.train_negatives, stable_seed(recipe.seed, "slices", epoch))
    places = [places[i] for i in torch.randperm(len(places), generator=generator)]
    effective = settings.batch_size * settings.accumulation
    steps = math.ceil(len(places) / effective)
    sums: dict[str, Tensor] = {}
    model.train()
    for step in tqdm(range(steps), f"epoch {epoch}", disable=not progress, mininterval=15, leave=False):
        lr = learning_rate(epoch - 1 + (step + 0.5) / steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        group = places[step * effective : (step + 1) * effective]
        for first in range(0, len(group), settings.batch_size):
            micro = group[first : first + settings.batch_size]
            images, labels = (t.to(device) for t in stack_slices(cases, micro, recipe.inputs.context))
            images, labels = augment(images, labels, recipe.augment, generator)
            images = drop_modalities(images, recipe.inputs, generator)
            with accelerator.autocast():
                fused, scales = model(images)
            loss, parts = total_loss(fused, scales, labels, recipe.loss)
            if not torch.isfinite(loss):
                raise WMHError(f"the loss became {loss.item()} in epoch {epoch}, step {step + 1}: lower training.lr "
                               f"(now {settings.lr:g}); the run goes on from its last checkpoint")
            accelerator.backward(loss * len(micro) / len(group))
            for name, value in {"train_loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0) + value * len(micro)
        accelerator.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {"lr": lr} | {name: float(value) / len(places) for name, value in sums.items()}


@torch.inference_mode()
def _validate(accelerator: Accelerator, model, cases: list[CaseSlices], places: list[tuple[int, int]],
              recipe: Recipe) -> dict[str, float]:
    model.eval()
    loss, overlap, size = 0.0, torch.zeros(len(cases)), torch.zeros(len(cases))
    for first in range(0, len(places), recipe.training.batch_size):
        some = places[first : first + recipe.training.batch_size]
        images, labels = (t.to(accelerator.device) for t in stack_slices(cases, some, recipe.inputs.context))
        with accelerator.autocast():
            fused, scales = model(images)
        loss += len(some) * float(total_loss(fused, scales, labels, recipe.loss)[0])
        found, lesion = (fused > 0) & (labels != 2), labels == 1
        number = torch.tensor([i for i, _ in some])
        overlap.index_add_(0, number, (found & lesion).sum((1, 2, 3)).float().cpu())
        size.index_add_(0, number, (found.sum((1, 2, 3)) + lesion.sum((1, 2, 3))).float().cpu())
    return {"val_loss": loss / len(places), "val_dice": float((2 * overlap / size)[size > 0].mean())}


def _dice(row: dict) -> float:
    """Validation Dice of an epoch; -1 where there is none, so that any other is better."""
    value = row.get("val_dice", math.nan)
    return -1.0 if math.isnan(value) else value


def _save_checkpoint(run: RunFolder, origin: dict[str, str], network: WMHNet, optimizer, scaler, history: list[dict]) -> None:
    state = {"origin": origin, "history": history, "network": network.trained_state(), "optimizer": optimizer.state_dict(),
             "scaler": scaler.state_dict() if scaler else {}}
    with atomic(run.checkpoints / f"epoch_{len(history):04d}.pt") as temporary:
        torch.save(state, temporary)
    for old in _checkpoints(run)[_GENERATIONS:]:
        old.unlink()


def _resume(run: RunFolder, origin: dict[str, str], network: WMHNet, optimizer, scaler, progress: bool) -> list[dict]:
    """Load the newest checkpoint that is whole into network and optimiser; its history, or [] where there is none."""
    for path in _checkpoints(run):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            differing = [name for name in origin if state["origin"][name] != origin[name]]
        except Exception as error:  # torch raises half a dozen types for a damaged file, and another program's has no origin
            print(f"checkpoint {path} is damaged or not ours and passed over: {error!r}", flush=True)
            continue
        if differing:
            raise CheckpointError(f"checkpoint {path} belongs to another {' and '.join(differing)}: choose another run folder, or "
                                  "delete the checkpoints of this one to train again")
        network.load_trained_state(state["network"], path)
        optimizer.load_state_dict(state["optimizer"])
        if scaler:
            scaler.load_state_dict(state["scaler"])
        if progress:
            print(f"going on from {path.name}", flush=True)
        return state["history"]
    return []


def _checkpoints(run: RunFolder) -> list[Path]:
    return sorted(run.checkpoints.glob("epoch_*.pt"), reverse=True)
