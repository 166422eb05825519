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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/wmh-lora/wmh-lora/blob/main/notebooks/04_search.ipynb)
#
# # 4 · Operating point
#
# Looks for the threshold, the smallest component worth keeping and the use of test-time augmentation (TTA)
# on validation cases. Test cases are refused. Reads `best.safetensors`; writes `search.csv` and `operating_point.json`.
# With `data_dir` the point is chosen on other labelled cases, for weights that are to be used there, and nothing is trained.
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
data_dir: str = ""  # other labelled cases, a folder or CSV, to choose the point on; empty: the run's own validation cases
out_dir: str = ""  # run folder for the weights with that point; empty: tuned/<name of data_dir> in the run folder, or in runs/minisam (in Colab MyDrive/wmh-lora/minisam)

# %% [markdown]
# The best weights of the run, whatever the last epoch did.

# %%
import json

from wmhlib import cohort, figures, opening, report, search
from wmhlib.engine import WMHInferenceEngine
from wmhlib.files import write_atomic, write_table
from wmhlib.workspace import MINISAM, RunFolder

run = RunFolder(run_dir or f"{root}/{preset}") if run_dir or preset else MINISAM
run = opening.open_tuning(run, data_dir, out_dir, root)
recipe = run.recipe(preset or None)
engine = WMHInferenceEngine.from_run(run, at_point=False)

# %% [markdown]
# Each validation case is predicted once and read once; the whole grid is tried on its probabilities.
# The smallest component is tried in voxels and in mm3; a size in mm3 carries over to scans with other voxels.

# %%
table, validation = search.search(engine.cases(run, "val"), recipe.operating)
write_table(table, run.search_csv)

# %% [markdown]
# Many points are nearly as good as the best (the *plateau*); its centre is chosen, since a narrow peak may be chance. With `operating.prefer=sensitive` the
# threshold is lowered as far as the mean Dice stays within one standard error of the best, for scanners that no validation case comes from. The baseline's z-score threshold and the
# limit above which a case is flagged as unsure are chosen on the same cases.

# %%
point = search.choose(table, validation, recipe.operating.prefer) | {"views": engine.recipe.operating.views, "weights_sha256": engine.model.fingerprint()}
write_atomic(run.operating_point, json.dumps(point, indent=2) + "\n")
print(f"operating point in {run.path}")

# %% [markdown]
# The whole grid, with the plateau, the choice and the recipe's own point marked.

# %%
data, n = cohort.describe(run.cases().query("split == 'val'"), recipe.inputs), len(validation)
report.show(figures.search_heatmap(table, point, recipe.operating.point), run, "search_heatmap", data, n)

# %% [markdown]
# The choice beside the recipe's own point, on the same validation cases.

# %%
report.tell(report.comparison_table(search.compare(table, point, recipe.operating, recipe.seed)), "comparison", data, n)
