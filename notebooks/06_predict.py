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
# # 6 · Your own scan
#
# Takes one FLAIR scan and gives back its lesions: mask, probability and uncertainty on the scan's own grid,
# the volume, a table of lesions and a page of overlays. For research; it is no medical device.
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
flair: str = ""  # the FLAIR scan, a NIfTI file
t1: str = ""  # its T1 on the same grid, for recipes that use one; empty: without
out_dir: str = ""  # folder for the results; empty: <run folder>/predictions/<scan>

# %% [markdown]
# The trained network with its operating point.

# %%
from pathlib import Path

import nibabel
from IPython.display import Markdown, display

from wmhlib import figures, report
from wmhlib.engine import WMHInferenceEngine
from wmhlib.workspace import RunFolder, read_table

run = RunFolder(run_dir or f"{root}/{preset}")
run.recipe(preset)
engine = WMHInferenceEngine.from_run(run)

# %% [markdown]
# All files keep the affine and header of the scan, so that a viewer overlays them exactly.

# %%
files = engine.predict_file(flair, out_dir or run.predictions / Path(flair).name.split(".nii")[0], t1 or None)
summary = read_table(files["summary"]).iloc[0]
print(f"{summary.scan}: {summary.volume_ml:.2f} mL in {summary.lesions} lesions")
print(*files.values(), sep="\n")

# %% [markdown]
# The lesions, largest first, with their centre in the scan's world coordinates (mm, RAS).

# %%
read_table(files["lesions"]).head(20).round(2)

# %% [markdown]
# Look before you believe: outlines, probability, and where the views of the scan disagree.

# %%
scan = nibabel.load(flair)
mask, prob, spread = (nibabel.load(files[name]).get_fdata() for name in ("mask", "probability", "spread"))
figure = figures.overlay_figure(scan.get_fdata().reshape(mask.shape), mask, prob, spread, scan.affine)
display(figure, Markdown(report.caption("overlay", Path(flair).name)))
