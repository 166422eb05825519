import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from small import ENCODER
from torch import nn

from wmhlib import training
from wmhlib.adapters import Dropout, adapt, budget
from wmhlib.errors import RecipeError
from wmhlib.medsam import ImageEncoder, build_encoder
from wmhlib.network import WMHNet, load_network
from wmhlib.presets import preset
from wmhlib.sections import FOUR_BITS, METHODS, Adapter
from wmhlib.settings import Recipe
from wmhlib.spectral import decompose
from wmhlib.storage import load_checkpoint
from wmhlib.trained import weights_bytes

OVERRIDES = "inputs.img_size=32 training.epochs=2 training.restart_epochs=2 training.ema=0.9 training.accumulation=2 training.batch_size=8"
IMAGE = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(2, 256, 4, 4, generator=torch.Generator().manual_seed(2))
README = Path(__file__).parent.parent / "README.md"


def adapted(dropout=0.0, seed=0, method="lora"):
    """An encoder whose LoRA has left its start, and the same in peft's own layers."""
    torch.manual_seed(seed)
    ours = adapt(ImageEncoder(ENCODER), Adapter(method=method, rank_attention=4, rank_mlp=2, dropout=dropout), seed)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return ours


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "salt", "ssam"])
def test_without_a_rank_for_them_the_mlps_stay_as_they_are(method):
    names = [name for name, p in adapt(build_encoder(ENCODER, 0), Adapter(method=method, rank_mlp=0), 0).named_parameters() if p.requires_grad]
    assert any(".attn." in name for name in names) and not any(".mlp." in name for name in names)


@pytest.mark.parametrize("p", [0.05, 0.5, 1e-6])
def test_dropout_keeps_each_element_with_its_probability_and_the_mean(p):
    kept = Dropout(p)(torch.ones(999, 1001))
    assert (kept > 0).float().mean().item() == pytest.approx(1 - p, abs=2e-3) and kept.mean().item() == pytest.approx(1, abs=5e-3)
    assert kept.unique().tolist()[-1] == pytest.approx(1 / (1 - p), rel=1e-4) and len(kept.unique()) <= 2
    rows, columns = (((kept > 0).float().mean(d) - (1 - p)).std().item() for d in (0, 1))
    assert max(rows, columns) < 1.15 * (p * (1 - p) / 999) ** 0.5 + 1e-3  # as if drawn one by one


def test_dropout_follows_the_global_generator_and_its_gradient_is_what_was_kept():
    x = torch.ones(7, 3, requires_grad=True)
    torch.manual_seed(3)
    first = Dropout(0.4)(x)
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.4)(x), first) and not torch.equal(Dropout(0.4)(x), first)
    first.sum().backward()
    assert torch.equal(x.grad, first)
    assert Dropout(0.4).eval()(x) is x


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa"])
def test_layers_compute_what_pefts_own_do_and_the_same_gradients(method):
    ours, image = adapted(method=method), torch.randn(2, 3, 64, 64)
    found = []
    for plain in (False, True):
        for module in ours.modules():
            if plain and isinstance(module, peft.tuners.lora.Linear):
                module.__class__ = peft.tuners.lora.Linear
        ours.zero_grad()
        output = ours(image)
        output.square().mean().backward()
        found.append([output.detach()] + [p.grad for p in ours.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_peft_merges_disables_saves_and_loads_the_adapter(tmp_path):
    ours, image = adapted(dropout=0.1).eval(), torch.randn(1, 3, 64, 64)
    expected = ours(image)
    ours.save_pretrained(tmp_path)
    with ours.disable_adapter():
        assert not torch.allclose(ours(image), expected)
    torch.testing.assert_close(adapted(dropout=0.1).eval().merge_and_unload()(image), expected, atol=1e-4, rtol=1e-4)
    base = adapted(dropout=0.1).unload()
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path).eval()(image), expected, atol=0, rtol=0)
    ours.add_adapter("second", ours.peft_config["default"])
    ours.set_adapter("second")
    assert not torch.allclose(ours(image), expected)


def test_without_an_adapter_the_encoder_is_only_frozen():
    encoder = nn.Sequential(nn.Linear(2, 2))
    assert adapt(encoder, Adapter(method="none"), 0) is encoder and not encoder[0].weight.requires_grad


def network(method, overrides="", bits=16):
    return WMHNet(preset("smoke", f"adapter.method={method} adapter.top=6 adapter.dropout=0.1 encoder.bits={bits} {overrides}"))


