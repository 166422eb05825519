"""Modality adapters: several named LoRA adapters on one frozen base, each with a decoder of its own, switched without reloading.

A modality is a folder that peft itself can load (adapter_config.json, adapter_model.safetensors) onto the base, and beside it
decoder.safetensors: channel adapter, decoder and skip, which lie outside of what peft knows, and which base they belong to.
"""

from __future__ import annotations

import copy
import hashlib
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import peft
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from safetensors.torch import save
from torch import Tensor, nn

from . import training
from .engine import WMHInferenceEngine, plain_dice
from .errors import CheckpointError, InputError, RecipeError
from .figures import ORANGE, page
from .files import sha256, write_atomic, write_table
from .minisam import modality_recipe
from .network import WMHNet, load_network
from .opening import prepare
from .settings import Recipe
from .weights import read_tensors, tensors_bytes
from .workspace import RunFolder

CONFIG, ADAPTER, DECODER = "adapter_config.json", "adapter_model.safetensors", "decoder.safetensors"
_NEW = "default"  # the adapter that a WMHNet has: here the place where a state is checked before it gets its name


class Modalities:
    """The network of `recipe` with one adapter, channel adapter, decoder and skip for each modality. The base is that of the
    recipe (dense or NF4) and lies in memory once. Raises RecipeError for a recipe without LoRA."""

    def __init__(self, recipe: Recipe):
        if recipe.adapter.method != "lora":
            raise RecipeError(f"setting adapter.method = {recipe.adapter.method!r} leaves no adapter to switch: expected 'lora'")
        self.recipe, self.network = recipe, WMHNet(recipe)
        self._parts: dict[str, dict[str, nn.Module]] = {_NEW: {name: part for name, part in self.network.named_children() if name != "encoder"}}
        self._recipes: dict[str, Recipe] = {}

    @property
    def names(self) -> list[str]:
        return list(self._recipes)

    def use(self, name: str) -> WMHNet:
        """The network (B x C x S x S slices -> B x 1 x S x S logits, and those of its scales) as it is for modality `name`, until
        another is used. Raises InputError for a name that was not added."""
        if name not in self._recipes:
            raise InputError(f"there is no modality {name!r}: known are {', '.join(self.names) or 'none'}")
        return self._use(name)

    def _use(self, name: str) -> WMHNet:
        self.network.encoder.set_adapter(name)
        for part, module in self._parts[name].items():
            setattr(self.network, part, module)
        self.network.recipe = self._recipes.get(name, self.recipe)
        return self.network.eval()

    def add(self, name: str, state: dict[str, Tensor], source: str | Path = "the state", recipe: Recipe | None = None) -> None:
        """Add modality `name`, or replace it, by what `WMHNet.trained_state` gives; `recipe`: what it was trained by, if known.
        Raises InputError for a name that no folder and no module can have, RecipeError for what was trained by another method than LoRA,
        CheckpointError with each key of `state` that does not fit."""
        if not re.fullmatch(r"[a-z][a-z0-9_]+", name) or name == _NEW:
            raise InputError(f"modality {name!r}: expected a name of small letters, digits and underscores")
        recipe = recipe or self.recipe
        if recipe.adapter.method != "lora":  # rsLoRA's and PiSSA's factors have the same shapes and mean something else
            raise RecipeError(f"{source} was trained with adapter.method = {recipe.adapter.method!r}: expected 'lora'")
        encoder = self._use(_NEW).encoder
        self.network.load_trained_state(state, source)
        if name not in encoder.peft_config:
            with torch.random.fork_rng(devices=[]):
                encoder.add_adapter(name, copy.deepcopy(encoder.peft_config[_NEW]))
        layers = [layer for layer in encoder.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
        for factors in (factors for layer in layers for factors in (layer.lora_A, layer.lora_B)):
            factors[name].load_state_dict(factors[_NEW].state_dict())
        self._parts[name], self._recipes[name] = copy.deepcopy(self._parts[_NEW]), recipe
        self.use(name)

    def add_run(self, name: str, run: RunFolder) -> None:
        """Add the best weights of a run as modality `name`. Raises CheckpointError where they were trained on another base."""
        network, _ = load_network(run.need(run.best, "03_train"), self.recipe.encoder.checkpoint)
        self._check_base(network.base_sha256, network.recipe.encoder.bits, run.best)
        self.add(name, network.trained_state(), run.best, network.recipe)

    def save(self, folder: str | Path) -> None:
        """Each modality as a folder of its name in `folder`."""
        encoder = self.network.encoder
        for name, recipe in self._recipes.items():
            adapter = save({key: value.cpu().contiguous() for key, value in peft.get_peft_model_state_dict(encoder, adapter_name=name).items()},
                           {"format": "pt"})
            about = {"recipe": recipe.to_json(), "base_sha256": self.network.base_sha256, "bits": self.recipe.encoder.bits,
                     "adapter_sha256": hashlib.sha256(adapter).hexdigest()}
            rest = {f"{part}.{key}": value.cpu().contiguous() for part, module in self._parts[name].items() for key, value in module.state_dict().items()}
            with tempfile.TemporaryDirectory() as scratch:
                replace(encoder.peft_config[name], inference_mode=True).save_pretrained(scratch)
                config = Path(scratch, CONFIG).read_bytes()
            for file, content in ((CONFIG, config), (ADAPTER, adapter), (DECODER, tensors_bytes(rest, about))):
                write_atomic(Path(folder, name, file), content)

    def load(self, folder: str | Path) -> list[str]:
        """Add the modality of `folder`, or of each folder in it, under the folder's name; gives the names. Raises CheckpointError where
        there is none, and for one that is damaged, was trained on another base, or whose two files do not belong together."""
        folder = Path(folder).resolve()
        places = [folder] if (folder / DECODER).exists() else sorted(path.parent for path in folder.glob(f"*/{DECODER}"))
        if not places:
            raise CheckpointError(f"{folder} holds no modality: expected {DECODER} with {ADAPTER} in it, or in folders of it")
        for place in places:
            rest, about = read_tensors(place / DECODER)
            if not isinstance(about, dict) or not {"base_sha256", "bits", "adapter_sha256"} <= about.keys() or not isinstance(about.get("recipe"), str):
                raise CheckpointError(f"{place / DECODER} names no base: expected a file that Modalities.save wrote")
            self._check_base(about["base_sha256"], about["bits"], place)
            adapter, _ = read_tensors(place / ADAPTER)
            if sha256(place / ADAPTER) != about["adapter_sha256"]:
                raise CheckpointError(f"{place / ADAPTER} is not the adapter that {DECODER} was saved with: save or copy both again")
            adapter = {f"encoder.{key.removesuffix('.weight')}.{_NEW}.weight": value for key, value in adapter.items()}
            self.add(place.name, adapter | rest, place, Recipe.from_json(about["recipe"], place / DECODER))
        return [place.name for place in places]

    def _check_base(self, base: str, bits: int, source: str | Path) -> None:
        own = self.network.base_sha256, self.recipe.encoder.bits
        if (base, bits) != own:
            raise CheckpointError(f"{source} was trained on the base {str(base)[:12]} at {bits} bits, this one is {own[0][:12]} at {own[1]} bits: "
                                  "give the checkpoint that it was trained on")


def train(folder: str | Path, base: Recipe, names: tuple[str, ...], overrides: str = "", progress: bool = True) -> pd.DataFrame:
    """Train an adapter for each of `names` on synthetic heads of that contrast (`sections.SCANNERS`), or go on where that stopped.

    `base` is a recipe with synthetic cases: its encoder is the base, LoRA of rank 8 (unless `overrides` say otherwise) and the
    decoder are trained. Leaves runs/<name>, adapters/<name> (`Modalities.save`) and cross_table.csv in `folder`; returns the
    `cross_table`.
    """
    runs = {name: RunFolder(Path(folder, "runs", name)) for name in names}
    for name, run in runs.items():
        recipe = modality_recipe(base, name, overrides)
        prepare(run.open(recipe), recipe)
        if progress:
            print(f"modality {name}, {recipe.cohort.synthetic_cases} synthetic cases", flush=True)
        training.fit(run, progress)
    modalities = Modalities(recipe)
    for name, run in runs.items():
        modalities.add_run(name, run)
    modalities.save(Path(folder, "adapters"))
    table = cross_table(modalities, runs)
    write_table(table.reset_index(), Path(folder, "cross_table.csv"))
    return table


def cross_table(modalities: Modalities, runs: dict[str, RunFolder]) -> pd.DataFrame:
    """Mean Dice, at 0.5 and with one view, of each adapter (rows) on the test cases of each run (columns), which chose no epoch; cases without a
    lesion in reference and result are left out."""
    table = pd.DataFrame(index=pd.Index(modalities.names, name="adapter"), columns=list(runs), dtype=float)
    for name in modalities.names:
        engine = WMHInferenceEngine(modalities.use(name))
        for column, run in runs.items():
            table.loc[name, column] = np.nanmean([plain_dice(row, engine.plain_mask, engine.recipe.inputs) for row in run.cases().query("split == 'test'").itertuples()])
    return table


def cross_figure(table: pd.DataFrame) -> Figure:
    """The cross table as a chart: Dice in grey and in figures, the best adapter of each modality framed."""
    fig, axes = page(1, 1, (1.6 + 1.1 * len(table.columns), 1.2 + 0.7 * len(table)))
    ax, values = axes[0, 0], table.to_numpy(float)
    ax.imshow(values, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = f"{value:.2f}" if np.isfinite(value) else "none"
        ax.text(column, row, text, ha="center", va="center", color="white" if value > 0.5 else "black")
        if np.isfinite(value) and value == np.nanmax(values[:, column]):
            ax.add_patch(Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor=ORANGE, linewidth=2))
    ax.set_xticks(range(len(table.columns)), table.columns)
    ax.set_yticks(range(len(table)), table.index)
    ax.set(xlabel="modality of the test cases", ylabel="adapter")
    ax.grid(visible=False)
    return fig
