"""Engines of volumes, and several engines as one."""

import nibabel
import numpy as np
import pytest
import torch

from wmhlib import bids, derivatives
from wmhlib.engine import WMHInferenceEngine
from wmhlib.ensemble import Ensemble, open_engine
from wmhlib.errors import InputError
from wmhlib.files import read_table, write_atomic
from wmhlib.network import build_network
from wmhlib.presets import preset
from wmhlib.trained import weights_bytes
from wmhlib.volumes import load_case
from wmhlib.volumetric import model
from wmhlib.volumetric.networks import UNet
from wmhlib.volumetric.windows import FLIPS, predict_box
from wmhlib.workspace import RunFolder, run_folders


@pytest.fixture
def engine(monkeypatch):
    """Makes an engine of volumes: `engine(seed, overrides)`, its weights random and its answers far from sure."""
    monkeypatch.setattr(model, "build", lambda settings, channels: UNet(channels, (4, 4, 8, 8, 8)))

    def make(seed=0, overrides=""):
        network = build_network(preset("stroke-smoke", f"seed={seed} {overrides}"))
        for head in network.network.heads:
            torch.nn.init.zeros_(head.bias)
        return WMHInferenceEngine(network, "cpu")

    return make


@pytest.fixture
def scan(tiny_nifti):
    return tiny_nifti("sub-1_T1w.nii.gz", (40, 30, 44), (4.0, 5.0, 4.0), "PSR")


@pytest.mark.parametrize("views", FLIPS)
def test_the_flips_of_a_volume_are_distinct_and_the_first_is_none(views):
    assert len(set(FLIPS[views])) == views and FLIPS[views][0] == ()


def test_probabilities_of_a_volume_lie_on_the_scans_own_grid_and_tta_is_the_mean_over_flips(engine, scan):
    plain, flipped = engine(), engine(overrides="operating.views=4")
    case = load_case(scan, inputs=plain.recipe.inputs)
    found = flipped.predict(case)
    for prob in (found.prob, found.prob_tta):
        assert prob.shape == nibabel.load(scan).shape and prob.dtype == np.float32 and 0 <= prob.min() < prob.max() <= 1
    assert not np.array_equal(found.prob, found.prob_tta) and np.array_equal(found.prob, plain.predict(case, use_tta=False).prob_tta)
    np.testing.assert_array_equal(flipped.predict_volume_probs(scan)[0], found.prob_tta)


@pytest.mark.parametrize("views", FLIPS)
def test_every_view_of_a_volume_comes_back_to_its_place(views, scan):
    recipe = preset("stroke-smoke")
    plain, mean, _ = predict_box(lambda windows: windows, load_case(scan, inputs=recipe.inputs), recipe, views, torch.device("cpu"))
    np.testing.assert_allclose(mean, plain, atol=1e-6)


@pytest.mark.parametrize("shape, spacing", [((73, 63, 15), (1.0, 1.0, 4.9)), ((66, 57, 13), (0.9, 1.3, 7.7)), ((43, 40, 9), (1.0, 0.7, 3.2))])
def test_sure_probabilities_are_no_more_than_one_on_any_grid(tiny_nifti, shape, spacing):
    scan = tiny_nifti("thick.nii.gz", shape, spacing, "LPS")
    recipe = preset("stroke-smoke", "volume.spacing=1")
    for prob in predict_box(lambda windows: torch.full_like(windows, 40.0), load_case(scan, inputs=recipe.inputs), recipe, 2, torch.device("cpu"))[:2]:
        assert prob.max() == 1 and prob.min() >= 0


def test_an_ensemble_is_the_mean_of_its_members_and_stands_wherever_an_engine_does(engine, scan):
    members = [engine(seed) for seed in (1, 2)]
    members[0].point |= dict(threshold=0.4, min_voxels=5, tta=False)
    members[1].point |= dict(min_mm3=7.0)
    both = Ensemble(members)
    case = load_case(scan, inputs=both.recipe.inputs)
    mean, *found = [each.predict(case) for each in (both, *members)]
    np.testing.assert_allclose(mean.prob, (found[0].prob + found[1].prob) / 2, atol=1e-7)
    np.testing.assert_allclose(mean.prob_tta, (found[0].prob_tta + found[1].prob_tta) / 2, atol=1e-7)
    assert both.point.items() >= dict(threshold=pytest.approx(0.45), min_voxels=5, min_mm3=7.0, tta=True).items()
    assert mean.uncertainty == pytest.approx((found[0].uncertainty + found[1].uncertainty) / 2), "as its limit is the mean of theirs"
    assert both.segment(mean).shape == case.volume.data.shape
    assert both.model.fingerprint() not in {each.model.fingerprint() for each in members}
    with pytest.raises(InputError, match="one kind of input: these have flair over 256 mm in 2 views; t1"):
        Ensemble([members[0], WMHInferenceEngine(build_network(preset("smoke")), "cpu")])


def test_several_runs_on_strokes_predict_as_one_into_files_that_say_stroke(engine, scan, tmp_path):
    for seed in (1, 2):
        network = engine(seed).model
        run = RunFolder(tmp_path / f"run {seed}").open(network.recipe)
        write_atomic(run.best, weights_bytes(network, {"recipe": network.recipe.to_json(), "base_sha256": "", "split": ""}))
    runs = run_folders(f"'{tmp_path}/run 1' '{tmp_path}/run 2'")
    assert [run.path.name for run in runs] == ["run 1", "run 2"] == [run_folders(str(run.path))[0].path.name for run in runs]
    out = tmp_path / "out"
    table = derivatives.predict_scans(open_engine(runs), derivatives.find(str(scan), inputs=runs[0].recipe().inputs), out, progress=False)
    assert table.status.tolist() == ["done"] and (out / "sub-1/anat/sub-1_space-T1w_label-lesion_mask.nii.gz").exists()
    texts = "".join(path.read_text() for path in out.rglob("*.html")) + "".join(path.read_text() for path in out.rglob("*.json")) + (out / "README").read_text()
    assert "Stroke lesions" in texts and "hyperintens" not in texts and "white matter" not in texts
    assert len(list(derivatives.worth_a_look(read_table(out / bids.TABLE), out))) == 1
    with pytest.raises(InputError, match="another kind of scan .Stroke lesions"):
        bids.write_dataset(out, {}, bids.WMH)
    with pytest.raises(InputError, match="quotes"):
        run_folders("'a b")
