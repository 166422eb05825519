"""Scores and tables by hand; masks as they are kept; captions."""

import numpy as np
import pytest

from wmhlib import report
from wmhlib.errors import InputError
from wmhlib.volumes import load_mask, load_volume


def test_three_systems_are_scored_on_each_case(scored):
    metrics, gallery = scored
    first = metrics[metrics.case == "Utrecht_0"].set_index("system")
    assert list(first.index) == list(report.SYSTEMS) and len(metrics) == 15 and len(gallery) == 5
    assert first.dsc.tolist() == [1, 0, 1]
    assert first.reference_ml.tolist() == pytest.approx([0.027] * 3)
    assert first.result_ml.tolist() == pytest.approx([0.027, 0, 0.027]), "other pathology is in neither volume"


def test_results_table_states_intervals_and_what_was_left_out(scored):
    table = report.results_table(scored[0])
    assert table.loc["operating point", "dsc"] == "1.00 [1.00, 1.00]" and table.loc["operating point", "n"] == 5
    assert table.loc["operating point", "left out"] == "dsc 1, hd95 1, avd 1"
    assert report.results_table(scored[0].iloc[:3]).loc["operating point", "dsc"] == "1.00"
    lines = report.results_text(scored[0]).splitlines()
    assert len(lines) == 5 and all(line.startswith(s) for line, s in zip(lines[2:], report.SYSTEMS))


def test_every_mask_is_kept_on_the_grid_of_its_scan_as_the_case_passes(disc_case, tiny_nifti, tmp_path):
    point = dict(threshold=0.4, min_voxels=3, tta=True, zscore_threshold=2.0)
    item = disc_case(codes="PIR")
    item["volume"] = load_volume(tiny_nifti("FLAIR.nii.gz", item["flair"].shape, axes="PIR"))
    passed = report.save_masks([item], point, tmp_path / "masks")
    assert not (tmp_path / "masks").exists() and next(passed) is item
    kept = load_mask(tmp_path / "masks" / "Utrecht_1_wmh.nii.gz", like=item["volume"])
    np.testing.assert_array_equal(kept, item["prob"] > 0)


def test_the_gallery_ranks_the_cases_that_have_a_dice(scored):
    gallery = [row | dict(dsc=d) for row, d in zip(scored[1], (0.5, 0.9, np.nan, 0.7, 0.6))]
    rows = report.best_median_worst(gallery)
    assert [(row["rank"], row["dsc"]) for row in rows] == [("best", 0.9), ("median", 0.6), ("worst", 0.5)]
    assert len(report.best_median_worst(gallery[:1])) == 1 and report.best_median_worst(gallery[2:3]) == []


def test_captions_name_the_data_and_what_good_looks_like():
    text = report.caption("predictions", data="synthetic cases", n=9)
    assert "9 synthetic cases" in text and "Good:" in text


def test_a_mask_file_is_scored_against_its_reference_on_the_grid_of_its_scan(tiny_nifti):
    reference = np.zeros((24, 28, 10), np.uint8)
    reference[10:14, 10:14, 4:6], reference[3, 3, 3] = 1, 2
    paths = tiny_nifti("FLAIR.nii.gz"), tiny_nifti("wmh.nii.gz", data=reference)
    found = report.score_files(*paths, tiny_nifti("same.nii.gz", data=(reference > 0).astype(np.uint8)))
    assert (found["dsc"], found["hd95"], found["reference_ml"]) == (1, 0, pytest.approx(0.096))
    half = reference * (np.arange(10) < 5)
    assert report.score_files(*paths, tiny_nifti("half.nii.gz", data=half.astype(np.uint8)))["dsc"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="other.nii.gz has shape"):
        report.score_files(*paths, tiny_nifti("other.nii.gz", shape=(5, 5, 5)))
