import numpy as np
import pandas as pd
import pytest
import torch

from wmhlib.bench import claims, roofline
from wmhlib.bench.claims import Subject
from wmhlib.sections import Encoder
from wmhlib.teacher import ENCODERS

TOY = Encoder(64, 2, 2, (1,), 4, 4, random=True)


@pytest.mark.parametrize("name, parameters", [("vit_h", 637_026_048), ("vit_b", 89_670_912), ("small", 2_644_096), ("tiny", 1_044_256)])
def test_parameters_are_counted_without_making_the_weights(name, parameters):
    assert claims._parameters(ENCODERS[name]) == parameters


@pytest.mark.parametrize("encoder, px", [(TOY, 64), (ENCODERS["small"], 208), (ENCODERS["tiny"], 256)])
def test_operations_are_those_of_the_formulas_and_of_padded_keys(encoder, px):
    useful = 1e-9 * sum(roofline.encoder_flops(encoder, px).values())
    assert useful <= claims.gflop(encoder, px) <= 1.25 * useful


def test_without_padding_operations_are_those_of_the_formulas():
    plain = Encoder(64, 2, 2, (1,), 4, 4)
    relative = 4 * 2 * 16 * 16 * 64 * 2  # one-hot keys of rows and columns ride along in q k^T: counted, though they multiply zeros
    assert claims.gflop(plain, 64) == pytest.approx(1e-9 * sum(roofline.encoder_flops(plain, 64).values()), rel=0.02, abs=1e-9 * relative)


def test_weights_of_a_subject_lie_in_its_precision():
    sizes = {kind: claims.weight_bytes(Subject("toy", ENCODERS["small"], 64, kind).build(torch.device("cpu"))) for kind in ("fp32", "bf16", "nf4")}
    assert sizes["fp32"] == 4 * claims._parameters(ENCODERS["small"])
    assert 0.5 < sizes["bf16"] / sizes["fp32"] < 0.6 and sizes["nf4"] < sizes["bf16"]


def test_all_precisions_give_nearly_the_same_map():
    maps = {}
    for kind in ("fp32", "bf16", "nf4"):
        subject = Subject("toy", TOY, 64, kind)
        maps[kind] = subject.run(subject.build(torch.device("cpu")), subject.image(torch.device("cpu"))).float()
    for kind, most in (("bf16", 0.05), ("nf4", 0.5)):
        assert 0 < float((maps[kind] - maps["fp32"]).norm() / maps["fp32"].norm()) < most


@pytest.fixture(scope="module")
def table():
    """The claims about toys."""
    encoders, pairs = claims.lineup(TOY, Encoder(32, 1, 2, (0,), 4, 4, random=True), 64, quick=True)
    return claims.claims(encoders, pairs, 1, {("student", 64, "nf4"): (0.6, 0.75)}, progress=False)


def test_every_row_names_teacher_student_size_precision_and_batch(table):
    assert {"", "vit_h, fp32", "teacher, fp32"} <= set(table.teacher) and set(table.precision) >= {"fp32", "nf4"} and table.batch.eq(1).all()
    own = table[table.teacher == ""]
    assert own[["seconds", "peak_mb", "gflop", "weight_mb"]].gt(0).all(None) and own.latency_ratio.isna().all()
    rest = table[table.teacher != ""]
    assert np.allclose(rest.latency_ratio, rest.teacher_seconds / rest.seconds) and np.allclose(table.gmac, table.gflop / 2)
    assert (table.peak_mb > table.libraries_mb).all() and (table.network_gflop > table.gflop).all()
    assert rest.reference_ratio.notna().tolist() == rest.teacher.str.startswith("vit_h").tolist()


def test_a_dice_stands_only_where_it_was_measured(table):
    measured = table[table.dice.notna()]
    assert len(measured) == 1 and measured.iloc[0][["student", "precision", "px"]].tolist() == ["student", "nf4", 64]
    assert measured.teacher.iloc[0].startswith("teacher") and measured.dice_ratio.iloc[0] == pytest.approx(0.8)


def a_row(**changes):
    row = dict(teacher="vit_h, fp32", student="vit_b", px=256, precision="fp32", batch=1, weight_mb=358.7, weight_saved=0.86, libraries_mb=480.0, peak_mb=1200.0,
               gflop_256=47.0, reference_ratio=4.0, latency_ratio=4.0, operations_ratio=7.0, dice=0.6, teacher_dice=0.75, dice_ratio=0.8)
    return pd.DataFrame([row | changes])


def test_what_does_not_hold_is_a_no_that_says_why():
    found = claims.reached(a_row()).iloc[0]
    assert [found[claim] for claim in claims.TARGETS] == ["no"] * 5
    for reason in ("Dice 0.600 against 0.750", "359 MB in fp32 are 14 % of ViT-H's", "the peak is 1200 MB, 480 of them libraries", "47 GFLOP at 256 px",
                   "7.0x fewer operations are 4.0x less time"):
        assert reason in found["why not"], reason


def test_what_holds_is_a_yes_and_what_was_not_measured_is_empty():
    found = claims.reached(a_row(weight_saved=0.98, peak_mb=520.0, gflop_256=1.5, reference_ratio=9.0, dice_ratio=np.nan)).iloc[0]
    assert [found[claim] for claim in claims.TARGETS] == ["", "yes", "yes", "yes", "yes"] and found["why not"] == ""


def test_the_teachers_own_rows_claim_nothing():
    assert claims.reached(a_row(teacher="")).empty


def test_the_table_can_be_read(table):
    text = claims.shown(table)
    assert "GMAC" in text and "ViT-H 64 px fp32" in text.index and text["against"].str.contains("ViT-H, fp32").any() and not text.isna().any(axis=None)
    told = claims.verdicts(claims.reached(a_row())).iloc[0]
    assert told.name == "ViT-B 256 px fp32" and told["7x faster"] == "no" and "7.0x fewer" in told["why not"]


def test_the_full_line_up_has_vit_h_at_256_and_512_and_at_1024_if_asked():
    for large in (False, True):
        _, pairs = claims.lineup(ENCODERS["small"], ENCODERS["tiny"], 208, large=large)
        assert {s.px for name, s in pairs if name == "vit_h"} == {256, 512} | ({1024} if large else set())
        assert {s.px for name, s in pairs if name == "teacher"} == {208}
