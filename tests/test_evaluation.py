"""One pass over predicted cases: masks and scores of the systems, lesions, zones, calibration, the flag; files and limits."""

import dataclasses
import weakref
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from wmhlib import evaluation, suite
from wmhlib.agreement import agreement_table, by_group, calibration_error, compare_systems, size_table, tertiles
from wmhlib.engine import Prediction, WMHInferenceEngine
from wmhlib.errors import InputError, MissingStepError
from wmhlib.evaluation import SYSTEMS, TABLES, ZERO_SHOT, evaluate, periventricular, pooled, system_masks
from wmhlib.files import read_table, write_table
from wmhlib.metrics import filter_components
from wmhlib.nifti import load_mask, load_volume
from wmhlib.presets import preset
from wmhlib.sections import Operating
from wmhlib.uncertainty import flag_table
from wmhlib.workspace import RunFolder

POINT = dict(threshold=0.5, min_voxels=1, min_mm3=0.0, tta=True, dsc=0.8, se=0.05, n=3, zscore_threshold=2.0, unsure_above=0.2, poor_below=0.8)


@pytest.fixture(scope="module")
def patchy():
    """Makes a case with many lesions, some found, some missed, some false, and a ventricle: `patchy(seed)`."""
    def make(seed=0, name="Utrecht_1"):
        rng = np.random.default_rng(seed)
        shape = (36, 30, 12)
        reference = (rng.random(shape) < 0.01).astype(np.uint8)
        reference[rng.random(shape) < 0.01] = 2
        prob = np.clip(0.7 * (rng.random(shape) < 0.7) * (reference > 0) + rng.random(shape) ** 8, 0, 1).astype(np.float32)
        ventricles = np.zeros(shape, bool)
        ventricles[16:20, 12:18, 5:7] = True
        return dict(case=name, site=name.split("_")[0], split="test", spacing=(0.9, 1.1, 3.0), affine=np.diag([0.9, 1.1, 3, 1]),
                    flair=rng.random(shape, np.float32), flair_z=rng.normal(size=shape).astype(np.float32), inner=np.ones(shape, bool),
                    reference=reference, prob=np.roll(prob, 1, 0), prob_tta=prob, ventricles=ventricles)
    return make


def test_four_systems_are_scored_on_each_case(evaluated):
    first = evaluated.metrics[evaluated.metrics.case == "Utrecht_0"].set_index("system")
    assert list(first.index) == list(SYSTEMS) and len(evaluated.metrics) == 20 and len(evaluated.gallery) == 5
    assert first.dsc.tolist() == [1, 0, 0, 1]
    assert first.reference_ml.tolist() == pytest.approx([0.027] * 4)
    assert first.result_ml.tolist() == pytest.approx([0.027, 0, 0, 0.027]), "other pathology is in neither volume"
    assert evaluated.uncertainty.set_index("case").dsc["Utrecht_0"] == 1


def test_systems_differ_by_their_point_alone(patchy):
    case = patchy()
    own, recipe, plain, zscore = system_masks(case, POINT | dict(min_mm3=4.0), Operating(threshold=0.6, min_voxels=3, tta=False)).values()
    assert (plain == (case["prob"] >= 0.5)).all() and (zscore == (case["flair_z"] > 2)).all()
    assert (own == filter_components(case["prob_tta"] >= 0.5, 2)).all(), "4 mm3 are two voxels of 2.97"
    assert (recipe == filter_components(case["prob"] >= 0.6, 3)).all()


@pytest.mark.parametrize("point", [dict(tta=True, min_voxels=2), dict(tta=False, min_mm3=4.0)])
def test_what_the_engine_segments_is_what_the_evaluation_scores(patchy, point):
    case, point = patchy(), POINT | point
    engine, scan = SimpleNamespace(point=point), SimpleNamespace(volume=SimpleNamespace(spacing=case["spacing"]))
    mask = WMHInferenceEngine.segment(engine, Prediction(scan, case["prob"], case["prob_tta"], 0))
    assert (mask == system_masks(case, point, Operating())[SYSTEMS[0]]).all()


