"""Files of networks of volumes give what their networks give."""

import importlib.util

import pytest
import torch
from torch import nn

from wmhlib.errors import InputError, WMHError
from wmhlib.sections import Volume
from wmhlib.volumetric.export import check, export
from wmhlib.volumetric.memory import MemoryAttention
from wmhlib.volumetric.networks import UNet, build
from wmhlib.volumetric.statespace import OverTokens, VisionMamba

SHAPE = (1, 32, 32, 32)


def small(kind):
    """A narrow network with every part of its kind."""
    if kind != "mamba":
        return UNet(1, (8,) * 5, "gelu", squeeze=kind == "squeeze")
    return UNet(1, (8, 8, 8, 8, 16), context={4: nn.Sequential(OverTokens(VisionMamba(16)), MemoryAttention(16))}, borders=True)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("kind", ["squeeze", "mamba"])
def test_a_file_gives_the_logits_of_its_network(kind, suffix, tmp_path):
    network = small(kind)
    path = export(network, tmp_path / f"network{suffix}", SHAPE)
    assert check(network, path, SHAPE) <= 1e-4
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and network.training
    with torch.no_grad():
        network.heads[0].weight += 0.01
        if network.last is not None:
            network.last.weight += 0.01
    with pytest.raises(WMHError, match="differs from its network"):
        check(network, path, SHAPE)


def test_the_attention_network_as_it_is_fits_onnx(tmp_path):
    network = build(Volume(network="attention"), 1)
    assert check(network, export(network, tmp_path / "attention.onnx", SHAPE), SHAPE) <= 1e-4


def test_another_ending_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"ends in \.onnx or \.pt2"):
        export(nn.Identity(), tmp_path / "network.bin", SHAPE)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else real(name, *a))
    with pytest.raises(WMHError, match="needs onnxscript: pip install onnxscript, or export to .pt2"):
        export(nn.Identity(), tmp_path / "network.onnx", SHAPE)
