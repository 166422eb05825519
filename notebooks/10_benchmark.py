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

from wmhlib.colab import bootstrap

root = bootstrap()

# %% tags=["parameters"]
preset: str = "demo"  # small recipe, for whole volumes; the recipe at full size is colab
run_dir: str = ""  # run folder whose weights predict one scan; empty: runs/<preset>, in Colab MyDrive/wmh-lora/<preset>
out_dir: str = ""  # folder for tables and figures; empty: runs/benchmark, in Colab MyDrive/wmh-lora/benchmark
quick: int = 0  # 1: every measurement at toy size, in seconds, which says nothing about speed

# %% [markdown]
# The machine: what it has, and the most it showed on a large matrix product and on a large copy. Everything below uses the
# same number of threads. Weights are random at full size: they do not change the time.

# %%
import itertools
import json
import tempfile
from pathlib import Path

import pandas as pd
import torch
from IPython.display import Markdown

from wmhlib.bench import charts, growth, measures, roofline, steps, table
from wmhlib.files import write_atomic, write_table
from wmhlib.workspace import RunFolder

plan = measures.plan(preset, bool(quick))
out = Path(out_dir or f"{root}/benchmark").expanduser()
machine = roofline.machine(plan.matrix)
write_atomic(out / "machine.json", json.dumps(machine, indent=2) + "\n")
pd.Series(machine, name="").to_frame()

# %% [markdown]
# Measured in processes of their own, while this one is still small: one scan of the challenge's size, from starting the command
# to all files written, and the memory of a training step, ours and the plain loop's.

# %%
run, folder = RunFolder(run_dir or f"{root}/{preset}"), tempfile.TemporaryDirectory()
rows = [measures.predict_row(run)]
memory = {who: steps.step_memories([plan.full], who)[0] for who in ("eager", "ours")} if not plan.quick else None

# %% [markdown]
# The encoder, on one image: against segment_anything's own with the same weights, with and without
# gradients, and against a plain matrix product.

# %%
rows += measures.encoder_rows(plan.full, plan.matrix, plan.repetitions)

# %% [markdown]
# Whole volumes with eight views: against one slice and one view at a time. Synthetic cases of the challenge's sizes, Utrecht's
# with brain in every slice and GE3T's down to the neck, for the small network, trained if the run has weights.

# %%
devices = [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]
network, name = measures.trained_network(run, plan)
sites = measures.challenge_cases(folder.name, network.recipe, plan.scale, plan.depth)
for device, site in itertools.product(devices, ("Utrecht", "GE3T")):
    rows += measures.volume_rows(network, sites[site], plan.few, f"volume like {site}'s, eight views, {name}", device)

# %% [markdown]
# A slab of Utrecht's for the network at full size, whose baseline would take many minutes.

# %%
full, case = measures.full_network(plan.full), sites["Utrecht"]
large = measures.challenge_cases(folder.name, plan.full, plan.scale, plan.depth)["Utrecht"]
for device in devices:
    rows += measures.volume_rows(full, measures.slab(large, plan.slab), 1, f"slab, eight views, {plan.full.name} network", device, large)

# %% [markdown]
# A training step: against the plain loop in fp32 with augmentation sample by sample.

# %%
rows += steps.step_rows(plan.full, plan.few, memory)

# %% [markdown]
# The search for the operating point: against labelling the mask anew at each of its points.

# %%
rows += measures.search_rows(case, plan.grid, plan.few)

# %% [markdown]
# ## Every claim as a ratio

# %%
claims = pd.DataFrame(rows)
write_table(claims.assign(reached=table.reached(claims)), out / "benchmark.csv")
charts.tell(table.shown(claims), "benchmark", machine["name"])
charts.show(charts.ratio_figure(claims), out, "ratios", machine["name"])

# %% [markdown]
# ## Around the network

# %%
steps_around = measures.around(case, folder.name, plan.scale, plan.full.inputs.img_size)
write_table(steps_around, out / "around.csv")
charts.tell(steps_around.round(3).set_index("step"), "around", machine["name"])

# %% [markdown]
# ## What the machine allows

# %%
points = measures.roofline_table(plan.full, plan.few)
charts.show(charts.roofline_figure(points, machine), out, "roofline", machine["name"])

# %% [markdown]
# ## How cost grows

# %%
curves = growth.growth(plan, case)
write_table(curves, out / "growth.csv")
charts.show(charts.growth_figure(curves), out, "growth", machine["name"])
held = curves.dropna(subset="memory_mb").pivot(index=["what", "along"], columns="n", values="memory_mb")
charts.tell(held.map("{:.0f} MB".format, na_action="ignore").fillna(""), "memory", machine["name"])

# %% [markdown]
# ## On a GPU

# %%
charts.tell_gpu(steps.gpu_rates(plan.full))

# %% [markdown]
# ## What 10,000 scans cost

# %%
Markdown(growth.ten_thousand(plan.full, large, rows, growth.files_s(large)))

# %% [markdown]
# ## Limits
#
# Ratios hold for this machine and this number of threads; others have other roofs, and a processor without bf16 instructions
# falls back to fp32. Medians of few repetitions: the ranges say how quiet the machine was. The cases are synthetic (n = 1 a
# geometry); lesion load moves the search, not the network. The straightforward ways are our own plain code around public
# packages, not another project's product. Rates of GPUs in the paragraph are assumptions.

# %%
folder.cleanup()
print(f"tables and figures in {out}")
