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
# # 5 · Results
#
# Scores test cases, or other labelled cases, with the metrics of the WMH Segmentation Challenge, beside three baselines, each mean with its 95 % interval. Then:
# how well volumes agree, where the method fails, and whether it flagged those cases. Reads weights and operating point; writes `metrics.csv`,
# `lesions.csv`, `zones.csv`, `calibration.csv`, `uncertainty.csv`, `predictions/`, `figures/` and `manifest.json`.
# For images that are no scans read what is marked for lesions, px (pixels) for mm and kpx (1000 pixels) for mL.
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
preset: str = "demo"  # recipe, the one of notebook 01; empty: the weights that come with the suite, which want data_dir
run_dir: str = ""  # run folder; empty: runs/<preset>, in Colab MyDrive/wmh-lora/<preset>
data_dir: str = ""  # other labelled cases, a folder or CSV, to evaluate the run on; empty: its own test cases
out_dir: str = ""  # folder for that evaluation; empty: evaluations/<name of data_dir> in the run folder, or in runs/minisam (in Colab MyDrive/wmh-lora/minisam)

# %% [markdown]
# Weights from notebook 03, operating point from 04. Nothing is tuned from here on.

# %%
import json

import pandas as pd
from IPython.display import HTML, Image, Markdown, display

from wmhlib import adapters, charts, evaluation, figures, methods, opening, prompting, report, viewer
from wmhlib.engine import WMHInferenceEngine
from wmhlib.files import read_table
from wmhlib.workspace import MINISAM, RunFolder

pd.set_option("display.max_rows", None, "display.max_colwidth", None)
run = RunFolder(run_dir or f"{root}/{preset}") if run_dir or preset else MINISAM
recipe = run.recipe(preset or None)
run.need(run.history_csv, "03_train")
run.need(run.operating_point, "04_search")
run.need(run.figures / "search_heatmap.png", "04_search")
engine = WMHInferenceEngine.from_run(run)
out = opening.open_evaluation(run, data_dir, out_dir, root)

# %% [markdown]
# Every case is predicted and scored. Its mask is kept on the scan's own grid, for any viewer. Where the base answers prompts it is
# also asked, before any adaptation, with the true box of each lesion.

# %%
base, about_base = prompting.open_base(recipe, engine.device)
cases = prompting.with_zero_shot(engine.cases(out, "test"), base)
cases = evaluation.save_masks(cases, engine.point, out.predictions)
results = evaluation.evaluate(cases, engine.point, recipe.operating)
results.write(out)
story = methods.Story.of(run, out, adapters.budget(engine.model))
data, n = story.data, len(story.evaluated)
Markdown(story.heading())

# %% [markdown]
# ## Results
#
# The operating point beside the recipe's own point, the same network at 0.5 without post-processing, and a plain
# z-score threshold of the scan.

# %%
report.tell(report.results_table(results.metrics, recipe.seed), "results", data, n)
Markdown(about_base)

# %% [markdown]
# The operating point against the others, case by case.

# %%
report.tell(report.paired_table(results.metrics, recipe.seed), "paired", data, n)

# %% [markdown]
# ## By site

# %%
report.show(charts.site_figure(results.systems, recipe.seed), out, "sites", data, n)
report.tell(report.group_table(results.own, "site", recipe.seed), "groups", data, n)

# %% [markdown]
# ## Lesion volume
#
# Lesion volume is what clinical studies use; agreement says more about it than correlation.

# %%
own = results.own
report.show(charts.bland_altman_figure(own.reference_ml, own.result_ml, own.site), out, "bland_altman", data, n)
report.tell(report.volume_table(own), "volumes", data, n)

# %% [markdown]
# ## Where it fails: by burden, lesion size and place

# %%
report.show(charts.strata_figure(results.metrics, results.lesions, results.zones, recipe.seed), out, "strata", data, n)
report.tell(report.group_table(results.own, "burden", recipe.seed), "groups", data, n)
report.tell(report.size_table(results.lesions, recipe.seed), "sizes", data, n)
report.tell(report.zone_table(results.zones, results.lesions, recipe.seed), "zones", data, n)

# %% [markdown]
# ## Can the probabilities be believed?

# %%
report.show(charts.calibration_figure(results.calibration, recipe.seed), out, "calibration", data, n)

# %% [markdown]
# ## Does it know when it is unsure?

# %%
report.show(charts.uncertainty_figure(results.uncertainty, engine.point), out, "uncertainty", data, n)
report.tell(report.flag_table(results.uncertainty, engine.point, recipe.seed), "flag", data, n)

# %% [markdown]
# ## Best, median and worst case

# %%
chosen = evaluation.best_median_worst(results.gallery)
report.show(figures.predictions_figure(chosen), out, "predictions", data, n)

# %% [markdown]
# All slices of these cases: click the image, then turn pages with the arrow keys or the wheel, or drag sideways.

# %%
files = evaluation.result_files(out, chosen)
display(HTML(viewer.viewer(viewer.case_files(files))), Markdown(report.caption("viewer", data, n)))

# %% [markdown]
# ## Every case

# %%
report.tell(report.case_table(results.own, results.uncertainty), "cases", data, n)

# %% [markdown]
# ## How it was made
#
# Training and search, from notebooks 03 and 04.

# %%
parts = story.trained_on.split.value_counts()
report.show(figures.training_curves(read_table(run.history_csv)), out, "training_curves", story.source("train"), parts["train"])
display(Image(run.figures / "search_heatmap.png", width=800), Markdown(report.caption("search_heatmap", story.source("val"), parts["val"])))

# %% [markdown]
# Data and recipe.

# %%
story.card()

# %% [markdown]
# ## Methods
#
# A paragraph for a paper, written from the recipe and the files of the run.

# %%
Markdown(story.paragraph())

# %% [markdown]
# ## Limits

# %%
Markdown(story.limits())

# %% [markdown]
# ## Made with
#
# Versions, commit and seed; `manifest.json` has them too, with the hashes of recipe, weights, tables, masks and figures.

# %%
manifest = json.loads(out.write_manifest().read_text())
pd.Series(manifest["versions"] | {"commit": manifest["commit"], "seed": manifest["seed"]}, name="").to_frame()
