"""The sections of a recipe as frozen dataclasses, each of which checks its values (RecipeError)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from .errors import RecipeError

COLOURS = ("grey", "red", "green", "blue")  # of an image that is no scan
SHIPPED = "minisam"  # the checkpoint that comes with the suite
SCANNERS = ("challenge", "flair", "t1", "ct", "ultrasound", "any", "mixed", "vessels", "stroke")
PROTOCOLS = ("stratified", "challenge", "leave-one-site-out", "k-fold", "given")
LOW_RANK = ("lora", "rslora", "dora", "pissa", "adalora")
METHODS = (*LOW_RANK, "salt", "ssam", "bias", "none", "full")
FOUR_BITS = ("lora", "rslora", "adalora", "bias", "none")  # that do without the dense matrices
NETWORKS = ("attention", "squeeze", "mamba")  # of volumes


def require(holds: bool, name: str, found, expected: str) -> None:
    """Raise RecipeError unless the value `found` of the setting `name` `holds`."""
    if not holds:
        raise RecipeError(f"setting {name} = {found!r} is impossible: expected {expected}")


@dataclass(frozen=True)
class Inputs:
    """What the network sees: one axial slice (with neighbours and T1 if wanted) on a square canvas centred on the head, or channels of an image."""

    modalities: tuple[str, ...] = ("flair",)  # or ("flair", "t1"); ("t1",) where lesions are drawn on T1; of images ("grey",), or some of "red", "green", "blue"
    context: int = 0  # neighbouring slices on each side, as extra channels
    img_size: int = 512  # canvas side, pixels
    fov: float = 256.0  # canvas side, mm; an image lies on it as a whole
    modality_dropout: float = 0.3  # chance that a training slice loses its T1

    @property
    def channels(self) -> int:
        """How many the network's input has: modalities times slices."""
        return len(self.modalities) * (2 * self.context + 1)

    @property
    def images(self) -> bool:
        """Whether the cases are images that are no scans."""
        return bool(self.modalities) and set(self.modalities) <= set(COLOURS)

    @property
    def t1_beside(self) -> bool:
        """Whether T1 is an input beside FLAIR."""
        return "t1" in self.modalities[1:]

    @property
    def t1_alone(self) -> bool:
        """Whether the scans that are segmented are T1w, on which lesions are dark."""
        return self.modalities == ("t1",)

    def __post_init__(self):
        scans = self.modalities in (("t1",), ("flair",), ("flair", "t1"))
        require((scans or self.images) and len(set(self.modalities)) == len(self.modalities), "inputs.modalities", self.modalities,
                 f"('flair',), ('flair', 't1') or ('t1',) of scans, or of images some of {', '.join(COLOURS)}")
        require(not self.images or self.context == 0, "inputs.context", self.context, "0 with images, which have no neighbours")
        require(0 <= self.context <= 5, "inputs.context", self.context, "0 to 5 slices on each side")
        require(32 <= self.img_size <= 4096 and self.img_size % 16 == 0, "inputs.img_size", self.img_size,
                 "a multiple of 16, from 32 to 4096")
        require(100 <= self.fov <= 500, "inputs.fov", self.fov, "100 to 500 mm")
        require(0 <= self.modality_dropout <= 1, "inputs.modality_dropout", self.modality_dropout, "0 to 1")