def moved(network, size=0.02):
    """`network`, the trained parameters of its encoder away from their start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def logits(network):
    with torch.no_grad():
        return network(IMAGE)[0]


def features(network, precision="no"):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return network.features(IMAGE).float()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_as_the_base(method):
    found, expected = (logits(network(m).eval()) for m in (method, "none"))
    torch.testing.assert_close(found, expected, atol=1e-5 if method == "pissa" else 0, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_saved_weights_give_the_same_bits_again_and_hold_nothing_of_a_frozen_base(method, tmp_path):
    ours = moved(network(method))
    path = tmp_path / "best.safetensors"
    path.write_bytes(weights_bytes(ours, {"recipe": ours.recipe.to_json(), "base_sha256": ours.base_sha256}))
    again, _ = load_network(path)
    assert torch.equal(logits(again), logits(ours)) and again.fingerprint() == ours.fingerprint()
    assert (method == "none") == torch.equal(logits(ours), logits(network("none").eval()))
    kept = sum(value.numel() for name, value in ours.trained_state().items() if name.startswith("encoder.") and not name.endswith(".basis"))
    assert kept == budget(ours)["adapter"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_merged_into_the_plain_encoder_every_method_computes_the_same(method, precision):
    ours = moved(network(method))
    merged = ours.for_inference(precision)
    assert {name: p.shape for name, p in merged.encoder.named_parameters()} == {name: p.shape for name, p in build_encoder(ours.recipe.encoder, 0).named_parameters()}
    expected, error = features(ours), 1e-5 if precision == "no" else 0.05
    for same in (merged, ours.cast_frozen(precision)):
        torch.testing.assert_close(features(same, precision), expected, atol=error, rtol=1e-5)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "none"])
def test_a_few_steps_in_bf16_with_checkpointed_gradients_lower_the_loss_and_leave_the_rest_alone(method):
    encoder = network(method, "training.gradient_checkpointing=true").cast_frozen("bf16").train().encoder
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    optimizer, losses = torch.optim.AdamW(trained.values(), 0.01), []
    for _ in range(14):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (encoder(IMAGE.expand(2, 3, 64, 64)).float() - TARGET).square().mean()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.995 * losses[0]
    assert {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])} == set(trained)


def test_the_trained_parameters_of_every_method_on_vit_b():
    d, r, mlp, sides = 768, 64, 32, {"qkv": 4, "proj": 2, "lin1": 5, "lin2": 5}  # in + out of each layer, in d
    lora = 12 * d * (r * (sides["qkv"] + sides["proj"]) + mlp * (sides["lin1"] + sides["lin2"]))
    spectral = {k: 48 * 2 * k + 24 * 2 * (d - k) * (r + mlp) for k in (76, 768)}
    expected = {"lora": lora, "rslora": lora, "pissa": lora, "dora": lora + 12 * 9 * d, "adalora": lora + 12 * 2 * (r + mlp), "salt": spectral[76],
                "ssam": 48 * 2 * d, "bias": 12 * 13 * d + d + 4 * 256, "none": 0, "full": 89_670_912}
    assert lora == 6_488_064 and set(expected) == set(METHODS)

    def counts(overrides):
        with torch.device("meta"):
            return budget(WMHNet(preset("colab", overrides)))

    for method, adapter in expected.items():
        found = counts(f"adapter.method={method}")
        rest = found["decoder"] + found["channel_adapter"] + found["skip"]
        assert (found["encoder"], found["adapter"]) == (89_670_912, adapter) and found["trainable"] == adapter + rest, method
        assert found["total"] == 89_670_912 + rest + (adapter if method not in ("bias", "full") else 0)
        assert method == "lora" or f"{adapter:,}" in README.read_text()
    eight = "adapter.method=salt adapter.rank_attention=8 adapter.rank_mlp=8"
    assert counts(eight)["adapter"] == 538_752
    assert counts(f"{eight} adapter.neck=true")["adapter"] == 538_752 + 2 * (2 * 76 + 2 * (256 - 76) * 8)


def test_dora_pissa_and_rslora_are_what_their_papers_say():
    base = build_encoder(ENCODER, 0)
    for method in ("dora", "pissa", "rslora"):
        layer = adapt(copy.deepcopy(base), Adapter(method=method, rank_attention=4, rank_mlp=2, dropout=0.3), 0).eval().base_model.model.blocks[0].mlp.lin1
        plain, x = base.blocks[0].mlp.lin1, torch.randn(5, 32)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if method == "pissa":
            u, s, vt = torch.linalg.svd(plain.weight, full_matrices=False)
            torch.testing.assert_close(b @ a, u[:, :2] * s[:2] @ vt[:2], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(layer.base_layer.weight + b @ a, plain.weight, atol=1e-6, rtol=0)
            assert isinstance(layer.lora_dropout["default"], nn.Identity)
            continue
        with torch.no_grad():
            b.normal_()
        weight = plain.weight + b @ a * (2**0.5 if method == "rslora" else 1)
        if method == "dora":
            length = layer.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(length, plain.weight.norm(dim=1))
            with torch.no_grad():
                length.mul_(1.5)
            weight = weight / weight.norm(dim=1, keepdim=True) * length[:, None]
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, plain.bias), atol=1e-5, rtol=1e-5)


def test_what_pissa_leaves_of_the_base_does_not_depend_on_the_signs_of_the_vectors(monkeypatch):
    expected = network("pissa").state_dict()
    monkeypatch.setattr("wmhlib.spectral.decompose", lambda matrix: (lambda u, s, vt: (-u, s, -vt))(*decompose(matrix)))
    found = network("pissa").state_dict()
    for name in expected:
        if "base_layer" in name:
            assert torch.equal(found[name], expected[name])
        elif "lora_" in name:
            assert torch.equal(found[name], -expected[name])


@pytest.mark.parametrize("method", FOUR_BITS)
def test_methods_that_need_no_dense_matrix_train_on_4_bits_and_merge(method):
    ours = moved(network(method, "training.gradient_checkpointing=true", bits=4))
    torch.testing.assert_close(logits(ours.for_inference("no")), logits(ours), atol=1e-5, rtol=1e-5)
    ours.train()(IMAGE)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in ours.encoder.named_parameters() if p.requires_grad)


def test_biases_on_4_bits_have_the_gradients_of_the_dense_encoder_of_the_same_values():
    from wmhlib.quantised import dequantised

    small = network("bias", bits=4).encoder
    dense = dequantised(small)
    for net in (small, dense):
        net(IMAGE.expand(2, 3, 64, 64)).square().mean().backward()
    expected = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in small.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and "blocks.0.attn.qkv.bias" in found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("overrides, message", [
    *((f"encoder.bits=4 adapter.method={method}", "one of lora, rslora, adalora, bias, none with encoder.bits=4") for method in METHODS if method not in FOUR_BITS),
    ("adapter.method=lokr", "one of lora, rslora, dora"), ("adapter.neck=true", "adapter.neck"), ("adapter.top=0", "adapter.top"),
    ("adapter.method=pissa adapter.rank_attention=64", "at most encoder.dim = 32")])
def test_an_adapter_that_cannot_be_is_named(overrides, message):
    with pytest.raises(RecipeError, match=message):
        preset("smoke", overrides)


def test_recipes_from_before_there_were_more_methods_still_load():
    text = json.loads(preset("flair").to_json())
    for new in ("top", "neck"):
        del text["adapter"][new]
    assert Recipe.from_json(json.dumps(text)) == preset("flair")


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("lora", "none")])
def test_every_method_goes_through_training(new_run, method, monkeypatch):
    monkeypatch.setattr(training.hardware, "estimate", lambda *_: 0)  # a second
    run = new_run(method, f"{OVERRIDES} training.epochs=1 adapter.method={method} adapter.top=6 training.precision=bf16")
    history = training.fit(run, progress=False)
    assert history.train_loss.notna().all() and ("orthogonality" in history) == (method == "adalora")
    assert load_network(run.best)[0].recipe.adapter.method == method


def test_an_interrupted_adalora_ends_bit_for_bit_as_a_whole_one(new_run, monkeypatch):
    monkeypatch.setattr(training.hardware, "estimate", lambda *_: 0)
    overrides = f"{OVERRIDES} adapter.method=adalora training.checkpoint_epochs=1"
    whole, stopped = new_run("whole", overrides), new_run("stopped", overrides)
    training.fit(whole, progress=False)
    write = training.Keeper.checkpoint

    def stop(self, epoch, state):
        write(self, epoch, state)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Keeper, "checkpoint", stop)
        training.fit(stopped, progress=False)
    training.fit(stopped, progress=False)
    one, other = (load_checkpoint(run.checkpoints / "epoch_0002.pt") for run in (whole, stopped))
    assert all(torch.equal(other["network"][name], value) for name, value in one["network"].items())
    assert all(torch.equal(a, b) for name in one["ranks"] for a, b in zip(one["ranks"][name], other["ranks"][name], strict=True))
    values = torch.cat([value for name, value in one["network"].items() if "lora_E" in name])
    assert int((values != 0).sum()) == 2 * len(values) // 3 and whole.best.read_bytes() == stopped.best.read_bytes()
