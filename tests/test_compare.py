"""The grid: every system gets the same, what is finished is read, jobs share it, and its tables say what the scores say."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from wmhlib import agreement, compare, metrics, report, suite
from wmhlib.bench import compared
from wmhlib.engine import Prediction
from wmhlib.errors import InputError, RecipeError
from wmhlib.files import read_table, write_table
from wmhlib.presets import preset
from wmhlib.training import fit
from wmhlib.workspace import RunFolder

OVERRIDES = ""
TINY = "training.epochs=1 training.warmup_epochs=0 training.slices=4"
CASES = pd.DataFrame({"case": ["a", "b"], "t1": ["a/T1.nii.gz", "b/T1.nii.gz"], "warnings": ""})
NAMED = {"none": "adapter.method=none", "lora 2": "adapter.rank_attention=2 adapter.rank_mlp=1"}


def test_methods_with_a_rank_come_at_each_rank_and_the_others_once():
    named = compare.systems(("none", "lora", "qlora", "salt"), (8, 24))
    assert list(named) == ["none", "lora 8", "lora 24", "qlora 8", "qlora 24", "salt 8", "salt 24"]
    recipe = preset("demo").with_overrides(named["qlora 24"])
    assert (recipe.encoder.bits, recipe.adapter.method, recipe.adapter.rank_attention, recipe.adapter.rank_mlp) == (4, "lora", 24, 12)
    assert compare.reference(pd.DataFrame({"system": list(named)})) == "lora 24" and compare.reference(pd.DataFrame({"system": ["none"]})) == "none"


@pytest.mark.parametrize("name", [name for name in compare.PLANS])
def test_every_system_and_ablation_of_a_plan_is_a_recipe_of_its_own(name):
    plan, recipe = compare.plan(name), preset(name).with_overrides(compare.plan(name).each)
    for named in (compare.systems(plan.methods, plan.ranks), compare.ablations(recipe, CASES, plan.ablations)):
        recipes = [recipe.with_overrides(overrides) for overrides in named.values()]
        assert len(set(map(repr, recipes))) == len(named)


def test_a_preset_without_a_plan_is_an_error():
    with pytest.raises(RecipeError, match="known are colab, demo, vessels, smoke"):
        compare.plan("base")


def test_cells_are_trained_once_on_the_same_cases_and_jobs_share_them(new_run, tmp_path, monkeypatch):
    run, trained = new_run("run"), []
    monkeypatch.setattr(compare, "fit", lambda place, progress: trained.append((place.path.name, place.cases().split.tolist())) or fit(place, progress))
    one = compare.train(run, NAMED, (0, 1), tmp_path, TINY, "1/3", progress=False)
    assert [name for name, _ in trained] == ["none_seed_0", "lora_2_seed_1"] and one.empty, "no system has both of its seeds"
    assert compare.summary(one).empty and compare.reference(one) == ""
    both = compare.train(run, NAMED, (0, 1), tmp_path, TINY, progress=False)
    assert len(trained) == 4 and all(sides == run.cases().split.tolist() for _, sides in trained)
    assert set(both.case) == set(run.cases().query("split == 'test'").case)
    assert both.groupby(["system", "seed"]).ngroups == 4 and both[list(metrics.SCORES[:1])].notna().all(None)
    pd.testing.assert_frame_equal(compare.train(run, NAMED, (0, 1), tmp_path, TINY, progress=False), both)
    assert len(trained) == 4
    with pytest.raises(RecipeError, match="belongs to another recipe"):
        compare.train(run, NAMED, (0,), tmp_path, TINY.replace("4", "5"), progress=False)
    split = read_table(run.split_csv)
    write_table(split.assign(split=split.split.replace({"test": "val", "val": "test"})), run.split_csv)
    with pytest.raises(InputError, match="split.csv is not that of .*choose another folder"):
        compare.train(run, NAMED, (0,), tmp_path, TINY, progress=False)


def test_the_recipe_is_scored_with_every_view_too_and_a_system_that_is_the_recipe_is_not_trained_again(new_run, tmp_path):
    run = new_run("run")
    ranks = run.recipe().adapter
    same = {f"lora {ranks.rank_attention}": f"adapter.method=lora adapter.rank_attention={ranks.rank_attention} adapter.rank_mlp={ranks.rank_mlp}"}
    scores = compare.train(run, same | {compare.BASELINE: ""}, (0,), tmp_path, TINY, progress=False)
    assert scores.system.unique().tolist() == [*same, compare.BASELINE, compare.TTA]
    assert [path.name for path in tmp_path.glob("*_seed_*")] == ["recipe_seed_0"]
    one, other = (scores[scores.system == name].drop(columns="system").reset_index(drop=True) for name in (*same, compare.BASELINE))
    pd.testing.assert_frame_equal(one, other)


def test_a_system_is_scored_in_one_view_and_other_pathology_counts_nowhere(tiny_nifti):
    reference = np.zeros((24, 28, 10), np.uint8)
    reference[10:14, 10:14, 4:6], reference[17, 16, 3:6] = 1, 2
    cases = pd.DataFrame([dict(case="a", site="A", flair=tiny_nifti("FLAIR.nii.gz"), t1="", mask=tiny_nifti("wmh.nii.gz", data=reference))])
    engine = SimpleNamespace(recipe=preset("smoke"), predict=lambda case, use_tta: Prediction(case, np.float32(case.mask > 0), np.float32(case.mask > 1), 0))
    one, recipe = (compare.score_cases(engine, cases, name, 0) for name in ("none", compare.BASELINE))
    assert one.dsc.tolist() == [1] and one.result_ml.tolist() == one.reference_ml.tolist() == [pytest.approx(0.096)]
    assert dict(zip(recipe.system, recipe.dsc)) == {compare.BASELINE: 1, compare.TTA: 0}


@pytest.mark.parametrize("share", ["", "0/2", "3/2", "1/0", "a/b", "1/2/3"])
def test_an_impossible_share_is_an_error(share, tmp_path):
    with pytest.raises(InputError, match="expected i/n"):
        compare.train(RunFolder(tmp_path), NAMED, (0,), tmp_path, share=share)
    with pytest.raises(InputError, match="expected i/n"):  # before any case is made
        suite.compare("smoke", out=str(tmp_path / "out"), share=share)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="at most 2 jobs"):
        compare.train(RunFolder(tmp_path), NAMED, (0,), tmp_path, share="3/3")


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    rows = [dict(system=system, seed=seed, case=f"c{case}", site="A", dsc=base + 0.02 * seed + 0.01 * rng.random(), hd95=5.0, avd=10.0, recall=0.5, f1=0.6)
            for system, base in (("none", 0.5), ("lora 8", 0.7), ("full", 0.69)) for seed in range(3) for case in range(8)]
    return pd.DataFrame(rows)


def test_the_interval_is_students_over_the_means_of_the_seeds(scores):
    table = compare.summary(scores).set_index("system")
    means = scores[scores.system == "full"].groupby("seed").dsc.mean()
    half = 4.302652729911275 * means.std(ddof=1) / np.sqrt(3)
    assert table.loc["full", "dsc_high"] - table.loc["full", "dsc"] == pytest.approx(half) and (table.n == 8).all() and (table.seeds == 3).all()
    alone = compare.summary(scores[scores.seed == 0])
    assert alone.dsc_low.isna().all() and alone.dsc.notna().all()


def test_paired_tests_are_over_cases_on_the_mean_of_the_seeds(scores):
    averaged = compare.over_seeds(scores)
    assert len(averaged) == 24
    table = agreement.compare_systems(averaged, "lora 8")
    assert table.loc["none", "n"] == 8 and table.loc["none", "difference"] == pytest.approx(0.2, abs=0.01) and table.loc["none", "p"] < 0.01
    assert report.paired_table(averaged, baseline="lora 8").index.name == "lora 8 against"


def test_what_the_cases_do_not_have_is_left_out_and_named(capsys):
    recipe = preset("demo")
    assert compare.WITH_T1 not in compare.ablations(recipe, CASES.assign(t1=["", "b"])) and "left out: with T1" in capsys.readouterr().out
    assert {compare.WITH_T1, compare.WITH_NEIGHBOURS}.isdisjoint(compare.ablations(preset("vessels"), CASES))
    half = recipe.with_overrides(compare.ablations(recipe.with_overrides("adapter.rank_mlp=0"), CASES)["half the rank"]).adapter
    assert (half.rank_attention, half.rank_mlp) == (recipe.adapter.rank_attention // 2, 0)


def test_t1_on_another_grid_and_changes_that_change_nothing_are_left_out_and_named(capsys):
    recipe = preset("colab", "inputs.context=1 skip=false")
    found = compare.ablations(recipe, CASES.assign(warnings=["", "no lesion; T1 lies on another grid than the scan: register it before training with it"]))
    assert found[compare.BASELINE] == "" and {compare.WITH_T1, compare.WITH_NEIGHBOURS, "no image skip"}.isdisjoint(found)
    assert "left out: no image skip, which is the recipe's own" in capsys.readouterr().out


@pytest.mark.parametrize("text, found", [("", []), ("0 1", [0, 1]), (1, [1])])
def test_numbers_come_as_text_or_as_what_papermill_makes_of_it(text, found):
    assert compare.numbers(text, "seeds") == found


def test_a_result_without_a_score_is_counted_and_left_out_of_its_mean(scores):
    scores.loc[scores.index[:8], "hd95"] = np.nan  # of "none" all cases of a seed
    row = compare.summary(scores).set_index("system").loc["none"]
    assert row.left_out == "HD95 (mm) 8" and row.hd95 == 5 and row.hd95_low == 5
    assert compared.shown(compare.summary(scores), "synthetic cases")["left out"].tolist().count("none") == scores.system.nunique() - 1
    of_images = compared.shown(compare.summary(scores), "synthetic images")
    assert "HD95 (px)" in of_images and of_images.loc["none", "left out"] == "HD95 (px) 8"


def test_the_front_holds_what_no_leaner_system_beats():
    table = pd.DataFrame(dict(system=list("abcd"), trainable=[1, 2, 3, 4], adapter=[0, 1, 2, 3], dsc=[0.5, 0.7, 0.6, 0.8], dsc_low=0.4, dsc_high=0.9))
    assert compare.pareto(table).tolist() == [True, True, False, True]
    labels = {text.get_text() for text in compared.pareto_figure(table).axes[0].texts}
    assert labels == set("abcd")
    assert compared.pareto_figure(table[:0]).axes  # a job of several, before any system is finished


def test_costs_count_what_is_trained_and_name_the_denominator():
    recipe = preset("smoke")
    table = compared.costs(recipe, NAMED, 1).set_index("system")
    assert table.loc["none", "adapter"] == 0 and table.loc["lora 2", "adapter"] > 0
    assert table.loc["lora 2", "trainable"] - table.loc["none", "trainable"] == table.loc["lora 2", "adapter"]
    assert (table[["step_s", "step_ratio", "peak_mb", "file_mb"]] > 0).all(None)
    assert (table.share_percent < 100).all()


def test_two_jobs_fill_a_grid_that_a_third_one_reports(tmp_path):
    command = [sys.executable, "-m", "wmhlib.suite", "compare", "--preset", "smoke", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "grid")]
    from wmhlib.opening import prepare
    prepare(RunFolder(tmp_path / "run"), preset("smoke", "cohort.synthetic_cases=6"))
    jobs = [subprocess.Popen([*command, "--share", f"{i}/2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in (1, 2)]
    for job in jobs:
        assert job.wait(600) == 0, job.stdout.read()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("best.safetensors")}
    assert len(before) == 6
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("best.safetensors")}
    table = read_table(tmp_path / "grid" / "methods.csv")
    assert table.system.tolist() == ["lora 2", "salt 2"] and (table.seeds == 2).all()
    for name in ("07_compare.html", "07_compare_1_of_2.html", "pareto.png", "tests.csv", "ablations.csv"):
        assert (tmp_path / "grid" / name).exists(), name


def test_a_case_without_hd95_with_one_seed_has_none_in_the_mean(scores):
    scores = scores.assign(hd95=np.where((scores.seed == 1) & (scores.case == scores.case.iloc[0]) & (scores.system == "full"), np.nan, 2.0))
    averaged = compare.over_seeds(scores).set_index(["system", "case"])
    assert averaged.hd95.isna().sum() == 1 and np.isnan(averaged.loc[("full", scores.case.iloc[0]), "hd95"])


def test_a_false_alarm_of_one_seed_in_a_case_without_a_lesion_counts_in_the_mean():
    scores = pd.DataFrame({"system": ["a"] * 3 + ["b"] * 3, "case": "x", "seed": [0, 1, 2] * 2, "dsc": [np.nan, np.nan, 0.0] + [np.nan] * 3,
                           "reference_ml": 0.0, "result_ml": [0, 0, 0.3, 0, 0, 0]})
    averaged = compare.over_seeds(scores).set_index("system")
    assert averaged.dsc["a"] == pytest.approx(2 / 3) and np.isnan(averaged.dsc["b"])
    assert agreement.compare_systems(averaged.reset_index(), "b").loc["a", "difference"] == pytest.approx(1 / 3)
