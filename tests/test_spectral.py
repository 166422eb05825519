import copy
from dataclasses import replace

import peft
import pytest
import scipy.linalg
import torch
from small import ENCODER
from torch import nn
from torch.nn import functional as F

from wmhlib import hardware
from wmhlib.adapters import adapt
from wmhlib.errors import CheckpointError
from wmhlib.medsam import build_encoder
from wmhlib.network import WMHNet
from wmhlib.presets import preset
from wmhlib.processes import Average
from wmhlib.sections import Adapter
from wmhlib.spectral import Spectral, decompose, fingerprint, to_lora

SALT, SSAM = Adapter(method="salt", top=6, rank_attention=3, rank_mlp=2, neck=True), Adapter(method="ssam", neck=True)
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def moved(module, size=0.1):
    """`module`, its trained parameters away from their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return module


def adapted(adapter):
    return moved(adapt(build_encoder(ENCODER, 0), adapter, 0))


def layer(top, rank, into=7, out=12):
    return Spectral(nn.Linear(into, out).requires_grad_(False), top, rank)


def from_the_equation(spectral, matrix):
    """W' as the papers write it, from an SVD of its own and with a gradient."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    sign = torch.stack([column[column.abs().argmax()].sign() for column in u.T])
    u, vt, k = u * sign, vt * sign[:, None], len(spectral.scale)
    middle = torch.diag(torch.cat([((1 + spectral.scale) * s[:k] + spectral.shift).clamp(min=0), s[k:]]))
    if spectral.x is not None:
        middle = middle + F.pad(spectral.x @ spectral.y, (k, 0, k, 0))
    return u @ middle @ vt


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_the_factors_of_a_matrix_do_not_depend_on_the_signs_or_the_method_of_its_svd(shape, monkeypatch):
    matrix = torch.randn(shape)
    u, s, vt = decompose(matrix)
    torch.testing.assert_close(u * s @ vt, matrix.double(), atol=1e-12, rtol=0)
    assert all(column[column.abs().argmax()] > 0 for column in u.T) and (s[:-1] >= s[1:]).all()

    def other(given, full_matrices):
        a, b, c = (torch.from_numpy(part) for part in scipy.linalg.svd(given.numpy(), full_matrices, lapack_driver="gesvd"))
        flips = torch.tensor([-1.0, 1.0]).repeat(len(b))[: len(b)].double()
        return a * flips, b, c * flips[:, None]

    monkeypatch.setattr(torch.linalg, "svd", other)
    for found, expected in zip(decompose(matrix), (u, s, vt)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_factors_have_the_same_bits_whatever_the_threads():
    matrix, threads, found = torch.randn(150, 120), torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(decompose(matrix))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("adapter", [SALT, SSAM])
def test_the_encoder_computes_the_same_bits_until_it_is_trained(adapter):
    plain = build_encoder(ENCODER, 0)
    assert torch.equal(adapt(copy.deepcopy(plain), adapter, 0)(IMAGE), plain(IMAGE))


@pytest.mark.parametrize("top, rank", [(3, 2), (7, 0), (99, 5)])  # SALT, S-SAM, more than there is
@pytest.mark.parametrize("tokens", [1, 400])
@pytest.mark.parametrize("out", [5, 12, 30])
def test_outputs_and_gradients_are_those_of_the_equation(top, rank, tokens, out):
    ours, x = moved(layer(top, rank, 7, out)), torch.randn(tokens, 7, requires_grad=True)
    target, inputs = torch.randn(tokens, out), [x, *(p for p in ours.parameters() if p.requires_grad)]
    assert len(inputs) == (5 if rank == 2 else 3)  # of a lesser rank than top there is no X
    expected = F.linear(x, from_the_equation(ours, ours.weight), ours.bias)
    found = ours(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(*(torch.autograd.grad((output * target).sum(), inputs) for output in (found, expected))):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_convolution_is_adapted_as_the_matrix_of_its_kernels():
    plain = nn.Conv2d(5, 6, 3, padding=1, stride=2).requires_grad_(False)
    ours, x = moved(Spectral(plain, 3, 2)), torch.randn(2, 5, 8, 8, requires_grad=True)
    expected = F.conv2d(x, from_the_equation(ours, plain.weight.flatten(1)).view(6, 5, 3, 3), plain.bias, stride=2, padding=1)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.merged()(x), expected, atol=1e-5, rtol=1e-5)
    inputs = [x, *(p for p in ours.parameters() if p.requires_grad)]
    for one, other in zip(*(torch.autograd.grad(output.square().sum(), inputs) for output in (ours(x), expected))):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("top", [3, 7])
def test_no_singular_value_of_the_diagonal_is_negative_and_the_rest_is_not_clipped(top):
    ours = moved(layer(top, 2))
    with torch.no_grad():
        ours.shift.fill_(-50.0)
    middle = ours.u.T @ ours.changed(torch.float32).detach() @ ours.vt.T
    torch.testing.assert_close(middle[:top], torch.zeros(top, 7), atol=1e-5, rtol=0)
    if top == 3:
        torch.testing.assert_close(middle[3:, 3:], torch.diag(ours.s[3:]) + ours.x.detach() @ ours.y.detach(), atol=1e-5, rtol=0)
        assert (middle[3:, 3:] < 0).any()


@pytest.mark.parametrize("change", ["optimizer", "load_state_dict", "move"])
def test_the_matrix_is_built_once_a_step_and_anew_when_a_parameter_changes(change, monkeypatch):
    ours, built = layer(3, 2), []
    changed = Spectral.changed
    monkeypatch.setattr(Spectral, "changed", lambda self, dtype: built.append(1) or changed(self, dtype))
    optimizer, x = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.1), torch.randn(4, 7)
    other = moved(copy.deepcopy(ours)).state_dict()
    for number in (1, 2):
        for _ in range(3):
            ours(x).square().sum().backward()
        with torch.no_grad():
            ours(x)
        assert len(built) == number
        if change == "optimizer":
            optimizer.step()
        elif change == "load_state_dict":
            ours.load_state_dict(other)
        else:
            ours.double()
            x = x.double()
    expected = F.linear(x, from_the_equation(ours, ours.weight), ours.bias)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_averaged_weights_are_computed_with_while_they_are_swapped_in():
    ours, x = layer(3, 2), torch.randn(4, 7)
    before, average = ours(x).detach(), Average(ours.state_dict(), 0.9)
    after = moved(ours)(x).detach()
    with average.swapped_in():
        assert torch.equal(ours(x), before)
    assert torch.equal(ours(x), after) and not torch.allclose(before, after)


