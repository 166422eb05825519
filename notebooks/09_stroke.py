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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/wmh-lora/wmh-lora/blob/main/notebooks/09_stroke.ipynb)
#
# # 9 · Stroke lesions in whole volumes
#
# Three networks of volumes on T1w scans of stroke patients: attention gates, squeeze-and-excitation, and state spaces with memory
# attention. Each gets the same cases, budget and seeds; their ensemble stands beside them. One network alone goes through notebooks 01 to 05,
# as any run does, with the presets `stroke` and `stroke-demo`.
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
preset: str = "stroke-demo"  # recipe: stroke-demo, stroke or stroke-smoke
run_dir: str = ""  # run folder whose cases and split are used; empty: for stroke the run of that preset; for the others synthetic cases, made for this in out_dir
out_dir: str = ""  # folder for the networks, one run folder each; empty: runs/<preset>_networks, in Colab MyDrive/wmh-lora/<preset>_networks
networks: str = ""  # which, such as "attention mamba"; empty: all. Jobs with one each may share a folder; run once more with all when they are done, for the tables
seeds: str = "0"  # each network is trained once with each, such as "0 1 2"
folds: int = 0  # cross-validate the network that is best on validation cases in so many folds; 0: do not
formats: str = "pt2"  # file formats to export the best network to: pt2, onnx (needs the packages onnx, onnxscript and onnxruntime), or both
overrides: str = ""  # settings of all networks to change, the way notebook 01 shows

# %% [markdown]
# The cases: ATLAS v2.0 in a run folder that notebooks 01 and 02 have prepared, or synthetic heads with territorial, cortical and lacunar strokes.

# %%
from pathlib import Path

from wmhlib import charts, cohort, compare, opening, presets, report
from wmhlib.bench import charts as bench
from wmhlib.bench import compared, roofline, volumes
from wmhlib.bench.table import shown
from wmhlib.files import read_table, write_table
from wmhlib.volumetric import study
from wmhlib.workspace import RunFolder

out, recipe, plan = Path(out_dir or f"{root}/{preset}_networks").expanduser(), presets.preset(preset), study.plan(preset)
run = RunFolder(run_dir or (out / "cases" if recipe.cohort.synthetic_cases else f"{root}/{preset}"))
recipe = opening.prepare(run, recipe).recipe(preset)
named, drawn = study.systems(networks), compare.numbers(seeds, "seeds") or [0]
study.check_request(run, named, folds, formats, overrides)
data = cohort.describe(read_table(run.cohort_csv), recipe.inputs)
print(f"{len(named)} networks x {len(drawn)} seeds on {(run.cases().split == 'train').sum()} {data}")

# %% [markdown]
# ## The networks

# %%
compared.tell(study.network_table(recipe, named), study.caption("networks"))

# %% [markdown]
# ## Training
#
# A network that is finished is read, one that was interrupted goes on.

# %%
scores = compare.train(run, named, drawn, out / "cells", overrides)

# %% [markdown]
# ## What overfits

# %%
curves = study.histories(named, drawn[0], out / "cells")
seen = study.overfitting(scores, curves, drawn[0], out / "cells")
write_table(seen, out / "overfitting.csv")
compared.show(study.curves_figure(curves, seen), out, "curves", study.caption("curves"))
compared.tell(study.overfitting_table(seen), study.caption("overfitting"))

# %% [markdown]
# ## Results
#
# Each network, and the mean of their probabilities.

# %%
scores = study.with_ensemble(run, scores, drawn, out / "cells")
write_table(scores, out / "scores.csv")
metrics, n = compare.over_seeds(scores), scores.case.nunique()
compared.tell(report.results_table(metrics, recipe.seed), study.caption("results", data, n, len(drawn)))

# %% [markdown]
# Paired tests of the first network against the others.

# %%
tests = report.paired_table(metrics, recipe.seed, next(iter(named)))
write_table(tests.reset_index(), out / "tests.csv")
compared.tell(tests, study.caption("tests", data, n))

# %% [markdown]
# ## Lesion volume

# %%
compared.tell(study.volume_table(metrics), study.caption("volumes", data, n))
last = metrics[metrics.system == metrics.system.iloc[-1]].merge(run.cases()[["case", "site"]], on="case")
figure = charts.bland_altman_figure(last.reference_ml, last.result_ml, last.site)
compared.show(figure, out, "bland_altman", f"{last.system.iloc[0]}. {report.caption('bland_altman', data, n)}")

# %% [markdown]
# ## Over folds
#
# With `folds` set, the network that was best on validation cases is trained once a fold, and every case is tested once.

# %%
best = study.best(curves)
pooled = study.fold_metrics(study.cross_validate(run, best, folds, out / "folds", overrides, drawn[0])) if folds else None
if folds:
    write_table(pooled, out / "folds.csv")
    compared.tell(report.results_table(pooled, recipe.seed), study.caption("folds", data, pooled.case.nunique()))

# %% [markdown]
# ## For others
#
# The network that was best on validation cases as a file, checked against itself.

# %%
exported = study.exported(compare.cell(out / "cells", best, drawn[0]), out, formats)
compared.tell(exported, study.caption("export"))

# %% [markdown]
# ## What a state space costs
#
# The third network reads the coarse maps as tokens, at a cost linear in their number; attention's is quadratic.

# %%
costs = volumes.token_costs(plan.tokens, repetitions=plan.repetitions)
write_table(costs, out / "tokens.csv")
machine = roofline.named("cpu")
bench.show(volumes.token_figure(costs), out, "tokens", machine)

# %% [markdown]
# ## Speed
#
# Against MONAI's networks of as many parameters, all in turns in one run.

# %%
speed = volumes.speed(plan.side, repetitions=plan.repetitions, precision=recipe.training.precision, networks=plan.raced)
write_table(speed, out / "speed.csv")
bench.tell(shown(speed)[["ratio", "baseline", "ours", "memory (MB)"]], "volumes", machine)

# %% [markdown]
# ## Limits
#
# The budget is the same for all, and small where the preset is: a network that would win after ten times as many steps does not show it here.
# Where cases are synthetic they say how networks compare, not how any of them does on patients. Nothing was tuned for one of them.

# %%
print(f"networks, tables and figures in {out}")
