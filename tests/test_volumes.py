import gzip

import nibabel as nib
import numpy as np
import pytest
import torch

from wmhlib import volumes
from wmhlib.canvas import from_canvas, mask_canvas, to_canvas
from wmhlib.errors import InputError
from wmhlib.nifti import load_mask, load_volume, save_like
from wmhlib.sections import Inputs
from wmhlib.volumes import AIR, BRIGHTEST, brain_slices, case_canvas, load_case, normalise, reorient

AFFINES = {
    "RAS": np.diag([1.0, 1.0, 3.0, 1.0]), "LAS": np.diag([-0.9, 0.9, 6.0, 1.0]), "LPS": np.diag([-1.2, -1.0, 3.0, 1.0]),
    "PSR": np.array([[0, 0, 1.5, 0], [-1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]]),  # sagittal
    "LPI": np.diag([-1.0, -0.9, -3.0, 1.0]), "IRP": np.array([[0, 1.0, 0, 0], [0, 0, -1.0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1]]),
    "oblique": np.array([[0.97, 0.05, 0.1, -80], [-0.04, 0.98, 0.2, -90], [-0.03, -0.06, 3.0, -40], [0, 0, 0, 1.0]]),
}


@pytest.fixture
def head(tmp_path):
    """Writes an ellipsoidal head of 130 x 170 x 120 mm (scalp 3, skull dark, brain about 1) and gives its path."""

    def write(affine=AFFINES["LAS"], name="FLAIR.nii.gz", change=lambda data: data):
        spacing = nib.affines.voxel_sizes(affine)
        order = nib.io_orientation(affine)[:, 0].astype(int)
        extent = np.array([150.0, 190.0, 140.0])[order]
        shape = np.maximum(4, (extent / spacing).astype(int))
        mm = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
        radii = np.array([65.0, 85.0, 60.0])[order]
        r = np.sqrt(sum((a / q) ** 2 for a, q in zip(np.meshgrid(*mm, indexing="ij"), radii, strict=True)))
        noise = np.random.default_rng(0).normal(0, 0.05, shape)
        data = np.where(r < 0.84, 1.0, np.where(r < 0.92, 0.1, np.where(r < 1, 3.0, 0.0))) + abs(noise)
        path = tmp_path / name
        nib.save(nib.Nifti1Image(change((100 * data).astype(np.float32)), affine), path)
        return path

    return write


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_canvas_and_back_is_the_scan_itself_in_any_orientation(head, affine):
    case = load_case(head(affine))
    blob = (case.volume.data > 150).astype(np.float32)
    back = from_canvas(to_canvas(blob, case.grid, 512), case.grid)
    assert back.shape == blob.shape
    assert 2 * ((back > 0.5) * blob).sum() / ((back > 0.5).sum() + blob.sum()) > 0.98


def test_canvas_shows_the_head_upright_whatever_the_files_orientation(head):
    canvases = []
    for affine in (AFFINES["RAS"], np.diag([-1.0, -1.0, 3.0, 1.0])):
        case = load_case(head(affine))
        world = nib.affines.apply_affine(affine, np.argwhere(np.ones(case.volume.data.shape)))
        front = (world[:, 1] > np.median(world[:, 1]) + 60).reshape(case.volume.data.shape)
        canvases.append(to_canvas(front.astype(np.float32), case.grid, 64))
    for canvas in canvases:
        assert canvas[:, :32].sum() > 0 and not canvas[:, 33:].any()


def test_normalisation_ignores_units_scalp_and_lesions(head):
    plain = load_case(head())
    scaled = load_case(head(change=lambda data: data * 37))
    assert np.allclose(plain.images, scaled.images, atol=1e-3)
    inside = plain.inner

    def with_lesions(data):
        data = data.copy()
        lesion = np.random.default_rng(1).random(data.shape) < 0.3
        data[inside & lesion] = 200
        return data

    heavy = load_case(head(change=with_lesions))
    tissue = inside & (heavy.volume.data < 150)
    assert abs(np.median(heavy.images[0][tissue])) < 0.3 and heavy.images[0][inside & ~tissue].min() > 5


