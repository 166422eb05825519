"""Feeds the readers of scans, tables, JSON files and weights with damaged and hostile files.

    python tests/fuzz.py --inputs 20000 --seed 0

Each input lies alone in a folder and is read in a process that may use no more than `MEMORY` bytes above what it starts with and
no more than `SECONDS`. It must load, and what is loaded must be sound, or be refused by a typed error; nothing may be left behind.
Input number n of a seed is always the same: `--only n` reads it again and shows the traceback.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import io
import logging
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from fuzz_inputs import Seeds
from fuzz_readers import TARGETS

from wmhlib.errors import WMHError

SECONDS = 10.0  # for one input, of this machine when nothing else runs on it
MEMORY = 2 << 30  # bytes, for one input


def make(seeds: Seeds, seed: int, number: int) -> tuple[str, str, bytes]:
    """Input `number`: what it attacks, the name of its file, its bytes."""
    rng = np.random.default_rng((seed, number))
    target = str(rng.choice(list(TARGETS), p=[share for share, *_ in TARGETS.values()]))
    content = TARGETS[target][1](seeds, rng)
    content, ending = content if isinstance(content, tuple) else (content, "")
    return target, target + ending, content


def read(seeds: Seeds, target: str, path: Path) -> str:
    """How reading ended: "loaded", "refused (<error>)" or what must not be. What asked for more memory than there is is read once
    more with four times as much, and is at fault only if it fills it: a buffer that is reserved and not used does no harm."""
    outcome = _read(seeds, target, path)
    if outcome == "MEMORY":
        with _memory(4 * MEMORY):
            outcome = _read(seeds, target, path)
    left = sorted(p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*") if p != path)
    return f"LEFT {left}" if left else outcome


def _read(seeds: Seeds, target: str, path: Path) -> str:
    started, outcome = _peak(), "loaded"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            TARGETS[target][2](path, seeds)
        except WMHError as error:
            cause = error.__context__
            outcome = "MEMORY" if isinstance(cause, MemoryError) or "allocate memory" in str(cause) else f"refused ({type(error).__name__})"
        except MemoryError:
            outcome = "MEMORY"
        except BaseException as error:  # the point of it
            outcome = f"UNTYPED {type(error).__name__}: {str(error)[:150]}"
    if _peak() - started > MEMORY // 2:
        outcome = f"MEMORY {(_peak() - started) >> 20} MB"
    return outcome


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _memory(more: int):
    """This process may take `more` bytes than it has."""
    before, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _work(pipe, seed: int, folder: str) -> None:
    """Reads the inputs whose numbers come through `pipe`, and sends what each attacks and then how it ended."""
    torch.set_num_threads(1)
    logging.disable()
    seeds = Seeds()
    faulthandler.disable()
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    os.chdir(folder)
    with _memory(MEMORY):
        for number in iter(pipe.recv, None):
            place = Path(folder, f"{number}")
            place.mkdir()
            target, name, content = make(seeds, seed, number)
            (place / name).write_bytes(content)
            pipe.send(target)
            outcome = read(seeds, target, place / name)
            shutil.rmtree(place)
            others = os.listdir(folder)
            pipe.send(outcome if not others else f"LEFT {others}")


def fuzz(inputs: int, seed: int, first: int = 0, progress: bool = False) -> tuple[collections.Counter, list[str]]:
    """Reads `inputs` inputs of `seed`, from number `first` on. Returns how often each (target, outcome) was, and a line for each that must not be."""
    counts, faults, worker = collections.Counter(), [], None
    context, start = multiprocessing.get_context("spawn"), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + inputs):
            if worker is None:
                pipe, end = context.Pipe()
                worker = context.Process(target=_work, args=(end, seed, folder), daemon=True)
                worker.start()
                end.close()
            pipe.send(number)
            target = pipe.recv()
            try:
                outcome = pipe.recv() if pipe.poll(SECONDS) else "HANGS"
            except EOFError:
                outcome = "CRASH"
            if outcome in ("HANGS", "CRASH"):
                worker.kill()
                worker.join()
                worker = None
                for name in os.listdir(folder):
                    shutil.rmtree(Path(folder, name))
            counts[target, outcome.split(":")[0]] += 1
            if outcome[:2].isupper():
                faults.append(f"{number} {target}: {outcome}")
                if progress:
                    print(faults[-1], flush=True)
            if progress and (number + 1 - first) % 1000 == 0:
                print(f"{number + 1 - first} inputs in {time.monotonic() - start:.0f} s, {len(faults)} faults", flush=True)
        if worker:
            pipe.send(None)
            worker.join()
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to share the work")
    parser.add_argument("--only", type=int, help="number of one input, read with its traceback")
    given = parser.parse_args()
    if given.only is not None:
        seeds = Seeds()
        target, name, content = make(seeds, given.seed, given.only)
        path = Path(tempfile.mkdtemp(), name)
        path.write_bytes(content)
        print(f"{target}: {len(content)} bytes in {path}")
        try:
            TARGETS[target][2](path, seeds)
        except Exception:
            traceback.print_exc()
        return 0
    start = time.monotonic()
    counts, faults = fuzz(given.inputs, given.seed, given.first, progress=True)
    inputs = sum(counts.values())
    for (target, outcome), count in sorted(counts.items()):
        print(f"{count:6d}  {target:26s} {outcome}")
    print(f"{inputs} inputs in {time.monotonic() - start:.0f} s, {len(faults)} of them faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