def test_lesions_give_the_recall_and_precision_of_the_scores(patchy):
    cases = [patchy(i, f"Utrecht_{i}") for i in range(3)]
    found = evaluate(cases, POINT, Operating())
    own = found.metrics[found.metrics.system == SYSTEMS[0]].set_index("case")
    hits = found.lesions.groupby(["case", "kind"]).hit.mean().unstack()
    np.testing.assert_allclose(hits.reference, own.recall)
    np.testing.assert_allclose(2 / (1 / hits.reference + 1 / hits.result), own.f1)
    volumes = found.lesions.groupby(["case", "kind"]).volume_mm3.sum().unstack() / 1000
    np.testing.assert_allclose(volumes, own[["reference_ml", "result_ml"]])


def test_tables_do_not_depend_on_how_volumes_lie_in_memory(patchy):
    case = patchy()
    turned = case | {name: np.asfortranarray(a) for name, a in case.items() if isinstance(a, np.ndarray)}
    found, other = (evaluate([one], POINT, Operating()) for one in (case, turned))
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(found, name), getattr(other, name), check_exact=True)
    labels, _ = ndimage.label((case["reference"] == 1).T, np.ones((3, 3, 3)))  # the first axis runs fastest, as in a file
    assert found.lesions[found.lesions.kind == "reference"].voxels.tolist() == np.bincount(labels.ravel())[1:].tolist()


def test_zones_follow_the_10_mm_rule(patchy):
    case = patchy()
    near = periventricular(case["ventricles"], case["spacing"])
    ventricles, voxels = (np.argwhere(mask) * case["spacing"] for mask in (case["ventricles"], np.ones_like(near)))
    distance = np.sqrt(((voxels[:, None] - ventricles[None]) ** 2).sum(-1)).min(1).reshape(near.shape)
    np.testing.assert_array_equal(near, distance <= 10)
    found = evaluate([case], POINT, Operating())
    own = found.metrics.iloc[0]
    assert found.zones.zone.tolist() == ["periventricular", "deep"] and 0 < found.zones.dsc.min() <= own.dsc <= found.zones.dsc.max()
    assert found.zones[["reference_ml", "result_ml"]].sum().tolist() == pytest.approx([own.reference_ml, own.result_ml])
    reference = found.lesions[found.lesions.kind == "reference"]
    assert reference[reference.zone == "deep"].volume_mm3.sum() <= 1000 * found.zones.reference_ml[1] + 1e-9


@pytest.mark.parametrize("ventricles", [None, np.zeros((36, 30, 12), bool)])
def test_without_ventricles_there_is_no_zone(patchy, ventricles):
    found = evaluate([patchy() | dict(ventricles=ventricles)], POINT, Operating())
    assert found.zones.empty and list(found.zones) == list(TABLES["zones"]) and set(found.lesions.zone) == {""}


def test_calibration_is_that_of_the_counted_voxels(patchy):
    from sklearn.metrics import brier_score_loss

    case = patchy()
    case["inner"] = np.arange(36)[:, None, None] * np.ones((1, 30, 12)) < 18
    counted = (case["inner"] | (case["reference"] == 1) | (case["prob_tta"] >= 0.01)) & (case["reference"] != 2)
    bins = evaluate([case], POINT, Operating()).calibration
    assert bins.bin.tolist() == list(range(15)) and bins.voxels.sum() == counted.sum()
    expected = brier_score_loss(case["reference"][counted] == 1, case["prob_tta"][counted].astype(float))
    assert calibration_error(bins)["brier"] == pytest.approx(expected)
    plain = evaluate([case], POINT | dict(tta=False), Operating()).calibration
    assert plain.probability.sum() != pytest.approx(bins.probability.sum()), "the probability that the point thresholds"


def test_the_flag_is_raised_above_its_limit(patchy):
    case = patchy()
    uncertainty = evaluate([case], POINT, Operating()).uncertainty.uncertainty[0]
    flags = [evaluate([case], POINT | dict(unsure_above=limit), Operating()).uncertainty.unsure[0] for limit in (uncertainty, 0)]
    assert uncertainty > 0 and flags == [False, True]