def test_a_brain_that_was_z_scored_alone_is_normalised_as_it_was_before(head):
    def stripped(data):
        return np.where(data > 50, np.minimum(data, 130), 0)

    def scored(data):
        brain, values = stripped(data) > 0, stripped(data)
        return np.where(brain, (values - values[brain].mean()) / values[brain].std(), 0)

    plain, found = load_case(head(change=stripped)), load_case(head(name="scored.nii.gz", change=scored))
    assert np.array_equal(plain.inner, found.inner)
    np.testing.assert_allclose(found.images[0][plain.inner], plain.images[0][plain.inner], atol=1e-3)
    assert (found.images[0][plain.volume.data == 0] == found.images[0].min()).all()


@pytest.mark.parametrize("rescale", [
    lambda data: 2 * data / data.max() - 1, lambda data: np.clip(2 * data / np.percentile(data, 99) - 1, -1, 1), lambda data: (data - data.mean()) / data.std(),
    lambda data: (data - 110) / 12, lambda data: data - 1000], ids=["-1 to 1", "clipped", "z-scored", "z-scored by the brain", "all below 0"])
def test_a_head_rescaled_around_0_is_the_same_head(head, rescale):
    plain, found = load_case(head()), load_case(head(name="rescaled.nii.gz", change=rescale))
    assert np.array_equal(plain.inner, found.inner) and (plain.grid.columns, plain.grid.rows) == (found.grid.columns, found.grid.rows)
    np.testing.assert_allclose(found.images[0][plain.inner], plain.images[0][plain.inner], atol=0.02)


def test_ringing_around_a_resampled_head_moves_nothing(head):
    def ringing(data):
        return np.where(data > 8, data, np.where(np.random.default_rng(0).random(data.shape) < 0.2, -15, 0))

    volume = load_volume(head(change=ringing))
    assert (volume.data < 0).mean() > 0.05 and volumes._with_dark_air(volume.data) is volume.data


@pytest.mark.parametrize("low", [-30, -1024], ids=["ringing", "padding"])
def test_what_a_resampling_leaves_below_0_is_not_the_air(head, low):
    def darkened(data):
        data = data.copy()
        data[:5] = low
        return data

    plain, found = load_case(head()), load_case(head(name="dark.nii.gz", change=darkened))
    assert np.array_equal(plain.inner, found.inner)


def test_gaussian_tissue_gets_a_deviation_of_one_and_the_extremes_the_ends_of_the_range():
    data = np.random.default_rng(0).normal(300, 40, (100, 100, 20))
    data[0, 0, :2] = -1e4, 1e4
    found = normalise(data, np.ones(data.shape, bool))
    assert found.std() == pytest.approx(1, rel=0.05) and abs(found.mean()) < 0.1
    assert found[0, 0, :2].tolist() == [AIR, BRIGHTEST] == [found.min(), found.max()]


def test_inner_region_holds_brain_and_no_scalp(head):
    case = load_case(head(AFFINES["RAS"]))
    assert 0.05 < case.inner.mean() < 0.3 and case.volume.data[case.inner].max() < 150


def test_absent_t1_is_blank_and_a_given_one_is_normalised(head):
    inputs = Inputs(modalities=("flair", "t1"), img_size=64)
    flair = head()
    without = load_case(flair, inputs=inputs)
    assert case_canvas(without, 64).shape[0] == 2 and not case_canvas(without, 64)[1].any()
    given = load_case(flair, t1=flair, inputs=inputs)
    torch.testing.assert_close(case_canvas(given, 64)[1], case_canvas(given, 64)[0])
    with pytest.raises(InputError, match="T1.nii.gz has shape"):
        load_case(flair, t1=head(AFFINES["RAS"], "T1.nii.gz"), inputs=inputs)


