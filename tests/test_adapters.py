import peft
import pytest
import torch
from torch import nn

from wmhlib.adapters import Dropout, adapt
from wmhlib.medsam import ImageEncoder
from wmhlib.settings import Adapter, Encoder

ENCODER = Encoder(dim=32, depth=2, heads=2, global_blocks=(1,), window=3, grid=4)


def adapted(dropout=0.0, seed=0):
    """An encoder whose LoRA has left its start, and the same in peft's own layers."""
    torch.manual_seed(seed)
    ours = adapt(ImageEncoder(ENCODER), Adapter(rank_attention=4, rank_mlp=2, dropout=dropout), seed)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return ours


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


def test_layers_compute_what_pefts_own_do_and_the_same_gradients():
    ours, image = adapted(), torch.randn(2, 3, 64, 64)
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
