"""Networks of volumes as files that need none of this library: ONNX, which any runtime reads, or torch.export's .pt2."""

from __future__ import annotations

import copy
import importlib.util
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError, WMHError
from ..files import atomic

MOST = 1e-4  # that a file may differ from its network
_NEEDS = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}


class _Logits(nn.Module):
    """The logits of a network that gives them with others."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(network).eval().float().cpu()

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)[0]


def export(network: nn.Module, path: str | Path, shape: tuple[int, int, int, int]) -> Path:
    """Writes `network` in fp32 to `path`, ".onnx" or ".pt2": `image` 1 x C x X x Y x Z, of the one size `shape` (C, X, Y, Z), to `logits`
    1 x 1 x X x Y x Z. The file holds its weights.

    ONNX is the format to hand to others: it holds data alone. A .pt2 is for one's own use, since torch unpickles parts of it: loading one from
    a stranger can run their code. Raises InputError for another ending, and WMHError where a package is missing.
    """
    path = Path(path)
    check_format(path)
    image, kept = torch.zeros(1, *shape), logging.root.manager.disable
    logging.disable(logging.WARNING)  # that torchvision's operators are not at hand
    try:
        with atomic(path) as temporary, torch.no_grad():
            if path.suffix == ".onnx":
                program = torch.onnx.export(_Logits(network).eval(), (image,), dynamo=True, verbose=False, input_names=["image"], output_names=["logits"])
                program.save(temporary, external_data=False)
            else:
                torch.export.save(torch.export.export(_Logits(network).eval(), (image,)), temporary)
    finally:
        logging.disable(kept)
    return path


def check(network: nn.Module, path: str | Path, shape: tuple[int, int, int, int]) -> float:
    """How far the logits of the file `path` lie from those of `network` in fp32 on normal noise of `shape` at most: absolute up to logits of 1,
    above relative to the largest. WMHError where that is more than 1e-4."""
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = _Logits(network)(image)
        found = _run(Path(path), image)
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not error <= MOST:
        raise WMHError(f"{path} differs from its network by {error:.1e}, more than {MOST:g}: export it again from the weights it is checked against")
    return error


def _run(path: Path, image: Tensor) -> Tensor:
    check_format(path)
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(image)
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def check_format(path: Path) -> None:
    """Raises InputError for a path of neither format, WMHError where its packages are missing."""
    if path.suffix not in _NEEDS:
        raise InputError(f"{path} names no format: expected a file that ends in {' or '.join(_NEEDS)}")
    missing = [name for name in _NEEDS[path.suffix] if importlib.util.find_spec(name) is None]
    if missing:
        raise WMHError(f"{path} needs {', '.join(missing)}: pip install {' '.join(missing)}, or export to .pt2")
