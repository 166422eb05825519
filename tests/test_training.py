import copy
import json
import math
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file

from wmhlib import epochs, slicestore, tasks, training
from wmhlib.errors import InputError, MissingStepError, WMHError
from wmhlib.files import read_table, write_table
from wmhlib.network import load_network
from wmhlib.presets import preset
from wmhlib.sections import Training
from wmhlib.seeds import stable_seed
from wmhlib.storage import load_checkpoint
from wmhlib.workspace import RunFolder

OVERRIDES = "inputs.img_size=32 training.checkpoint_epochs=2 training.epochs=4 training.restart_epochs=4 training.accumulation=2 training.batch_size=4"


def outcome(run):
    """What a run leaves that must not depend on how it got there: weights, history, state of the last checkpoint."""
    state = load_checkpoint(newest_checkpoint(run))
    return load_file(run.best), run.history_csv.read_bytes(), state


def newest_checkpoint(run):
    return max(run.checkpoints.glob("epoch_*.pt"))


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


def assert_same(first, second):
    (weights, history, last), (weights2, history2, last2) = first, second
    assert history == history2
    assert same(weights, weights2) and same(last["network"], last2["network"]) and same(last["average"], last2["average"])
    moments, moments2 = (state["optimizer"]["state"] for state in (last, last2))
    assert all(torch.equal(moments[p][k], moments2[p][k]) for p in moments for k in moments[p])
    assert torch.equal(last["best"], last2["best"])


def test_training_lowers_the_loss_and_leaves_the_base_frozen(new_run):
    run = new_run("run", "inputs.img_size=32 training.epochs=6 training.restart_epochs=6 training.lr=5e-3")
    history = training.fit(run, progress=False)
    assert history.focal.iloc[-1] < 0.7 * history.focal.iloc[0]
    weights = load_file(run.best)
    assert not any(name.startswith("encoder.") and "lora_" not in name for name in weights)


def test_inputs_with_t1_and_neighbours_train_by_the_same_loop(new_run):
    run = new_run("run", "inputs.img_size=32 inputs.modalities=['flair','t1'] inputs.context=1 training.epochs=1 adapter.method=none")
    assert training.fit(run, progress=False).train_loss.notna().all()


def test_validation_cases_without_a_lesion_still_leave_weights(new_run, monkeypatch):
    monkeypatch.setattr(training, "validate", lambda *_: {"val_loss": 1.0, "val_dice": math.nan})
    run = new_run("run", "inputs.img_size=32 training.epochs=2")
    training.fit(run, progress=False)
    last = load_checkpoint(newest_checkpoint(run))["network"]
    assert same(load_network(run.best)[0].trained_state(), last), "the last, since none is better"


def test_training_stops_where_the_validation_dice_has_not_risen_for_long_enough_and_stays_stopped(new_run, monkeypatch, capsys):
    scores = iter([0.3, 0.5, 0.4, math.nan, 0.2])
    monkeypatch.setattr(training, "validate", lambda *_: {"val_loss": 1.0, "val_dice": next(scores)})
    run = new_run("run", "inputs.img_size=32 training.epochs=9 training.patience=2 training.checkpoint_epochs=9")
    assert len(training.fit(run)) == 4 and "training.patience" in capsys.readouterr().out
    assert newest_checkpoint(run).name == "epoch_0004.pt" and len(training.fit(run, progress=False)) == 4


def test_the_weights_that_validated_best_are_kept_and_ema_averages_them_without_changing_the_training(new_run, monkeypatch):
    scores, validated, trained = iter(2 * [0.1, 0.5, 0.3]), [], []

    def validate(job, *_):
        validated.append(copy.deepcopy((job.network.trained_state(), job.average.state)))
        return {"val_loss": 1.0, "val_dice": next(scores)}

    monkeypatch.setattr(training, "validate", validate)
    for ema in (0.0, 0.9):
        run = new_run(f"run{ema}", f"inputs.img_size=32 training.epochs=3 training.ema={ema}")
        training.fit(run, progress=False)
        kept, (network, average) = load_file(run.best), validated[-2]
        trained.append(load_checkpoint(newest_checkpoint(run))["network"])
        assert same(kept, network) and (same(kept, average) if ema else not average)
    assert same(*trained)


def test_the_dice_of_each_site_stands_beside_the_mean_of_all_cases(new_run, monkeypatch):
    run = new_run("run", "inputs.img_size=32 training.epochs=1")
    first, second, third = run.cases().query("split == 'val'").site
    overlap, size = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([4.0, 10.0, 0.0])  # nothing in reference and result of the third
    monkeypatch.setattr(tasks.Slices, "validate", lambda *_: (torch.zeros(1), overlap, size))
    row = training.fit(run, progress=False).iloc[0].filter(like="val_dice")
    expected = {"val_dice": 0.65, f"val_dice {first}": 0.5, f"val_dice {second}": 0.8, f"val_dice {third}": math.nan}
    assert row.to_dict() == pytest.approx(expected, nan_ok=True)


def test_optimiser_and_clipping_are_the_recipes(new_run, monkeypatch):
    groups, limits = [], set()

    def validate(job, *_):
        groups.extend(job.optimizer.param_groups)
        return {"val_loss": 1.0, "val_dice": 0.5}

    monkeypatch.setattr(training, "validate", validate)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda self, parameters, limit: limits.add(limit) or torch.ones(()))
    training.fit(new_run("run", "inputs.img_size=32 training.epochs=1 training.betas=[0.8,0.95] training.weight_decay=0.3 training.clip_norm=0.7"), progress=False)
    assert {(group["betas"], group["weight_decay"]) for group in groups} == {((0.8, 0.95), 0.3)} and limits == {0.7}