@pytest.mark.parametrize("n", [1, 2])
def test_a_case_without_lesions_or_result_is_counted_not_scored(patchy, recwarn, n):
    empty = patchy(1, "Utrecht_2") | dict(reference=np.zeros((36, 30, 12), np.uint8))
    empty |= {name: np.zeros((36, 30, 12), np.float32) for name in ("prob", "prob_tta", "flair_z")}
    found = evaluate([empty | dict(case=name) for name in ("a", "b")][:n], POINT, Operating())
    assert found.metrics.dsc.isna().all() and (found.metrics.recall == 1).all() and found.lesions.empty
    assert found.uncertainty.iloc[0][["entropy", "uncertainty", "unsure"]].tolist() == [0, 1, True]
    own = found.metrics[found.metrics.system == SYSTEMS[0]]
    assert agreement_table(own).left_out.tolist() == [0, n, n] and size_table(found.lesions).recall.isna().all()
    assert by_group(own.assign(burden=tertiles(own.reference_ml)), "burden").nans.tolist() == [n, n, n, 0, 0]
    assert compare_systems(found.metrics).zeros.tolist() == [n] * 3, "all are right"
    assert flag_table(found.uncertainty, 0.8).loc["specificity", ["count", "n"]].tolist() == [0, n]
    assert np.isnan(calibration_error(found.calibration)["ece_found_ci"]).all() and not len(recwarn)


def test_a_zero_shot_mask_has_a_row_of_its_own_that_is_no_system(patchy):
    case = patchy()
    found = evaluate([case | dict(zero_shot=case["reference"] == 1), patchy(1, "Utrecht_2") | dict(zero_shot=np.zeros((36, 30, 12), bool))], POINT, Operating())
    told = found.metrics[found.metrics.system == ZERO_SHOT]
    assert told.dsc.tolist() == [1, 0] and told.result_ml.tolist() == [told.reference_ml.iloc[0], 0]
    assert set(found.systems.system) == set(SYSTEMS) and len(found.metrics) == len(found.systems) + 2
    pd.testing.assert_frame_equal(found.lesions, evaluate([case, patchy(1, "Utrecht_2")], POINT, Operating()).lesions)


def test_tables_come_back_as_they_were_written(patchy, tmp_path):
    cases = [patchy(0, "Utrecht_0") | dict(ventricles=None), patchy(1, "Singapore_1")]
    found, run = evaluate(cases, POINT, Operating()), RunFolder(tmp_path)
    found.write(run)
    assert {f"{name}.csv" for name in TABLES} == {path.name for path in tmp_path.iterdir()}
    for name in TABLES:
        pd.testing.assert_frame_equal(read_table(tmp_path / f"{name}.csv"), getattr(found, name), rtol=1e-5, check_dtype=False)
    evaluate(cases[:1], POINT, Operating()).write(run)
    assert set(read_table(tmp_path / "lesions.csv").zone) == {""} and list(read_table(tmp_path / "zones.csv")) == list(TABLES["zones"])


def test_what_is_missing_is_named(patchy):
    with pytest.raises(InputError, match="no unsure_above: run notebook 04_search again"):
        evaluate([patchy()], {k: v for k, v in POINT.items() if k != "unsure_above"}, Operating())
    with pytest.raises(InputError, match="no case to evaluate"):
        evaluate([], POINT, Operating())


def test_cases_are_read_once_and_one_at_a_time(patchy):
    passed = []

    def stream():
        for i in range(4):
            assert sum(array() is not None for array in passed) <= 1, "an earlier case than the last is still held"
            case = patchy(i, f"Utrecht_{i}")
            passed.append(weakref.ref(case["flair"]))
            yield case
            del case

    found = evaluate(stream(), POINT, Operating())
    assert len(passed) == len(found.uncertainty) == 4
    assert not any(array() is not None for array in passed), "the gallery keeps slices, not scans"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.metrics = None


