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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/wmh-lora/wmh-lora/blob/main/notebooks/03_train.ipynb)
#
# # 3 · Training
#
# Trains LoRA, the channel adapter (of a scan the three channels that the encoder takes), the decoder and the image skip. The encoder stays frozen, unless
# `adapter.method` says otherwise; a network of whole volumes (preset `stroke`) is trained in full.
# Reads recipe, `cohort.csv` and `split.csv`; writes `checkpoints/`, `history.csv`, `best.safetensors` and `tensorboard/`. The longest of 01 to 05: each line tells the time that is left.
# Stopped at any moment and run again, it goes on from the last checkpoint and ends with the same weights (on a GPU up to the order of its sums).
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
preset: str = "demo"  # recipe, the one of notebook 01
run_dir: str = ""  # run folder; empty: runs/<preset>, in Colab MyDrive/wmh-lora/<preset>

# %% [markdown]
# Recipe and split say all there is to say; nothing is chosen here.

# %%
from wmhlib import cohort, figures, report, training
from wmhlib.files import read_table
from wmhlib.workspace import RunFolder

run = RunFolder(run_dir or f"{root}/{preset}")
recipe = run.recipe(preset)
split = read_table(run.need(run.split_csv, "02_split"))

# %% [markdown]
# One line an epoch. A star marks the best validation Dice so far, whose weights are kept. Where this machine has several GPUs,
# each gets a process of its own and its share of every step, up to one for each micro-batch (`training.accumulation`); the result is that of one.

# %%
history = training.launch(run)
history.tail()

# %% [markdown]
# The curves tell whether training was long enough and whether it went on too long.

# %%
data, n = cohort.describe(read_table(run.cohort_csv), recipe.inputs), (split.split == "train").sum()
report.show(figures.training_curves(history), run, "training_curves", data, n)
