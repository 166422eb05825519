"""The device and a recipe's place on it: how much memory a training step needs, and how a batch is split so that it fits.

What a step needs is counted, not guessed: the network takes one step on tensors that have shapes and no data, and every
allocation of the forward and the backward pass is followed (in about two seconds, whatever the size). So it holds for any
encoder, adapter, decoder and precision, and changes when they do.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .errors import RecipeError
from .losses import total_loss
from .network import build_network
from .precision import PRECISIONS, native_precision
from .sections import Training
from .settings import Recipe
from .tasks import task_of

SHARE = 0.85  # of the memory that a recipe may plan with; the rest is for the driver, workspaces and fragments
_PROCESS = 650_000_000  # bytes of a Python process with the libraries loaded, before it holds data (measured on Linux)
_MALLOC = 1.25  # resident bytes a byte of tensors on a CPU: the allocator's fragments and the kernels' own copies (measured)
_STATES = 16  # bytes a trained parameter: AdamW's two moments, and the sum of a step's gradients in double precision


def device_memory(device: torch.device) -> tuple[str, int]:
    """Name and bytes of a device: what this process may use of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)  # another process may hold some of it
        return torch.cuda.get_device_name(device), min(total, free + torch.cuda.memory_reserved(device))
    return "CPU", min(psutil.virtual_memory().total, *_memory_limits())


def _memory_limits(system: Path = Path("/")) -> list[int]:
    """Bytes that the control groups of this process, and those around them, allow (Linux; version 2, and 1)."""
    own, limits = system / "proc/self/cgroup", [sys.maxsize]
    for line in own.read_text().splitlines() if own.exists() else ():
        _, kinds, group = line.split(":", 2)
        root, name = ("memory", "memory.limit_in_bytes") if kinds else ("", "memory.max")
        if kinds and "memory" not in kinds.split(","):
            continue
        for folder in (Path(group), *Path(group).parents):
            file = system / "sys/fs/cgroup" / root / str(folder).lstrip("/") / name
            text = file.read_text().strip() if file.exists() else "max"
            limits += [int(text)] if text.isdigit() else []
    return limits


def reset_peak(device: torch.device) -> None:
    """Lets `measured_peak` count from now on: on a GPU, and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # no Linux, or a container that forbids it
            Path("/proc/self/clear_refs").write_text("5")


def measured_peak(device: torch.device) -> int:
    """The most bytes held since `reset_peak`, or the process began: tensors on a GPU (`torch.cuda.max_memory_allocated`), on a CPU all of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    status = Path("/proc/self/status")  # getrusage of a process that a larger one has started begins with the size of that
    if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else ""):
        return 1024 * int(found[1])
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@functools.lru_cache(maxsize=64)
def estimate(recipe: Recipe, batch_size: int, gradient_checkpointing: bool, precision: str) -> int:
    """Bytes of tensors at the peak of a training step on `batch_size` slices or patches, in `precision` "no", "bf16" or "fp16".

    Counted are the weights, what the optimiser keeps of each trained one, and what a forward and a backward pass hold at
    their worst moment. Not counted are the kernels' workspaces, the allocator's fragments (`SHARE`) and what `pretext` adds. Attention is counted
    as the CPU computes it; the fused kernels of a GPU hold other copies, for ViT-B at 512 px about as many bytes.
    """
    training = replace(recipe.training, gradient_checkpointing=gradient_checkpointing)
    with torch.device("meta"):
        network = build_network(replace(recipe, training=training, encoder=replace(recipe.encoder, checkpoint=""))).cast_frozen("no" if precision == "no" else "bf16")
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = network.to_empty(device="cpu")
        held, (images, labels) = Held(), task_of(recipe).shapes(batch_size)
        images, labels = torch.empty(images), torch.empty(labels, dtype=torch.uint8)
        for tensor in (*network.parameters(), *network.buffers(), images, labels):
            held.add(tensor)
        with held:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
                fused, scales, *edges = network(images)
            loss, _ = total_loss(fused, scales, labels, recipe.loss, *edges)
            if loss.requires_grad:
                loss.backward()
    kept = _STATES + 4 * bool(training.ema)
    return held.peak + kept * sum(p.numel() for p in network.parameters() if p.requires_grad)


