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
# Deals the subjects over training, validation and test: by site and lesion burden, or by another protocol. Reads `cohort.csv`, writes `split.csv`.
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

from wmhlib.colab import bootstrap

root = bootstrap()

# %% tags=["parameters"]
preset: str = "demo"  # recipe, the one of notebook 01
run_dir: str = ""  # run folder; empty: runs/<preset>, in Colab MyDrive/wmh-lora/<preset>

# %% [markdown]
# The cohort of notebook 01, with subject and lesion volume of every case.

# %%
from wmhlib import cohort, figures, report, splits
from wmhlib.files import read_table
from wmhlib.workspace import RunFolder

run = RunFolder(run_dir or f"{root}/{preset}")
recipe = run.recipe(preset)
cases = read_table(run.need(run.cohort_csv, "01_download"))

# %% [markdown]
# Subjects are dealt, so all scans of one stay together. `split.protocol`, set in notebook 01, says how: `stratified` draws
# from every site, evenly over its lesion burden; `challenge`, `leave-one-site-out` and `k-fold` say who is tested, and only the
# validation subjects are drawn so; `given` draws nothing and takes the split that a set of images brings.

# %%
split = splits.deal(run, cases)
print(f"protocol {recipe.split.protocol}, seed {recipe.seed}")
splits.split_table(split)

# %% [markdown]
# No subject and no file may be on two sides. If you change split.csv by hand, run this cell and not the one above, which deals anew until the run is trained.

# %%
split = splits.check_split(read_table(run.split_csv), cases)
print(f"{split.subject.nunique()} subjects, each in one of {', '.join(split.split.unique())}")

# %% [markdown]
# Within a site the parts should span a similar range of burden; a site that is left out is all test.

# %%
report.show(figures.split_figure(split), run, "split", cohort.describe(cases, recipe.inputs), len(split))
