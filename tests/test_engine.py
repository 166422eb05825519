import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from wmhlib.batches import with_context
from wmhlib.engine import VIEWS, WMHInferenceEngine, turn, unturn
from wmhlib.errors import CheckpointError, InputError, MissingStepError, WMHError
from wmhlib.files import write_atomic, write_table
from wmhlib.network import WMHNet, load_network
from wmhlib.phantom import write_cohort
from wmhlib.presets import preset
from wmhlib.trained import weights_bytes
from wmhlib.volumes import brain_slices, case_canvas, load_case
from wmhlib.workspace import RunFolder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort"), 3, seed=5, scale=3.0, progress=False)


def network(overrides=""):
    torch.manual_seed(0)
    model = WMHNet(preset("smoke", overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("count", VIEWS)
def test_the_views_are_distinct_and_each_is_undone(count):
    y, x = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
    image = torch.exp(-((x - 0.2) ** 2 + (y + 0.1) ** 2) / 0.03)[None, None]  # smooth, within the borders, and nowhere symmetric
    views = [turn(image, *view) for view in VIEWS[count]]
    assert len(views) == count and torch.equal(views[0], image)
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])
    for turned, view in zip(views, VIEWS[count], strict=True):
        torch.testing.assert_close(unturn(turned, *view), image, atol=0.02 if len(view) > 2 else 0, rtol=0)


def test_a_zoomed_view_is_larger_about_the_middle():
    image = torch.zeros(1, 1, 100, 100)
    image[..., 40:60, 40:60] = 1
    assert turn(image, 0, False, 0.0, 1.5).sum() == pytest.approx(900, rel=0.02)
    assert torch.equal(turn(image, 0, True, 0.0, 1.0), image.flip(-1))


def test_probabilities_lie_on_the_scans_own_grid_and_tta_is_the_mean_over_views(cohort):
    engine = WMHInferenceEngine(model=network("operating.views=8"), device="cpu", img_size=64)
    flair = cohort.flair[0]
    prob, reference = engine.predict_volume_probs(flair, use_tta=True)
    assert prob.shape == nib.load(flair).shape and prob.dtype == np.float32 and 0 <= prob.min() <= prob.max() <= 1
    assert np.array_equal(reference.affine, nib.load(flair).affine)
    plain, _ = engine.predict_volume_probs(flair, use_tta=False)
    prediction = engine.predict(load_case(flair, inputs=engine.recipe.inputs))
    assert np.array_equal(prediction.prob_tta, prob) and not np.array_equal(plain, prob)
    np.testing.assert_allclose(prediction.prob, plain, atol=1e-6)


def test_tta_of_a_turned_canvas_is_the_turned_tta():
    engine = WMHInferenceEngine(network("operating.views=8"), "cpu")
    image = torch.randn(2, 1, 64, 64)
    mean = engine._views(image, VIEWS[8]).mean(0)
    torch.testing.assert_close(engine._views(image.rot90(1, (-2, -1)), VIEWS[8]).mean(0), mean.rot90(1, (-2, -1)), atol=1e-5, rtol=1e-4)


def test_no_more_slices_than_the_setting_says_are_in_a_forward_pass(cohort):
    found, seen = [], []
    for size in (64, 3, 1):
        engine = WMHInferenceEngine(network(f"operating.views=2 operating.batch_size={size} inputs.context=1"), "cpu")
        engine._network.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
        case = load_case(cohort.flair[0], inputs=engine.recipe.inputs)
        seen.clear()
        found.append(engine.predict(case))
        assert max(seen) <= size and sum(seen) == 2 * (case.grid.depth - found[-1].skipped)
        np.testing.assert_allclose(found[-1].prob_tta, found[0].prob_tta, atol=1e-6)


