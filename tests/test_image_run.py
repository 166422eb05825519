import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from pictures import photograph, save
from PIL import Image

from wmhlib import (
    album,
    charts,
    cohort,
    derivatives,
    evaluation,
    figures,
    methods,
    opening,
    presets,
    report,
    search,
    suite,
    training,
    vessels,
    viewer,
)
from wmhlib.adapters import budget
from wmhlib.engine import WMHInferenceEngine
from wmhlib.errors import InputError
from wmhlib.files import read_table, write_atomic, write_table
from wmhlib.workspace import RunFolder

OVERRIDES = ("inputs.modalities=['red','green','blue'] inputs.img_size=32 split.protocol=given cohort.scanners=vessels cohort.synthetic_cases=5 "
             "cohort.scale=4.0 operating.sizes_mm3=[] training.batch_size=2")


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """Cohort, split, training and operating point of five tiny images, as notebooks 01 to 04 make them: the run folder."""
    recipe = presets.preset("smoke", OVERRIDES)
    run = opening.prepare(RunFolder(tmp_path_factory.mktemp("runs") / "vessels"), recipe)
    training.fit(run, progress=False)
    table, validation = search.search(WMHInferenceEngine.from_run(run).cases(run, "val", progress=False), recipe.operating)
    write_table(table, run.search_csv)
    write_atomic(run.operating_point, json.dumps(search.choose(table, validation, recipe.operating.prefer)))
    return run


def test_a_run_on_images_is_trained_searched_and_evaluated(image_run):
    run, recipe = image_run, image_run.recipe()
    engine = WMHInferenceEngine.from_run(run)
    results = evaluation.evaluate(evaluation.save_masks(engine.cases(run, "test", progress=False), engine.point, run.predictions), engine.point, recipe.operating)
    results.write(run)
    assert results.own.case.tolist() == ["vessels_3"] and set(read_table(run.search_csv).unit) == {"voxels"}
    result, reference = Image.open(run.predictions / "vessels_3_mask.png"), Image.open(run.path / "data/masks/vessels_3.png")
    assert result.size == reference.size and set(np.unique(result)) <= {0, 255}
    found, truth = np.asarray(result) > 0, np.asarray(reference) > 0
    assert results.own.dsc.iloc[0] == pytest.approx(2 * (found & truth).sum() / (found.sum() + truth.sum()), nan_ok=True)
    assert results.own.reference_ml.iloc[0] == pytest.approx(truth.sum() / 1000)
    assert WMHInferenceEngine.from_run(run).predict_volume_probs(run.path / "data/images/vessels_3.png")[0].shape == (*truth.shape, 1)


def test_the_report_on_images_speaks_of_pixels(image_run, capsys):
    run, recipe = image_run, image_run.recipe()
    engine = WMHInferenceEngine.from_run(run)
    results = evaluation.evaluate(engine.cases(run, "test", progress=False), engine.point, recipe.operating)
    story = methods.Story.of(run, run, budget(engine.model))
    data, own = story.data, results.own
    assert data == "synthetic images"
    shown = {"cohort": figures.cohort_figure(cohort.examples(run.cases())), "split": figures.split_figure(read_table(run.split_csv)),
             "search_heatmap": figures.search_heatmap(read_table(run.search_csv), engine.point, recipe.operating.point),
             "sites": charts.site_figure(results.systems), "bland_altman": charts.bland_altman_figure(own.reference_ml, own.result_ml, own.site),
             "strata": charts.strata_figure(results.metrics, results.lesions, results.zones), "predictions": figures.predictions_figure(results.gallery),
             "calibration": charts.calibration_figure(results.calibration)}
    for name, figure in shown.items():
        report.show(figure, run, name, data, 1)
        figure.canvas.draw()
        words = " ".join(text.get_text() for text in figure.findobj(Text))
        assert not re.search(r"\b(mm[3³]?|mL|FLAIR|lesions?|voxels?)\b", words), (name, words)
        assert not {"R", "L"} & set(words.split()), name
    for table, name in ((report.results_table(results.metrics), "results"), (report.volume_table(own), "volumes"), (report.size_table(results.lesions), "sizes"),
                        (report.zone_table(results.zones, results.lesions), "zones"), (report.case_table(own, results.uncertainty), "cases")):
        report.tell(table, name, data, 1)
    missing = report.results_table(results.metrics.assign(hd95=np.nan))
    capsys.readouterr()
    report.tell(missing, "results", data, 1)
    assert "HD95 (px) 1" in (told := capsys.readouterr().out) and "(mm)" not in told
    texts = [story.paragraph(), story.limits(), story.card().to_string(), *(report.caption(name, data, 1) for name in shown)]
    assert not re.search(r"\b(mm[3³]?|mL|FLAIR|skull|ventricles|lesions?)\b", " ".join(texts)), texts
    page = viewer.viewer(viewer.case_files(evaluation.result_files(run, evaluation.best_median_worst(results.gallery))))
    assert "T1" not in texts[0] and "label 2" not in texts[0] and "red, green, blue of an image" in texts[0]
    assert '"scan":false' in page and "z = 0 mm" not in page