def test_a_matrix_built_in_validation_serves_training():
    ours, x = moved(layer(3, 2)), torch.randn(4, 7)
    with torch.inference_mode():
        validated = ours(x).clone()
    output = ours(x)
    output.sum().backward()
    assert torch.equal(output.detach(), validated) and ours.y.grad.abs().sum() > 0


def test_a_copy_changes_alone():
    ours, x = moved(layer(3, 2)), torch.randn(4, 7)
    before, twin = ours(x).detach(), copy.deepcopy(ours)
    with torch.no_grad():
        twin.shift.add_(1)
        assert not torch.allclose(twin(x), before)
    assert torch.equal(ours(x), before)
    torch.testing.assert_close(twin(x), F.linear(x, from_the_equation(twin, twin.weight), twin.bias), atol=1e-5, rtol=1e-5)


def test_under_autocast_the_layer_is_a_linear_layer_of_bf16_and_small_changes_are_not_rounded_away():
    ours, x = layer(3, 2, 64, 96), torch.randn(256, 64)
    with torch.no_grad():
        ours.scale.fill_(1e-3)  # less than half a step between numbers of bf16
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), F.linear(x, from_the_equation(ours, ours.weight), ours.bias), atol=0.02, rtol=0.02)
    change = (ours.dense(torch.bfloat16).float() - ours.weight.bfloat16().float()) @ ours.vt[:3].T
    expected = 1e-3 * ours.u[:, :3] * ours.s[:3]
    assert (change * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.3)
    found.float().sum().backward()
    assert ours.shift.grad.dtype == torch.float32 and ours.shift.grad.abs().sum() > 0


def test_gradients_checkpointed_are_the_same():
    net, found = adapted(SALT), []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(IMAGE).square().mean().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert len(found[0]) == 4 * (8 + 2) and all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("adapter", [SALT, SSAM])
def test_peft_loads_the_exported_lora_onto_the_base_and_computes_the_same(adapter, tmp_path):
    net = adapted(adapter)
    config, state = to_lora(net)
    lora = peft.get_peft_model(build_encoder(ENCODER, 0), config)
    found = peft.set_peft_model_state_dict(lora, state)
    assert not found.unexpected_keys and not [key for key in found.missing_keys if "lora_" in key]
    torch.testing.assert_close(lora(IMAGE), net(IMAGE), atol=1e-5, rtol=1e-4)
    lora.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build_encoder(ENCODER, 0), tmp_path)
    assert torch.equal(again(IMAGE), lora(IMAGE))
    if adapter is SALT:
        assert config.rank_pattern["blocks.0.attn.qkv"] == 6 + 3 and config.rank_pattern["blocks.1.mlp.lin2"] == 6 + 2 and len(config.rank_pattern) == 10


def test_weights_trained_in_other_singular_vectors_are_refused():
    recipe = replace(preset("smoke"), adapter=Adapter(method="salt", top=6, rank_attention=3, rank_mlp=2))
    network = WMHNet(recipe)
    state, fresh = network.trained_state(), WMHNet(recipe)
    fresh.load_trained_state(state, "file")
    spectral = network.encoder.blocks[1].mlp.lin1
    vectors = spectral.u.clone()
    vectors[:, 20] *= -1
    name = "encoder.blocks.1.mlp.lin1.basis"
    with pytest.raises(CheckpointError, match="file was trained in other singular vectors of encoder.blocks.1.mlp.lin1"):
        fresh.load_trained_state(state | {name: fingerprint(vectors)}, "file")
    fresh.load_trained_state(state | {name: fingerprint(spectral.u)}, "file")  # of vectors rounded to float32


def test_the_memory_of_a_step_counts_the_factors_and_the_built_matrices():
    recipe = replace(preset("smoke", "inputs.img_size=32"), encoder=replace(preset("smoke").encoder, dim=256, depth=4))
    none, salt = (hardware.estimate(replace(recipe, adapter=Adapter(method=method, rank_attention=8, rank_mlp=8)), 1, False, "no") for method in ("none", "salt"))
    weights = 4 * 12 * 256**2
    factors = 4 * 256**2 * (3 + 1 + 1 + 1 + 4 + 1 + 4 + 1)  # U and V of qkv, proj, lin1 and lin2
    assert salt - none == pytest.approx(4 * (weights + factors), rel=0.15)
