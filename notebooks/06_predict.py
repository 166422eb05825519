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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/wmh-lora/wmh-lora/blob/main/notebooks/06_predict.ipynb)
#
# # 6 · Your own scans
#
# Takes FLAIR scans (T1w scans with a run on strokes), one or a whole cohort, and gives back their lesions: mask, probability and uncertainty on each scan's
# own grid, volumes in one table, a page to look at each scan. For research; it is no medical device.
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
preset: str = ""  # your run: the preset of notebook 01, such as "colab"; empty: NOT your run but the small weights that come with the suite
run_dir: str = ""  # or its run folder, or several, whose probabilities are averaged (in quotes where a path has spaces); empty: runs/<preset>, in Colab MyDrive/wmh-lora/<preset>
flair: str = ""  # the scans, without which nothing can be done: a NIfTI file, several (in quotes where a path has spaces), a folder (BIDS or other) or a CSV with subject and flair; in Colab e.g. /content/drive/MyDrive/scan.nii.gz
t1: str = ""  # T1 of a single FLAIR on the same grid, for recipes that use one; empty: without, or as the folder or CSV has it
out_dir: str = ""  # folder for the results, a BIDS derivatives dataset; empty: runs/<preset or minisam>/derivatives, in Colab MyDrive/wmh-lora/<preset or minisam>/derivatives

# %% [markdown]
# The trained network with its operating point: your run's, the mean of several, or the one that comes with the suite (its limits: assets/minisam/README.md).

# %%
import pandas as pd
from IPython.display import HTML, Markdown, display

from wmhlib import bids, derivatives, ensemble, report, scanpages, viewer
from wmhlib.workspace import MINISAM, RunFolder, run_folders

runs = run_folders(run_dir) or [RunFolder(f"{root}/{preset}") if preset else MINISAM]
run = runs[0]
run.recipe(preset or None)
engine = ensemble.open_engine(runs)
pd.set_option("display.max_rows", None, "display.max_colwidth", None)

# %% [markdown]
# The scans. Names in BIDS form keep their subject and session; others get a subject label from the file's name.

# %%
scans = derivatives.find(flair, t1, engine.recipe.inputs)
scans[["case", "flair", "t1"]]

# %% [markdown]
# One after the other. A scan that cannot be used is named and the rest go on; one done before, by the same code with the same weights at the
# same operating point, is kept as it is, and so is a mask that you have corrected, which counts with its own volume. All maps keep the affine and header of their scan, so that a viewer overlays them exactly.

# %%
out = Path(out_dir or run.results(root) / "derivatives").expanduser()
table = derivatives.predict_scans(engine, scans, out)
print(f"every scan: {out / derivatives.INDEX}, as a table: {derivatives.TABLE} beside it")

# %% [markdown]
# ## Volumes
#
# A scan is unsure where plain prediction and test-time views differ more than the limit that best told poor validation cases from others: look at it first.

# %%
table[["scan", "volume_ml", "lesions", "uncertainty", "unsure", "warnings", "status"]].round(3)

# %% [markdown]
# ## Look before you believe
#
# Outlines, probability, and where the network is in two minds: unsure scans before others, then those with most lesion.

# %%
shown, kind = list(derivatives.worth_a_look(table, out)), bids.kind_of(engine.recipe.inputs)
for scan in shown:
    display(scanpages.overlay(scan), Markdown(report.caption("overlay", f"{kind.scan} scan {scan['case']}, {scan['site']}")))

# %% [markdown]
# The same scans, every slice.

# %%
display(HTML(viewer.viewer(shown)))
