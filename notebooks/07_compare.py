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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/wmh-lora/wmh-lora/blob/main/notebooks/07_compare.ipynb)
#
# # 7 · Adapters on equal terms
#
# Which way of adapting the encoder is worth its parameters, and which parts of the recipe are worth their trouble: each trained on
# the same base, cases, budget and seeds, each scored on the same test cases at threshold 0.5. A *cell* is one training: one system with one seed.
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
preset: str = "demo"  # recipe: demo, vessels (images), colab or smoke
run_dir: str = ""  # run folder whose cases and split are used; empty: for colab the run of that preset; for the others a few synthetic cases, made for this in out_dir
out_dir: str = ""  # folder for the grid, one run folder a cell; empty: runs/compare_<preset>, in Colab MyDrive/wmh-lora/compare_<preset>
methods: str = ""  # some of none, bias, ssam, full, lora, rslora, dora, pissa, adalora, qlora and salt, with spaces between; empty: all
ranks: str = ""  # of the methods that have one, such as "8 24 64" (on MLPs half of it); empty: the preset's
seeds: str = ""  # each method is trained once with each, such as "0 1 2"; empty: the preset's
overrides: str = ""  # settings of all cells to change, the way notebook 01 shows
share: str = "1/1"  # "2/8": this is the second of eight jobs that share the grid; run once more with 1/1 when all are done

# %% [markdown]
# The cases, and the grid.

# %%
from pathlib import Path

from wmhlib import cohort, compare, opening, presets, report
from wmhlib.bench import compared, roofline
from wmhlib.files import read_table, write_table
from wmhlib.workspace import RunFolder

out, plan = Path(out_dir or f"{root}/compare_{preset}").expanduser(), compare.plan(preset)
run = RunFolder(run_dir or (out / "cases" if plan.cases else f"{root}/{preset}"))
recipe = opening.prepare(run, presets.preset(preset, plan.cases)).recipe(preset)
drawn = compare.numbers(seeds, "seeds") or plan.seeds
each = f"{plan.each} {overrides}"
named = compare.systems(methods.split() or plan.methods, compare.numbers(ranks, "ranks") or plan.ranks)
changed = compare.ablations(recipe.with_overrides(each), run.cases(), plan.ablations)
data = cohort.describe(read_table(run.cohort_csv), recipe.inputs)
print(f"{len(named)} methods and {len(changed)} changes x {len(drawn)} seeds on {(run.cases().split == 'train').sum()} {data}")

# %% [markdown]
# ## Training
#
# Cells that are finished are read. A grid can be spread over a cluster, one papermill job a share.

# %%
scores = compare.train(run, named | changed, drawn, out / "cells", each, share)
of_methods = scores[scores.system.isin(named)]
of_changes = scores[scores.system.isin([*changed, compare.TTA])]

# %% [markdown]
# ## Methods and ranks

# %%
costs = compared.costs(recipe.with_overrides(each), {name: named[name] for name in of_methods.system.unique()})
table = compare.summary(of_methods, costs)
write_table(table, out / "methods.csv")
compared.tell(compared.shown(table, data), compared.caption("methods", data, table))

# %% [markdown]
# What they cost.

# %%
compared.tell(compared.shown_costs(table), compared.caption("costs", data, table, roofline.named()))

# %% [markdown]
# What a parameter buys.

# %%
compared.show(compared.pareto_figure(table), out, "pareto", compared.caption("pareto", data, table))

# %% [markdown]
# Paired tests over the test cases.

# %%
tests = report.paired_table(compare.over_seeds(of_methods), recipe.seed, baseline=compare.reference(of_methods))
write_table(tests.reset_index(), out / "tests.csv")
compared.tell(tests, compared.caption("tests", data, table))

# %% [markdown]
# ## Parts of the recipe
#
# One thing changed at a time.

# %%
table = compare.summary(of_changes)
write_table(table, out / "ablations.csv")
compared.tell(compared.shown(table, data), compared.caption("ablations", data, table))

# %% [markdown]
# Paired tests of the recipe against each change.

# %%
tests = report.paired_table(compare.over_seeds(of_changes), recipe.seed, baseline=compare.reference(of_changes))
write_table(tests.reset_index(), out / "ablation_tests.csv")
compared.tell(tests, compared.caption("tests", data, table))

# %% [markdown]
# ## Limits
#
# The budget is the same for all, and small: a method that would win after ten times as many steps does not show it here. Where cases are
# synthetic they say how methods compare, not how any of them does on patients. Nothing was tuned for a method: the rate is that of the LoRA recipe.

# %%
print(f"grid, tables and figures in {out}")
