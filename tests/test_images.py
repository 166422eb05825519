import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import photograph, save
from PIL import Image

from wmhlib import album, cohort, images, presets, splits, volumes, wording
from wmhlib.batches import drop_modalities
from wmhlib.canvas import from_canvas
from wmhlib.engine import Prediction
from wmhlib.errors import InputError, RecipeError
from wmhlib.files import write_atomic
from wmhlib.sections import Inputs

RGB = Inputs(modalities=("red", "green", "blue"), img_size=64)


@pytest.fixture
def image_set(tmp_path):
    """Makes a set of three images and their masks, `image_set(table)` with the text of data_split.csv."""

    def make(table="imgs,split\na.png,train\nb,val\nc.png,test\n"):
        for seed, name in enumerate("abc"):
            save(tmp_path / f"images/{name}.png", photograph(seed=seed))
            mask = np.zeros((45, 70), np.uint8)
            mask[10:20, 30:33] = 255
            save(tmp_path / f"masks/{name}.png", mask)
        write_atomic(tmp_path / images.TABLE, table)
        return tmp_path

    return make


@pytest.mark.parametrize("header", ["imgs,split", "Image,Split", ",img,split", "name;split"])
def test_a_set_is_found_with_its_own_split(image_set, header):
    start, end = ("0," if header.startswith(",") else ""), ";" if ";" in header else ","
    folder = image_set(f"{header}\n{start}a.png{end}train\n{start}images/b.png{end}Val\n{start}c{end}test\n")
    cases = cohort.find_cases(folder)
    assert cases.case.tolist() == ["a", "b", "c"] and cases.group.tolist() == ["training", "val", "test"]
    assert cases["mask"][1] == str(folder / "masks/b.png") and cases.flair[2] == str(folder / "images/c.png")
    checked = cases.merge(cohort.check_cases(cases, RGB), on=["case", "site"])
    assert checked.lesion_ml.tolist() == [0.03] * 3 and checked.warnings.fillna("").eq("").all() and cohort.describe(cases) == "images"
    split = splits.split_cases(checked, presets.preset("vessels"))
    assert split.split.tolist() == ["train", "val", "test"]


@pytest.mark.parametrize("change, message", [
    (lambda folder: (folder / "masks/b.png").unlink(), "image 'b': masks/ has no file"),
    (lambda folder: (folder / "images/c.png").unlink(), "image 'c.png': images/ has no file"),
    (lambda folder: save(folder / "images/b.jpg", photograph(), format="JPEG"), "images/ has b.jpg and b.png"),
    (lambda folder: save(folder / "masks/a.bmp", photograph(), format="BMP"), "masks/ has a.bmp and a.png"),
    (lambda folder: write_atomic(folder / images.TABLE, "imgs,split\na.png,train\na,val\n"), "it is also in line 2"),
    (lambda folder: write_atomic(folder / images.TABLE, "imgs,split\na.png,dev\n"), "its split is 'dev'"),
    (lambda folder: write_atomic(folder / images.TABLE, "id,split\na.png,train\n"), "has the columns id, split"),
    (lambda folder: write_atomic(folder / images.TABLE, "imgs,split\n"), "names no image"),
    (lambda folder: (folder / "images").rename(folder / "pictures"), "images does not exist")])
def test_a_set_that_leaves_something_open_is_refused(image_set, change, message):
    folder = image_set()
    change(folder)
    with pytest.raises(InputError, match=re.escape(message)):
        cohort.find_cases(folder)


@pytest.mark.parametrize("change, message", [
    (lambda folder: save(folder / "masks/b.png", np.zeros((45, 71), np.uint8)), "b.png has 71 x 45 pixels"),
    (lambda folder: write_atomic(folder / "images/b.png", b"no image"), "images/b.png is no PNG"),
    (lambda folder: write_atomic(folder / "images/b.png", (folder / "images/b.png").read_bytes()[:900]), "images/b.png is no PNG"),
    (lambda folder: save(folder / "masks/b.png", np.arange(45 * 70, dtype=np.uint8).reshape(45, 70) % 3), "masks/b.png holds 3 values from 0 to 2"),
    (lambda folder: (folder / "masks/b.png").unlink() or save(folder / "masks/b.tiff", np.full((45, 70), np.nan, np.float32), format="TIFF"), "masks/b.tiff holds pixels that are no numbers"),
    (lambda folder: save(folder / "images/b.png", np.full((45, 70), 7, np.uint8)), "images/b.png is constant"),
    (lambda folder: save(folder / "images/b.png", np.pad(np.full((41, 66), 99, np.uint8), 2)), "images/b.png shows one value in all of its 2706 pixels"),
    (lambda folder: save(folder / "images/b.png", photograph(seed=0)), "holds the same scan as case a")])
