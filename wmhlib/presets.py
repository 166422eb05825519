"""The recipes that have a name: `preset` gives one, with settings changed."""

from __future__ import annotations

from dataclasses import replace

from .errors import RecipeError
from .sections import (
    SHIPPED,
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
)
from .settings import Recipe

_LEAN = Adapter(rank_attention=24, rank_mlp=12)

_SMALL = Inputs(img_size=208, fov=208.0)
MINI = Encoder(dim=160, depth=6, heads=5, global_blocks=(2, 5), window=7, grid=13, random=True)
_SHIPPED = replace(MINI, checkpoint=SHIPPED, random=False)
_UPRIGHT = Augment(flips_ap=False, rotate90=False, bias_field=0.2)
_FLIPS = Augment(rotation=0.0, scale=0.0, flips_ap=False, rotate90=False, gamma=0.0, noise=0.0, brightness=0.0, contrast=0.0)
_WIDE = replace(_UPRIGHT, scale=0.15, gamma=0.4, bias_field=0.3, contrast=0.3, brightness=0.3)  # for scanners of all kinds
_STROKE = Recipe(name="stroke", inputs=Inputs(modalities=("t1",)), adapter=Adapter(method="none"),
                 loss=Loss(weights=(0.25, 0.35, 0.25), boundary_weight=4.0, tversky=0.15, scale_weights=(0.0, 0.0, 0.0, 0.0)),
                 augment=replace(_UPRIGHT, scale=0.15, bias_field=0.3, elastic=6.0, resolution=2.5),
                 training=Training(epochs=150, batch_size=2, accumulation=2, lr=5e-4, warmup_epochs=5, restart_epochs=145, weight_decay=1e-4,
                                   checkpoint_epochs=5, validate_epochs=5, precision="bf16", ema=0.999),
                 split=Split(val=0.1, test=0.15), volume=Volume("attention"),
                 operating=Operating(threshold=0.5, views=2, sizes=(1, 5, 10, 20, 50, 100, 200), sizes_mm3=(10.0, 30.0, 50.0, 100.0, 200.0, 400.0)))

