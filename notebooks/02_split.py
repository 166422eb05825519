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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/wmh-lora/wmh-lora/blob/main/notebooks/02_split.ipynb)
#
# # 2 · Train, validation and test cases
#
# Deals the cases of each site over training, validation and test so that each part spans the lesion burden.
# Validation cases will choose the operating point, test cases are looked at once, at the end.
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
preset: str = "demo"  # recipe: demo, colab, lean, original or smoke
run_dir: str = ""  # run folder; empty: <root>/<preset>, on Drive in Colab

# %% [markdown]
# The cohort of notebook 01, with the lesion volume of every case.

# %%
from IPython.display import Markdown, display

from wmhlib import cohort, figures, report
from wmhlib.workspace import RunFolder, read_table, write_table

run = RunFolder(run_dir or f"{root}/{preset}")
recipe = run.recipe(preset)
cases = read_table(run.need(run.cohort_csv, "01_download"))

# %% [markdown]
# In each site the cases are ordered by burden and drawn at even steps. All sessions of a subject stay together.

# %%
split = cohort.split_cases(cases, recipe)
write_table(split, run.split_csv)
split.groupby(["site", "split"]).lesion_ml.agg(["count", "median", "min", "max"]).round(1)

# %% [markdown]
# The three parts should look alike in every column.

# %%
figure = figures.split_figure(split)
figures.save_figure(figure, run.figures / "split.png")
display(figure, Markdown(report.caption("split", cohort.describe(cases), len(split))))