def test_an_image_that_cannot_be_used_is_named(image_set, change, message):
    folder = image_set()
    change(folder)
    with pytest.raises(InputError, match=re.escape(message)):
        cohort.check_cases(cohort.find_cases(folder), RGB)


def test_scans_and_images_are_not_taken_for_each_other(image_set, tiny_nifti):
    with pytest.raises(InputError, match="is an image, and inputs.modalities is flair"):
        cohort.check_cases(cohort.find_cases(image_set()))
    with pytest.raises(InputError, match="is no image, and inputs.modalities is red, green, blue"):
        volumes.load_case(tiny_nifti("FLAIR.nii.gz"), inputs=RGB)
    for overrides in ("inputs.modalities=['grey']", "inputs.modalities=['flair','red']", "inputs.modalities=['grey'] split.protocol=given inputs.context=1",
                      "cohort.scanners=vessels cohort.synthetic_cases=2", "inputs.modalities=[]"):
        with pytest.raises(RecipeError):
            presets.preset("colab", overrides)


def test_full_size_recipes_take_images_and_no_colour_is_left_out():
    recipe = presets.preset("colab", "inputs.modalities=['red','green','blue'] split.protocol=given operating.sizes_mm3=[]")
    batch = torch.ones(50, recipe.inputs.channels, 2, 2)
    assert recipe.inputs.images and recipe.inputs.channels == 3 and drop_modalities(batch, recipe.inputs, torch.Generator()) is batch


def test_data_without_a_whole_split_are_not_split(image_set):
    cases = cohort.find_cases(image_set("imgs,split\na,train\nb,train\nc,test\n"))
    with pytest.raises(InputError, match=r"no split of their own .*found: train, test"):
        splits.split_cases(cases.assign(lesion_ml=1.0), presets.preset("vessels"))


@pytest.mark.parametrize("height, width", [(37, 91), (91, 37), (20, 21), (300, 173)])
def test_an_image_of_any_size_comes_back_from_the_canvas_as_it_was(tmp_path, height, width):
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([127 + 60 * np.sin(3 * x / width + k) * np.cos(2 * y / height) for k in range(3)], -1).astype(np.uint8)
    case = volumes.load_case(save(tmp_path / "a.png", smooth), inputs=RGB)
    canvas = volumes.case_canvas(case, 128)
    assert canvas.shape == (3, 1, 128, 128) and case.images.shape == (3, height, width, 1)
    back = np.stack([from_canvas(channel, case.grid) for channel in canvas])
    inner = np.s_[:, 3:-3, 3:-3]
    assert back.shape == case.images.shape and np.abs(back - case.images)[inner].max() < 0.25
    shown = canvas[0, 0] > 0.9 * volumes.AIR
    assert shown.any(0).sum() / shown.any(1).sum() == pytest.approx(width / height, rel=0.05), "the aspect ratio stays"


def test_an_images_rows_and_columns_stay_where_they_are(tmp_path):
    pixels = photograph(40, 80)
    pixels[:10, :20] = 255  # upper left
    case = volumes.load_case(save(tmp_path / "a.png", pixels), inputs=RGB)
    canvas = volumes.case_canvas(case, 80)[0, 0]
    assert canvas[21:29, 1:19].min() > canvas[31:59, 21:].max() and (canvas[:19] == volumes.AIR).all()
    from wmhlib.slices import to_display
    (shown,), spacing = to_display(case.volume.affine, case.volume.data)
    assert np.array_equal(shown[..., 0], pixels.mean(-1, dtype=np.float32)) and spacing.tolist() == [1, 1, 1]


