"""Few-shot: one run a point, done once, beside the levels that the run's base and weights give."""

import numpy as np
import pandas as pd
import pytest
import torch

from wmhlib import fewshot
from wmhlib.errors import RecipeError
from wmhlib.evaluation import ZERO_SHOT
from wmhlib.files import read_table
from wmhlib.medsam import build_encoder
from wmhlib.network import Decoder
from wmhlib.presets import preset
from wmhlib.promptable import Promptable
from wmhlib.training import fit

OVERRIDES = ""
SHORT = "training.epochs=2 training.validate_epochs=2 training.checkpoint_epochs=2 training.warmup_epochs=1"


def test_every_point_is_trained_once_and_scored(new_run, monkeypatch, capsys):
    run, trained = new_run("run"), []
    monkeypatch.setattr(fewshot, "fit", lambda point, progress: trained.append(point.recipe()) or fit(point, progress))
    monkeypatch.setattr(fewshot.WMHInferenceEngine, "plain_mask", lambda engine, case: (case.mask > 0) & (engine.recipe == trained[-1]))
    table = fewshot.curve(run, (3,), (0,), SHORT)
    assert [(r.training.slices, r.seed, r.training.epochs) for r in trained] == [(3, 0, 2)]
    assert table[["system", "slices", "seed"]].to_numpy().tolist() == [["few-shot", 3, 0]]
    assert table[["val_dice", "test_dice"]].to_numpy().tolist() == [[1, 1]], "of the point's own network"
    pd.testing.assert_frame_equal(read_table(run.path / "fewshot" / "fewshot.csv"), table, rtol=1e-5, check_dtype=False)
    more = fewshot.curve(run, (3, 9999), (0, 1), SHORT)
    assert "left out: 9999 slices" in capsys.readouterr().out and len(trained) == 2 and trained[1].seed == 1, "what is finished is read"
    pd.testing.assert_frame_equal(more[more.seed == 0].reset_index(drop=True), table)
    with pytest.raises(RecipeError, match="training.epochs is 2 there"):
        fewshot.curve(run, (3,), (0,), SHORT.replace("epochs=2", "epochs=3"))


def test_the_trained_run_and_a_base_that_answers_prompts_are_levels(new_run, tmp_path, monkeypatch):
    recipe = preset("smoke")
    state = {f"image_encoder.{name}": value for name, value in build_encoder(recipe.encoder, 0).state_dict().items()} | Promptable(4, 32).state_dict()
    state |= {f"decoder.{name}": value for name, value in Decoder().state_dict().items()}
    torch.save(state, tmp_path / "base.pth")
    run = new_run("run", f"encoder.checkpoint={tmp_path / 'base.pth'} training.epochs=1")
    rates = []
    monkeypatch.setattr(fewshot, "_trained", lambda point: rates.append(point.recipe().training.lr) or dict(val_dice=0.5, test_dice=0.4))
    table = fewshot.curve(run, (1,), (0,))
    assert rates == [recipe.training.lr / 10], "few slices do not undo a good start"
    assert table.system.tolist() == ["few-shot", ZERO_SHOT, "no adaptation"]
    fit(run, progress=False)
    table = fewshot.curve(run, (1,), (0,), folder=run.path / "fewshot")
    assert len(rates) == 1 and table.system.tolist() == ["few-shot", ZERO_SHOT, "no adaptation", "all slices"] and table.slices.tolist() == [1, 0, 0, 0]
    torch.save({name: value + 0.01 if name.endswith("pos_embed") else value for name, value in state.items()}, tmp_path / "base.pth")
    run.best.unlink()
    fewshot.curve(run, (1,), (0,))
    assert len(rates) == 2, "scores on another base are not read back"


@pytest.mark.parametrize("count, epochs", [(1, 200), (8, 200), (9, 100), (100, 16)])
def test_few_slices_are_seen_often_enough(count, epochs):
    recipe = fewshot.few_slices_recipe(preset("demo"), count, 3)
    assert (recipe.training.epochs, recipe.training.slices, recipe.seed) == (epochs, count, 3)
    halves = fewshot.few_slices_recipe(preset("demo"), count, 3, "training.batch_size=4 training.lr=1e-3").training
    assert halves.epochs * -(-count // 4) in range(200, 260) and halves.lr == 1e-3
    assert recipe.training.epochs // recipe.training.validate_epochs >= 10 and recipe.training.restart_epochs == epochs


def test_dice_is_that_of_whole_scans_without_other_pathology(new_run):
    run = new_run("run")
    assert fewshot._scores(run, lambda case: case.mask > 0) == dict(val_dice=1.0, test_dice=1.0)
    assert fewshot._scores(run, lambda case: np.zeros(case.mask.shape, bool)) == dict(val_dice=0.0, test_dice=0.0)


def test_the_figure_has_a_point_a_run_and_a_line_a_level():
    rows = [("few-shot", n, seed, 0.1 * seed + 0.004 * n, 0.3) for n in (1, 5, 20, 100) for seed in (0, 1)] + [(ZERO_SHOT, 0, 0, 0.5, 0.6), ("all slices", 0, 0, 0.7, 0.8)]
    fig = fewshot.figure(pd.DataFrame(rows, columns=fewshot.COLUMNS))
    ax = fig.axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "5", "20", "100"]
    assert sum(len(line.get_xdata()) == 8 for line in ax.lines) == 2
    assert {text.get_text() for text in fig.legends[0].get_texts()} == {"test cases", "validation cases", f"{ZERO_SHOT} (test cases): 0.60", "all slices (test cases): 0.80"}
