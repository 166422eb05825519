import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from wmhlib.errors import InputError
from wmhlib.viewer import _area, _content, _outline, case_files, viewer


def points(path):
    """The rings of a path of `_outline` as arrays of (x, y)."""
    rings = []
    for ring in re.findall(r"M(-?\d+ -?\d+)l([^z]*)z", path):
        start, steps = (np.array(part.split(), int).reshape(-1, 2) for part in ring)
        rings.append(np.cumsum(np.vstack([start, steps]), axis=0))
    return rings


def grey(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), float)


@pytest.mark.parametrize("codes", ("RAS", "LPS", "PSR", "ILA"))
def test_slices_are_the_same_however_the_file_lies(disc_case, codes):
    content = _content(disc_case(codes=codes) | {"result": disc_case(codes=codes)["reference"] == 1})
    assert content == _content(disc_case() | {"result": disc_case()["reference"] == 1})
    assert content["slices"][content["start"]]["z"] == 62


def test_the_patients_right_is_on_the_left(disc_case):
    content = _content(disc_case())
    ring, = points(content["slices"][content["start"]]["paths"][0])
    assert ring[:, 0].max() < content["voxels"][0]  # half voxels: within the left half; the lesion lies on the right


def test_label_2_is_neither_hit_nor_error(disc_case):
    case = disc_case()
    content = _content(case | {"result": case["reference"] == 2})
    paths = dict(zip(content["layers"], content["slices"][content["start"]]["paths"]))
    assert paths["missed"] and not paths["found"] and not paths["false"] and not paths["result"]


def test_the_error_map_covers_each_voxel_once(disc_case):
    case = disc_case()
    result = np.roll(case["reference"] == 1, 1, axis=0)
    content = _content(case | {"result": result})
    paths = dict(zip(content["layers"], content["slices"][content["start"]]["paths"]))
    runs = {name: sum(int(n) // 2 for n in re.findall(r"h(\d+)v2", paths[name])) for name in ("found", "false", "missed")}
    assert runs == {"found": 6, "false": 3, "missed": 3}


def test_outlines_run_through_the_edge_of_the_mask():
    mask = np.zeros((5, 6), bool)
    mask[1, 2] = mask[3:, 4:] = True
    single, corner = sorted(points(_outline(mask)), key=len)
    assert sorted(map(tuple, single)) == [(4, 3), (5, 2), (5, 4), (6, 3)]
    assert corner.max(0).tolist() == [12, 10] and _outline(mask & False) == ""
    assert _area(mask) == "M4 2h2v2h-2zM8 6h4v2h-4zM8 8h4v2h-4z"


def test_proportions_are_true_and_slices_without_head_left_out(disc_case):
    case = disc_case()
    flair = np.pad(case["flair"], ((0, 0), (0, 0), (3, 2)))
    affine = case["affine"] @ np.diag([1, 2, 1, 1])
    affine[:3, 3] -= 3 * affine[:3, 2]
    content = _content(dict(case="a", site="b", affine=affine, flair=flair))
    assert [s["z"] for s in content["slices"]] == [50, 53, 56, 59, 62, 65] and content["start"] == 3
    width, height = content["voxels"]
    assert content["size"] == [width, 2 * height] and 33 <= width <= 40 and content["layers"] == []


def test_one_window_serves_all_slices(disc_case):
    case = disc_case(lesions=False)
    case["flair"] = case["flair"] * np.linspace(0.5, 1, 6, dtype=np.float32)
    levels = [grey(s["image"]).max() for s in _content(case)["slices"]]
    assert levels == sorted(levels) and levels[0] < 0.7 * levels[-1]


def test_a_case_opens_on_its_slice_with_most_lesion_and_without_one_in_the_middle(disc_case):
    assert _content(disc_case())["start"] == 4 and _content(disc_case(lesions=False))["start"] == 3


def test_the_fragment_holds_its_slices_and_loads_nothing(disc_case):
    html = viewer([disc_case(), disc_case("Singapore_1", "Singapore")])
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.S)[1])
    assert [case["title"] for case in data] == ["Utrecht_1 · Utrecht", "Singapore_1 · Singapore"]
    assert html.count("<option>") == 2 and "error map" not in html
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(| id=""", html)
    assert grey(data[0]["slices"][0]["image"]).shape == tuple(data[0]["voxels"][::-1])


def test_a_name_cannot_break_out_of_the_page(disc_case):
    html = viewer([disc_case("</script><b>")])
    assert "</script><b>" not in html and html.count("</script>") == 2


def test_a_large_scan_stays_small():
    x, y, z = np.mgrid[-1:1:240j, -1:1:240j, -1:1:48j]
    noise = np.random.default_rng(0).normal(0, 4, x.shape)
    flair = (100 * (np.hypot(np.hypot(x, y), z) < 0.9) + noise).astype(np.float32)
    lesion = np.hypot(np.hypot(x - 0.2, y), z) < 0.2
    assert len(viewer([dict(case="a", site="b", affine=np.diag([1, 1, 3, 1.0]), flair=flair, reference=lesion, result=lesion)])) < 1_000_000


def test_cases_come_from_files(tiny_nifti):
    mask = np.zeros((24, 28, 10), np.uint8)
    mask[10:13, 10:13, 5] = 1
    rows = pd.DataFrame([dict(case="a", site="b", flair=tiny_nifti("FLAIR.nii.gz"), mask=tiny_nifti("wmh.nii.gz", data=mask),
                              result="", dsc=np.nan)])
    case, = case_files(rows)
    assert np.array_equal(case["reference"], mask) and case["result"] is None
    assert "Dice" not in viewer([case]) and _content(case)["layers"] == ["reference"]


def test_no_case_is_an_error():
    with pytest.raises(InputError, match="no case to view"):
        viewer([])
