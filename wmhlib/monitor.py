"""What a person sees of a training: a line an epoch, curves drawn as it goes in a notebook, TensorBoard events in the run folder."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

from .figures import training_curves
from .hardware import measured_peak, reset_peak
from .settings import Recipe
from .workspace import RunFolder

_RECENT = 10  # epochs that the remaining time is told from
PARTS = ("focal", "dice", "boundary", "tversky", "scales", "edges", "tissue", "prompts", "orthogonality")
_SITE = "val_dice "  # column of a site's validation Dice: this and its name
_PATIENCE = 10.0  # seconds that the end of a training waits for the disk


class Monitor:
    """Tells of a training epoch by epoch; with `main` false (all processes but one) it says and writes nothing.

    `first_epoch` is where this process begins: what earlier ones wrote of it and of later epochs is void in TensorBoard.
    `estimated` are the bytes the device should hold at its peak, shown beside those measured; `note` is kept with the
    recipe among the events; `many` is what an epoch is counted in. With `progress` false nothing is printed or drawn. Use it in a `with` block, or `close` it.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, device: torch.device, first_epoch: int = 1, estimated: int = 0, note: str = "",
                 progress: bool = True, main: bool = True, many: str = "slices"):
        self.epochs, self.device, self.estimated = recipe.training.epochs, device, estimated
        self.progress, self.many = progress and main, many
        self._curves = _Curves() if self.progress and watched() else None
        self._first, self._seconds = True, deque(maxlen=_RECENT)
        self._start = self._trained = time.perf_counter()
        self._events = _Events(run.path / "tensorboard", first_epoch) if main else None
        if self._events:
            self._events.text("recipe", first_epoch, "\n".join("    " + line for line in recipe.to_json().splitlines()))
            if note:
                self._events.text("device", first_epoch, note)
        reset_peak(device)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def steps(self, epoch: int, count: int) -> Iterator[int]:
        """The numbers of an epoch's optimiser steps, with a bar; the epoch's clock starts here."""
        self._start = time.perf_counter()
        yield from tqdm(range(count), f"epoch {epoch}", disable=not self.progress, mininterval=15, leave=False)
        self._trained = time.perf_counter()

    def epoch(self, history: list[dict], better: bool, drawn: int) -> None:
        """Tells of the last row of `history` (columns as in history.csv), an epoch that trained on `drawn` slices or patches, in all
        processes together; `better`: its validation Dice is the best so far."""
        row, now, peak = history[-1], time.perf_counter(), measured_peak(self.device)
        self._seconds.append(now - self._start)
        speed = drawn / max(self._trained - self._start, 1e-9)
        if self._events:
            self._events.scalars(row["epoch"], {_tag(name): value for name, value in row.items() if name != "epoch"} | {
                f"speed/{self.many}_per_second": speed, "speed/seconds_per_epoch": self._seconds[-1],
                "memory/peak_GB": peak / 1e9, "memory/estimated_GB": self.estimated / 1e9 or math.nan})
            self._events.flush()
        if self.progress:
            print(self._line(row, better, speed, peak), flush=True)
        if self._curves:
            self._curves.draw(history)
        self._first = False

    def close(self) -> None:
        """Waits, for some seconds at most, until the last events are in the run folder."""
        if self._events:
            self._events.close()

    def _line(self, row: dict, better: bool, speed: float, peak: int) -> str:
        sites = ", ".join(f"{name.removeprefix(_SITE)} {value:.3f}" for name, value in row.items() if name.startswith(_SITE))
        left = (self.epochs - row["epoch"]) * sum(self._seconds) / len(self._seconds)
        words = [f"epoch {row['epoch']:3d}/{self.epochs}", f"loss {row['train_loss']:.3f}"]
        if "val_dice" in row:
            words += [f"val loss {row['val_loss']:.3f}", f"val Dice {row['val_dice']:.3f}{' *' if better else '  '}"]
        estimated = f" ({self.estimated / 1e9:.1f} estimated)" if self._first and self.estimated else ""
        words += [f"({sites})"] * bool(sites)
        words += [f"lr {row['lr']:.1e}", f"{self._seconds[-1]:.0f} s", f"{speed:.1f} {self.many}/s", f"{peak / 1e9:.1f} GB{estimated}", f"ETA {hours(left)}"]
        return "  ".join(words)