def test_every_mask_is_kept_on_the_grid_of_its_scan_as_the_case_passes(disc_case, tiny_nifti, tmp_path):
    item = disc_case(codes="PIR")
    item |= dict(volume=load_volume(tiny_nifti("FLAIR.nii.gz", item["flair"].shape, axes="PIR")), prob=0 * item["prob"])
    point = POINT | dict(threshold=0.4, min_voxels=5)  # the other pathology has four voxels
    passed = evaluation.save_masks([item], point, tmp_path / "masks")
    assert not (tmp_path / "masks").exists() and next(passed) is item
    kept = load_mask(tmp_path / "masks" / "Utrecht_1_wmh.nii.gz", like=item["volume"])
    np.testing.assert_array_equal(kept, item["reference"] == 1)
    other = item | dict(case="Utrecht_2")
    list(evaluation.save_masks([other], point, tmp_path / "masks"))
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["Utrecht_2_wmh.nii.gz"], "of this evaluation alone"


def test_the_gallery_ranks_the_cases_that_have_a_dice(evaluated):
    gallery = [row | dict(dsc=d) for row, d in zip(evaluated.gallery, (0.5, 0.9, np.nan, 0.7, 0.6))]
    rows = evaluation.best_median_worst(gallery)
    assert [(row["rank"], row["dsc"]) for row in rows] == [("best", 0.9), ("median", 0.6), ("worst", 0.5)]
    assert len(evaluation.best_median_worst(gallery[:1])) == 1
    assert [row["case"] for row in evaluation.best_median_worst(gallery[2:3])] == ["Utrecht_2"], "no case with a Dice: those there are"


def test_a_mask_file_is_scored_against_its_reference_on_the_grid_of_its_scan(tiny_nifti):
    reference = np.zeros((24, 28, 10), np.uint8)
    reference[10:14, 10:14, 4:6], reference[3, 3, 3] = 1, 2
    paths = tiny_nifti("FLAIR.nii.gz"), tiny_nifti("wmh.nii.gz", data=reference)
    found = evaluation.score_files(*paths, tiny_nifti("same.nii.gz", data=(reference > 0).astype(np.uint8)))
    assert (found["dsc"], found["hd95"], found["reference_ml"]) == (1, 0, pytest.approx(0.096)) and found["result_ml"] == found["reference_ml"]
    assert evaluation.score_files(*paths, tiny_nifti("two.nii.gz", data=2 * (reference > 0).astype(np.uint8))) == found, "the challenge asks for 0.5 or more"
    half = reference * (np.arange(10) < 5)
    assert evaluation.score_files(*paths, tiny_nifti("half.nii.gz", data=half.astype(np.uint8)))["dsc"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="other.nii.gz has shape"):
        evaluation.score_files(*paths, tiny_nifti("other.nii.gz", shape=(5, 5, 5)))


def test_folds_are_pooled_into_one_table_and_each_case_is_tested_once(scored, tmp_path, capsys):
    metrics = scored[0]
    runs = [RunFolder(tmp_path / f"fold{fold}").open(preset("smoke", f"split.protocol=k-fold split.folds=3 split.fold={fold}")) for fold in (0, 1)]
    for fold, run in enumerate(runs):
        write_table(metrics.assign(case=metrics.case + f"_{fold}"), run.metrics_csv)
        write_table(pd.DataFrame({"case": ["a"], "site": ["s"], "flair": ["f"], "origin": ["synthetic"]}), run.cohort_csv)
    table = pooled(runs)
    assert len(table) == 2 * len(metrics) and set(table.run) == {str(run.path) for run in runs}
    assert capsys.readouterr().out == "of 3 folds there are no runs of 2\n"
    path = suite.pool(runs)
    assert path == tmp_path / "pooled" / "metrics.csv" and read_table(path).case.tolist() == table.case.tolist()
    assert "operating point" in (out := capsys.readouterr().out) and "ICC(2,1)" in out
    with pytest.raises(InputError, match="was tested in several"):
        pooled([runs[0], runs[0]])
    other = RunFolder(tmp_path / "other").open(preset("smoke", "training.epochs=9"))
    with pytest.raises(InputError, match="another recipe"):
        pooled([runs[0], other])
    with pytest.raises(MissingStepError, match="05_report"):
        pooled([runs[0], RunFolder(tmp_path / "late").open(preset("smoke", "split.protocol=k-fold split.folds=3 split.fold=2"))])