def test_a_folder_of_images_is_segmented_and_a_bad_one_is_named(image_run, tmp_path, capsys):
    arguments = ["predict", "--run", str(image_run.path), "--out", str(tmp_path / "out"), "--flair"]
    assert suite.main([*arguments, str(image_run.path / "data")]) == 0
    table = read_table(tmp_path / "out/images.csv")
    assert len(table) == 5 and table.status.eq("done").all()
    for path, pixels in zip(table.image, table.pixels):
        mask, prob = (np.asarray(Image.open(tmp_path / f"out/{Path(path).stem}_{kind}.png")) for kind in ("mask", "probability"))
        assert mask.shape == prob.shape == Image.open(path).size[::-1] and (mask > 0).sum() == pixels
    save(tmp_path / "photos/good.jpg", photograph(), format="JPEG")
    write_atomic(tmp_path / "photos/bad.png", b"no image")
    (tmp_path / "out/second_mask.png").mkdir()  # which cannot be written
    save(tmp_path / "photos/second.jpg", photograph(), format="JPEG")
    assert suite.main([*arguments, str(tmp_path / "photos")]) == 1
    assert "2 of 3 images failed" in capsys.readouterr().err and (tmp_path / "out/good_mask.png").exists()
    assert suite.main([*arguments, str(tmp_path / "photos"), "--t1", "t1.nii.gz"]) == 1 and "have no T1" in capsys.readouterr().err
    for place, out, message in (("photos", "photos", "choose a folder"), ("nothing", "out", "holds no image")):
        with pytest.raises(InputError, match=message):
            album.segment_images(None, tmp_path / place, tmp_path / out)
    save(tmp_path / "photos/good.bmp", photograph(), format="BMP")
    with pytest.raises(InputError, match="results of one name"):
        album.segment_images(None, tmp_path / "photos", tmp_path / "out")


def test_weights_for_images_are_not_run_on_scans(image_run, tmp_path):
    with pytest.raises(InputError, match="for images, not for scans"):
        derivatives.predict_scans(WMHInferenceEngine.from_run(image_run), derivatives.find("FLAIR.nii.gz"), tmp_path)


def test_other_images_are_evaluated_and_known_ones_refused(image_run, tmp_path):
    vessels.write_images(tmp_path / "other", 2, 7, 56, progress=False)
    folder = opening.open_evaluation(image_run, str(tmp_path / "other"), str(tmp_path / "out"))
    assert folder.cases().split.tolist() == ["test", "test"]
    with pytest.raises(InputError, match="were used to train"):
        opening.open_evaluation(image_run, str(image_run.path / "data"), str(tmp_path / "again"))


def test_the_same_images_train_the_same_weights(image_run, tmp_path):
    again = RunFolder(tmp_path / "again").open(image_run.recipe())
    for path in (image_run.cohort_csv, image_run.split_csv):
        write_atomic(again.path / path.name, path.read_bytes())
    torch.manual_seed(1)
    training.fit(again, progress=False)
    assert again.best.read_bytes() == image_run.best.read_bytes()
