import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_training import assert_same, outcome

from wmhlib import hardware, tasks, training
from wmhlib.adapters import budget
from wmhlib.errors import InputError, RecipeError, WMHError
from wmhlib.files import read_table
from wmhlib.network import build_network, load_network
from wmhlib.presets import preset
from wmhlib.volumetric import model, task
from wmhlib.volumetric.networks import UNet

OVERRIDES = ("volume.network=attention volume.spacing=5 volume.box=[32,48,32] volume.patch=[32,32,32] volume.patches=2 training.batch_size=2 training.accumulation=2 "
             "training.epochs=3 training.restart_epochs=3 training.checkpoint_epochs=1 training.lr=1e-2 loss.tversky=0.15 training.ema=0.9")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Few channels, so that an epoch takes a second."""
    monkeypatch.setattr(model, "build", lambda settings, channels: UNet(channels, (4, 4, 8, 8, 8)))


def test_volumes_train_by_the_same_loop_and_their_weights_load_again(new_run):
    run = new_run("run")
    history = training.fit(run, progress=False)
    assert {"focal", "dice", "boundary", "tversky", "scales", "val_loss", "val_dice"} <= set(history) and history.notna().all(axis=None)
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
    sites = run.cases().query("split == 'val'").site
    assert {name for name in history if name.startswith("val_dice ")} == set(sites.map("val_dice {}".format))
    network, split = load_network(run.best)
    assert split == run.split_text() and all(torch.equal(value, network.state_dict()[name]) for name, value in load_file(run.best).items())


def test_a_run_of_volumes_that_was_interrupted_ends_bit_for_bit_as_one_that_was_not(new_run, monkeypatch):
    two, validate, epochs = f"{OVERRIDES} inputs.modalities=['flair','t1'] inputs.modality_dropout=0.5", training.validate, iter(range(3))
    whole, stopped = new_run("whole", two), new_run("stopped", two)
    training.fit(whole, progress=False)

    def interrupted(*rest):
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return validate(*rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "validate", interrupted)
        training.fit(stopped, progress=False)
    assert len(read_table(stopped.history_csv)) == 2
    training.fit(stopped, progress=False)
    assert_same(outcome(whole), outcome(stopped))


def test_a_loss_that_is_not_finite_names_the_patch(new_run, monkeypatch):
    def load_volumes(*rest):
        cases = original(*rest)
        for case in cases:
            case.images[:] = math.nan
        return cases

    original = task.load_volumes
    monkeypatch.setattr(task, "load_volumes", load_volumes)
    monkeypatch.setattr(task, "draw_patches", lambda cases, *_: [(number, 0, 0, 0) for number in range(len(cases))])
    run = new_run("run")
    with pytest.raises(WMHError, match=r"the loss became nan.*patch \[0, 0, 0\]"):
        training.fit(run, progress=False)
    with safe_open(run.path / "failed_batch.safetensors", "pt") as file:
        assert json.loads(file.metadata()["wmhlib"])["patches"][0]["patch"] == [0, 0, 0]


def test_memory_is_counted_for_patches_and_a_device_too_small_for_one_is_named(monkeypatch):
    small, large = (preset("smoke", f"{OVERRIDES} volume.patch={patch}") for patch in ("[32,32,32]", "[32,48,32]"))
    assert hardware.estimate(large, 1, False, "no") > 1.3 * hardware.estimate(small, 1, False, "no")
    assert hardware.estimate(large, 2, False, "no") > 1.5 * hardware.estimate(large, 1, False, "no")
    assert hardware.estimate(large, 1, True, "no") < hardware.estimate(large, 1, False, "no")
    monkeypatch.setattr(hardware, "estimate", lambda recipe, size, *_: int(3e9 * size))
    monkeypatch.setattr(hardware, "device_memory", lambda device: ("small GPU", int(4e9)))
    recipe, why = hardware.fit(large, torch.device("cuda"))
    assert (recipe.training.batch_size, recipe.training.accumulation) == (1, 4) and "4 patches a step as asked" in why and "BatchNorm" not in why
    monkeypatch.setattr(hardware, "device_memory", lambda device: ("small GPU", int(2e9)))
    with pytest.raises(RecipeError, match="one patch of 32 x 48 x 32 voxels .* smaller volume.patch"):
        hardware.fit(large, torch.device("cuda"))


def test_a_network_of_volumes_has_the_same_weights_for_the_same_seed_and_all_of_it_is_trained():
    one, again, other = (build_network(preset("smoke", f"{OVERRIDES} seed={seed}")) for seed in (1, 1, 2))
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()
    counts = budget(one)
    assert counts["trainable"] == counts["total"] == sum(p.numel() for p in one.parameters()) and counts["share_percent"] == 100


def test_the_validation_loss_is_that_of_patches_drawn_as_for_training_and_dice_that_of_whole_boxes(new_run):
    recipe = new_run("run").recipe()
    labels = torch.zeros(32, 48, 32, dtype=torch.uint8)
    labels[4:12, 4:12, 4:12], labels[20:28, 30:38, 20:28] = 1, 2
    case = task.CaseVolume("a", torch.where(labels > 0, 4.0, -4.0)[None].half(), labels)
    volumes = tasks.task_of(recipe)
    places = volumes.validation_places([case], [case])
    assert places == volumes.validation_places([case, case], [case]) and len(places) == recipe.volume.patches
    loss, overlap, both = volumes.validate(lambda x: (x, [x]), [case], places, range, torch.device("cpu"))
    assert overlap.item() == 8**3 and both.item() == 2 * 8**3 and math.isfinite(loss)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_without_a_lesion_is_named_before_training(new_run, part):
    run = new_run("run")
    cases = tasks.task_of(run.recipe()).load(run.cases().query("split != 'test'"), False)
    sides = {"train": cases[:1], "val": cases[:1]} | {part: [replace(cases[0], labels=0 * cases[0].labels)]}
    with pytest.raises(InputError, match=f"no {part} case has a lesion"):
        tasks.task_of(run.recipe()).validation_places(**sides)
    with pytest.raises(InputError, match=f"no {part} case has a lesion"):
        tasks.task_of(run.recipe()).validation_places(**sides | {part: []})
