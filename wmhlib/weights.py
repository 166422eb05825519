"""Files of weights: read so that no code in them can run, checked against the network they are for, written, and told apart by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .errors import CheckpointError
from .sections import SHIPPED
from .workspace import MINISAM

BASE = MINISAM.path / "base.safetensors"  # the small base that comes with the suite


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file by name. No code in it can run; CheckpointError if it cannot be read."""
    path = BASE if str(path) == SHIPPED else Path(path).expanduser()
    try:
        if not path.is_file():
            raise CheckpointError(f"checkpoint {path} does not exist: correct the path, which a run that has begun keeps as encoder.checkpoint in its recipe.json")
        if path.suffix == ".safetensors":
            return load_file(path)
        _refuse_bomb(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises half a dozen types for a damaged or hostile file
        raise CheckpointError(f"checkpoint {path} is damaged or holds more than tensors: {error}") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"checkpoint {path} is not a state dict of tensors")
    return state


def check_state(expected: dict[str, Tensor], state: dict[str, Tensor], trouble: str) -> None:
    """CheckpointError, `trouble` with each key of `state` that is missing, unexpected, misshapen or cannot be weights, unless it fits `expected`."""
    faults = [f"missing {key}" for key in expected if key not in state] + [f"unexpected {key}" for key in state if key not in expected]
    faults += [f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
               for key, value in expected.items() if key in state and state[key].shape != value.shape]
    faults += [f"{key} {fault}" for key in expected if not faults and (fault := no_weights(state[key]))]
    if faults:
        raise CheckpointError(f"{trouble}: {'; '.join(faults)}")


def no_weights(value: Tensor) -> str:
    """Why `value` cannot be weights, "" if it can: it is no plain array of real numbers, or not all of them are finite."""
    if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.device.type != "cpu":
        return f"is no plain array ({value.dtype}, {value.layout}, {value.device})"
    return "" if torch.isfinite(value).all() else "holds numbers that are NaN or infinite"


def _refuse_bomb(path: str | Path) -> None:
    """CheckpointError for a zip file that unpacks to more than it holds: torch compresses nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as content:
            if sum(info.file_size for info in content.infolist()) > Path(path).stat().st_size:
                raise CheckpointError(f"checkpoint {path} unpacks to more than it holds: expected a file that torch wrote")


def tensors_bytes(tensors: dict[str, Tensor], about: dict) -> bytes:
    """A safetensors file of `tensors`, whose metadata keep `about` as JSON."""
    return save(tensors, {"wmhlib": json.dumps(about)})  # one key: safetensors shuffles several


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], object]:
    """The tensors of a safetensors file, and what `tensors_bytes` kept with them ({}: nothing). CheckpointError for a damaged file."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("there is no such file")
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads((file.metadata() or {}).get("wmhlib", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"weights {path} cannot be read: {error}") from None


def weights_sha256(module: nn.Module) -> str:
    """Fingerprint of a module's parameters: what adapters and decoders were trained on."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def half(value: Tensor) -> Tensor:
    """`value` on the CPU, in half precision where it is a matrix or a kernel, as bases and adapters are handed out."""
    return value.detach().cpu().to(torch.float16 if value.is_floating_point() and value.dim() > 1 else value.dtype).contiguous()