def test_the_network_sees_each_slice_between_its_neighbours_as_in_training(cohort, monkeypatch):
    engine, seen = WMHInferenceEngine(network("operating.batch_size=3 inputs.modalities=['flair','t1'] inputs.context=1"), "cpu"), []
    monkeypatch.setattr(engine, "_logits", lambda batch: seen.append(batch) or batch[:, :1])
    case = load_case(cohort.flair[0], cohort.t1[0], inputs=engine.recipe.inputs)
    engine.predict(case, use_tta=False)
    images = case_canvas(case, engine.img_size)
    torch.testing.assert_close(torch.cat(seen), torch.stack([with_context(images, z, 1) for z in brain_slices(case)]))


def test_slices_without_brain_are_skipped_and_counted(cohort, tmp_path):
    image = nib.load(cohort.flair[0])  # slices along the last axis, the vertex at its end
    data = np.concatenate([np.repeat(image.get_fdata()[..., :1], 40, 2), image.get_fdata()], 2)
    affine = image.affine.copy()
    affine[:3, 3] -= 40 * affine[:3, 2]
    nib.save(nib.Nifti1Image(data.astype(np.float32), affine), tmp_path / "neck.nii.gz")
    engine = WMHInferenceEngine(network(), "cpu")
    case = load_case(tmp_path / "neck.nii.gz", inputs=engine.recipe.inputs)
    prediction = engine.predict(case)
    shown = prediction.prob.any((0, 1))
    assert prediction.skipped == np.count_nonzero(~shown) and not shown[:20].any()
    assert shown[case.inner.any((0, 1))].all()


def test_probabilities_stay_between_0_and_1_where_the_network_is_certain(cohort, monkeypatch):
    engine = WMHInferenceEngine(network(), "cpu", img_size=512)
    monkeypatch.setattr(engine, "_logits", lambda batch: torch.full((len(batch), 1, 512, 512), 40.0))
    prob = engine.predict(load_case(cohort.flair[0], inputs=engine.recipe.inputs), use_tta=False).prob
    assert prob.max() == 1 and prob.min() == 0


def test_probabilities_that_are_no_numbers_are_an_error_and_no_empty_mask(cohort, monkeypatch):
    engine = WMHInferenceEngine(network())
    monkeypatch.setattr(engine, "_logits", lambda batch: torch.full_like(batch[:, :1], torch.nan))
    with pytest.raises(InputError, match="no numbers"):
        engine.predict(load_case(cohort.flair[0], inputs=engine.recipe.inputs))


def test_inference_weights_give_what_the_trained_network_gives():
    model, image = network(), torch.randn(2, 1, 64, 64)
    merged = model.for_inference("no")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.for_inference("bf16")(image)[0], model(image)[0], atol=0.1, rtol=0.05)
    assert not any("lora" in name for name, _ in merged.named_parameters()) and any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(merged(image)[0], model(image)[0], atol=1e-5, rtol=1e-4)