PRESETS = {
    # The recipe at full size, with the image skip; the others say what they change.
    "colab": Recipe(training=Training(precision="bf16")),
    # LoRA at rank 24/12: below 3.5 % trainable.
    "lean": Recipe(name="lean", adapter=_LEAN, training=Training(precision="bf16")),
    # The recipe as published: no image skip.
    "original": Recipe(name="original", skip=False, training=Training(precision="fp16")),
    # The small base that comes with the suite, adapted to a synthetic cohort: minutes on two cores.
    "demo": Recipe(name="demo", inputs=_SMALL, encoder=_SHIPPED, adapter=Adapter(rank_attention=16, rank_mlp=8, dropout=0.0), augment=_UPRIGHT,
                   training=Training(epochs=5, batch_size=8, accumulation=1, lr=2e-3, warmup_epochs=1, restart_epochs=4,
                                     checkpoint_epochs=2, train_negatives=0.2, precision="bf16", ema=0.99),
                   split=Split(val=0.17, test=0.25), operating=Operating(views=2), cohort=Cohort(synthetic_cases=48)),
    # The adapter that comes with the suite: the base on FLAIR of many scanners, for scanners that nobody has validated on.
    "flair": Recipe(name="flair", inputs=_SMALL, encoder=_SHIPPED, adapter=Adapter(rank_attention=8, rank_mlp=4, dropout=0.0), augment=_WIDE,
                    training=Training(epochs=9, batch_size=8, accumulation=2, lr=1e-3, lr_min=1e-5, warmup_epochs=1, restart_epochs=8,
                                      checkpoint_epochs=1, train_negatives=0.2, precision="bf16", ema=0.998),
                    split=Split(val=0.1, test=0.1), operating=Operating(views=10, prefer="sensitive"), cohort=Cohort(synthetic_cases=320, scanners="flair")),
    # The small base: all of it trained on heads of every contrast, with their tissues and prompts. Hours on two cores.
    "base": Recipe(name="base", inputs=_SMALL, encoder=MINI, adapter=Adapter(method="full"),
                   pretext=Pretext(tissue=0.3, prompts=0.3),
                   augment=_WIDE,
                   training=Training(epochs=8, batch_size=8, accumulation=2, lr=2e-3, lr_min=1e-5, weight_decay=0.05, warmup_epochs=1, restart_epochs=7,
                                     checkpoint_epochs=1, train_negatives=0.2, precision="bf16", ema=0.998),
                   split=Split(val=0.06, test=0.06), operating=Operating(views=2), cohort=Cohort(synthetic_cases=400, scanners="mixed")),
    # Seconds: every step at toy size, for the tests.
    "smoke": Recipe(name="smoke", inputs=Inputs(img_size=64), encoder=Encoder(dim=32, depth=2, heads=2, global_blocks=(1,), window=4, grid=4, random=True),
                    adapter=Adapter(rank_attention=4, rank_mlp=2),
                    training=Training(epochs=2, batch_size=8, accumulation=1, lr=2e-3, warmup_epochs=1, restart_epochs=2,
                                      checkpoint_epochs=1),
                    split=Split(val=0.25, test=0.25), operating=Operating(views=2, thresholds=(0.3, 0.6), sizes=(1, 3), sizes_mm3=(9.0, 30.0)),
                    cohort=Cohort(synthetic_cases=12, scale=3.0)),
    # The small base adapted to images in colour, of synthetic vessels where no data is given: minutes on two cores.
    "vessels": Recipe(name="vessels", inputs=replace(_SMALL, modalities=("red", "green", "blue")), encoder=_SHIPPED,
                      adapter=Adapter(rank_attention=16, rank_mlp=8, dropout=0.0), augment=Augment(bias_field=0.2),
                      training=Training(epochs=25, batch_size=4, accumulation=1, lr=2e-3, warmup_epochs=2, restart_epochs=23, checkpoint_epochs=10,
                                        precision="bf16", ema=0.98),
                      split=Split(protocol="given"), operating=Operating(views=4, sizes=(1, 5, 10, 20, 40, 80), sizes_mm3=()),
                      cohort=Cohort(synthetic_cases=50, scanners="vessels")),
    # Stroke lesions on T1w volumes of 1 mm (ATLAS v2.0), 75/10/15 by subject: a network of whole volumes, on a GPU.
    "stroke": _STROKE,
    # The same on synthetic heads of 3 mm, two patches of which hold most of a head: ten to twenty minutes a network on one core. Flips are all that changes them:
    # whatever resamples such voxels blurs them, and so small a budget does not make up for it.
    "stroke-demo": replace(_STROKE, name="stroke-demo", cohort=Cohort(synthetic_cases=60, scanners="stroke", scale=3.0), split=Split(val=0.15, test=0.25),
                           volume=Volume("attention", spacing=3.0, box=(64, 80, 64), patch=(48, 64, 48), patches=2), augment=_FLIPS,
                           training=replace(_STROKE.training, epochs=30, accumulation=1, lr=2e-3, warmup_epochs=2, restart_epochs=28, checkpoint_epochs=5,
                                            validate_epochs=5, ema=0.99),
                           operating=replace(_STROKE.operating, sizes=(1, 2, 3, 5, 10, 20), sizes_mm3=(16.0, 50.0, 100.0, 200.0, 400.0))),
    # Seconds: the same at toy size, for the tests.
    "stroke-smoke": replace(_STROKE, name="stroke-smoke", cohort=Cohort(synthetic_cases=8, scanners="stroke", scale=4.0),
                            volume=Volume("attention", spacing=4.0, box=(48, 64, 48), patch=(32, 32, 32), patches=2),
                            training=Training(epochs=2, batch_size=2, accumulation=1, lr=2e-3, warmup_epochs=1, restart_epochs=2, checkpoint_epochs=1),
                            split=Split(val=0.25, test=0.25),
                            operating=Operating(threshold=0.5, views=2, thresholds=(0.3, 0.6), sizes=(1, 3), sizes_mm3=(64.0, 200.0))),
}


def planned(plans: dict, name: str, notebook: str):
    """What `plans` have for the preset `name` in a notebook; RecipeError where they have nothing."""
    if name not in plans:
        raise RecipeError(f"notebook {notebook} has no preset {name!r}: known are {', '.join(plans)}")
    return plans[name]


def preset(name: str, overrides: str = "") -> Recipe:
    """The recipe called `name`, one of PRESETS, with `overrides` applied. RecipeError for another name or an override that cannot be."""
    if name not in PRESETS:
        raise RecipeError(f"unknown preset {name!r}: known are {', '.join(PRESETS)}")
    return PRESETS[name].with_overrides(overrides)
