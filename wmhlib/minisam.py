"""Phase 2 of MiniSAM: a distilled student in 4 bits under small adapters, on the cases of a run, and its Dice beside its teacher's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from .engine import WMHInferenceEngine, plain_dice
from .errors import RecipeError
from .fewshot import few_slices_recipe
from .presets import planned
from .sections import Encoder, Loss
from .settings import Recipe
from .workspace import RunFolder

RANKS = "adapter.method=lora adapter.rank_attention=8 adapter.rank_mlp=8"


@dataclass(frozen=True)
class Plan:
    """How much of notebook 08 a preset does: what is overridden in the recipe of its `cases` ("": those of the preset's run folder), of
    phase 2 (`adapt`), of each point of the few-shot curve (`few`; `counts` of slices, `seeds`) and of each modality adapter
    (`modalities`; `names`); `quick`: claims about toys, not about ViT-H."""

    cases: str = ""
    adapt: str = ""
    counts: tuple[int, ...] = (1, 5, 20, 100)
    seeds: tuple[int, ...] = (0, 1)
    few: str = ""
    modalities: str = "cohort.synthetic_cases=48"
    names: tuple[str, ...] = ("flair", "t1", "ct", "ultrasound")
    repetitions: int = 5
    quick: bool = False


PLANS = {
    "colab": Plan(),
    "demo": Plan("cohort.synthetic_cases=24", "training.epochs=4 training.warmup_epochs=1 training.restart_epochs=3", seeds=(0,),
                 few="training.batch_size=4",
                 modalities="cohort.synthetic_cases=24 training.epochs=6 training.warmup_epochs=1 training.restart_epochs=5", repetitions=2),
    "smoke": Plan("cohort.synthetic_cases=6", "training.epochs=1 training.warmup_epochs=0 training.slices=8", (2,), (0,),
                  "training.epochs=1 training.warmup_epochs=0",
                  "cohort.synthetic_cases=3 training.epochs=1 training.warmup_epochs=0 training.slices=4", ("flair", "ct"), 1, True),
}
PLAIN_LOSS = Loss(weights=(0.0, 1.0, 1.0), boundary_weight=1.0, scale_weights=(0.0, 0.0, 0.0, 0.0))  # cross-entropy + Dice, on the fused output alone


def plan(preset: str) -> Plan:
    """The plan of `preset`; RecipeError for one that has none."""
    return planned(PLANS, preset, "08")


def adapted_recipe(recipe: Recipe, encoder: Encoder, overrides: str = "") -> Recipe:
    """`recipe` for `encoder` under LoRA of rank 8, with cross-entropy + Dice as its loss; whoever is compared gets the same."""
    lora = recipe.afresh().with_overrides(f"{RANKS} adapter.neck=false")  # before the encoder, whose 4 bits go with few methods
    return replace(lora, encoder=encoder, loss=PLAIN_LOSS).with_overrides(overrides)


def modality_recipe(base: Recipe, name: str, overrides: str = "") -> Recipe:
    """`base` under LoRA of rank 8 (unless `overrides` say otherwise) for synthetic heads of the contrast `name` (`sections.SCANNERS`)."""
    split = replace(base.split, protocol="stratified", held_out="", fold=0)
    return replace(base.afresh(), split=split).with_overrides(f"{RANKS} {overrides} cohort.scanners={name}")


def check_request(recipe: Recipe, plan: Plan, overrides: str) -> None:
    """RecipeError, before the hours of phase 1, for what a later part of notebook 08 cannot do with a run of this `recipe`."""
    if recipe.inputs.images or recipe.inputs.t1_alone or recipe.volume.network:
        raise RecipeError("notebook 08 adapts networks of FLAIR slices to synthetic heads of other contrasts: name a run of FLAIR scans")
    adapted = adapted_recipe(recipe, replace(recipe.encoder, bits=4), f"{plan.adapt} {overrides}")
    few_slices_recipe(adapted, 1, 0, plan.few)
    for name in plan.names:
        modality_recipe(adapted, name, plan.modalities)


def adaptation(run: RunFolder, folder: str | Path, encoder: Encoder, overrides: str = "") -> RunFolder:
    """A run folder for `training.fit`: `adapted_recipe` of the run's recipe, on the same cases and split."""
    return RunFolder(folder).open(adapted_recipe(run.recipe(), encoder, overrides)).take_cases(run)


def scan_dice(runs: dict[str, RunFolder]) -> pd.DataFrame:
    """Dice of whole scans, one view at 0.5 without a filter, of each test case: columns case, site and one for each of `runs` by its
    name. NaN where reference and result are empty. The threshold is chosen on nothing, so that it favours nobody."""
    rows = next(iter(runs.values())).cases().query("split == 'test'")
    table = rows[["case", "site"]].reset_index(drop=True)
    for name, run in runs.items():
        engine = WMHInferenceEngine.from_run(run)
        table[name] = [plain_dice(row, engine.plain_mask, run.recipe().inputs) for row in rows.itertuples()]
    return table