@dataclass(frozen=True)
class Encoder:
    """SAM's image encoder. `checkpoint` is a file of segment_anything's format, "minisam" for the small base that comes with the
    suite, or empty for seeded random weights."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    window: int = 14
    grid: int = 64  # side of the position embedding, tokens; interpolated to the canvas
    checkpoint: str = ""
    bits: int = 16  # 4: frozen matrices in NF4 with double quantisation
    random: bool = False  # train on random weights where no checkpoint is named
    pixels: str = "medsam"  # what a checkpoint without a channel adapter was trained on: "medsam" 0 to 1, "sam" those standardised

    def __post_init__(self):
        require(self.heads > 0, "encoder.heads", self.heads, "at least 1")
        require(self.depth > 0, "encoder.depth", self.depth, "at least 1 block")
        require(self.dim > 0 and self.dim % self.heads == 0, "encoder.dim", self.dim, f"a multiple of {self.heads} heads")
        require(all(0 <= b < self.depth for b in self.global_blocks), "encoder.global_blocks", self.global_blocks,
                 f"block numbers below {self.depth}")
        require(0 < self.window <= 256, "encoder.window", self.window, "1 to 256 tokens")
        require(self.bits in (4, 16), "encoder.bits", self.bits, "4 or 16")
        require(self.pixels in ("medsam", "sam"), "encoder.pixels", self.pixels, "'medsam' or 'sam'")
        require(0 < self.grid <= 256, "encoder.grid", self.grid, "1 to 256 tokens")
        require(self.dim <= 4096 and self.dim**2 * self.depth <= 1 << 26, "encoder.dim, encoder.depth", (self.dim, self.depth),
                 "an encoder no larger than SAM's ViT-H (1280 x 32)")


@dataclass(frozen=True)
class Adapter:
    """What of the encoder is trained, or beside it (see `adapters.adapt`); LoRA's alpha equals the rank, as in the recipe."""

    method: str = "lora"  # or "rslora", "dora", "pissa", "adalora", "salt", "ssam", "bias"; "none" for a frozen encoder, "full" to train all of it
    rank_attention: int = 64  # on qkv and proj; of SALT the columns of X
    rank_mlp: int = 32  # on lin1 and lin2; 0: these stay as they are
    dropout: float = 0.05  # of lora, rslora, dora and adalora
    top: int = 76  # singular values that SALT scales and shifts
    neck: bool = False  # salt and ssam on the neck's convolutions too

    def __post_init__(self):
        require(self.method in METHODS, "adapter.method", self.method, f"one of {', '.join(METHODS)}")
        require(0 < self.top <= 4096, "adapter.top", self.top, "1 to 4096 singular values")
        require(not self.neck or self.method in ("salt", "ssam"), "adapter.neck", self.neck, "false, but for adapter.method=salt or ssam")
        require(0 < self.rank_attention <= 1024, "adapter.rank_attention", self.rank_attention, "1 to 1024")
        require(0 <= self.rank_mlp <= 1024, "adapter.rank_mlp", self.rank_mlp, "0 to 1024")
        require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "0 up to 1")


@dataclass(frozen=True)
class Loss:
    """Weights of the loss (see `losses`)."""

    focal_alpha: float = 0.75
    focal_gamma: float = 2.0
    boundary_weight: float = 3.0
    scale_weights: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)  # finest scale first
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)  # of focal, Dice and boundary loss
    tversky: float = 0.0  # weight of the Tversky loss
    tversky_beta: float = 0.7  # what a missed voxel weighs in it; a false one weighs the rest of 1
    edges: float = 0.25  # weight of the map of borders, of networks that give one

    def __post_init__(self):
        require(0 <= self.focal_alpha <= 1, "loss.focal_alpha", self.focal_alpha, "0 to 1")
        require(self.focal_gamma == 0 or self.focal_gamma >= 1, "loss.focal_gamma", self.focal_gamma, "0, or 1 or more: in between its slope has no bound")
        require(self.boundary_weight >= 1, "loss.boundary_weight", self.boundary_weight, "1 or more")
        require(len(self.scale_weights) == 4 and min(self.scale_weights) >= 0, "loss.scale_weights", self.scale_weights,
                 "four weights of 0 or more")
        require(len(self.weights) == 3 and min(self.weights) >= 0, "loss.weights", self.weights, "three weights of 0 or more")
        require(self.tversky >= 0, "loss.tversky", self.tversky, "0 or more")
        require(self.edges >= 0, "loss.edges", self.edges, "0 or more")
        require(0 < self.tversky_beta < 1, "loss.tversky_beta", self.tversky_beta, "between 0 and 1")


@dataclass(frozen=True)
class Pretext:
    """What a base learns beside lesions (see `pretext`); 0 leaves a part out."""

    tissue: float = 0.0  # weight of the tissues' cross-entropy
    prompts: float = 0.0  # weight of the masks that SAM's decoder gives for boxes and points
    each: int = 3  # prompts for a slice
    alone: bool = False  # learn these and nothing else, with adapter.method=none
    mlp: int = 256  # width of the prompt decoder's MLPs; SAM's own: 2048

    def __post_init__(self):
        require(min(self.tissue, self.prompts) >= 0, "pretext", (self.tissue, self.prompts), "weights of 0 or more")
        require(self.each >= 1, "pretext.each", self.each, "at least 1")
        require(1 <= self.mlp <= 4096, "pretext.mlp", self.mlp, "1 to 4096")


@dataclass(frozen=True)
class Augment:
    """Random changes of a training batch; 0 switches one off."""

    rotation: float = 15.0  # degrees, either way
    scale: float = 0.1  # relative, either way
    flips: bool = True  # left-right
    flips_ap: bool = True  # front-back
    rotate90: bool = True
    gamma: float = 0.3  # log range, either way
    noise: float = 0.1  # highest standard deviation, in units of the normalised slice
    brightness: float = 0.2  # either way, same units
    contrast: float = 0.2  # relative, either way
    bias_field: float = 0.0  # log range of a smooth field, either way
    elastic: float = 0.0  # of volumes: highest displacement by a smooth, invertible field, mm
    resolution: float = 1.0  # of volumes: how many times as thick as voxels slices may become, and are brought back

    def __post_init__(self):
        for name in ("rotation", "scale", "gamma", "noise", "brightness", "contrast", "bias_field", "elastic"):
            require(getattr(self, name) >= 0, f"augment.{name}", getattr(self, name), "0 or more")
        require(self.scale < 1, "augment.scale", self.scale, "less than 1")
        require(1 <= self.resolution <= 8, "augment.resolution", self.resolution, "1 to 8")


