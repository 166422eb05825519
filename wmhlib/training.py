"""`fit`: trains a run, goes on where it stopped, and keeps the best weights; in one process or many.

    python -m wmhlib.training RUN_FOLDER
    accelerate launch -m wmhlib.training RUN_FOLDER

Everything random follows from the recipe's seed and the place in the training (see `epochs`), the learning rate from the step.
Weights, averages, optimiser, fp16's loss scale and the history are therefore all that a killed run needs to end as if nothing
had happened.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from . import hardware
from .adapters import budget
from .checkpoints import Keeper
from .epochs import Job, train_epoch, validate
from .errors import CheckpointError, InputError, WMHError, some, told
from .files import read_table, table_bytes
from .monitor import Monitor
from .network import build_network
from .precision import best_device, enough_memory, native_precision
from .processes import Average, GradientSum, StepStatistics, from_main, main_speaks_first
from .ranks import Ranks
from .sections import SHIPPED, Training
from .settings import Recipe
from .splits import check_split, tell_unused
from .trained import read_weights, weights_bytes
from .workspace import MINISAM, RunFolder, same_split

_STATE = ("origin", "history", "network", "optimizer", "scaler", "average", "ranks", "best")


def fit(run: RunFolder, progress: bool = True) -> pd.DataFrame:
    """Train the recipe of `run` on its split; go on from the newest checkpoint there is.

    Writes history.csv each epoch, checkpoints every `checkpoint_epochs` and at the end, and best.safetensors whenever the
    validation Dice rises (with training.ema the averaged weights, which are then the ones validated). Returns the history: one
    row an epoch with lr, the training loss and its parts, the validation loss, and val_dice, the mean over validation cases of
    the Dice at 0.5 over a case's drawn slices (of volumes over all of it), of all and of each site. In several processes, each returns the same.
    """
    cases = run.cases()
    check_split(read_table(run.split_csv), cases)
    AcceleratorState._reset_state()  # the precision of an earlier run in this process
    device = best_device()
    recipe = run.recipe()
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=native_precision(recipe.training.precision, device))
    with main_speaks_first(accelerator.is_main_process), Keeper(run) if accelerator.is_main_process else contextlib.nullcontext() as keeper:
        if progress and accelerator.is_main_process:
            tell_unused(run)
        network = build_network(recipe).cast_frozen(accelerator.mixed_precision).to(accelerator.device)
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=recipe.training.lr,
                                      betas=recipe.training.betas, weight_decay=recipe.training.weight_decay)
        job = Job(run, recipe, accelerator, network, accelerator.prepare(optimizer), GradientSum(network), StepStatistics(network),
                  Average(network.live_state(), recipe.training.ema), Ranks(network), keeper)
        return pd.DataFrame(_train(job, cases, progress and accelerator.is_main_process))


def launch(run: RunFolder) -> pd.DataFrame:
    """`fit` in a fresh process for each GPU of this machine that a step has a micro-batch for, what they print going on to here, or in this process
    where there are fewer than two. Raises WMHError where one stops."""
    gpus = min(torch.cuda.device_count(), run.recipe().training.accumulation)
    if gpus < 2:
        return fit(run)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m", "wmhlib.training", str(run.path)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // gpus))}
    with subprocess.Popen(command, env=os.environ | threads, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as processes:
        for line in processes.stdout:
            print(line, end="", flush=True)
    if processes.returncode:
        raise WMHError(f"training on {gpus} GPUs stopped: the reason stands above")
    return read_table(run.history_csv)


def main(arguments: list[str] | None = None) -> int:
    """The command: trains, or goes on with, the run of a folder. Returns 1 where a WMHError stopped it."""
    parser = argparse.ArgumentParser(prog="python -m wmhlib.training", description=main.__doc__.splitlines()[0])
    parser.add_argument("run", help="the run folder that notebooks 01 and 02 have prepared")
    try:
        fit(RunFolder(parser.parse_args(arguments).run))
    except WMHError as error:
        return told(error)
    PartialState().destroy_process_group()
    return 0


@enough_memory("leave it to this training, which goes on from its last checkpoint, or take another run folder with a lower training.batch_size")
def _train(job: Job, cases: pd.DataFrame, progress: bool) -> list[dict]:
    """All epochs that are left; the history of all."""
    run, settings, keeper = job.run, job.recipe.training, job.keeper
    origin = {"recipe": job.recipe.to_json(), "base_sha256": job.network.base_sha256, "split": run.split_text()}
    history, best = _resume(job, origin, progress)
    if _finished(history, settings):
        return history
    if not history:
        if keeper:
            _drop(run.earlier_csv)
        if settings.start:
            _start(job, progress)
    train, val = (job.task.load(cases[cases.split == name], progress) for name in ("train", "val"))
    sites = cases[cases.split == "val"].site.tolist()
    places = job.task.validation_places(train, val)
    with _fitted(job, sum(c.images.nbytes + c.labels.nbytes for c in train + val), len(history) + 1, progress) as monitor:
        if keeper:
            keeper.claim()
        while not _finished(history, settings):
            epoch = len(history) + 1
            row, drawn = train_epoch(job, monitor, train, epoch, [row["train_loss"] for row in history])
            row = {"epoch": epoch} | row
            with job.average.swapped_in():
                if epoch % settings.validate_epochs == 0 or epoch == settings.epochs:
                    row |= validate(job, val, sites, places)
                if keeper:
                    keeper.hold()
                highest = max(map(_dice, history), default=-1.0)
                better = _dice(row) > highest or highest < 0  # until an epoch has a Dice, the last one
                if better and keeper:
                    best = weights_bytes(job.network, origin)
                    keeper.write(run.best, best)
                    _drop(run.operating_point)  # which is that of the weights it was chosen with
            history.append(row)
            if keeper:
                keeper.write(run.history_csv, table_bytes(pd.DataFrame(history)))
                if epoch % settings.checkpoint_epochs == 0 or _finished(history, settings):
                    keeper.checkpoint(epoch, _state(job, origin, history, best))
            monitor.epoch(history, better, drawn)
    if keeper:
        keeper.release()
    if progress and len(history) < settings.epochs:
        print(f"stopped: no better validation Dice for {settings.patience} epochs (training.patience)", flush=True)
    return history


def _start(job: Job, progress: bool) -> None:
    """Take up the trained weights of the run `training.start`; earlier.csv keeps what they have seen. CheckpointError where they do not fit,
    InputError where this run would validate or test on some of that."""
    start = MINISAM if job.recipe.training.start == SHIPPED else RunFolder(job.recipe.training.start)
    state, origin = read_weights(start.need(start.best, "03_train"))
    if origin["base_sha256"] != job.network.base_sha256:
        raise CheckpointError(f"training.start: {start.best} was trained on the base {origin['base_sha256'][:12]}, this run adapts "
                              f"{job.network.base_sha256[:12]}: start from a run of the same base")
    theirs, mine = Recipe.from_json(origin["recipe"], start.best), job.recipe
    if (theirs.adapter.method, theirs.encoder.bits) != (mine.adapter.method, mine.encoder.bits):
        raise CheckpointError(f"training.start: {start.best} has adapter.method={theirs.adapter.method} and encoder.bits={theirs.encoder.bits}, this run "
                              f"{mine.adapter.method} and {mine.encoder.bits}: start from a run of the same")
    if origin.get("split") and not same_split(origin["split"], start.split_text()):
        raise CheckpointError(f"training.start: {start.best} was trained on another split than {start.split_csv} has now: what it has seen is not known; put that split.csv back, or start from another run")
    cases, seen = job.run.scans(), start.seen()
    chose = set(start.scans().query("split == 'val'").digest) - set(start.earlier().digest)  # and may again, but not test
    known = cases.case[cases.digest.isin(seen.digest) & (cases.split == "test") | cases.digest.isin(set(seen.digest) - chose) & (cases.split == "val")]
    if len(known):
        raise InputError(f"training.start: {len(known)} validation or test cases were used to train {start.path} or to choose its operating point "
                         f"({some(known)}): start from another run, or split so that they train")
    job.network.load_trained_state(state, start.best)
    job.average.load(job.network.live_state())
    if job.keeper:
        job.keeper.write(job.run.earlier_csv, table_bytes(seen))
    if progress:
        print(f"the first weights are those of {start.path}", flush=True)


def _fitted(job: Job, data: int, first_epoch: int, progress: bool) -> Monitor:
    """Let micro-batches and gradient checkpointing be such that they fit, the same in all processes; `data`: bytes of all cases."""
    accelerator = job.accelerator
    fitted, why = hardware.fit(job.recipe, accelerator.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    job.recipe = Recipe.from_json(from_main(accelerator, {"recipe": fitted.to_json()})["recipe"])
    job.network.checkpoint_gradients(job.recipe.training.gradient_checkpointing)
    if progress:
        counts, processes = budget(job.network), accelerator.num_processes
        if job.network.started and not job.recipe.training.start:
            print(f"{', '.join(job.network.started)} start from {job.recipe.encoder.checkpoint}", flush=True)
        print(f"training {counts['trainable']:,} of {counts['total']:,} parameters ({counts['share_percent']:.2f} %) on "
              f"{accelerator.device}{f' and {processes - 1} more' if processes > 1 else ''}\n{why}; {data / 1e9:.1f} GB of {job.task.stored} in {tempfile.gettempdir()}", flush=True)
    return Monitor(job.run, job.recipe, accelerator.device, first_epoch, hardware.expected_peak(job.recipe, accelerator.device, data), why,
                   progress, accelerator.is_main_process, job.task.many)


def _dice(row: dict) -> float:
    """Validation Dice of an epoch; -1 where there is none, so that any other is better."""
    value = row.get("val_dice", math.nan)
    return -1.0 if math.isnan(value) else value


def _finished(history: list[dict], settings: Training) -> bool:
    scores = list(map(_dice, history))
    waited = len(scores) - 1 - scores.index(max(scores)) if scores else 0
    return len(scores) >= settings.epochs or (0 < settings.patience <= waited and len(scores) % settings.validate_epochs == 0)


def _state(job: Job, origin: dict[str, str], history: list[dict], best: bytes) -> dict:
    """What a checkpoint holds. `best`: the content of best.safetensors, which may be lost with the folder it lay in."""
    scaler = job.accelerator.scaler
    return {"origin": origin, "history": history, "network": job.network.trained_state(), "optimizer": job.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else {}, "average": job.average.state, "ranks": job.ranks.state,
            "best": torch.frombuffer(bytearray(best), dtype=torch.uint8)}


def _differing(state: dict, origin: dict[str, str]) -> list[str]:
    """What of `origin` is another in a checkpoint. KeyError for a file that lacks something, which is not ours."""
    return _unlike({name: state[name] for name in _STATE}["origin"], origin)


def _unlike(there: dict[str, str], origin: dict[str, str]) -> list[str]:
    """What of `origin` is another `there`; where the base lies, which its sha256 tells, where training started, the order of a split, and settings that
    came later do not count."""
    alike = {"recipe": lambda one, other: _placeless(one) == _placeless(other), "split": same_split}
    return [name for name in origin if not alike.get(name, str.__eq__)(there[name], origin[name])]


def _placeless(recipe: str) -> Recipe:
    known = Recipe.from_json(recipe)
    return replace(known.afresh(), encoder=replace(known.encoder, checkpoint=""))


def _drop(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _resume(job: Job, origin: dict[str, str], progress: bool) -> tuple[list[dict], bytes]:
    """Take up the newest whole checkpoint, best.safetensors included; its history and best weights, empty where there is none."""
    keeper, state = job.keeper, None
    if keeper:
        state = keeper.newest(lambda state: _differing(state, origin))
        if state is None:
            state = _ended(job, origin)
    state = from_main(job.accelerator, state)
    if state is None:
        return [], b""
    if "network" not in state:
        return state["history"], b""
    job.network.load_trained_state(state["network"], keeper.source if keeper else "checkpoint")
    job.optimizer.load_state_dict(state["optimizer"])
    job.average.load(state["average"])
    job.ranks.load(state["ranks"])
    if job.accelerator.scaler and state["scaler"]:
        job.accelerator.scaler.load_state_dict(state["scaler"])
    best = state["best"].numpy().tobytes()
    for path, content in ((job.run.best, best), (job.run.history_csv, table_bytes(pd.DataFrame(state["history"])))):
        if keeper and (not path.exists() or path.read_bytes() != content):
            keeper.write(path, content)
            if path == job.run.best:
                _drop(job.run.operating_point)
    if progress:
        print(f"going on from {keeper.source.name}", flush=True)
    return state["history"], best


def _ended(job: Job, origin: dict[str, str]) -> dict | None:
    """Of a run without checkpoints: its history, where it is done; None where it may have been killed before its first checkpoint. Else CheckpointError,
    since training would begin anew over weights that are there."""
    run, settings = job.run, job.recipe.training
    if not run.best.exists() or not run.history_csv.exists():
        return None
    history = read_table(run.history_csv).to_dict("records")
    done = _finished(history, settings)
    if done and not _unlike({"split": ""} | read_weights(run.best)[1], origin):
        return {"history": history}
    if done or len(history) > settings.checkpoint_epochs:
        raise CheckpointError(f"{run.best} is there, but no checkpoint of its training that can be used: put {run.checkpoints} back, choose another run folder, "
                              f"or delete {run.best.name} and {run.history_csv.name} to train anew")
    return None


if __name__ == "__main__":
    sys.exit(main())