def test_frozen_weights_in_the_computing_precision_change_nothing():
    model, image = network(), torch.randn(2, 1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(image)[0]
        after = model.cast_frozen("bf16")(image)[0]
    assert torch.equal(before, after)
    kinds = {name: parameter.dtype for name, parameter in model.encoder.named_parameters()}
    assert kinds["base_model.model.blocks.0.mlp.lin1.base_layer.weight"] == torch.bfloat16
    assert all(kind == torch.float32 for name, kind in kinds.items() if "lora" in name)


def test_threshold_and_component_filter():
    prob = np.zeros((6, 6, 6), np.float32)
    prob[0, 0, 0], prob[3:5, 3, 3], prob[5, 4, 4] = 0.9, 0.6, 0.7
    mask = WMHInferenceEngine.apply_threshold(prob, threshold=0.60)
    assert mask.sum() == 4
    kept = WMHInferenceEngine.cc_filter(mask, min_v=3)
    assert kept.sum() == 3 and not kept[0, 0, 0] and kept[5, 4, 4]


def origin(model):
    return {"recipe": model.recipe.to_json(), "base_sha256": model.base_sha256, "split": "a,train"}


def test_weights_trained_on_another_split_are_refused(tmp_path):
    run, model = RunFolder(tmp_path / "run").open(preset("smoke")), network()
    write_atomic(run.best, weights_bytes(model, origin(model)))
    assert WMHInferenceEngine.from_run(run).recipe == model.recipe
    write_table(pd.DataFrame([{"case": "a"} | dict.fromkeys(("site", "flair", "t1", "mask", "ventricles"), "")]), run.cohort_csv)
    write_table(pd.DataFrame([{"case": "a", "split": "test"}]), run.split_csv)
    with pytest.raises(CheckpointError, match="another split"):
        WMHInferenceEngine.from_run(run)


def test_a_point_that_was_chosen_with_other_weights_or_views_is_refused(tmp_path):
    run, model = RunFolder(tmp_path / "run").open(preset("smoke")), network()
    write_atomic(run.best, weights_bytes(model, origin(model)))
    point = {"threshold": 0.4, "min_voxels": 2, "tta": False}
    for chosen_with in ({}, {"weights_sha256": load_network(run.best)[0].fingerprint()}):
        write_atomic(run.operating_point, json.dumps(point | chosen_with))
        assert WMHInferenceEngine.from_run(run).point["threshold"] == 0.4
    for chosen_with, other in (({"weights_sha256": "0" * 64}, "other weights than"), ({"views": 10}, "10 views, .*recipe.json has 2 now")):
        write_atomic(run.operating_point, json.dumps(point | chosen_with))
        with pytest.raises(CheckpointError, match=f"was chosen with {other}.*: run notebook 04_search again"):
            WMHInferenceEngine.from_run(run)


def test_a_gpu_whose_memory_is_full_is_told(cohort, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    engine = WMHInferenceEngine(network())
    monkeypatch.setattr(engine, "_network", full)
    with pytest.raises(WMHError, match=r"GPU is full: .*operating.batch_size lower.*Tried to allocate 2.00 GiB.\)$"):
        engine.predict(load_case(cohort.flair[0], inputs=engine.recipe.inputs))


def test_weights_come_back_exactly_with_batchnorm_statistics(tmp_path):
    model = network().train()
    model(torch.randn(2, 1, 64, 64))
    write_atomic(tmp_path / "w.safetensors", weights_bytes(model, origin(model)))
    untouched = WMHNet(model.recipe)
    untouched.load_trained_state(model.trained_state(), "memory")
    again, split = load_network(tmp_path / "w.safetensors")
    image = torch.randn(1, 1, 64, 64)
    assert again.recipe == model.recipe and split == "a,train" and torch.equal(untouched.eval()(image)[0], again(image)[0])
    statistics = [name for name in model.state_dict() if name.endswith("running_mean")]
    assert statistics and all(torch.equal(model.state_dict()[name], again.state_dict()[name]) for name in statistics)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model = network()
    with pytest.raises(CheckpointError, match="unexpected decoder"):
        model.load_trained_state({**model.trained_state(), "decoder.extra": torch.zeros(1)}, "w")
    with pytest.raises(CheckpointError, match="missing channel_adapter.0.weight"):
        model.load_trained_state({k: v for k, v in model.trained_state().items() if k != "channel_adapter.0.weight"}, "w")
    write_atomic(tmp_path / "w.safetensors", weights_bytes(model, origin(model) | {"recipe": preset("smoke", "seed=7").to_json()}))
    with pytest.raises(CheckpointError, match="were trained on the base"):
        load_network(tmp_path / "w.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cut.safetensors cannot be read"):
        load_network(tmp_path / "cut.safetensors")


def test_a_run_without_weights_names_the_notebook_to_run(tmp_path):
    with pytest.raises(MissingStepError, match="03_train"):
        WMHInferenceEngine.from_run(tmp_path)


def test_t1_weights_run_on_flair_alone(cohort):
    engine = WMHInferenceEngine(network("inputs.modalities=['flair','t1'] inputs.context=1"))
    alone, _ = engine.predict_volume_probs(cohort.flair[0])
    both, _ = engine.predict_volume_probs(cohort.flair[0], t1=cohort.t1[0])
    assert alone.shape == both.shape and not np.array_equal(alone, both)