def test_each_epoch_step_and_micro_batch_is_augmented_in_its_own_way():
    recipe = preset("smoke", "inputs.img_size=32")
    case = slicestore.CaseSlices("a", torch.randn(1, 2, 32, 32), torch.zeros(2, 32, 32, dtype=torch.uint8))
    job = SimpleNamespace(recipe=recipe, task=tasks.task_of(recipe), accelerator=SimpleNamespace(device="cpu"))
    first, again, *others = (epochs._batch(job, [case], [(0, 0), (0, 1)], *number)[0] for number in ((1, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)))
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_batch(new_run, monkeypatch):
    broken = []

    def load_slices(rows, *rest):
        cases = slicestore.load_slices(rows, *rest)
        if not broken:
            broken.append((cases[1].case, int(cases[1].lesions()[0])))
            cases[1].images[:, broken[0][1]] = math.nan
        return cases

    monkeypatch.setattr(tasks, "load_slices", load_slices)
    run = new_run("run")
    with pytest.raises(WMHError, match=r"epoch 1, step \d+: the loss became nan.*failed_batch.safetensors.*lower training.lr"):
        training.fit(run, progress=False)
    with safe_open(run.path / "failed_batch.safetensors", "pt") as file:
        about, images = json.loads(file.metadata()["wmhlib"]), file.get_tensor("images")
    at = about["slices"].index(dict(zip(("case", "slice"), broken[0])))
    assert images[at].isnan().any() and not images[[i for i in range(len(images)) if i != at]].isnan().any()
    assert len(about["slices"]) == len(images) and not list(run.checkpoints.glob("*"))


def test_a_gradient_that_is_not_finite_stops_the_run(new_run, monkeypatch):
    monkeypatch.setattr(epochs, "total_loss", lambda fused, *rest: (torch.sqrt(fused.sum() * 0), {name: torch.ones(()) for name in ("focal", "dice", "boundary", "scales")}))
    with pytest.raises(WMHError, match="the loss became 0, its gradient nan"):
        training.fit(new_run("run"), progress=False)


def test_a_loss_that_climbs_far_above_an_earlier_epochs_stops_the_run(new_run):
    run = new_run("run", "inputs.img_size=32 training.epochs=9 training.warmup_epochs=3 training.lr=300 training.clip_norm=1e9")
    with pytest.raises(WMHError, match=r"the loss (rose to|became)"):
        training.fit(run, progress=False)
    assert (run.path / "failed_batch.safetensors").exists()


def test_a_warm_restart_of_an_overfitted_network_is_no_divergence(new_run, monkeypatch):
    losses = iter([0.6, 0.02, 0.2, 0.4, 0.4])
    monkeypatch.setattr(epochs, "sum_over_processes", lambda accelerator, tensors: tensors[-1].fill_(next(losses)))
    monkeypatch.setattr(training, "validate", lambda *_: {"val_loss": 1.0, "val_dice": 0.5})
    run = new_run("run", "inputs.img_size=32 training.epochs=4 training.train_negatives=0 training.batch_size=512")
    with pytest.raises(WMHError, match="the loss rose to .* from .* in an epoch before"):
        training.fit(run, progress=False)
    assert read_table(run.history_csv).epoch.max() == 3


def test_missing_steps_name_their_notebook(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(MissingStepError, match="01_download"):
        training.fit(run)
    run.open(preset("smoke"))
    with pytest.raises(MissingStepError, match="01_download"):
        training.fit(run)


def test_the_rate_warms_up_then_falls_along_a_cosine_and_starts_again():
    settings = Training()
    assert epochs.learning_rate(0.0, settings) == 0 and epochs.learning_rate(2.5, settings) == pytest.approx(1.5e-4)
    assert epochs.learning_rate(5.0, settings) == pytest.approx(3e-4) == pytest.approx(epochs.learning_rate(30.0, settings))
    assert epochs.learning_rate(17.5, settings) == pytest.approx((3e-4 + 1e-6) / 2)
    assert epochs.learning_rate(math.nextafter(30.0, 0), settings) == pytest.approx(1e-6, rel=1e-3)


def test_the_command_trains_a_run_and_says_on_stderr_why_it_cannot(new_run, capsys, tmp_path):
    run = new_run("run", "inputs.img_size=32 training.epochs=1")
    assert training.main([str(run.path)]) == 0 and run.best.exists() and "epoch" in capsys.readouterr().out
    assert training.main([str(tmp_path / "nowhere")]) == 1
    assert "01_download" in capsys.readouterr().err


def test_early_stopping_counts_validated_epochs():
    settings = Training(validate_epochs=5, patience=3, epochs=100)
    assert not training._finished([{}] * 4, settings) and not training._finished([{}] * 4 + [{"val_dice": 0.5}], settings)
    assert training._finished([{}] * 4 + [{"val_dice": 0.5}] + [{}] * 4 + [{"val_dice": 0.4}], settings)


def test_validation_cases_without_a_lesion_which_could_choose_nothing_are_refused_before_training(new_run):
    run = new_run("run", "inputs.img_size=32 training.epochs=1")
    cohort = read_table(run.cohort_csv)
    for path in cohort["mask"][cohort["case"].isin(read_table(run.split_csv).query("split == 'val'").case)]:
        empty = nibabel.load(path)
        copy = run.path / f"{stable_seed(path)}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(0 * np.asarray(empty.dataobj), empty.affine), copy)
        cohort.loc[cohort["mask"] == path, "mask"] = str(copy)
    write_table(cohort, run.cohort_csv)
    with pytest.raises(InputError, match="no validation case has a lesion"):
        training.fit(run, progress=False)