def hours(seconds: float) -> str:
    """hh:mm, rounded up."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def watched() -> bool:
    """Whether a person looks at a notebook: this process is its kernel, none that it forked, and no suite runs it (which sets
    WMHLIB_BATCH)."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None and multiprocessing.parent_process() is None and not os.environ.get("WMHLIB_BATCH")


def _tag(column: str) -> str:
    """TensorBoard's name of a history column; the part before the slash is the panel it stands in."""
    if column.startswith(_SITE):
        return f"validation_dice/{column.removeprefix(_SITE)}"
    known = {"train_loss": "loss/train", "val_loss": "loss/validation", "val_dice": "validation_dice/mean", "lr": "training/learning_rate"}
    return known.get(column, f"loss_parts/{column}" if column in PARTS else f"training/{column}")


class _Curves:
    """The training curves in a notebook, one picture that is drawn again every epoch."""

    def __init__(self):
        self.handle = None

    def draw(self, history: list[dict]) -> None:
        figure = training_curves(pd.DataFrame(history))
        if self.handle:
            self.handle.update(figure)
        else:
            from IPython.display import display
            self.handle = display(figure, display_id=True)


class _Events:
    """A TensorBoard event file that training neither waits for nor stops over.

    All of it stays in memory (about 1 kB an epoch); a thread appends what the file lacks, and all again where the
    file or its folder was lost. A file system that fails is named once, and once more when it is back.
    """

    def __init__(self, folder: Path, first_epoch: int):
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.wmhlib"  # sorts by time: TensorBoard reads in this order
        self._data, self._delivered, self._failing = b"", 0, False
        self._thread = threading.Thread()
        self._add(Event(wall_time=time.time(), step=first_epoch, file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=first_epoch, session_log=SessionLog(status=SessionLog.START)))  # voids later steps

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isnan(value):
                self._add(Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value)))

    def text(self, name: str, step: int, markdown: str) -> None:
        self._add(Event(wall_time=time.time(), step=step, summary=summary.text(name, markdown)))

    def flush(self) -> None:
        """Sends the thread off; where it still waits for the disk, the next flush takes all."""
        if not self._thread.is_alive():
            self._thread = threading.Thread(target=self._deliver, args=(self._data,), daemon=True)
            self._thread.start()

    def close(self) -> None:
        for _ in range(2):  # what is under way, then the rest
            self._join()
            if self._delivered < len(self._data):
                self.flush()
        self._join()
        if self._delivered < len(self._data):
            print(f"TensorBoard's events did not all reach {self.path.parent}: history.csv has the same figures", flush=True)

    def _join(self) -> None:
        with contextlib.suppress(RuntimeError):  # never started
            self._thread.join(_PATIENCE)

    def _add(self, event: Event) -> None:
        """TFRecord: length, its checksum, content, its checksum (little-endian)."""
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        self._data += length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))

    def _deliver(self, data: bytes) -> None:
        try:
            self.path.parent.mkdir(exist_ok=True)  # never the run folder: where Drive was unmounted, its place must stay empty
            with open(self.path, "r+b" if self.path.exists() else "wb") as file:
                whole = min(os.fstat(file.fileno()).st_size, self._delivered)
                file.seek(whole)
                file.write(data[whole:])
                file.truncate()
            self._delivered = len(data)
            if self._failing:
                print(f"TensorBoard's events are written to {self.path.parent} again", flush=True)
            self._failing = False
        except OSError as error:
            if not self._failing:
                print(f"TensorBoard's events cannot be written ({error}): training goes on, and they are tried again every epoch", flush=True)
            self._failing = True
