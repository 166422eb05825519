# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     notebook_metadata_filter: kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/wmh-lora/wmh-lora/blob/main/notebooks/10_benchmark.ipynb)
#
# # 10 · Speed
#
# How fast each part is that somebody waits for: the encoder, whole volumes, training, the search, one scan from start to files.
# Each is measured against the straightforward way to the same result, in one run on one machine.
#
# The first cell below prepares Colab (Drive, missing packages) and does nothing elsewhere; the second holds all you may want to set.

# %% tags=["bootstrap"]
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

if "google.colab" in sys.modules and not find_spec("wmhlib"):
    if not Path("/content/wmh-lora").exists():
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", "https://github.com/wmh-lora/wmh-lora", "/content/wmh-lora"],
                       check=True)
    sys.path.insert(0, "/content/wmh-lora")

from wmhlib.workspace import bootstrap

root = bootstrap()

# %% tags=["parameters"]
preset: str = "demo"  # small recipe, for whole volumes; the recipe at full size is colab
run_dir: str = ""  # run folder whose weights predict one scan; empty: <root>/<preset>
out_dir: str = ""  # folder for tables and figures; empty: <root>/benchmark
quick: int = 0  # 1: every measurement at toy size, in seconds, which says nothing about speed

# %% [markdown]
# The machine: what it has, and the most it showed on a large matrix product and on a large copy. Everything below uses the
# same number of threads. Weights are random at full size: they do not change the time.

# %%
import json
import tempfile
from pathlib import Path

import pandas as pd
import torch
from IPython.display import Markdown

from wmhlib import benchcharts, benchgrowth, benchmark, benchsteps, benchtable, roofline
from wmhlib.workspace import RunFolder, write_atomic, write_table

plan = benchmark.plan(preset, bool(quick))
out = Path(out_dir or f"{root}/benchmark")
machine = roofline.machine(plan.matrix)
write_atomic(out / "machine.json", json.dumps(machine, indent=2) + "\n")
pd.Series(machine, name="").to_frame()

# %% [markdown]
# The memory of a training step, ours and the plain loop's, each in a process of its own, while this one is still small.

# %%
memory = {who: benchsteps.step_memory(plan.full, who) for who in ("eager", "ours")} if plan.memory else None

# %% [markdown]
# The encoder, on one image: against segment_anything's own with the same weights, with and without
# gradients, and against a plain matrix product.

# %%
rows = benchmark.encoder_rows(plan.full, plan.matrix, plan.repetitions)

# %% [markdown]
# Whole volumes with eight views: against one slice and one view at a time. A synthetic case of the challenge's size for the small
# network, trained if the run has weights; a slab of it for the one at full size, whose baseline would take many minutes.

# %%
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
run, folder = RunFolder(run_dir or f"{root}/{preset}"), tempfile.TemporaryDirectory()
network, name = benchmark.trained_network(run, plan)
full = benchmark.full_network(plan.full)
case, large = benchmark.challenge_cases(folder.name, [network.recipe, plan.full], plan.scale, plan.depth)
rows += benchmark.volume_rows(network, case, plan.few, f"volume, eight views, {name}", device)
rows += benchmark.volume_rows(full, benchmark.slab(large, plan.slab), 1, f"slab, eight views, {plan.full.name} network", device, large)

# %% [markdown]
# A training step: against the plain loop in fp32 with augmentation sample by sample.

# %%
rows += benchsteps.step_rows(plan.full, plan.few, memory)

# %% [markdown]
# The search for the operating point: against labelling the mask anew at each of its points.

# %%
rows += benchmark.search_rows(case, plan.grid, plan.few)

# %% [markdown]
# One scan of the challenge's size, from starting the command to all files written.

# %%
rows.append(benchmark.predict_row(run))

# %% [markdown]
# ## Every claim as a ratio

# %%
table = pd.DataFrame(rows)
write_table(table.assign(reached=benchtable.reached(table)), out / "benchmark.csv")
benchcharts.tell(benchtable.shown(table), "benchmark", machine)
benchcharts.show(benchcharts.ratio_figure(table), out, "ratios", machine)

# %% [markdown]
# ## What the machine allows

# %%
points = benchmark.roofline_table(plan.full, plan.few)
benchcharts.show(benchcharts.roofline_figure(points, machine), out, "roofline", machine)

# %% [markdown]
# ## How cost grows

# %%
growth = benchgrowth.growth(plan, case)
write_table(growth, out / "growth.csv")
benchcharts.show(benchcharts.growth_figure(growth), out, "growth", machine)
held = growth.dropna(subset="memory_mb").pivot(index=["what", "along"], columns="n", values="memory_mb")
benchcharts.tell(held.map("{:.0f} MB".format, na_action="ignore").fillna(""), "memory", machine)

# %% [markdown]
# ## On a GPU

# %%
benchcharts.tell_gpu(benchsteps.gpu_rates(plan.full))

# %% [markdown]
# ## What 10,000 scans cost

# %%
Markdown(benchgrowth.ten_thousand(plan.full, large, rows, benchgrowth.files_s(large)))

# %% [markdown]
# ## Limits
#
# Ratios hold for this machine and this number of threads; others have other roofs, and a processor without bf16 instructions
# falls back to fp32. Medians of few repetitions: the ranges say how quiet the machine was. The case is synthetic (n = 1), of the geometry of
# one site; lesion load moves the search, not the network. The straightforward ways are our own plain code around public
# packages, not another project's product. Rates of GPUs in the paragraph are assumptions.

# %%
folder.cleanup()
print(f"tables and figures in {out}")
