"""Several trained runs as one engine, which averages their probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from .engine import Prediction, WMHInferenceEngine
from .errors import InputError
from .trained import TrainedNet
from .volumes import Case
from .workspace import RunFolder

_MEANS = ("threshold", "zscore_threshold", "unsure_above", "poor_below")  # of an operating point; the rest is the most careful of the members'


class Networks(TrainedNet):
    """The networks of the members, for their fingerprint."""

    def __init__(self, networks: Sequence[TrainedNet]):
        super().__init__()
        self.members = nn.ModuleList(networks)
        self.recipe, self.base_sha256 = networks[0].recipe, " ".join(network.base_sha256 for network in networks)


class Ensemble(WMHInferenceEngine):
    """The mean of the probabilities of several engines, usable wherever one is; `recipe` is that of the first.

    Its operating point has the mean of their thresholds and limits, their largest smallest component, and TTA
    where one of them has it. Raises InputError for engines that look at other kinds of input.
    """

    def __init__(self, engines: Sequence[WMHInferenceEngine]):
        seen = sorted({f"{', '.join(e.recipe.inputs.modalities)} over {e.recipe.inputs.fov:g} mm in {e.recipe.operating.views} views" for e in engines})
        if len(seen) != 1:
            raise InputError(f"an ensemble averages runs on one kind of input: these have {'; '.join(seen) or 'none'} (inputs.modalities, inputs.fov, operating.views)")
        first = engines[0]
        self.engines, self.recipe, self.device, self.precision, self.img_size = list(engines), first.recipe, first.device, first.precision, first.img_size
        self.model = Networks([engine.model for engine in engines])
        points = [engine.point for engine in engines]
        means = {name: float(np.mean([p[name] for p in points])) for name in _MEANS if all(p.get(name) is not None for p in points)}
        largest = {name: max(p[name] for p in points) for name in ("min_voxels", "min_mm3", "tta")}
        self.point = means | largest

    def predict(self, case: Case, use_tta: bool = True) -> Prediction:
        found = [engine.predict(case, use_tta) for engine in self.engines]
        plain, mean = (np.mean([getattr(each, name) for each in found], axis=0) for name in ("prob", "prob_tta"))
        return Prediction(case, plain, mean, min(each.skipped for each in found), tuple(each.uncertainty for each in found))


def open_engine(runs: Sequence[RunFolder]) -> WMHInferenceEngine:
    """The engine of one run, or an `Ensemble` of several."""
    engines = [WMHInferenceEngine.from_run(run) for run in runs]
    return engines[0] if len(engines) == 1 else Ensemble(engines)
