"""Baselines give what the library gives, counts are what torch counts, and the notebook writes what it promises."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small import OFF
from torch.utils.flop_counter import FlopCounterMode

from wmhlib import suite
from wmhlib.bench import baselines, charts, growth, measures, roofline, steps, table
from wmhlib.engine import WMHInferenceEngine
from wmhlib.files import read_table
from wmhlib.medsam import ImageEncoder, build_encoder
from wmhlib.presets import preset
from wmhlib.search import PER_CASE, search
from wmhlib.sections import Encoder, Operating
from wmhlib.slicestore import CaseSlices
from wmhlib.volumes import brain_slices
from wmhlib.workspace import RunFolder

SMOKE = preset("smoke")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return measures.challenge_cases(tmp_path_factory.mktemp("case"), SMOKE, 4.0)["Utrecht"]


@pytest.mark.parametrize("px", [64, 96])
def test_segment_anythings_encoder_gives_our_features_at_any_size(px):
    encoder = build_encoder(SMOKE.encoder, 0).eval()
    image = torch.randn(2, 3, px, px)
    sam = baselines.sam_encoder(SMOKE.encoder, encoder.state_dict(), px)
    torch.testing.assert_close(encoder(image), sam(image), atol=1e-4, rtol=0)


def test_the_eager_network_gives_our_logits_and_gradients():
    network = measures.full_network(SMOKE)
    eager, image = baselines.eager_network(network, 64), torch.randn(2, 1, 64, 64)
    assert type(eager.encoder) is type(network.encoder) and "segment_anything" in type(eager.encoder.get_base_model()).__module__
    for net in (eager, network):
        net(image)[0].mean().backward()
    torch.testing.assert_close(network(image)[0], eager(image)[0], atol=1e-4, rtol=0)
    ours, theirs = ({name: p.grad for name, p in net.named_parameters() if p.grad is not None} for net in (network, eager))
    assert ours.keys() == theirs.keys() and any("lora_A" in name for name in ours)
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-9, name


@pytest.mark.parametrize("change", ["adapter.method=adalora", "adapter.method=salt", "adapter.method=ssam", "encoder.bits=4"])
def test_adapters_that_segment_anythings_encoder_cannot_hold_are_merged(change):
    network, image = measures.full_network(preset("smoke", change)).eval(), torch.randn(2, 1, 64, 64)
    eager = baselines.eager_network(network, 64)
    with torch.inference_mode():
        torch.testing.assert_close(network(image)[0], eager(image)[0], atol=1e-3, rtol=0)


def test_slice_by_slice_gives_the_engines_probabilities(case):
    part = measures.slab(case, 3)
    network = measures.full_network(preset("smoke", "operating.views=8"))
    found = WMHInferenceEngine(network, "cpu").predict(part).prob_tta
    expected = baselines.slice_by_slice(baselines.eager_network(network, 64), part)
    assert found.shape == (*case.grid.shape[:2], 3) and (found > 0).any()
    np.testing.assert_allclose(found, np.where(found > 0, expected, 0), atol=1e-4)


def test_the_naive_search_gives_the_searchs_table_to_the_last_bit(case):
    grid = Operating(thresholds=(0.2, 0.6), sizes=(1, 3, 8), sizes_mm3=(9.0, 150.0))
    items = [measures.predicted(case, number) for number in range(2)]
    items[1]["reference"] = np.where(items[1]["reference"] == 1, 2, 0).astype(np.uint8)  # no lesion
    table, _ = search(items, grid)
    expected = baselines.naive_search(items, grid)
    for item in items:
        assert np.array_equal(table[PER_CASE + item["case"]], expected[item["case"]], equal_nan=True)
    assert table.dsc.nunique() > 6


def test_augmentation_sample_by_sample_moves_image_and_label_as_one():
    images = torch.zeros(1, 2, 32, 32).half()
    images[0, 0, 8:14, 18:26] = 4
    cases = [CaseSlices("a", images, (images[0] > 1).byte())]
    image, label = baselines.per_sample_batch(cases, [(0, 0), (0, 1)], OFF, 0, np.random.default_rng(0))
    assert torch.equal(label[:, 0], cases[0].labels) and torch.allclose(image[0, 0], images[0, 0].float(), atol=1e-5)
    turned = replace(OFF, rotation=15, flips=True, flips_ap=True, rotate90=True)
    image, label = baselines.per_sample_batch(cases, [(0, 0)] * 8, turned, 0, np.random.default_rng(0))
    assert len({tuple(x.flatten().tolist()) for x in label}) > 4
    assert (((image > 2) != (label > 0)).sum((1, 2, 3)) < 8).all()


@pytest.mark.parametrize("settings, px", [(Encoder(dim=48, depth=3, heads=3, global_blocks=(1,), window=4, grid=8), 128),
                                          (Encoder(window=16), 512)])
def test_counted_operations_are_torchs_where_windows_leave_nothing_over(settings, px):
    with torch.device("meta"):
        sam = baselines.sam_encoder(settings, ImageEncoder(settings).state_dict(), px)
        count = FlopCounterMode(display=False)
        with count, torch.no_grad():
            sam(torch.empty(1, 3, px, px))
    assert sum(roofline.encoder_flops(settings, px).values()) == count.get_total_flops()


def test_padding_is_not_counted():
    assert sorted(roofline.windows(32, 14))[0] == (4, 4) and sum(r * c for r, c in roofline.windows(32, 14)) == 32 * 32
    assert roofline.windows(32, 0) == [(32, 32)]
    linear = roofline.encoder_flops(Encoder(), 512)["linear"]
    assert linear == 24 * 12 * 1024 * 768**2 and roofline.network_flops(preset("colab"), training=True) > 2 * linear


def test_a_row_is_the_ratio_of_its_medians_and_is_judged_by_all_it_must_hold():
    limits = dict(target=2, error_target=1e-4, memory_target=0.5)
    rows = [table.row("good", [3.0, 9.0, 4.0], [1.0, 2.0, 1.5], error=1e-5, memory=(10, 5), **limits),
            table.row("slow", [3.0], [2.0], error=1e-5, memory=(10, 5), **limits),
            table.row("wrong", [3.0], [1.0], error=1e-3, memory=(10, 5), **limits),
            table.row("large", [3.0], [1.0], error=1e-5, memory=(10, 6), **limits),
            table.row("open", [3.0], [1.0]), table.row("left out", [3.0], [np.nan], 2)]
    claims = pd.DataFrame(rows)
    assert np.allclose(claims.ratio[:5], claims.baseline_s[:5] / claims.ours_s[:5]) and claims.ratio[0] == 4 / 1.5
    assert table.reached(claims).tolist() == ["yes", "no", "no", "no", "", ""]
    lines = table.markdown(claims).splitlines()
    assert lines[2] == "| good | 4 s | 1.5 s | 2.67x | 2.00x | 1.0e-05 | yes |" and lines[3].startswith("| good: memory | 10 MB | 5 MB |")
    assert {line.count("|") for line in lines} == {8}


@pytest.mark.parametrize("who", ["ours", "eager"])
def test_a_step_trains_and_a_process_of_its_own_tells_its_memory(who):
    step = steps.Step(SMOKE, who)
    losses = [step.run() for _ in range(6)]
    assert losses[-1] < losses[0]
    assert set(steps.step_memories([SMOKE], who)[0]) == {"loaded_mb", "step_mb"}


def test_rates_follow_from_the_steps():
    rates = steps.step_rates(SMOKE, (2, 4), 100.0, torch.device("cpu"), 1)
    assert np.allclose(rates.samples_per_s, rates.batch / rates.step_s) and (rates.mfu > 0).all()


def test_ten_thousand_scans_are_told_from_what_was_counted_and_what_was_measured(case):
    rows = [table.row("slab, eight views, colab network: a slice", [9.0], [3.0])]
    text = growth.ten_thousand(preset("colab"), case, rows, cpu_s=2.0)
    assert "an estimate" in text and "not measured" in text and "accelerate launch" in text and "H100" in text
    work = roofline.network_flops(preset("colab")) * len(brain_slices(case)) * 8
    assert growth._hours(10_000 * work / 150e12 / 3600) in text and growth._hours(10_000 * (work / 150e12 + 2) / 3600) in text
    assert text.count("10,000 scans") == 2 and "2 s of one core" in text


def test_prediction_is_left_out_where_nothing_is_trained(tmp_path):
    row = measures.predict_row(RunFolder(tmp_path))
    assert np.isnan(row["ratio"]) and "left out" in row["note"] and str(tmp_path) in row["note"]


def test_captions_name_the_machine():
    assert all("Processor X (2 threads)" in charts.caption(name, "Processor X (2 threads)") for name in charts.CAPTIONS)


def test_the_notebook_leaves_its_tables_and_figures(tmp_path):
    suite.execute("10_benchmark", tmp_path / "10_benchmark.ipynb", {"out_dir": str(tmp_path / "out"), "run_dir": str(tmp_path), "quick": 1})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"around.csv", "benchmark.csv", "growth.csv", "machine.json", "ratios.png", "roofline.png", "growth.png"}
    table = read_table(tmp_path / "out" / "benchmark.csv")
    measured = table[table.ours_s.notna()]
    assert len(measured) > 10 and np.allclose(measured.ratio, measured.baseline_s / measured.ours_s, rtol=1e-4)
    assert set(read_table(tmp_path / "out" / "growth.csv").along) == {"cases", "slices", "px", "views"}
    assert {"fp32", "bf16", "bandwidth", "name", "threads"} <= set(json.loads((tmp_path / "out" / "machine.json").read_text()))