def test_outputs_keep_affine_header_and_orientation(head, tmp_path):
    volume = load_volume(head(AFFINES["oblique"]))
    array = np.random.default_rng(0).random(volume.data.shape).astype(np.float32)
    image = nib.load(save_like(array, volume, tmp_path / "out" / "prob.nii.gz"))
    assert np.array_equal(image.affine, volume.affine) and image.get_data_dtype() == np.float32
    assert np.array_equal(np.asarray(image.dataobj), array)
    for field in ("pixdim", "qform_code", "sform_code", "xyzt_units"):
        assert np.array_equal(image.header[field], volume.image.header[field])


def test_outputs_do_not_inherit_the_scans_scaling_and_window(head, tmp_path):
    image = nib.load(head())
    scan = nib.Nifti1Image(np.asarray(image.dataobj).astype(np.int16), image.affine)
    scan.header.set_slope_inter(2, 1)
    scan.header["cal_min"], scan.header["cal_max"] = 5, 900
    nib.save(scan, tmp_path / "scaled.nii.gz")
    volume = load_volume(tmp_path / "scaled.nii.gz")
    assert volume.data.max() == 2 * scan.dataobj.max() + 1
    for array in (volume.data > 150).astype(np.uint8), volume.data / 7:
        found = nib.load(save_like(array, volume, tmp_path / "out.nii.gz"))
        assert np.array_equal(np.asarray(found.dataobj), array) and (found.dataobj.slope, found.dataobj.inter) == (1, 0)
        assert found.header["cal_min"] == found.header["cal_max"] == 0


def bad(path, name, content):
    path = path.parent / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        nib.save(nib.Nifti1Image(content, np.eye(4)), path)
    return path


@pytest.mark.parametrize("name, content, message", [
    ("text.nii.gz", gzip.compress(b"hello" * 200, mtime=0), "not a NIfTI"), ("raw.nii", b"hello" * 200, "not a NIfTI"),
    ("table.csv", b"a,b", "not a NIfTI"), ("empty.nii.gz", b"", "empty.nii.gz"),
    ("time.nii.gz", np.zeros((4, 4, 4, 3), np.float32), "expected one 3-D volume"),
    ("flat.nii.gz", np.full((4, 4, 4), 7, np.float32), "constant"),
    ("nan.nii.gz", np.where(np.arange(64).reshape(4, 4, 4) == 5, np.nan, 1).astype(np.float32), "1 voxels that are NaN"),
    ("complex.nii.gz", np.ones((4, 4, 4), np.complex64), "expected numbers")])
def test_a_bad_scan_is_named_with_what_was_found(head, name, content, message):
    path = bad(head(), name, content)
    with pytest.raises(InputError, match=message) as error:
        load_volume(path)
    assert name in str(error.value)


def test_a_truncated_gzip_is_named(head):
    path = head()
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="FLAIR.nii.gz is damaged or incomplete"):
        load_volume(path)
    with pytest.raises(InputError, match="does not exist"):
        load_volume(path.with_name("nowhere.nii.gz"))


def test_a_mask_of_another_grid_or_with_other_labels_is_refused_and_an_empty_one_is_legal(head, tmp_path):
    volume = load_volume(head())

    def mask(array, affine=volume.affine):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / "wmh.nii.gz")
        return load_mask(tmp_path / "wmh.nii.gz", volume)

    empty = np.zeros(volume.data.shape, np.uint8)
    assert not mask(empty).any()
    with pytest.raises(InputError, match="wmh.nii.gz has shape"):
        mask(empty[1:])
    with pytest.raises(InputError, match="lies elsewhere in space"):
        mask(empty, volume.affine + np.array([[0, 0, 0.05, 0]] + [[0] * 4] * 3))
    with pytest.raises(InputError, match="labels 0, 3"):
        mask(empty + 3 * (np.arange(empty.size).reshape(empty.shape) == 9).astype(np.uint8))