@dataclass(frozen=True)
class Training:
    """Epochs, optimiser and schedule (`epochs.learning_rate`)."""

    epochs: int = 100
    batch_size: int = 4
    accumulation: int = 4
    lr: float = 3e-4
    lr_min: float = 1e-6
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    warmup_epochs: int = 5
    restart_epochs: int = 25  # T0 of the cosine with warm restarts
    checkpoint_epochs: int = 10
    validate_epochs: int = 1
    train_negatives: float = 0.08  # share of the slices without a lesion
    val_negatives: float = 0.15
    precision: str = "no"  # "no", "bf16" or "fp16"
    fit_device: bool = True  # split the batch (and checkpoint gradients) so that it fits the device; its effective size stays
    gradient_checkpointing: bool = False  # compute the encoder's activations again instead of keeping them
    ema: float = 0.0  # decay per step of the averaged weights that are validated and kept; 0: none
    slices: int = 0  # drawn once, that are all there is to train on (few-shot); 0: every one with a lesion, and others anew each epoch
    patience: int = 0  # epochs without a better validation Dice after which training stops; 0: never
    start: str = ""  # folder of the run whose trained weights are the first ones ("minisam": the adapter that comes with the suite); "": those of the base

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulation", "restart_epochs", "checkpoint_epochs", "validate_epochs"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        require(self.warmup_epochs >= 0, "training.warmup_epochs", self.warmup_epochs, "0 or more")
        require(self.slices >= 0, "training.slices", self.slices, "0 or more")
        require(self.patience >= 0, "training.patience", self.patience, "0 or more")
        require(0 <= self.ema < 1, "training.ema", self.ema, "0 up to 1")
        require(0 <= self.lr_min <= self.lr, "training.lr_min", self.lr_min, f"0 to lr = {self.lr}")
        require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "0 or more")
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "training.betas", self.betas, "two values from 0 up to 1")
        require(self.clip_norm > 0, "training.clip_norm", self.clip_norm, "above 0")
        for name in ("train_negatives", "val_negatives"):
            require(0 <= getattr(self, name) <= 1, f"training.{name}", getattr(self, name), "0 to 1")
        require(self.precision in ("no", "bf16", "fp16"), "training.precision", self.precision, "'no', 'bf16' or 'fp16'")


@dataclass(frozen=True)
class Split:
    """Who trains, validates and tests (see `splits`)."""

    protocol: str = "stratified"  # or "challenge", "leave-one-site-out", "k-fold", "given" (of a set of images: its own)
    val: float = 0.15  # share of the subjects of a site that are not held out by the protocol
    test: float = 0.15  # share of the subjects of a site, for "stratified"
    held_out: str = ""  # the site that tests, for "leave-one-site-out"
    folds: int = 5  # for "k-fold"
    fold: int = 0  # the one that tests, counted from 0

    def __post_init__(self):
        require(self.protocol in PROTOCOLS, "split.protocol", self.protocol, f"one of {', '.join(PROTOCOLS)}")
        require(min(self.val, self.test) > 0 and self.val + self.test < 1, "split", (self.val, self.test),
                 "two shares above 0 that leave cases for training")
        require(bool(self.held_out) == (self.protocol == "leave-one-site-out"), "split.held_out", self.held_out,
                 "a site's name with split.protocol=leave-one-site-out, and nothing else")
        require(self.folds >= 2, "split.folds", self.folds, "2 or more")
        require(0 <= self.fold < (self.folds if self.protocol == "k-fold" else 1), "split.fold", self.fold,
                 f"0 to {self.folds - 1} with split.protocol=k-fold, 0 with another")


