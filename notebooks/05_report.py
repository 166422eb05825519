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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/wmh-lora/wmh-lora/blob/main/notebooks/05_report.ipynb)
#
# # 5 · Results on the test cases
#
# Scores the test cases once with the metrics of the WMH Segmentation Challenge, beside two baselines,
# each mean with its 95 % interval.
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
# Weights from notebook 03, operating point from 04. Nothing is tuned from here on.

# %%
import json

import pandas as pd
from IPython.display import Image, Markdown, display

from wmhlib import cohort, figures, report
from wmhlib.engine import WMHInferenceEngine
from wmhlib.workspace import RunFolder, read_table, write_table

run = RunFolder(run_dir or f"{root}/{preset}")
recipe = run.recipe(preset)
point = json.loads(run.need(run.operating_point, "04_search").read_text())
engine = WMHInferenceEngine.from_run(run)
data = cohort.describe(read_table(run.cohort_csv))

# %% [markdown]
# Every test case is predicted and scored. Its mask is kept on the scan's own grid, for any viewer.

# %%
cases = report.save_masks(engine.cases(run, "test"), point, run.predictions)
metrics, gallery = report.score_cases(cases, point)
write_table(metrics, run.metrics_csv)

# %% [markdown]
# The headline: the operating point beside the same network at 0.5 without post-processing, and beside a plain FLAIR z-score threshold.

# %%
display(report.results_table(metrics, recipe.seed))
display(Markdown(report.caption("results", data, len(gallery))))

# %% [markdown]
# Each case by site.

# %%
figure = figures.site_figure(metrics)
figures.save_figure(figure, run.figures / "sites.png")
display(figure, Markdown(report.caption("sites", data, len(gallery))))

# %% [markdown]
# Best, median and worst case, so that failures show too.

# %%
figure = figures.predictions_figure(report.best_median_worst(gallery))
figures.save_figure(figure, run.figures / "predictions.png")
display(figure, Markdown(report.caption("predictions", data, len(gallery))))

# %% [markdown]
# Lesion volume is what clinical studies use; agreement says more about it than correlation.

# %%
own = metrics[metrics.system == "operating point"]
figure = figures.bland_altman_figure(own.reference_ml, own.result_ml, own.site)
figures.save_figure(figure, run.figures / "bland_altman.png")
display(figure, Markdown(report.caption("bland_altman", data, len(own))))

# %% [markdown]
# How the network was trained and how the operating point was found, from notebooks 03 and 04.

# %%
for name, part in (("training_curves", "train"), ("search_heatmap", "val")):
    n = (read_table(run.split_csv).split == part).sum()
    display(Image(run.figures / f"{name}.png", width=800), Markdown(report.caption(name, data, n)))

# %% [markdown]
# Every test case at the operating point.

# %%
own.drop(columns="system").round(3)

# %% [markdown]
# Versions, commit, seed and the hash of every file close the run.

# %%
manifest = json.loads(run.write_manifest().read_text())
pd.Series(manifest["versions"] | {"commit": manifest["commit"], "seed": manifest["seed"]}, name="made with").to_frame()
