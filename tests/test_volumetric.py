"""The networks of volumes: sizes, shapes, gradients, and their state spaces against a plain recurrence."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from wmhlib import hardware
from wmhlib.errors import InputError
from wmhlib.losses import total_loss
from wmhlib.network import build_network
from wmhlib.presets import preset
from wmhlib.sections import NETWORKS, Loss, Volume
from wmhlib.volumetric import statespace
from wmhlib.volumetric.memory import Attention, MemoryAttention, position_code
from wmhlib.volumetric.networks import build
from wmhlib.volumetric.statespace import OverTokens, VisionMamba
from wmhlib.volumetric.windows import probabilities

each_network = pytest.mark.parametrize("name", NETWORKS)


def network(name, channels=1, seed=0):
    torch.manual_seed(seed)
    return build(Volume(network=name), channels)


@pytest.mark.parametrize("name, parameters", [("attention", 5_654_968), ("squeeze", 7_741_128), ("mamba", 8_676_314)])
def test_networks_have_the_parameters_they_are_said_to_have(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(Volume(network=name), 1).parameters()) == parameters


@each_network
def test_logits_are_float_and_lie_on_four_scales(name):
    with torch.inference_mode():
        logits, scales, *edges = network(name, 2)(torch.randn(1, 2, 48, 32, 64))
    assert logits.shape == (1, 1, 48, 32, 64) and logits.dtype == torch.float32
    assert [tuple(z.shape) for z in scales] == [(1, 1, 48 // n, 32 // n, 64 // n) for n in (1, 2, 4, 8)]
    assert [z.shape for z in edges] == [logits.shape] * (name == "mamba")


@each_network
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_parameter(name, precision):
    net, image = network(name).train(), torch.randn(1, 1, 32, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        logits, scales, *edges = net(image)
    labels = (image > 1).byte()
    total_loss(logits, scales, labels, Loss(tversky=0.15), *edges)[0].backward()
    assert logits.dtype == torch.float32
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()] == []


@each_network
def test_a_seed_gives_one_network(name):
    one, same, other = (network(name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert not torch.equal(one["down.0.0.conv.weight"], other["down.0.0.conv.weight"])


@each_network
def test_checkpointed_gradients_are_the_same(name):
    grads = []
    for on in (False, True):
        net, image = network(name).train(), torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
        net.checkpointing = on
        net(image)[0].mean().backward()
        grads.append(net.down[0][0].conv.weight.grad)
    assert torch.equal(*grads)


@each_network
def test_at_first_nothing_is_a_lesion(name):
    with torch.inference_mode():
        logits, scales, *edges = network(name).eval()(torch.randn(1, 1, 32, 32, 32))
    assert all(z.sigmoid().mean() < 0.1 for z in (logits, *scales, *edges))


@pytest.mark.parametrize("shape", [(40, 32, 32), (16, 32, 32)])
def test_sides_that_do_not_fit_are_named(shape):
    with pytest.raises(InputError, match="multiples of 16, from 32 on"):
        network("attention")(torch.zeros(1, 1, *shape))


def test_an_unknown_network_is_an_error():
    with pytest.raises(InputError, match="names no network"):
        build(Volume(), 1)


def recurrence(mixer, x):
    """A state space one token after the other in float64, from the weights of a mixer: h = exp(dt A) h + dt x B^T, y = h C + D x."""
    heads, width, state = mixer.num_heads, mixer.head_dim, mixer.ssm_state_size
    gate, mixed, dt = F.linear(x, mixer.in_proj.weight).split([heads * width, heads * width + 2 * state, heads], -1)
    kernel = mixer.conv1d.weight[:, 0]
    past = F.pad(mixed, (0, 0, kernel.shape[1] - 1, 0))
    mixed = F.silu(sum(past[:, i : i + mixed.shape[1]] * kernel[:, i] for i in range(kernel.shape[1])) + mixer.conv1d.bias)
    u, b, c = mixed.split([heads * width, state, state], -1)
    dt, a, h, found = F.softplus(dt + mixer.dt_bias), -mixer.A_log.exp(), x.new_zeros(len(x), heads, width, state), []
    for t in range(x.shape[1]):
        token = u[:, t].unflatten(-1, (heads, width))
        h = (dt[:, t] * a).exp()[..., None, None] * h + (dt[:, t, :, None] * token)[..., None] * b[:, t, None, None]
        found.append((h @ c[:, t, None, :, None])[..., 0] + mixer.D[:, None] * token)
    y = torch.stack(found, 1).flatten(2) * F.silu(gate)
    y = y * (y.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon).rsqrt() * mixer.norm.weight
    return F.linear(y, mixer.out_proj.weight)


@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_state_spaces_are_the_plain_recurrence_from_both_ends(tokens):
    block = VisionMamba(32)
    x = torch.randn(2, tokens, 32)
    x64, found = x.double(), block(x)
    block = block.double()
    y = block.norm(x64)
    expected = x64 + recurrence(block.first, y) + recurrence(block.last, y.flip(1)).flip(1)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert (expected - x64).abs().max() > 0.01


def test_gradients_of_state_spaces_are_those_of_the_recurrence():
    block, x = VisionMamba(32), torch.randn(1, 80, 32)
    block(x).square().sum().backward()
    found = {name: p.grad.double() for name, p in block.named_parameters()}
    block = block.double()
    block.zero_grad()
    y = block.norm(x.double())
    (x.double() + recurrence(block.first, y) + recurrence(block.last, y.flip(1)).flip(1)).square().sum().backward()
    for name, p in block.named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-4 * float(p.grad.abs().max())), name


def test_kernels_of_cuda_are_not_asked_for_tensors_elsewhere():
    plain = torch.neg

    @functools.wraps(plain)
    def kernel(x):
        raise RuntimeError("expected a CUDA tensor")

    kernel.__wrapped__ = plain
    assert statespace._by_device(kernel)(torch.ones(1)) == -1
    with pytest.raises(RuntimeError, match="CUDA"):
        statespace._by_device(kernel)(SimpleNamespace(is_cuda=True))


def test_every_token_reaches_every_other_through_a_state_space():
    x = torch.randn(1, 16, 4, 4, 4, requires_grad=True)
    OverTokens(VisionMamba(16))(x)[0, :, 2, 1, 1].sum().backward()
    assert x.grad[0].abs().sum(0).min() > 0


def test_what_a_slab_knows_reaches_every_slab_above_it_and_none_below():
    block, x = MemoryAttention(32), torch.randn(1, 32, 2, 2, 6, requires_grad=True)
    out = block(x)
    seen = [torch.autograd.grad(out[..., z].sum(), x, retain_graph=True)[0].abs().sum((0, 1, 2, 3)) > 0 for z in range(6)]
    assert [row.tolist() for row in seen[:2]] == [[True] + [False] * 5, [True] * 2 + [False] * 4]
    assert all(row[: z + 1].all() and not row[z + 1 :].any() for z, row in enumerate(seen))  # memories of memories


def test_memories_of_memories_do_not_grow_with_the_slabs():
    torch.manual_seed(0)
    block, sizes = MemoryAttention(32), []
    with torch.no_grad():
        for p in (*block.below.parameters(), *block.remember.parameters()):
            p *= 2  # as training may
    for slabs in (4, 24):
        x = torch.randn(1, 32, 2, 2, slabs, requires_grad=True)
        out = block(x)
        out[..., -1].sum().backward()
        sizes.append((out[..., -1].norm().item(), x.grad.norm().item()))
    assert all(many < 20 * few for few, many in zip(*sizes))  # without a norm: more than 600 times the gradient


def test_memories_know_how_far_below_they_are():
    block, x = MemoryAttention(32), torch.randn(1, 32, 2, 2, 3)
    x[..., 1] = x[..., 0]
    before = block(x)
    with torch.no_grad():
        block.distance[0] += 3
    assert torch.equal(block(x)[..., 0], before[..., 0]) and not torch.allclose(block(x)[..., 2], before[..., 2])


def test_attention_equals_torchs():
    ours, theirs, x = Attention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 9, 32)
    theirs.in_proj_weight.data = torch.cat([part.weight for part in (ours.queries, ours.keys, ours.values)])
    theirs.in_proj_bias.data = torch.cat([part.bias for part in (ours.queries, ours.keys, ours.values)])
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    assert torch.allclose(ours(x, x, x), theirs(x, x, x)[0], atol=1e-6)


def test_each_place_has_a_code_of_its_own():
    code = position_code(14, 12, 64)
    assert code.shape == (168, 64) and len(torch.unique(code, dim=0)) == 168


@each_network
def test_a_whole_volume_of_atlas_is_predicted_within_8_gb(name):
    recipe, window, whole = preset("stroke", f"volume.network={name}"), hardware.Held(), hardware.Held()
    assert math.prod(recipe.volume.box) >= 192 * 224 * 176
    with torch.device("meta"):
        network = build_network(recipe)
    with torch.inference_mode():
        with FakeTensorMode(allow_non_fake_inputs=True):
            network = network.to_empty(device="cpu").eval()
            images = torch.empty(recipe.training.batch_size, 1, *recipe.volume.patch)
            for tensor in (*network.parameters(), *network.buffers(), images):
                window.add(tensor)
            with window:
                network(images)
        with whole:
            probabilities(lambda windows: windows, torch.zeros(1, *recipe.volume.box), recipe.volume, recipe.training.batch_size)
    assert 1e9 < hardware._PROCESS + hardware._MALLOC * (window.peak + whole.peak) < 8e9
