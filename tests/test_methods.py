"""The text of a report follows the recipe and the files, not a template of wishes."""

import dataclasses
import json

import pandas as pd
import pytest

from wmhlib import methods
from wmhlib.errors import MissingStepError
from wmhlib.files import write_atomic, write_table
from wmhlib.presets import preset
from wmhlib.sections import METHODS
from wmhlib.workspace import RunFolder

POINT = dict(threshold=0.45, min_voxels=1, min_mm3=9.0, tta=True, dsc=0.7, se=None, n=1)
COUNTS = dict(trainable=10, total=40, share_percent=25.0, trainable_mb_fp32=0.1)


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run").open(preset("smoke"))
    cases = pd.DataFrame({"case": list("abcd"), "subject": list("abcd"), "site": ["Utrecht", "Utrecht", "Utrecht", "GE3T"], "flair": "f", "t1": "", "mask": "m", "origin": "real",
                          "lesion_ml": [1.0, 2, 3, 40]})
    write_table(cases, run.cohort_csv)
    write_table(cases.assign(split=["train", "train", "val", "test"])[["case", "site", "lesion_ml", "split"]], run.split_csv)
    write_table(pd.DataFrame({"epoch": [1, 2, 3], "val_dice": [0.1, 0.6, 0.5]}), run.history_csv)
    write_atomic(run.operating_point, json.dumps(POINT))
    return run


def test_the_paragraph_tells_the_files_numbers(run):
    text = methods.Story.of(run, run, COUNTS).paragraph()
    for fact in ("2 training, 1 validation and 1 test cases", "GE3T 1, Utrecht 3", "10 of 40 parameters (25.0 %)", "3 epochs", "weights of epoch 2 were kept",
                 "probability at least 0.45, components of at least 9 mm3, mean of two views", "random weights of seed 42", "rank 4 on attention", "rotated by up to 15 degrees", "flipped front-back"):
        assert fact in text, fact


def test_the_paragraph_follows_the_recipe(run):
    story = methods.Story.of(run, run, COUNTS)
    other = dataclasses.replace(story, point=POINT | dict(min_voxels=3, min_mm3=0.0, tta=False), external=True, recipe=preset(
        "colab", "inputs.modalities=['flair','t1'] inputs.context=2 skip=false encoder.checkpoint=/secret/place/medsam.pth")).paragraph()
    for fact in ("FLAIR and T1 in axial slices with 2 neighbouring slices on each side", "weights medsam.pth", "at least 3 voxels, one view",
                 "No scan of the evaluated data was used for training"):
        assert fact in other, fact
    shipped = dataclasses.replace(story, recipe=preset("demo")).paragraph()
    assert "weights of the suite's small base" in shipped and "MedSAM" not in shipped
    assert "fed by a convolutional branch" not in other and "fed by a convolutional branch" in story.paragraph()
    assert "/secret" not in other


def test_limits_tell_of_people_with_several_scans_and_of_labels_that_trained_too(run):
    story = methods.Story.of(run, run, COUNTS)
    assert "people" not in story.limits()
    several = pd.concat([story.evaluated] * 3).assign(case=list("xyz"), subject=["p", "p", "a"])
    assert "The 3 cases are of 2 people" in dataclasses.replace(story, evaluated=several).limits()
    assert "1 of the people have the label of one who trained or chose (a)" in dataclasses.replace(story, evaluated=several, external=True).limits()


def test_what_the_first_weights_had_seen_is_told(run):
    assert "started from" not in methods.Story.of(run, run, COUNTS).paragraph()
    write_table(pd.DataFrame({"case": ["x", "y"], "site": ["Oslo", "GE3T"], "digest": ["1", "2"]}), run.earlier_csv)
    story = methods.Story.of(run, run, COUNTS)
    assert ". 2 other cases (GE3T 1, Oslo 1) had trained or chosen the weights that training started from. AdamW" in story.paragraph()
    assert "; 2 others had trained or chosen the weights" in str(story.card().loc["trained on"].item())
    assert "of sites that were trained or chosen on too (GE3T)" in dataclasses.replace(story, external=True).heading()


def test_the_baseline_that_sees_the_reference_is_told_where_there_is_one(run):
    assert "zero-shot" not in methods.Story.of(run, run, COUNTS).paragraph()
    write_table(pd.DataFrame({"case": ["d"], "system": [methods.ZERO_SHOT], "dsc": [0.5]}), run.metrics_csv)
    assert "for orientation since it is told where every lesion lies, the base before any adaptation" in methods.Story.of(run, run, COUNTS).paragraph()


def test_intervals_tests_and_zones_are_told_where_there_are_any(run):
    story = methods.Story.of(run, run, COUNTS)
    said = {n: dataclasses.replace(story, evaluated=pd.concat([story.evaluated] * n)).paragraph() for n in (4, 5, 6)}
    assert [("2,000 resamples" in text, "Wilcoxon" in text) for text in said.values()] == [(False, False), (True, False), (True, True)]
    assert all("olumes were compared by bias" in text and "DeCarli" not in text for text in said.values())
    assert "DeCarli" in dataclasses.replace(story, evaluated=story.evaluated.assign(ventricles="v.nii.gz")).paragraph()


