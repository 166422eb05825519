"""What a paper says of a run, written from its files: the card of data and recipe, the methods paragraph, the limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .agreement import FEWEST_CASES, FEWEST_PAIRS, RESAMPLES
from .cohort import describe
from .errors import some
from .evaluation import ZERO_SHOT
from .files import read_table
from .search import NEAR_BEST
from .sections import SHIPPED, Augment
from .settings import Recipe
from .volumetric import story
from .wording import words
from .workspace import RunFolder

_PROTOCOLS = {
    "stratified": "at random in each site, stratified by lesion volume",
    "challenge": "as the challenge splits them; validation cases drawn from its training cases, stratified by site and lesion volume",
    "leave-one-site-out": "with one site held out for testing; validation cases drawn from the others, stratified by lesion volume",
    "k-fold": "in folds stratified by site and lesion volume, one of them for testing",
    "given": "as they came",
}
_VIEWS = {1: "one view", 2: "two views (left-right flip)", 4: "four views (flips)", 8: "eight views (flips and quarter turns)",
          10: "ten views (left-right flip, tilts by 12 degrees and zooms by 0.9 and 1.12)"}

_SUBJECTS = "; all scans of a subject stayed on one side"
_IGNORED = "; other pathology (label 2) was ignored"
_ZONES = "Lesions within 10 mm of the ventricles counted as periventricular (DeCarli et al. 2005). "
_LOW_RANK = {"lora": "LoRA (Hu et al. 2021)", "rslora": "rsLoRA (Kalajdzievski 2023)", "dora": "DoRA (Liu et al. 2024)", "pissa": "PiSSA (Meng et al. 2024)",
             "adalora": "AdaLoRA (Zhang et al. 2023, pruned to two thirds of its singular values by the end of training)"}
_SENSITIVE = ", with the lowest threshold whose mean Dice was within one standard error of the best"
_ZERO_SHOT = (" and, for orientation since it is told where every lesion lies, the base before any adaptation, prompted with the reference's bounding box of each "
              "lesion on each slice (zero-shot)")
_INTERVALS = f"means have 95 % bootstrap intervals over cases ({RESAMPLES:,} resamples, expanded percentiles, Hesterberg 2015)"
_TESTS = "systems were compared by Wilcoxon signed-rank tests with Holm's correction"
_VOLUMES = "volumes were compared by bias and limits of agreement (Bland and Altman 1999) and ICC(2,1) and ICC(3,1) (Shrout and Fleiss 1979)"


@dataclass(frozen=True)
class Story:
    """The facts of a run and of the cases `evaluated` (the run itself, or a folder of external cases), and `counts`, the
    parameter budget of its network (`adapters.budget`)."""

    recipe: Recipe
    point: dict
    trained_on: pd.DataFrame  # cohort with the column split
    evaluated: pd.DataFrame
    data: str  # what the evaluated cases are, as `cohort.describe` says it
    epochs: int
    best_epoch: int
    counts: dict
    external: bool
    earlier: pd.DataFrame  # cases that the first weights had seen
    zero_shot: bool = False  # whether the base was asked with the reference's boxes too

    @classmethod
    def of(cls, run: RunFolder, evaluated: RunFolder, counts: dict) -> Story:
        """Reads the files of both folders; MissingStepError names the notebook whose file is missing."""
        mine, theirs = run.cases(), evaluated.cases()
        history, recipe = read_table(run.need(run.history_csv, "03_train")), run.recipe()
        last = int(history.epoch.max())
        best = int(history.epoch[history.val_dice.idxmax()]) if history.val_dice.notna().any() else last
        return cls(recipe=recipe, point=run.point(), trained_on=mine, evaluated=theirs[theirs.split == "test"], data=describe(theirs, recipe.inputs),
                   epochs=last, best_epoch=best, counts=counts, external=evaluated.path != run.path,
                   earlier=run.earlier(), zero_shot=evaluated.metrics_csv.exists() and ZERO_SHOT in set(read_table(evaluated.metrics_csv).system))

    def source(self, *parts: str) -> str:
        """What the cases of these parts of the split ("train", "val", "test") are, as `data`."""
        return describe(self.trained_on[self.trained_on.split.isin(parts)], self.recipe.inputs)

    def tuned(self) -> bool:
        """Whether the operating point was chosen on other cases than the epoch (`opening.open_tuning`), which leaves no test cases."""
        return not (self.trained_on.split == "test").any()

    def others(self) -> str:
        """What the `earlier` cases did."""
        return "chose the epoch, or " * self.tuned() + "had trained or chosen the weights that training started from"

    def heading(self) -> str:
        """One sentence: what was evaluated on what."""
        known = sorted(set(self.evaluated.site) & {*self.trained_on.site[self.trained_on.split != "test"], *self.earlier.site})
        what = ("Test cases of the run" if not self.external else "**External validation**: cases of sites with other names than those trained or chosen on" if not known else
                f"Labelled cases of another folder, of sites that were trained or chosen on too ({', '.join(known)})")
        return f"{what}, n = {len(self.evaluated)} {self.data} ({_sites(self.evaluated)}). Recipe {self.recipe.name}, seed {self.recipe.seed}."

    def card(self) -> pd.DataFrame:
        """The data and the recipe, a line each."""
        recipe, training, point = self.recipe, self.recipe.training, self.point
        parts = self.trained_on.split.value_counts()
        lines = {
            "evaluated on": f"{len(self.evaluated)} {self.data}: {_sites(self.evaluated)}",
            "lesion volume": "median {:.1f} mL, {:.1f} to {:.1f}".format(*self.evaluated.lesion_ml.quantile([0.5, 0, 1])),
            "trained on": f"{parts.get('train', 0)} {self.source('train')}, chosen on {parts.get('val', 0)} {self.source('val')}: "
                          f"{_sites(self.trained_on[self.trained_on.split != 'test'])}"
                          + f"; {len(self.earlier)} others {self.others()}: {_sites(self.earlier)}" * (len(self.earlier) > 0),
            "split": "as the weights were trained; their operating point on cases of its own" if self.tuned() else f"{_protocol(recipe)}, seed {recipe.seed}",
            **(story.card(recipe) if recipe.volume.network else _card(recipe)),
            "trained parameters": f"{self.counts['trainable']:,} of {self.counts['total']:,} ({self.counts['share_percent']:.2f} %), "
                                  f"{self.counts['trainable_mb_fp32']:.1f} MB in fp32",
            "training": f"AdamW, {training.lr:g}, batch {training.batch_size * training.accumulation}, {self.epochs} of "
                        f"{training.epochs} epochs, weights of epoch {self.best_epoch}",
            "operating point": f"probability at least {point['threshold']:g}, {_components(point)}, {_views(recipe, point)}",
            "validation Dice there": f"{point['dsc']:.3f} (n = {point['n']}" + (
                f", standard error {point['se']:.3f})" if point["se"] is not None else ")"),
        }
        word = words(self.data)
        lines = {word(name): word(line) for name, line in lines.items()}
        return pd.DataFrame({"": lines.values()}, index=pd.Index(lines, name=recipe.name))

    def paragraph(self) -> str:
        """The methods, ready to be edited into a paper."""
        recipe, training, augment, point = self.recipe, self.recipe.training, self.recipe.augment, self.point
        parts, images, whole = self.trained_on.split.value_counts(), recipe.inputs.images, bool(recipe.volume.network)
        zones = not images and any(self.evaluated.get("ventricles", ""))
        statistics = "; ".join([_INTERVALS] * (len(self.evaluated) >= FEWEST_CASES) + [_TESTS] * (len(self.evaluated) >= FEWEST_PAIRS) + [_VOLUMES])
        tested = "No scan of the evaluated data was used for training or for choosing the operating point. " if self.external else ""
        what, drawn = story.draws(recipe) if whole else ("slices", f"on all slices with lesions and {100 * training.train_negatives:g} % of the others")
        kept = f"The weights of epoch {self.best_epoch} were kept" + f", averaged over the steps (decay {training.ema:g})" * bool(training.ema)
        begun = f"{len(self.earlier)} other cases ({_sites(self.earlier)}) {self.others()}. " * (len(self.earlier) > 0)
        if self.tuned():
            chosen = "those other cases"
            train, val = (self.trained_on[self.trained_on.split == part] for part in ("train", "val"))
            cases = (f"The network was trained on {len(train)} {self.source('train')} ({_sites(train)}), its operating point chosen on {len(val)} {self.source('val')} "
                     f"({_sites(val)}), the validation cases below")
        else:
            chosen = "validation cases"
            cases = (f"{len(self.trained_on)} {self.source('train', 'val', 'test')} ({_sites(self.trained_on)}) were split {_PROTOCOLS[recipe.split.protocol]} into "
                     f"{parts.get('train', 0)} training, {parts.get('val', 0)} validation and {parts.get('test', 0)} test cases (seed {recipe.seed}){_SUBJECTS * (not images)}")
        text = (
            f"{cases}. Input was {story.inputs(recipe) if whole else _normalised(recipe)}. "
            f"{story.network(recipe, self.counts) if whole else _network(recipe, self.counts)}. The loss "
            f"was the sum of {_loss(recipe)}{', with focal and Dice terms at the four scales' * any(recipe.loss.scale_weights)}{_IGNORED * (not images)}. "
            f"{begun}AdamW (learning rate {training.lr:g}, weight decay {training.weight_decay:g}) ran for {self.epochs} epochs with a batch "
            f"of {training.batch_size * training.accumulation} {what}, warm-up over {training.warmup_epochs:g} and cosine restarts "
            f"every {training.restart_epochs} epochs, {drawn}{_changes(augment, whole)}"
            f"{f'; T1 was left out of {100 * recipe.inputs.modality_dropout:g} % of them' if recipe.inputs.t1_beside else ''}. "
            f"{story.inference(recipe) * whole}{kept}, whose Dice at 0.5 on {'whole' if whole else 'slices of'} {chosen} was best. "
            f"On the {point['n']} validation cases the operating point was taken from the centre of the plateau {NEAR_BEST} Dice"
            f"{_SENSITIVE * (recipe.operating.prefer == 'sensitive')}: probability at least {point['threshold']:g}, {_components(point)}, "
            f"{_views(recipe, point)}. {tested}{len(self.evaluated)} {self.data} ({_sites(self.evaluated)}) were evaluated with the metrics of the WMH "
            "Segmentation Challenge (Kuijf et al. 2019): Dice, 95th percentile of the Hausdorff distance, absolute volume difference, lesion recall and "
            f"lesion F1 ({8 if images else 26}-connected lesions), beside the same network at the recipe's own point and at 0.5 in one view, and a threshold of the normalised FLAIR tuned on the same validation cases"
            f"{_ZERO_SHOT if self.zero_shot else ''}. "
            f"{statistics[0].upper()}{statistics[1:]}. {_ZONES * zones}A case was flagged as unsure where plain prediction and the mean over all views differed more than a "
            "limit chosen on the validation cases.")
        return words(self.data)(text)

    def limits(self) -> str:
        """What the figures do not show, as a Markdown list."""
        n = len(self.evaluated)
        known = {*self.trained_on.site[self.trained_on.split == "train"], *self.earlier.site}
        validation = f"{self.point['n']} validation case{'s' * (self.point['n'] > 1)}"
        images = self.recipe.inputs.images
        few = "intervals are wide, and a test between systems finds large differences only" if n >= FEWEST_PAIRS else "too few to test one system against another"
        points = [f"{n} case{'s' * (n > 1)}: {few}."] * (n < 30)
        people = self.evaluated.subject.nunique()
        if people < n:
            points.append(f"The {n} cases are of {people} people: intervals and tests treat their scans as independent, and are too sure.")
        alike = set(self.evaluated.subject) & set(self.trained_on.subject[self.trained_on.split != "test"])
        if self.external and alike and not images and "synthetic" not in self.data:
            points.append(f"{len(alike)} of the people have the label of one who trained or chose ({some(sorted(alike))}): where they are the same, these figures flatter.")
        if "synthetic" in self.data:
            points.append("The cases are synthetic. The figures show that the method works, not how well it does on patients.")
        elif "synthetic" in self.source("train"):
            points.append("The network was trained on synthetic cases" + ", its operating point was chosen on them" * ("synthetic" in self.source("val")) + ".")
        if not self.recipe.volume.network and self.recipe.encoder.random and not self.recipe.encoder.checkpoint:
            points.append("The encoder started from random weights, not from those of MedSAM.")
        if self.external:
            chosen_on = ", ".join(sorted(set(self.trained_on.site[self.trained_on.split == "val"])))
            points.append(f"Operating point and limit of the flag were chosen on {validation} of {chosen_on}; probabilities shift between scanners.")
        elif images:
            points.append("The split is that of the data: whether two images show one person, it does not say.")
        elif set(self.evaluated.site) <= known:
            several = self.trained_on.site.nunique() > 1 and self.recipe.split.protocol != "leave-one-site-out"
            advice = " Split by leave-one-site-out to see how much." * several
            points.append(f"Every site was in training too; another scanner may do worse.{advice}")
        if not self.external and self.recipe.split.protocol == "k-fold":
            points.append(f"One of {self.recipe.split.folds} folds: the others are runs of their own.")
        if not self.external and self.point["n"] < 10:
            points.append(f"The operating point and the limit of the flag rest on {validation}.")
        if self.recipe.inputs.t1_alone:
            points += story.limits()
        elif not images:
            if "synthetic" not in self.data:
                points.append("One rater's or one consensus reference counts as the truth; on the challenge's training cases raters agree with a Dice of 0.76 to 0.79.")
            points.append("Cortical lesions, infarcts and artefacts can look like white matter hyperintensities on FLAIR.")
        return "\n".join(f"- {point}" for point in [*points, "For research. It is no medical device."])


def _sites(cases: pd.DataFrame) -> str:
    return ", ".join(f"{site} {n}" for site, n in cases.site.value_counts().sort_index().items())


def _card(recipe: Recipe) -> dict[str, str]:
    return {"inputs": f"{_inputs(recipe)}; {recipe.inputs.img_size} px over {'the longer side' if recipe.inputs.images else f'{recipe.inputs.fov:g} mm'}",
            "encoder": f"ViT of {recipe.encoder.depth} blocks, width {recipe.encoder.dim}: {_base(recipe)}", "adapter": _adapter(recipe)}


def _normalised(recipe: Recipe) -> str:
    """What the network sees, as sentences."""
    size = f"was resized to {recipe.inputs.img_size} x {recipe.inputs.img_size} pixels"
    if recipe.inputs.images:
        return (f"{_inputs(recipe)}. Each channel lost its median in the field of view and was divided by the standard deviation of the mean of red, green and blue "
                f"there; the smallest square around it {size}")
    return (f"{_inputs(recipe)} on the scan's own grid. Intensities were centred and scaled by the shortest interval that holds half of the voxels deeper than "
            f"scalp and skull (Rousseeuw and Leroy 1987), and a square window of {recipe.inputs.fov:g} mm around the head {size}")


def _network(recipe: Recipe, counts: dict) -> str:
    frozen, packed = "frozen, " * (recipe.adapter.method != "full"), "in NF4 (Dettmers et al. 2023), " * (recipe.encoder.bits == 4)
    return (f"The network was a vision transformer of the architecture of SAM's image encoder (Kirillov et al. 2023; {recipe.encoder.depth} blocks of width "
            f"{recipe.encoder.dim}; {_base(recipe)}), {frozen}{packed}with {_adapter(recipe)}, "
            f"and a convolutional decoder with outputs at four scales{', fed by a convolutional branch from the image' if recipe.skip else ''}; "
            f"{counts['trainable']:,} of {counts['total']:,} parameters ({counts['share_percent']:.1f} %) were trained")


def _loss(recipe: Recipe) -> str:
    loss, pretext = recipe.loss, recipe.pretext
    terms = zip((*loss.weights, loss.tversky), (
        f"focal (alpha {loss.focal_alpha:g}, gamma {loss.focal_gamma:g})", "Dice", f"boundary-weighted ({loss.boundary_weight:g}x) cross-entropy",
        f"Tversky (beta {loss.tversky_beta:g}; Salehi et al. 2017)"))
    terms = [f"{weight:g} {term}" if set(loss.weights) != {1.0} or loss.tversky else term for weight, term in terms if weight]
    more = [f"{loss.edges:g} focal and Dice terms of the map of lesions' borders"] * (recipe.volume.borders and loss.edges > 0) + [
        f"{pretext.tissue:g} cross-entropy of the tissues"] * bool(pretext.tissue) + [
        f"{pretext.prompts:g} loss of the masks that boxes and points ask for"] * bool(pretext.prompts)
    return " and ".join(filter(None, [", ".join(terms[:-1]), *terms[-1:]])) + " terms" + f", with {' and '.join(more)}" * bool(more)


def _inputs(recipe: Recipe) -> str:
    if recipe.inputs.images:
        return f"{', '.join(recipe.inputs.modalities)} of an image"
    names = {"flair": "FLAIR", "t1": "T1"}
    context = recipe.inputs.context
    return " and ".join(names[m] for m in recipe.inputs.modalities) + " in axial slices" + (
        f" with {context} neighbouring slice{'s' if context > 1 else ''} on each side" if context else "")


def _changes(augment: Augment, whole: bool) -> str:
    """What augmentation does to slices, or to `whole` volumes, each with a comma before it."""
    varied = [name.replace("_", " ") for name in ("gamma", "contrast", "bias_field", "brightness", "noise") if getattr(augment, name)]
    changes = {f"rotated by up to {augment.rotation:g} degrees": augment.rotation, f"scaled by up to {100 * augment.scale:g} %": augment.scale,
               "turned by quarters": augment.rotate90 and not whole, "flipped left-right": augment.flips, "flipped front-back": augment.flips_ap,
               f"deformed elastically by up to {augment.elastic:g} mm": whole and augment.elastic,
               f"coarsened along one axis by up to {augment.resolution:g} times": whole and augment.resolution > 1,
               f"varied in {', '.join(varied)}": varied}
    return "".join(f", {change}" for change, made in changes.items() if made)


def _protocol(recipe: Recipe) -> str:
    more = {"leave-one-site-out": f" ({recipe.split.held_out} left out)", "k-fold": f" (fold {recipe.split.fold} of {recipe.split.folds}, from 0)"}
    return recipe.split.protocol + more.get(recipe.split.protocol, "")


def _base(recipe: Recipe) -> str:
    if recipe.encoder.checkpoint == SHIPPED:
        return "weights of the suite's small base, trained on synthetic heads"
    return f"weights {Path(recipe.encoder.checkpoint).name}, for MedSAM's see Ma et al. 2024" if recipe.encoder.checkpoint else f"random weights of seed {recipe.seed}"


def _adapter(recipe: Recipe) -> str:
    adapter = recipe.adapter
    where = "attention and MLP layers" if adapter.rank_mlp else "attention layers"
    ranks = f"{adapter.rank_attention} on attention" + (f" and {adapter.rank_mlp} on MLP layers" if adapter.rank_mlp else " layers")
    known = {"none": "no adapter", "full": "all of its weights trained", "bias": "its biases and norms trained (BitFit, Ben Zaken et al. 2022)",
             "ssam": "S-SAM (Paranjape et al. 2024) on the singular values of " + where,
             "salt": f"SALT (Elsayed et al. 2025), top {adapter.top} singular values and rank {ranks}"}
    return known.get(adapter.method) or (
        f"{_LOW_RANK[adapter.method]} of rank {ranks}, alpha equal to the rank"
        + (f", dropout {adapter.dropout:g}" if adapter.method != "pissa" else ""))


def _components(point: dict) -> str:
    if point.get("min_mm3", 0):
        return f"components of at least {point['min_mm3']:g} mm3"
    return f"components of at least {point['min_voxels']} voxel{'s' if point['min_voxels'] > 1 else ''}"


def _views(recipe: Recipe, point: dict) -> str:
    if not point["tta"]:
        return "one view"
    flips = recipe.volume.network and recipe.operating.views == 8
    return f"mean of {'eight views (flips along all axes)' if flips else _VIEWS[recipe.operating.views]}"