def test_grey_colour_and_sixteen_bits_of_one_picture_are_one(tmp_path):
    grey = photograph()[..., 0]
    formats = {"a.png": grey, "a.bmp": np.stack([grey] * 3, -1), "a.tif": grey.astype(np.uint16) * 257}
    loaded = [volumes.load_case(save(tmp_path / name, data, format={"png": "PNG", "bmp": "BMP", "tif": "TIFF"}[name[2:]]), inputs=RGB).images
              for name, data in formats.items()]
    assert all(np.allclose(one, loaded[0], atol=1e-4) for one in loaded[1:]) and np.array_equal(loaded[0][0], loaded[0][2])


def test_a_channel_is_one_of_the_colours_or_their_mean(tmp_path):
    path = save(tmp_path / "a.png", photograph())
    colours = volumes.load_case(path, inputs=RGB).images
    green, grey = (volumes.load_case(path, inputs=Inputs(modalities=(name,))).images for name in ("green", "grey"))
    assert np.array_equal(green[0], colours[1]) and np.corrcoef(grey.ravel(), colours.mean(0).ravel())[0, 1] > 0.999
    assert grey.std() == pytest.approx(1, rel=0.01)


def test_a_stack_of_pages_is_no_image(tmp_path):
    pages = [Image.fromarray(photograph(seed=seed)) for seed in range(2)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match="stack.tif holds 2 images"):
        images.read(tmp_path / "stack.tif")


def test_normalisation_forgives_exposure_and_leaves_the_dark_surround_out(tmp_path):
    picture = photograph(90, 90).astype(int)
    y, x = np.mgrid[-45:45, -45:45]
    picture[np.hypot(y, x) > 40] = 0
    dim, bright = (volumes.load_case(save(tmp_path / f"{k}.png", (picture * k).astype(np.uint8)), inputs=RGB) for k in (0.5, 1))
    assert np.array_equal(dim.inner, bright.inner) and bright.inner.mean() == pytest.approx(np.pi * 40**2 / 90**2, rel=0.02)
    assert np.abs(dim.images - bright.images)[:, bright.inner].mean() < 0.1
    for channel in bright.images:
        assert np.median(channel[bright.inner]) == pytest.approx(0, abs=1e-5)
    assert bright.images[0][~bright.inner].max() == volumes.AIR, "darkness of a red picture lies far below its median"


def test_a_lossy_mask_is_cut_in_the_middle_and_one_of_ones_is_one(tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[8:24, 8:24] = 1
    assert np.array_equal(images.read_mask(save(tmp_path / "one.png", mask)), mask > 0)
    assert np.array_equal(images.read_mask(save(tmp_path / "lossy.jpg", 255 * mask, format="JPEG", quality=40)), mask > 0)
    for name, data in (("dark.jpg", mask), ("full.png", mask * 0 + 255)):
        with pytest.raises(InputError, match=name):
            images.read_mask(save(tmp_path / name, data, format="JPEG" if name.endswith("jpg") else "PNG"))


def test_words_of_scans_become_words_of_images():
    assert wording.of_images("Lesion volume (mL), HD95 (mm), < 14 mm3; FLAIR z-score") == "Marked area (kpx), HD95 (px), < 14 px; image z-score"
    assert wording.of_images("lesions of case lesion-3, scan_1") == "objects of case lesion-3, scan_1"


def test_words_are_those_of_the_kind_of_scan_whatever_its_name():
    assert wording.words("FLAIR scan sub-01_acq-T1wreg") is str and wording.words("real images of FLAIR") is str
    assert wording.words("T1w scan sub-01") is wording.words("real and synthetic T1w scans") is wording.of_strokes and wording.words("images") is wording.of_images


@pytest.mark.parametrize("tta, grey", [(True, 204), (False, 51)])
def test_the_probability_of_an_image_is_that_of_the_operating_point(tmp_path, tta, grey):
    engine = SimpleNamespace(recipe=SimpleNamespace(inputs=RGB), point=dict(tta=tta), segment=lambda found: found.prob > 1,
                             predict=lambda case: Prediction(case, *(np.full(case.grid.shape, p, np.float32) for p in (0.2, 0.8)), 0))
    album.segment_images(engine, save(tmp_path / "a.png", photograph()), tmp_path / "out", progress=False)
    assert set(np.unique(Image.open(tmp_path / "out/a_probability.png"))) == {grey}
