"""What the networks of slices and of volumes have in common: their trained state, as files keep it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor, nn

from .errors import CheckpointError
from .spectral import check_bases
from .weights import check_state, read_tensors, tensors_bytes


class TrainedNet(nn.Module):
    """A network of a `recipe`; `base_sha256` is that of its frozen base, "" where all of it is trained."""

    def live_state(self) -> dict[str, Tensor]:
        """What training changes, where it lies: the trained parameters, and the buffers of the trained modules (BatchNorm statistics; of
        a spectral adapter the fingerprint of its basis)."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad} | {name for name, _ in self.named_buffers()}
        return {name: value for name, value in self.state_dict().items() if name in trained}

    def trained_state(self) -> dict[str, Tensor]:
        """`live_state` on the CPU, as files keep it."""
        return {name: value.cpu().contiguous() for name, value in self.live_state().items()}

    def fingerprint(self) -> str:
        """What tells this network from any other: the sha256 of its base and its trained state."""
        return hashlib.sha256(weights_bytes(self, {"base_sha256": self.base_sha256})).hexdigest()

    def load_trained_state(self, state: dict[str, Tensor], source: str | Path) -> None:
        """Load what `trained_state` gave; CheckpointError lists each key that does not fit, or names the layer whose singular vectors
        are others than those it was trained in."""
        check_state(self.trained_state(), state, f"{source} does not fit the network of its recipe")
        check_bases(self, state, source)
        self.load_state_dict(state, strict=False)


def weights_bytes(network: TrainedNet, origin: dict[str, str]) -> bytes:
    """The trained state as `tensors_bytes`; `origin`: the `recipe` (JSON), the `base_sha256` of the frozen weights and the `split` it was
    trained on (`RunFolder.split_text`)."""
    return tensors_bytes(network.trained_state(), origin)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The trained state that `weights_bytes` wrote to `path`, and its `origin`. CheckpointError for another or a damaged file."""
    state, origin = read_tensors(path)
    if not isinstance(origin, dict) or not all(isinstance(origin.get(key), str) for key in ("recipe", "base_sha256")):
        raise CheckpointError(f"weights {path} name no recipe and base: expected a file that training wrote")
    return state, origin