def test_labels_that_a_scaled_integer_file_rounds_are_read_as_they_were(head, tmp_path):
    volume = load_volume(head())
    labels = (np.arange(volume.data.size) % 3).reshape(volume.data.shape)
    image = nib.Nifti1Image(labels.astype(np.float32), volume.affine)
    image.set_data_dtype(np.int16)
    nib.save(image, tmp_path / "wmh.nii.gz")
    assert set(np.unique(nib.load(tmp_path / "wmh.nii.gz").get_fdata())) != {0, 1, 2}
    assert np.array_equal(load_mask(tmp_path / "wmh.nii.gz", volume), labels)


def test_a_scan_without_contrast_inside_the_head_is_refused():
    with pytest.raises(InputError, match="no tissue contrast"):
        normalise(np.ones((5, 5, 5)), np.ones((5, 5, 5), bool), "x.nii")


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_every_lesion_voxel_keeps_a_pixel_near_it(head, affine):
    case = load_case(head(affine))
    lone = np.zeros(case.volume.data.shape, bool)
    lone[tuple(np.argwhere(case.inner)[::97].T)] = True
    canvas = mask_canvas(lone, case.grid, 256)
    assert canvas.sum() >= 0.99 * lone.sum()
    assert (from_canvas(canvas.float(), case.grid)[lone] > 0.1).all()


def test_real_scans_find_head_and_lesions(real_scans):
    for flair in sorted(real_scans.glob("sub-*/anat/*_FLAIR.nii.gz")):
        folder = real_scans / "derivatives" / "manual" / flair.parts[-3] / "anat"
        case = load_case(flair, mask=next(folder.glob("*label-WMH_mask.nii.gz")))
        lesion = case.mask == 1
        assert case.inner[lesion].mean() > 0.95 and np.median(case.images[0][lesion]) > 1.5
        back = from_canvas(to_canvas(lesion, case.grid, 512), case.grid) > 0.5
        (upright,), _ = reorient(case.volume.affine, "LPS", lesion)
        assert set(np.flatnonzero(upright.any((0, 1)))) <= set(brain_slices(case).tolist())
        assert 2 * (back & lesion).sum() / (back.sum() + lesion.sum()) > 0.99


@pytest.mark.parametrize("axes", AFFINES)
def test_slices_written_one_by_one_are_those_written_at_once(head, axes):
    case = load_case(head(AFFINES[axes]))
    canvas, out = case_canvas(case, 64)[0], np.zeros(case.grid.shape, np.float32)
    for place in torch.arange(case.grid.depth).flip(0):
        torch.testing.assert_close(case_canvas(case, 64, place[None])[0, 0], canvas[place])
        from_canvas(canvas[place][None], case.grid, place[None], out)
    np.testing.assert_array_equal(out, from_canvas(canvas, case.grid))


def test_air_around_the_scan_is_air_on_the_canvas(head):
    case = load_case(head(), inputs=Inputs(fov=400.0))
    torch.testing.assert_close(case_canvas(case, 64)[0, :, 0], torch.full((len(case_canvas(case, 64)[0]), 64), AIR))
    assert case.grid.columns[1] * case.volume.spacing[0] == pytest.approx(400, abs=1)


def test_a_brain_wider_than_the_field_of_view_stays_on_the_canvas(head):
    case = load_case(head(), inputs=Inputs(fov=100.0))
    back = from_canvas(to_canvas(case.inner.astype(np.float32), case.grid, 256), case.grid)
    assert (back[case.inner] > 0.1).all()


def test_a_brain_far_darker_than_an_open_ring_of_fat_is_found(head):
    def far_brighter_in_front(data):
        fat = data > 250
        fat[:, : fat.shape[1] // 2] = False
        return np.where(fat, 4 * data, np.where(data > 250, 20, data))

    case = load_case(head(change=far_brighter_in_front))
    assert np.median(case.volume.data[case.inner]) < 150  # the brain's brightness is 100, the fat's 1200
