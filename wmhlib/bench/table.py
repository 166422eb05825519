"""The table of notebook 10_benchmark: works taken in turns, a row for each pair of ways to one result, and how it is read.

    python -m wmhlib.bench.table runs/benchmark/benchmark.csv

prints it as Markdown.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..errors import WMHError

Times = dict[str, list[float]]


def alternate(works: dict[str, Callable[[], object]], repetitions: int, warm: bool = False) -> tuple[Times, dict[str, object]]:
    """Seconds of each work, taken in turns `repetitions` times so that whatever else the machine does hits all of them, and
    what each gave. `warm`: after a round that does not count."""
    times: Times = {name: [] for name in works}
    results = {}
    if warm:
        alternate(works, 1)
    for _ in range(repetitions):
        for name, work in works.items():
            start = time.perf_counter()
            results[name] = work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return times, results


def each_alone(work: Callable[[Any], Any], given: Iterable[Any], threads: int) -> list:
    """`work` of each of `given` in a process of its own with `threads`, a copy of this one where the system can (what has been loaded here
    is there) and no GPU is in use, which bitsandbytes does as it is imported. Raises BrokenProcessPool where one dies."""
    copies = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
    context, found = multiprocessing.get_context("fork" if copies else "spawn"), []
    for one in given:
        with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as pool:
            found.append(pool.submit(work, one).result())
    return found


def measured_apart(module: str, *given: Any, **environment: str) -> list:
    """What `python -m module` prints in a fresh process that has loaded the libraries and nothing else: JSON of [threads, *given] goes in, a list in
    JSON comes back; `environment`: variables that are other than here. WMHError where it fails."""
    words = json.dumps([torch.get_num_threads(), *given])
    done = subprocess.run([sys.executable, "-m", module], input=words, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise WMHError(f"the process of {module} that measures memory ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(what: str, baseline: list[float], ours: list[float], target: float = np.nan, error: float = np.nan, error_target: float = np.nan,
        memory: tuple[float, float] = (np.nan, np.nan), memory_target: float = np.nan, note: str = "") -> dict:
    """A row of the table: median seconds of the baseline and of ours with their range, `ratio` of the medians (`target`: the
    least it must be), largest `error` and memory in MB with what they may be at most (memory as a share of the baseline's)."""
    first, second = median(baseline), median(ours)
    return dict(what=what, baseline_s=first, ours_s=second, ratio=first / second, target=target, error=error, error_target=error_target,
                memory_baseline_mb=memory[0], memory_ours_mb=memory[1], memory_target=memory_target, baseline_min=min(baseline),
                baseline_max=max(baseline), ours_min=min(ours), ours_max=max(ours), repetitions=len(ours), note=note)


def reached(table: pd.DataFrame) -> pd.Series:
    """Whether each row holds all it must: "yes", "no", or "" where it must nothing or was not measured."""
    share = table.memory_ours_mb / table.memory_baseline_mb
    pairs = ((-table.ratio, -table.target), (table.error, table.error_target), (share, table.memory_target))
    fails = sum((found > limit).astype(int) for found, limit in pairs)
    asked = sum((found.notna() & limit.notna()).astype(int) for found, limit in pairs)
    return pd.Series(np.select([fails > 0, asked > 0], ["no", "yes"], ""), table.index)


def markdown(table: pd.DataFrame) -> str:
    """The table for a README, one line a row."""
    lines = ["| what | baseline | ours | ratio | must be | error | reached |", "|---|---|---|---|---|---|---|"]
    for line, held in zip(table.itertuples(), reached(table)):
        lines.append(f"| {line.what} | {_s(line.baseline_s)} | {_s(line.ours_s)} | {_ratio(line.ratio)} | {_ratio(line.target)} | "
                     f"{_plain(line.error)} | {held or '-'} |")
        if np.isfinite(line.memory_ours_mb):
            lines.append(f"| {line.what}: memory | {line.memory_baseline_mb:.0f} MB | {line.memory_ours_mb:.0f} MB | "
                         f"{_ratio(line.memory_baseline_mb / line.memory_ours_mb)} | {_ratio(1 / line.memory_target)} | | |")
    return "\n".join(lines)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table ready to read, with the range of the times."""
    return pd.DataFrame({
        "ratio": table.ratio.map(_ratio), "must be": table.target.map(_ratio), "reached": reached(table),
        "baseline": [f"{_s(r.baseline_s)} ({_s(r.baseline_min)} to {_s(r.baseline_max)})" for r in table.itertuples()],
        "ours": [f"{_s(r.ours_s)} ({_s(r.ours_min)} to {_s(r.ours_max)})" if np.isfinite(r.ours_s) else "-" for r in table.itertuples()],
        "error": table.error.map(_plain),
        "memory (MB)": [f"{r.memory_baseline_mb:.0f} / {r.memory_ours_mb:.0f}" if np.isfinite(r.memory_ours_mb) else "-" for r in table.itertuples()],
        "note": table.note}).set_index(table.what.rename("what"))


def _s(value: float) -> str:
    return "-" if not np.isfinite(value) else f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


def _ratio(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 2}f}x" if np.isfinite(value) else "-"


def _plain(value: float) -> str:
    return f"{value:.1e}" if np.isfinite(value) and value else "0" if value == 0 else "-"


if __name__ == "__main__":
    print(markdown(pd.read_csv(sys.argv[1])))
