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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/wmh-lora/wmh-lora/blob/main/notebooks/01_download.ipynb)
#
# # 1 · Data and recipe
#
# Opens a run folder, brings in the cases and checks every one of them. Writes `recipe.json`, `cohort.csv` and, where cases are synthetic or fetched, `data/`.
# The presets demo, flair, base, vessels, stroke-demo, smoke and stroke-smoke make a synthetic cohort of their own unless you name data; `colab`, `lean` and `original` take
# your scans, the Kaggle mirror or DataverseNL, `stroke` your T1w scans. The preset `vessels` takes
# images that are no scans: a folder with `images/`, `masks/` and `data_split.csv`; `stroke` takes T1w scans with masks of stroke lesions, as
# ATLAS v2.0 lays them out (`R001/sub-*/ses-1/anat/*_T1w.nii.gz`). How your scans may lie in folders, and what BIDS masks are called:
# [Your data](https://github.com/wmh-lora/wmh-lora#your-data).
#
# A mask lies on its scan's grid and holds 0, 1 (lesion) and 2 (other pathology, which counts neither for nor against a result). Where 2 stands for deep
# lesions, make it 1 first.
#
# Any setting of the recipe can be changed by name: `overrides = "training.epochs=3 skip=false inputs.modalities=['flair','t1']"`, with spaces between settings and
# none inside a value. Names and meanings stand in `wmhlib/sections.py` (`seed` and `skip` in `wmhlib/settings.py`).
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
preset: str = "demo"  # recipe: demo, colab, lean, original, flair, base, vessels, stroke, stroke-demo, smoke or stroke-smoke
run_dir: str = ""  # run folder; empty: runs/<preset>, in Colab MyDrive/wmh-lora/<preset>
data_dir: str = ""  # your cases: a folder (challenge, Kaggle, BIDS or ATLAS layout, or images with masks) or a CSV table; or where a download goes; empty: <run folder>/data
source: str = ""  # synthetic, folder, kaggle or dataverse; empty: folder if data_dir is given, else synthetic where the preset has synthetic cases
medsam: str = ""  # weights of the encoder: empty for the recipe's own, zenodo to fetch MedSAM, or a checkpoint file
seed: int = 42  # of everything random
overrides: str = ""  # settings to change, the way the text above shows

# %% [markdown]
# The recipe is written once. The run folder refuses another one later, so that its files always belong together.

# %%
import pandas as pd

from wmhlib import cohort, download, figures, opening, presets, report
from wmhlib.workspace import RunFolder

pd.set_option("display.max_rows", None, "display.max_colwidth", None)
recipe = presets.preset(preset, f"seed={seed} {overrides}")
run = opening.open_run(RunFolder(run_dir or f"{root}/{preset}"), recipe, medsam)
print(f"run folder {run.path}")

# %% [markdown]
# The cases come from wherever `source` says; what is already there is kept.

# %%
folder = download.get_cohort(run, source, data_dir)
cases = cohort.find_cases(folder, recipe.inputs)
print(f"{len(cases)} cases in {folder}, by site: {cases.site.value_counts().to_dict()}")

# %% [markdown]
# Every file is read now, so that a damaged scan or a mask on another grid stops here and not in the middle of training.

# %%
checks = cohort.check_cases(cases, recipe.inputs, recipe.volume)
run.write_cases(cases.merge(checks, on=["case", "site"]))
checks.drop(columns=["digest", "mask_digest"]).round({"lesion_ml": 2})

# %% [markdown]
# One case of each site, as radiologists look at it, or some of the images. A look at this page finds what no check does.

# %%
report.show(figures.cohort_figure(cohort.examples(cases)), run, "cohort", cohort.describe(cases, recipe.inputs), len(cases))
