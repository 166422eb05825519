import numpy as np
import pytest
from PIL import Image

from wmhlib import vessels
from wmhlib.errors import InputError


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def test_same_seed_gives_the_same_files_however_many_images(tmp_path):
    few = vessels.write_images(tmp_path / "few", 2, seed=5, side=48, progress=False)
    vessels.write_images(tmp_path / "many", 5, seed=5, side=48, progress=False)
    vessels.write_images(tmp_path / "other", 2, seed=6, side=48, progress=False)
    one, many, other = (files(tmp_path / name) for name in ("few", "many", "other"))
    assert len(one) == 4 and one == {name: many[name] for name in one}
    assert all(one[name] != other[name] for name in one)
    assert few.case.tolist() == ["vessels_0", "vessels_1"]


def test_each_part_has_retinas_and_angiograms(tmp_path):
    table = vessels.write_images(tmp_path, 10, seed=0, side=32, progress=False)
    kinds = [Image.open(path).mode for path in table.flair]
    assert set(zip(table.group, kinds)) == {(group, mode) for group in ("training", "val", "test") for mode in ("RGB", "L")}


@pytest.mark.parametrize("retina", [True, False])
def test_vessels_are_darker_than_what_is_beside_them_and_of_several_widths(retina):
    from scipy import ndimage

    for seed in range(3):
        image, mask = vessels.make_image(seed, 160, retina)
        green = (image[..., 1] if retina else image).astype(float)
        beside = ndimage.binary_dilation(mask, iterations=4) & ~ndimage.binary_dilation(mask) & (green > 0)
        assert 0.01 < mask.mean() < 0.2 and green[mask].mean() < 0.9 * green[beside].mean()
        depth = ndimage.distance_transform_edt(mask)[mask]
        assert depth.max() > 2 > np.median(depth)
        assert image.dtype == np.uint8 and image.shape[:2] == mask.shape


def test_an_impossible_number_or_size_is_refused(tmp_path):
    for count, side in ((0, 64), (3, 8)):
        with pytest.raises(InputError, match="were asked for"):
            vessels.write_images(tmp_path, count, 1, side)
