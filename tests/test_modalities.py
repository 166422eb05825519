from dataclasses import replace

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from safetensors.torch import save

from wmhlib import hardware
from wmhlib.errors import CheckpointError, InputError, RecipeError
from wmhlib.medsam import build_encoder
from wmhlib.minisam import RANKS
from wmhlib.modalities import ADAPTER, CONFIG, DECODER, Modalities, cross_figure, train
from wmhlib.network import WMHNet
from wmhlib.presets import preset
from wmhlib.quantised import quantise

RECIPE = preset("smoke")
IMAGE = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))


def trained(number, bits=16):
    """A network as training could have left it, BatchNorm statistics included."""
    network, generator = WMHNet(replace(RECIPE, encoder=replace(RECIPE.encoder, bits=bits))).eval(), torch.Generator().manual_seed(number)
    for value in network.live_state().values():
        if value.is_floating_point():
            value.add_(0.02 * torch.rand(value.shape, generator=generator))
    return network


def three_modalities(bits=16):
    found = Modalities(replace(RECIPE, encoder=replace(RECIPE.encoder, bits=bits)))
    for number, name in enumerate(("flair", "t1", "ct")):
        found.add(name, trained(number, bits).trained_state())
    return found


@pytest.fixture
def three():
    return three_modalities()


@torch.no_grad()
def logits(network):
    fused, scales = network(IMAGE)
    return torch.cat([fused.flatten(), *(s.flatten() for s in scales)])


@pytest.mark.parametrize("bits", [16, 4])
def test_each_modality_gives_what_its_own_network_gave(bits):
    three = three_modalities(bits)
    for number, name in enumerate(three.names):
        torch.testing.assert_close(logits(three.use(name)), logits(trained(number, bits)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [16, 4])
def test_switching_back_and_forth_gives_the_same_bits_and_leaves_the_base(bits):
    three = three_modalities(bits)
    base = {name: value.clone() for name, value in three.network.encoder.state_dict().items() if "lora_" not in name}
    first = {name: logits(three.use(name)) for name in three.names}
    for name in ("t1", "flair", "ct", "t1"):
        assert torch.equal(logits(three.use(name)), first[name])
    assert not torch.allclose(first["flair"], first["t1"]) and not torch.allclose(first["t1"], first["ct"])
    state = three.network.encoder.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.items())


@pytest.mark.parametrize("bits", [16, 4])
def test_the_merged_copy_of_a_modality_predicts_the_same(bits):
    three = three_modalities(bits)
    expected = logits(three.use("t1"))
    merged = three.network.for_inference("no")
    three.use("ct")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_saved_folder_gives_the_same_outputs_here_and_in_peft(bits, tmp_path):
    three = three_modalities(bits)
    three.save(tmp_path)
    again = Modalities(three.network.recipe)
    assert again.load(tmp_path) == ["ct", "flair", "t1"] and again.load(tmp_path / "flair") == ["flair"]
    for name in three.names:
        assert {path.name for path in (tmp_path / name).iterdir()} == {CONFIG, ADAPTER, DECODER}
        assert torch.equal(logits(again.use(name)), logits(three.use(name)))
        base = build_encoder(RECIPE.encoder, RECIPE.seed)
        plain = peft.PeftModel.from_pretrained(quantise(base) if bits == 4 else base, tmp_path / name).eval()
        image = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(plain(image), three.network.encoder(image), atol=1e-6, rtol=0)


def test_the_same_modalities_give_the_same_files(three, tmp_path):
    three.save(tmp_path / "a"), three.save(tmp_path / "b")
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 9 and all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_a_modality_can_be_replaced_and_nothing_random_outside_changes(three):
    state = torch.get_rng_state()
    three.add("t1", trained(7).trained_state())
    assert torch.equal(torch.get_rng_state(), state) and three.names == ["flair", "t1", "ct"]
    torch.testing.assert_close(logits(three.use("t1")), logits(trained(7)), atol=1e-6, rtol=0)


def test_an_adapter_of_another_base_is_refused_by_both_names(three, tmp_path):
    three.save(tmp_path)
    other = Modalities(replace(RECIPE, seed=RECIPE.seed + 1))
    with pytest.raises(CheckpointError, match=f"{three.network.base_sha256[:12]}.*{other.network.base_sha256[:12]}"):
        other.load(tmp_path)
    with pytest.raises(CheckpointError, match="at 16 bits, this one is .* at 4 bits"):
        three_modalities(4).load(tmp_path)