@dataclass(frozen=True)
class Operating:
    """The recipe's operating point, and the grid that `search` tries on validation cases."""

    threshold: float = 0.60
    min_voxels: int = 3
    tta: bool = True
    # 8: flips and quarter turns (the group D4), of volumes all flips; 4: both flips; 2: the left-right flip; 1: none; 10: the left-right flip, each
    # upright, tilted by 12 degrees either way, smaller and larger
    views: int = 8
    thresholds: tuple[float, ...] = tuple(round(0.1 + 0.05 * i, 2) for i in range(17))
    sizes: tuple[int, ...] = (1, 2, 3, 5, 8, 12, 20)  # smallest component kept, voxels
    sizes_mm3: tuple[float, ...] = (3.0, 6.0, 9.0, 15.0, 25.0, 40.0, 60.0)  # the same, mm3; none for images
    prefer: str = "centre"  # of the plateau; or "sensitive": the lowest threshold within one standard error of the best Dice
    batch_size: int = 16  # slices in one forward pass

    @property
    def point(self) -> dict:
        """The recipe's own operating point, as operating_point.json has one."""
        return {"threshold": self.threshold, "min_voxels": self.min_voxels, "min_mm3": 0.0, "tta": self.tta}

    def __post_init__(self):
        require(0 < self.threshold < 1, "operating.threshold", self.threshold, "between 0 and 1")
        require(self.views in (1, 2, 4, 8, 10), "operating.views", self.views, "1, 2, 4, 8 or 10")
        require(len(self.thresholds) > 0 and all(0 < t < 1 for t in self.thresholds), "operating.thresholds",
                 self.thresholds, "values between 0 and 1")
        require(len(self.sizes) > 0 and min(self.sizes) >= 1, "operating.sizes", self.sizes, "voxel counts of 1 or more")
        require(min(self.sizes_mm3, default=1) > 0, "operating.sizes_mm3", self.sizes_mm3, "volumes above 0 mm3")
        require(self.prefer in ("centre", "sensitive"), "operating.prefer", self.prefer, "'centre' or 'sensitive'")
        require(self.min_voxels >= 1, "operating.min_voxels", self.min_voxels, "1 or more")
        require(self.batch_size >= 1, "operating.batch_size", self.batch_size, "1 or more")


def head_name(path: str) -> str:
    """What cases with the brain of the T1w scan `path` are known by: its file's name up to the first dot."""
    return PurePath(path).name.split(".")[0]


@dataclass(frozen=True)
class Cohort:
    """The synthetic cohort that `phantom`, or `vessels`, writes where no data is given."""

    synthetic_cases: int = 0  # 0: real data is required
    scanners: str = "challenge"  # its three sites; or each case in a scanner of its own: flair, t1, ct, ultrasound, any, or mixed; vessels: images; stroke: T1w scans
    scale: float = 1.0  # voxel size relative to the sites' own (in the plane of slices; of T1w scans along all axes), or of a pixel; tests use coarse ones
    heads: tuple[str, ...] = ()  # T1w scans of healthy adults, whose brains the cases have by turns with the MNI152's; each is a site

    def __post_init__(self):
        require(not self.heads or self.scanners not in ("challenge", "vessels", "stroke"), "cohort.heads", self.heads,
                "none with cohort.scanners=challenge, vessels or stroke")
        names = {self.scanners, *map(head_name, self.heads)}
        require(len(names) == 1 + len(self.heads), "cohort.heads", self.heads, f"files of different names, none of them {self.scanners}")
        require(self.scanners in SCANNERS, "cohort.scanners", self.scanners, f"one of {', '.join(SCANNERS)}")
        require(self.synthetic_cases >= 0, "cohort.synthetic_cases", self.synthetic_cases, "0 or more")
        require(1 <= self.scale <= 4, "cohort.scale", self.scale, "1 to 4")


@dataclass(frozen=True)
class Volume:
    """A network of whole volumes in place of one of slices (see `volumetric`), which has neither encoder nor adapter of the recipe."""

    network: str = ""  # "attention", "squeeze" or "mamba"; "": a network of slices
    spacing: float = 1.0  # mm, of the grid of cubic voxels that it sees
    box: tuple[int, ...] = (192, 224, 176)  # of that grid, cut out around the head: left-right, front-back, down-up
    patch: tuple[int, ...] = (96, 96, 96)  # voxels of a training patch and of the sliding window
    patches: int = 4  # of a case in an epoch
    lesion_share: float = 0.67  # of the patches, drawn around a voxel of a lesion
    overlap: float = 0.5  # of neighbouring windows, along each axis

    @property
    def borders(self) -> bool:
        """Whether the network gives a map of lesions' borders too."""
        return self.network == "mamba"

    def __post_init__(self):
        require(self.network in ("", *NETWORKS), "volume.network", self.network, f"one of {', '.join(NETWORKS)}, or '' for slices")
        require(0.3 <= self.spacing <= 5, "volume.spacing", self.spacing, "0.3 to 5 mm")
        for name in ("box", "patch"):
            size = getattr(self, name)
            require(len(size) == 3 and all(32 <= n <= 512 and n % 16 == 0 for n in size), f"volume.{name}", size, "three multiples of 16, from 32 to 512 voxels")
        require(all(small <= large for small, large in zip(self.patch, self.box)), "volume.patch", self.patch, f"no larger than volume.box = {self.box}")
        require(self.patches >= 1, "volume.patches", self.patches, "1 or more")
        require(0 <= self.lesion_share <= 1, "volume.lesion_share", self.lesion_share, "0 to 1")
        require(0 <= self.overlap < 1, "volume.overlap", self.overlap, "0 up to 1")
