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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/wmh-lora/wmh-lora/blob/main/notebooks/08_distill.ipynb)
#
# # 8 · MiniSAM
#
# A large encoder teaches a small one, which is then quantised to four bits and adapted; beside it adapters for other modalities,
# what a handful of labelled slices achieve, and a table of what the small one costs and saves.
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
preset: str = "demo"  # recipe: demo, colab or smoke
run_dir: str = ""  # run folder whose cases and split are used; empty: for colab the run of that preset; for demo and smoke a few synthetic cases, made for this in out_dir
out_dir: str = ""  # folder for everything this notebook makes; empty: runs/distill_<preset>, in Colab MyDrive/wmh-lora/distill_<preset>
teacher: str = ""  # the teacher's weights: a file of SAM's format (SAM, MedSAM, a base), which colab needs; empty: the preset's own
teacher_kind: str = ""  # its encoder: vit_h, vit_l, sam_vit_b (SAM's), vit_b (MedSAM's), vit_t or small; empty: the preset's own
student_kind: str = ""  # the student's encoder: one of these, or tiny; empty: the preset's own
alpha: float = 0.5  # weight of the feature loss, 0 to 1; the mask loss has the rest
feature: str = "mse"  # feature loss: mse or huber
overrides: str = ""  # settings of phase 2 to change, the way notebook 01 shows
large: int = 0  # 1: the claims at 1024 px too, where ViT-H takes a minute a pass on a CPU

# %% [markdown]
# The cases, and who teaches whom.

# %%
from dataclasses import replace
from pathlib import Path

import pandas as pd

from wmhlib import cohort, distill, fewshot, minisam, modalities, opening, presets, slicestore, training
from wmhlib.bench import claims, distilled, roofline
from wmhlib.files import read_table, write_table
from wmhlib.teacher import choose
from wmhlib.workspace import RunFolder

out, plan = Path(out_dir or f"{root}/distill_{preset}").expanduser(), minisam.plan(preset)
run = RunFolder(run_dir or (out / "cases" if plan.cases else f"{root}/{preset}"))
recipe = opening.prepare(run, presets.preset(preset, plan.cases)).recipe(preset)
minisam.check_request(recipe, plan, overrides)
job = choose(preset, recipe.inputs, teacher, teacher_kind, student_kind, recipe.seed, alpha=alpha, feature=feature)
cases, kind = run.cases(), cohort.describe(read_table(run.cohort_csv), recipe.inputs)
pd.DataFrame({"teacher": vars(job.teacher), "student": vars(job.student)})

# %% [markdown]
# ## Phase 1: the teacher teaches
#
# The teacher's embeddings are computed once and kept on disk; training, once interrupted, goes on from its last checkpoint. The student
# matches them, and the masks that the teacher's own prompt encoder and mask decoder make of them.

# %%
parts = {part: slicestore.load_slices(cases[cases.split == part], job.inputs) for part in ("train", "val")}
history = distill.distill(job, parts["train"], parts["val"], out / "phase1")
distilled.show(distilled.distil_figure(history), out, "distil", f"{len(parts['train'])} {kind}, {len(parts['val'])} for validation")

# %% [markdown]
# ## Phase 2: four bits under small adapters
#
# The student's matrices in NF4 with double quantisation, frozen; LoRA of rank 8, channel adapter and decoder are trained with
# cross-entropy + Dice. Its teacher gets the same recipe on the same cases, so that the two can be compared.

# %%
student = replace(job.student, checkpoint=str((out / "phase1" / distill.STUDENT).absolute()), bits=4)
runs = {name: minisam.adaptation(run, out / name, encoder, f"{plan.adapt} {overrides}")
        for name, encoder in (("teacher", job.teacher), ("student", student))}
for adapted in runs.values():
    training.fit(adapted)

# %% [markdown]
# Both on the test cases.

# %%
dice = minisam.scan_dice(runs)
write_table(dice, out / "dice.csv")
both = dice[["teacher", "student"]].dropna()
print(both.mean().round(3).to_dict())
distilled.show(distilled.dice_figure(dice), out, "dice", f"{len(dice)} {kind}")

# %% [markdown]
# ## Few labelled slices

# %%
curve = fewshot.curve(runs["student"], plan.counts, plan.seeds, plan.few, out / "fewshot")
distilled.show(fewshot.figure(curve), out, "fewshot", f"{len(dice)} {kind} for test")

# %% [markdown]
# ## Adapters for other modalities
#
# One frozen base, an adapter for each contrast, switched without reloading. Each is a folder that peft can load.

# %%
table = modalities.train(out / "modalities", runs["student"].recipe(), plan.names, plan.modalities)
distilled.show(modalities.cross_figure(table), out, "cross", "synthetic cases")

# %% [markdown]
# ## What it costs and what it saves
#
# Measured on this machine now. ViT-H has random weights here: its cost is real, but it has no Dice.

# %%
encoders, pairs = claims.lineup(job.teacher, student, job.inputs.img_size, plan.quick, bool(large))
scores = {("student", job.inputs.img_size, "nf4"): (both.student.mean(), both.teacher.mean())}
costs = claims.claims(encoders, pairs, plan.repetitions, scores)
write_table(costs, out / "claims.csv")
distilled.tell(claims.shown(costs), "claims", roofline.named())

# %% [markdown]
# ## Claims

# %%
verdicts = claims.reached(costs)
write_table(verdicts, out / "reached.csv")
distilled.tell(claims.verdicts(verdicts), "reached", roofline.named())

# %% [markdown]
# ## Limits
#
# Where cases are synthetic they say how the parts compare, not how any of them does on patients. A student distilled in minutes is
# not one distilled in days, and the ratios of time hold for this machine, this number of threads and these sizes.

# %%
print(f"student, adapters, tables and figures in {out}")