def test_cases_of_sites_that_were_trained_on_are_no_external_validation(run):
    story = dataclasses.replace(methods.Story.of(run, run, COUNTS), external=True)
    assert "External validation" in story.heading(), "GE3T was not trained on"
    known = dataclasses.replace(story, evaluated=story.trained_on[2:]).heading()
    assert "External validation" not in known and "of sites that were trained or chosen on too (Utrecht)" in known


def test_the_card_names_data_and_recipe(run):
    card = methods.Story.of(run, run, COUNTS).card()[""]
    assert card["evaluated on"] == "1 real scans: GE3T 1" and card["validation Dice there"] == "0.700 (n = 1)"
    assert card["lesion volume"] == "median 40.0 mL, 40.0 to 40.0" and "weights of epoch 2" in card["training"]


def test_limits_say_what_the_cases_are(run):
    story = methods.Story.of(run, run, COUNTS)
    assert "synthetic" not in story.limits() and "1 case: too few to test" in story.limits() and "raters agree" in story.limits()
    assert "in training too" not in story.limits(), "GE3T was not trained on"
    known = dataclasses.replace(story, evaluated=story.trained_on[:1])
    alone = dataclasses.replace(known, trained_on=story.trained_on.assign(site="Utrecht"))
    assert "in training too; another scanner may do worse. Split by leave-one-site-out" in known.limits()
    assert "in training too; another scanner may do worse.\n" in alone.limits(), "of one site none can be left out"
    synthetic = dataclasses.replace(story, trained_on=story.trained_on.assign(origin="synthetic"))
    assert "was chosen on them" in synthetic.limits()
    parts = story.trained_on[:3].assign(origin=["synthetic", "synthetic", "real"])
    tuned = dataclasses.replace(story, trained_on=parts, earlier=pd.DataFrame({"case": ["x"], "site": ["Oslo"]}), external=True)
    assert "trained on synthetic cases.\n" in tuned.limits(), "the point was chosen on real ones"
    assert tuned.card()[""]["trained on"].startswith("2 synthetic cases, chosen on 1 real scans: ")
    for fact in ("trained on 2 synthetic cases (Utrecht 2), its operating point chosen on 1 real scans (Utrecht 1), the validation cases below. Input",
                 "1 other cases (Oslo 1) chose the epoch, or had trained", "whose Dice at 0.5 on slices of those other cases was best", "On the 1 validation cases"):
        assert fact in tuned.paragraph(), fact
    assert "split" not in tuned.paragraph() and "on slices of validation cases was best" in story.paragraph()
    of_synthetic = dataclasses.replace(synthetic, data="synthetic cases").limits()
    assert "The cases are synthetic" in of_synthetic and "raters agree" not in of_synthetic
    many = dataclasses.replace(story, evaluated=pd.concat([story.evaluated] * 40), external=True).limits()
    assert "intervals are wide" not in many and "chosen on 1 validation case of Utrecht" in many
    folds = dataclasses.replace(story, recipe=preset("smoke", "split.protocol=k-fold split.fold=2"))
    assert "One of 5 folds" in folds.limits() and folds.card()[""]["split"].startswith("k-fold (fold 2 of 5, from 0)")
    assert "no medical device" in story.limits()


def test_a_story_without_search_names_the_notebook(run):
    run.operating_point.unlink()
    with pytest.raises(MissingStepError, match="04_search"):
        methods.Story.of(run, run, COUNTS)


def test_every_adapter_is_named_with_its_paper():
    told = {method: methods._adapter(preset("smoke", f"adapter.method={method}")) for method in METHODS}
    assert len(set(told.values())) == len(METHODS)
    assert all(("et al." in text or "Kalajdzievski" in text) == (method not in ("none", "full")) for method, text in told.items())


def test_a_network_of_volumes_is_told_as_one(run):
    story = methods.Story.of(run, run, COUNTS)
    story = dataclasses.replace(story, recipe=preset("stroke"), data="real T1w scans")
    text = story.paragraph()
    for fact in ("cubic voxels of 1 mm, in a box of 192 x 224 x 176 voxels", "attention gates", "0.25 focal", "0.15 Tversky", "patches of 96 x 96 x 96 voxels", "overlap by 50 %",
                 "deformed elastically by up to 6 mm", "whole validation cases", "threshold of the normalised T1w"):
        assert fact in text, fact
    assert "DeCarli" not in text and "vision transformer" not in text and "quarters" not in text and "T1 was left out" not in text
    card = story.card()[""]
    assert "encoder" not in card and "attention gates" in card["network"] and "acute" not in story.limits() and "Ventricles" in story.limits()
    near = dataclasses.replace(story, evaluated=story.evaluated.assign(ventricles="v.nii.gz"))
    assert "DeCarli" in near.paragraph()
