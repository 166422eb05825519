"""The recipe: every choice of a run as frozen dataclasses, JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import RecipeError
from .sections import (
    FOUR_BITS,
    Adapter,
    Augment,
    Cohort,
    Encoder,
    Inputs,
    Loss,
    Operating,
    Pretext,
    Split,
    Training,
    Volume,
    require,
)

_LARGEST = 1 << 40  # of any number


@dataclass(frozen=True)
class Recipe:
    """Every choice of a run. RecipeError for values that are impossible, alone or together."""

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
    volume: Volume = field(default_factory=Volume)

    def __post_init__(self):
        require(not self.inputs.images or self.split.protocol == "given", "split.protocol", self.split.protocol,
                 "'given' with images, whose data_split.csv says who trains")
        scans = not self.inputs.images and self.inputs.context == 0
        require(not self.volume.network or scans, "volume.network", self.volume.network, "scans in inputs.modalities and inputs.context=0 with it")
        require(not self.volume.network or not (self.training.slices or self.pretext.tissue or self.pretext.prompts), "volume.network", self.volume.network,
                "no training.slices and no pretext with it, which are of slices")
        require(self.cohort.scanners != "stroke" or self.inputs.t1_alone, "inputs.modalities", self.inputs.modalities,
                "('t1',) with cohort.scanners=stroke")
        require(not self.cohort.synthetic_cases or self.inputs.images == (self.cohort.scanners == "vessels"), "cohort.scanners", self.cohort.scanners,
                 "'vessels' for inputs.modalities of images, another for scans")
        require(self.encoder.bits == 16 or self.adapter.method in FOUR_BITS, "adapter.method", self.adapter.method,
                 f"one of {', '.join(FOUR_BITS)} with encoder.bits=4, whose dense matrices neither lie in memory nor can be trained")
        require(not self.volume.network or self.operating.views <= 8, "operating.views", self.operating.views, "1, 2, 4 or 8 with volume.network, whose views are flips")
        ranks = self.adapter.rank_attention, self.adapter.rank_mlp
        require(self.adapter.method != "pissa" or max(ranks) <= self.encoder.dim, "adapter.rank_attention, adapter.rank_mlp", ranks,
                 f"at most encoder.dim = {self.encoder.dim} with adapter.method=pissa, which takes them from its matrices")
        require(not self.pretext.alone or (self.adapter.method == "none" and self.pretext.prompts > 0), "pretext.alone", True,
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
                raise RecipeError(f"override {word!r} is not of the form section.setting=value, without spaces in the value")
            try:
                value = json.loads(text.replace("'", '"'))
            except (ValueError, RecursionError):
                value = text
            place = tree.setdefault(section, {}) if dot else tree
            if not isinstance(place, dict):
                raise RecipeError(f"override {word!r} goes into {section}, which another override sets as a whole")
            place[key] = value
        return merge(self, tree)

    def afresh(self) -> Recipe:
        """This recipe trained from its base, not from the weights of another run (`training.start`)."""
        return replace(self, training=replace(self.training, start=""))

    def to_json(self) -> str:
        """The recipe as a JSON object, its sections objects in it."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str, source: str | Path = "recipe") -> Recipe:
        """The recipe in `text`; what that lacks has its default. RecipeError, naming `source`, where it is no JSON object, or has an unknown or
        impossible setting."""
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:  # a number without end is a ValueError too
            raise RecipeError(f"{source} is not JSON: {error}") from None
        if not isinstance(tree, dict):
            raise RecipeError(f"{source} holds {type(tree).__name__}, expected an object of settings")
        return merge(Recipe(), tree)


def merge(target, tree: dict, prefix: str = ""):
    """`target` (a dataclass of settings) with the values of `tree`; unknown keys and values of the wrong type raise RecipeError."""
    hints = typing.get_type_hints(type(target))
    changes = {}
    for key, value in tree.items():
        name = prefix + key
        if key not in hints:
            raise RecipeError(f"unknown setting {name}: known here are {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise RecipeError(f"setting {name} = {value!r} is a section: expected an object of settings")
            changes[key] = merge(getattr(target, key), value, name + ".")
        else:
            changes[key] = _cast(hints[key], value, name)
    return replace(target, **changes)


def _cast(hint, value, name: str):
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"setting {name} = {value!r}: expected a list")
        return tuple(_cast(typing.get_args(hint)[0], v, name) for v in value)
    if type(value) is not hint and not (hint is float and type(value) is int):
        quoted = f" ('{value}', in quotes)" if hint is str and type(value) is int else ""
        raise RecipeError(f"setting {name} = {value!r} is of type {type(value).__name__}: expected {hint.__name__}{quoted}")
    if hint in (int, float) and not abs(value) < _LARGEST:
        raise RecipeError(f"setting {name} = {value!r} is impossible: expected a number below 2 ** 40")
    return float(value) if hint is float else value