def expected_peak(recipe: Recipe, device: torch.device, data: int = 0) -> int:
    """What `measured_peak` will show when `recipe` trains on `device`: on a CPU within 15 % of what was measured (Linux, presets
    demo and colab), with the `data` bytes of cases mapped from a file, as far as memory is left for them; on a GPU the tensors alone."""
    training = recipe.training
    tensors = estimate(recipe, training.batch_size, training.gradient_checkpointing, native_precision(training.precision, device))
    if device.type != "cpu":
        return tensors
    held = int(_PROCESS + _MALLOC * tensors)
    return held + min(data, max(0, device_memory(device)[1] - held))


def fit(recipe: Recipe, device: torch.device, processes: int = 1) -> tuple[Recipe, str]:
    """`recipe` with precision, micro-batches and gradient checkpointing as `device` can take them, and a sentence that says why.

    An optimiser step keeps its slices, or patches: `batch_size` becomes the largest divisor of batch_size x accumulation, up to what
    the recipe asks, with which the expected peak stays below `SHARE` of the memory, and `accumulation` follows. It is
    never larger than asked, for BatchNorm normalises over a micro-batch, and several processes share those of a step.
    Gradients are checkpointed where one alone does not fit without. Device and recipe decide, on a CPU also how
    many `processes` of this training share the machine.

    Raises RecipeError where nothing fits. With `training.fit_device` off only the precision is set.
    """
    asked = recipe.training
    name, memory = device_memory(device)
    if device.type == "cpu":
        memory //= processes
    drawn, task = asked.batch_size * asked.accumulation, task_of(recipe)
    precision = native_precision(asked.precision, device)
    sizes = [n for n in range(asked.batch_size, 0, -1) if drawn % n == 0] if asked.fit_device else [asked.batch_size]
    modes = [True] if asked.gradient_checkpointing else [False, True] if asked.fit_device else [False]
    peaks = []
    for checkpointed, size in itertools.product(modes, sizes):
        training = replace(asked, batch_size=size, accumulation=drawn // size, gradient_checkpointing=checkpointed, precision=precision)
        fitted = replace(recipe, training=training)
        peaks.append(expected_peak(fitted, device))
        if peaks[-1] <= SHARE * memory or not asked.fit_device:
            return fitted, _sentence(name, memory, asked, training, peaks, task)
    raise RecipeError(
        f"{name} has {_gb(memory)}{' for each process' if device.type == 'cpu' and processes > 1 else ''}, and one {task.one} of {task.size} "
        f"with checkpointed gradients in {PRECISIONS[precision]} needs about {_gb(peaks[-1])}, more than {SHARE:.0%} of it: choose a smaller "
        f"{task.smaller}, or a device with at least {_gb(peaks[-1] / SHARE)}")


def _sentence(name: str, memory: int, asked: Training, training: Training, peaks: list[int], task) -> str:
    split = f"{training.batch_size} x {training.accumulation} accumulated"
    if training.batch_size == asked.batch_size:
        words = [f"micro-batches of {split}, as asked"]
    else:
        drawn, norm = asked.batch_size * asked.accumulation, f"; Dice{' and BatchNorm' * task.batchnorm} now of {training.batch_size} at a time"
        words = [f"micro-batches of {split} ({drawn} {task.many} a step as asked; {asked.batch_size} x {asked.accumulation} would need about {_gb(peaks[0])}{norm})"]
    wanted, given = PRECISIONS[asked.precision], PRECISIONS[training.precision]
    words.append(given if wanted == given else f"{given}, as {wanted} is not native here")
    if training.gradient_checkpointing:
        words.append("gradients checkpointed" + ("" if asked.gradient_checkpointing else f", without which one {task.one} would not fit"))
    return f"{name}, {_gb(memory)}: {'; '.join(words)}: about {_gb(peaks[-1])} at the peak (estimated)"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


class Held(TorchDispatchMode):
    """Follows every storage that operations give back while it is the mode: `bytes` held now, and their `peak`."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def _drop(self, key: int, size: int) -> None:
        del self._storages[key]
        self.bytes -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result
