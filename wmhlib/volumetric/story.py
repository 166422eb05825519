"""What the card and the methods of a report say of a network of volumes (`methods` says the same of one of slices)."""

from __future__ import annotations

from ..settings import Recipe

NETWORKS = {
    "attention": "a 3-D U-Net of five scales with attention gates (Oktay et al. 2018)",
    "squeeze": "a 3-D U-Net of five scales with attention gates (Oktay et al. 2018), squeeze-and-excitation (Hu et al. 2018) and GELU",
    "mamba": "a 3-D U-Net of five scales with attention gates (Oktay et al. 2018), selective state spaces (Gu and Dao 2023; Zhu et al. 2024) and memory "
             "attention (Ravi et al. 2024) at the coarse ones, and a head for lesions' borders that opens the last one to them",
}


def card(recipe: Recipe) -> dict[str, str]:
    """Lines of `methods.Story.card`."""
    volume = recipe.volume
    scans = " and ".join({"flair": "FLAIR", "t1": "T1w"}[name] for name in recipe.inputs.modalities)
    return {"inputs": f"{scans} volumes of {_voxels(volume.box)} of {volume.spacing:g} mm, in patches of {_voxels(volume.patch)}",
            "network": f"{NETWORKS[volume.network]}, from random weights of seed {recipe.seed}"}


def inputs(recipe: Recipe) -> str:
    """What the network sees, as sentences."""
    return (f"whole volumes on cubic voxels of {recipe.volume.spacing:g} mm, in a box of {_voxels(recipe.volume.box)} around the head. Intensities were centred "
            "and scaled by the shortest interval that holds half of the voxels deeper than scalp and skull (Rousseeuw and Leroy 1987)")


def network(recipe: Recipe, counts: dict) -> str:
    """The network, as a sentence without its full stop."""
    return f"The network was {NETWORKS[recipe.volume.network]}; its {counts['total']:,} parameters were trained from random weights"


def draws(recipe: Recipe) -> tuple[str, str]:
    """What a batch counts, and what an epoch trains on."""
    volume = recipe.volume
    return f"patches of {_voxels(volume.patch)}", f"on {volume.patches} patches of each case, {100 * volume.lesion_share:g} % of them with a lesion voxel in their middle half (nearer a side at the box's edge)"


def inference(recipe: Recipe) -> str:
    """How whole scans were predicted, as a sentence."""
    return f"Whole volumes were predicted in windows that overlap by {100 * recipe.volume.overlap:g} %, averaged with Gaussian weights. "


def limits() -> list[str]:
    """What T1w scans of strokes cannot show."""
    return ["Ventricles, wide sulci, perivascular spaces and old white matter lesions are dark on T1w too; a stroke of the last days may not show there at all."]


def _voxels(size: tuple[int, ...]) -> str:
    return f"{' x '.join(map(str, size))} voxels"
