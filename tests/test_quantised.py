import copy
import importlib
import pickle
import sys
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wmhlib import hardware
from wmhlib.adapters import adapt
from wmhlib.errors import RecipeError
from wmhlib.medsam import build_encoder
from wmhlib.network import WMHNet
from wmhlib.presets import preset
from wmhlib.quantised import Linear4bit, dequantised, quantise, weight_bytes
from wmhlib.sections import Adapter, Encoder

ENCODER = Encoder(dim=64, depth=2, heads=2, global_blocks=(1,), window=3, grid=4)
ODD = Encoder(dim=40, depth=1, heads=2, global_blocks=(), window=3, grid=4)  # 40 weights a row: no whole blocks of 64
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def encoder(settings=ENCODER):
    return build_encoder(settings, 0).eval()


def adapted(net, dropout=0.0):
    """With LoRA that has left its start."""
    net = adapt(net, Adapter(rank_attention=8, rank_mlp=8, dropout=dropout), 0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def nf4(weight):
    """NF4 with double quantisation written out: blocks of 64 share a scale, 8 bits of blocks of 256 scales less their mean."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale, levels, codes = blocks.abs().amax(1), get_4bit_type("nf4", "cpu"), create_dynamic_map()
    offset = scale.mean()
    groups = F.pad(scale - offset, (0, -len(scale) % 256)).view(-1, 256)
    top = groups.abs().amax(1, keepdim=True)
    nearest = codes[((groups / top)[..., None] - codes).abs().argmin(-1)]
    rounded = (nearest * top).flatten()[: len(scale), None] + offset
    return (levels[((blocks / scale[:, None])[..., None] - levels).abs().argmin(-1)] * rounded).flatten()[: weight.numel()].view(weight.shape)


@pytest.mark.parametrize("settings", [ENCODER, ODD])
def test_matrices_have_the_values_of_nf4_and_the_encoder_computes_with_them(settings):
    dense, small = encoder(settings), quantise(encoder(settings))
    layers = [layer for layer in small.modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 4 * settings.depth and small.is_loaded_in_4bit
    for name, layer in small.named_modules():
        if isinstance(layer, Linear4bit):
            weight = dense.get_submodule(name).weight
            torch.testing.assert_close(layer.dense(torch.float32), nf4(weight.data), atol=1e-6, rtol=1e-3)  # a scale may be rounded the other way
            weight.data = layer.dense(torch.float32)
    assert torch.equal(small(IMAGE), dense(IMAGE)) and torch.equal(dequantised(small)(IMAGE), dense(IMAGE))


def test_a_weight_takes_4_13_bits_and_the_tables_of_its_layer():
    with torch.device("meta"):
        wide = quantise(build_encoder(Encoder(depth=1, global_blocks=(0,)), 0))
    small = quantise(build_encoder(Encoder(dim=768, depth=1, heads=12, global_blocks=(0,), grid=4), 0))
    for net, tables in ((wide, 0), (small, 4 * (256 + 16 + 1) * 4)):
        layers = [layer for layer in net.modules() if isinstance(layer, Linear4bit)]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        packed = weight_bytes(nn.ModuleList(layers)) - sum(layer.bias.nbytes for layer in layers)
        assert 8 * (packed - tables) / weights == pytest.approx(4.127, abs=2e-3) and 8 * packed / weights < 4.17


def test_weight_bytes_counts_shared_tensors_once_and_copies_twice():
    layer = nn.Linear(8, 4)
    assert weight_bytes(nn.ModuleList([layer, layer])) == 4 * (32 + 4)
    assert weight_bytes(nn.ModuleList([layer, copy.deepcopy(layer)])) == 8 * (32 + 4)


def test_the_same_base_gives_the_same_bits_whatever_the_threads():
    wide, states = Encoder(dim=1024, depth=1, heads=2, global_blocks=(0,), grid=2), []  # threads share a sum of more than 32768
    threads, base = torch.get_num_threads(), build_encoder(wide, 0)
    nn.init.normal_(base.blocks[0].mlp.lin1.weight)
    for count in (1, 2):
        torch.set_num_threads(count)
        states.append(quantise(copy.deepcopy(base)).state_dict())
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_training_and_inference_are_the_same_function_in_each_precision(autocast):
    plain, lora, types = quantise(encoder()), adapted(quantise(encoder())), []
    plain.blocks[0].attn.qkv.register_forward_hook(lambda layer, args, out: types.append(out.dtype))
    for small in (plain, lora):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            before = small.train()(IMAGE)
            assert torch.equal(small.eval()(IMAGE), before) and torch.equal(small.train()(IMAGE), before)
            dense = dequantised(small)(IMAGE)
        rounding = 0.02 if autocast and small is lora else 0  # peft adds the adapter's part after rounding it, `adapters.Linear` before
        torch.testing.assert_close(dense, before, atol=rounding, rtol=rounding)
    assert set(types) == {torch.bfloat16 if autocast else torch.float32}


def test_without_autocast_it_computes_in_fp32_and_the_input_decides_what_comes_back():
    layer = quantise(encoder()).blocks[0].mlp.lin1
    x = torch.randn(5, 64)
    expected = F.linear(x, layer.dense(torch.float32), layer.bias)
    assert torch.equal(layer(x), expected) and torch.equal(layer(x.double()), expected.double())
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer(x[0]), layer(x[:1])[0])


def test_only_adapters_train_and_the_loss_falls():
    net, target = adapt(quantise(encoder()), Adapter(rank_attention=8, rank_mlp=8), 0), torch.randn(2, 256, 4, 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 8 and all("lora_" in name for name in trained)
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(8):
        loss = (net.train()(IMAGE) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    after = net.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(trained)


def test_gradients_are_those_of_the_dense_encoder_of_the_same_values():
    small = adapted(quantise(encoder(ODD)))
    found = []
    for net in (small, dequantised(small)):
        net(IMAGE).square().mean().backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-6, rtol=1e-4)


def test_a_saved_adapter_on_the_base_quantised_again_gives_the_same_outputs(tmp_path):
    net = adapted(quantise(encoder()))
    net.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantise(encoder()), tmp_path).eval()
    assert torch.equal(again(IMAGE), net(IMAGE))


def test_adapters_merge_into_the_dequantised_encoder():
    net = adapted(quantise(encoder(ODD)))
    merged = dequantised(net).merge_and_unload()
    assert not any(isinstance(module, (Linear4bit, peft.tuners.lora.LoraLayer)) for module in merged.modules()) and not merged.is_loaded_in_4bit
    torch.testing.assert_close(merged(IMAGE), net(IMAGE), atol=1e-4, rtol=1e-4)


def test_copies_and_pickles_compute_the_same_and_share_nothing():
    net = adapted(quantise(encoder()))
    expected = net(IMAGE)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(IMAGE), expected) and weight_bytes(twin) == weight_bytes(net)
        assert weight_bytes(nn.ModuleList([net, twin])) > 1.9 * weight_bytes(net)


def test_checkpointed_gradients_are_the_same():
    net, found = adapted(quantise(encoder())), []
    for checkpointing in (False, True):
        net.base_model.model.checkpointing = checkpointing
        net.zero_grad()
        net(IMAGE).square().mean().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_network_of_4_bits_keeps_the_hash_of_its_base_and_can_be_cast_merged_and_loaded(precision):
    recipe = preset("smoke", "encoder.bits=4")
    network, image = WMHNet(recipe).eval(), torch.randn(1, 1, 64, 64)
    assert network.base_sha256 == WMHNet(preset("smoke")).base_sha256 and any(isinstance(m, Linear4bit) for m in network.modules())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
        expected = network(image)[0].float()
        other = WMHNet(recipe).eval()
        other.load_trained_state(network.trained_state(), "state")
        assert torch.equal(other.cast_frozen(precision)(image)[0].float(), expected)
        merged = network.for_inference(precision)
        assert not any(isinstance(m, (Linear4bit, peft.tuners.lora.LoraLayer)) for m in merged.modules())
        torch.testing.assert_close(merged(image)[0].float(), expected, atol=1e-4 if precision == "no" else 0.1, rtol=1e-3)


def test_the_estimate_of_a_step_counts_the_bits():
    encoder = Encoder(dim=256, depth=4, heads=2, global_blocks=(1,), window=3, grid=4, random=True)
    recipe = replace(preset("smoke", "inputs.img_size=32"), encoder=encoder)
    dense, small = (hardware.estimate(replace(recipe, encoder=replace(encoder, bits=bits)), 1, False, "no") for bits in (16, 4))
    weights = 4 * 12 * 256**2
    assert dense - small == pytest.approx(weights * (4 - 4.13 / 8), rel=0.25)  # less a matrix that is dense for a moment


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "wmhlib.quantised")
    with pytest.raises(RecipeError, match="pip install bitsandbytes"):
        importlib.import_module("wmhlib.quantised")