def test_files_that_are_damaged_missing_or_of_two_modalities_are_refused(three, tmp_path):
    three.save(tmp_path)
    with pytest.raises(CheckpointError, match="no modality"):
        three.load(tmp_path / "nowhere")
    adapter = tmp_path / "t1" / ADAPTER
    adapter.write_bytes((tmp_path / "ct" / ADAPTER).read_bytes())
    with pytest.raises(CheckpointError, match="not the adapter"):
        three.load(tmp_path / "t1")
    adapter.write_bytes(adapter.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        three.load(tmp_path / "t1")
    (tmp_path / "ct" / DECODER).write_bytes(adapter.read_bytes())
    with pytest.raises(CheckpointError, match="cannot be read"):
        three.load(tmp_path)
    (tmp_path / "ct" / DECODER).write_bytes(save({"a": torch.zeros(1)}, {"wmhlib": '{"recipe": 3}'}))
    with pytest.raises(CheckpointError, match="names no base"):
        three.load(tmp_path / "ct")


def test_a_state_that_does_not_fit_changes_no_modality(three):
    state, before = trained(5).trained_state(), {name: logits(three.use(name)) for name in three.names}
    state.pop("decoder.fuse.0.bias")
    with pytest.raises(CheckpointError, match="missing decoder.fuse.0.bias"):
        three.add("t1", state)
    assert all(torch.equal(logits(three.use(name)), before[name]) for name in three.names)


def test_factors_of_another_method_are_refused_and_each_modality_is_seen_at_its_own_size(three):
    with pytest.raises(RecipeError, match="trained with adapter.method = 'rslora': expected 'lora'"):
        three.add("t1", trained(5).trained_state(), recipe=RECIPE.with_overrides("adapter.method=rslora"))
    three.add("pet", trained(5).trained_state(), recipe=RECIPE.with_overrides("inputs.img_size=32"))
    assert [three.use(name).recipe.inputs.img_size for name in ("pet", "t1")] == [32, 64]


@pytest.mark.parametrize("name", ["default", "a.b", "../t1", "T1", ""])
def test_names_that_no_folder_or_module_can_have_are_refused(three, name):
    with pytest.raises(InputError, match="expected a name"):
        three.add(name, trained(0).trained_state())


def test_an_unknown_modality_and_a_recipe_without_adapters_are_refused(three):
    for name in ("pet", "default"):
        with pytest.raises(InputError, match="known are flair, t1, ct"):
            three.use(name)
    with pytest.raises(RecipeError, match="no adapter to switch"):
        Modalities(preset("smoke", "adapter.method=none"))


def test_a_modality_of_vit_b_has_fewer_than_5_million_parameters():
    with torch.device("meta"):
        wide = WMHNet(preset("colab", RANKS))
    assert 1.5e6 < sum(p.numel() for p in wide.parameters() if p.requires_grad) < 5e6


def test_training_leaves_a_run_and_an_adapter_for_each_name_and_a_table_of_all_on_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hardware, "estimate", lambda *_: 0)  # seconds for each recipe
    overrides = "cohort.synthetic_cases=3 cohort.scale=4 training.slices=8 training.epochs=1 training.restart_epochs=1 inputs.img_size=32"
    base = preset("smoke", "split.protocol=leave-one-site-out split.held_out=Utrecht")  # which synthetic cases of one contrast know nothing of
    table = train(tmp_path, base, ("flair", "ct"), overrides)
    assert list(table.index) == list(table.columns) == ["flair", "ct"] and table.notna().all(axis=None)
    assert "modality ct" in capsys.readouterr().out
    written = pd.read_csv(tmp_path / "cross_table.csv", index_col="adapter")
    np.testing.assert_allclose(written, table, rtol=1e-5)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/best.safetensors")}
    assert len(files) == 2 and train(tmp_path, base, ("flair", "ct"), overrides, progress=False).equals(table)
    assert files == {path: path.stat().st_mtime_ns for path in files}
    again = Modalities(preset("smoke", f"{RANKS} inputs.img_size=32"))
    assert again.load(tmp_path / "adapters") == ["ct", "flair"]


def test_the_figure_shows_every_figure_of_the_table_and_frames_the_best():
    table = pd.DataFrame([[0.8, 0.1], [0.3, np.nan]], index=["flair", "t1"], columns=["flair", "t1"])
    ax = cross_figure(table).axes[0]
    assert [text.get_text() for text in ax.texts] == ["0.80", "0.10", "0.30", "none"] and len(ax.patches) == 2
