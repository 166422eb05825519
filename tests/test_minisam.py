import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from wmhlib import minisam, suite, teacher
from wmhlib.bench import distilled
from wmhlib.errors import RecipeError
from wmhlib.files import read_table
from wmhlib.losses import dice_loss, total_loss
from wmhlib.presets import preset
from wmhlib.sections import Inputs
from wmhlib.teacher import PRESETS
from wmhlib.workspace import RunFolder

OVERRIDES = "training.epochs=1 training.warmup_epochs=0 training.slices=6"


def test_phase_two_is_the_runs_recipe_with_rank_eight_and_cross_entropy_and_dice(new_run, tmp_path):
    run = new_run("run")
    encoder = replace(PRESETS["smoke"].student, bits=4)
    adapted = minisam.adaptation(run, tmp_path / "student", encoder, "training.lr=1e-4")
    recipe = adapted.recipe("smoke")
    assert recipe.encoder == encoder and recipe.training.lr == 1e-4 and recipe.inputs == run.recipe().inputs
    assert (recipe.adapter.rank_attention, recipe.adapter.rank_mlp) == (8, 8)
    assert adapted.split_text() == run.split_text()
    logits, labels = torch.randn(2, 1, 16, 16), torch.randint(0, 2, (2, 1, 16, 16))
    loss, _ = total_loss(logits, [logits], labels, recipe.loss)
    target = labels.float()
    assert float(loss) == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, target) + dice_loss(logits, target, torch.ones_like(target))), rel=1e-5)


def test_dice_of_scans_is_that_of_each_test_case(new_run, monkeypatch):
    runs = {name: new_run(name) for name in ("all", "nothing")}
    monkeypatch.setattr(minisam.WMHInferenceEngine, "from_run", lambda run: SimpleNamespace(plain_mask=lambda case: (case.mask > 0) & (run.path.name == "all")))
    table = minisam.scan_dice(runs)
    assert table.case.tolist() == runs["all"].cases().query("split == 'test'").case.tolist()
    assert table["all"].eq(1).all() and table.nothing.eq(0).all()


def test_every_preset_of_the_distillation_has_a_plan_and_a_recipe():
    for name in PRESETS:
        plan = minisam.plan(name)
        for words in (plan.cases, plan.adapt, plan.few, plan.modalities):
            preset(name, words)
    with pytest.raises(RecipeError, match="no preset 'lean'"):
        minisam.plan("lean")


def test_an_adapter_that_four_bits_cannot_have_is_refused_before_phase_one():
    minisam.check_request(preset("smoke", "adapter.method=dora"), minisam.plan("smoke"), "")
    with pytest.raises(RecipeError, match="adapter.method = 'dora'.*encoder.bits=4"):
        minisam.check_request(preset("smoke"), minisam.plan("smoke"), "adapter.method=dora")


def test_teacher_and_student_can_be_chosen_by_name():
    chosen = teacher.choose("demo", Inputs(img_size=512), "sam.pth", "vit_l", "vit_t", 7, alpha=1.0, feature="huber")
    assert (chosen.teacher.dim, chosen.teacher.bits, chosen.teacher.checkpoint, chosen.student.dim, chosen.student.grid, chosen.seed) == (1024, 4, str(Path("sam.pth").absolute()), 192, 32, 7)
    assert (chosen.inputs.img_size, chosen.alpha, chosen.feature) == (512, 1.0, "huber")
    assert teacher.choose("demo", Inputs()).teacher == PRESETS["demo"].teacher
    with pytest.raises(RecipeError, match="no 'vit_x': known are vit_h"):
        teacher.choose("demo", Inputs(), teacher_kind="vit_x")
    with pytest.raises(RecipeError, match="names no teacher"):
        teacher.Teacher(PRESETS["colab"])


def test_figures_have_captions():
    history = pd.DataFrame({name: [0.5, 0.4] for name in ("epoch", "feature", "val_feature", "mask", "val_mask", "val_agreement", "val_dice", "val_teacher_dice")})
    assert [len(ax.lines) for ax in distilled.distil_figure(history).axes] == [2, 2, 3]
    assert distilled.dice_figure(pd.DataFrame({"teacher": [0.5, math.nan], "student": [0.4, math.nan]})).axes
    assert all("{" not in text.format(data="3 synthetic cases") for text in distilled.CAPTIONS.values())


def test_the_notebook_leaves_student_adapters_tables_and_figures(tmp_path, capsys):
    out = tmp_path / "out"
    suite.execute("08_distill", tmp_path / "08_distill.ipynb", {"preset": "smoke", "out_dir": str(out)})
    for name in ("phase1/student.safetensors", "phase1/history.csv", "student/best.safetensors", "teacher/best.safetensors", "fewshot/fewshot.csv",
                 "modalities/adapters/flair/adapter_model.safetensors", "dice.csv", "claims.csv", "reached.csv", "distil.png", "dice.png", "fewshot.png", "cross.png"):
        assert (out / name).exists(), name
    assert RunFolder(out / "student").recipe().encoder.bits == 4
    table = read_table(out / "claims.csv")
    assert {"student", "teacher", "vit_h"} <= set(table.student) and table.dice.notna().sum() == 1
