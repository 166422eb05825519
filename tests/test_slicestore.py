import os
import sys
import tempfile

import pytest
import torch

from wmhlib.canvas import mask_canvas
from wmhlib.errors import InputError
from wmhlib.sections import Inputs
from wmhlib.slicestore import load_slices
from wmhlib.volumes import case_canvas, load_case


def test_slices_of_a_cohort_lie_in_a_file_without_a_name_and_not_in_memory(split_cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cases, inputs = load_slices(split_cohort[0], Inputs(img_size=32, modalities=("flair", "t1")), progress=False), Inputs(img_size=32)
    assert not list(tmp_path.iterdir())
    for case, row in zip(cases, split_cohort[0].itertuples(), strict=True):
        scan = load_case(row.flair, None, row.mask, inputs)
        assert case.case == row.case and torch.equal(case.images[:1], case_canvas(scan, 32).half()) and case.images.shape[0] == 2
        assert torch.equal(case.labels == 1, mask_canvas(scan.mask == 1, scan.grid, 32))
    if sys.platform == "linux":
        inside = [line for line in open("/proc/self/maps") if str(tmp_path) in line and "deleted" in line]
        first, last = (int(n, 16) for n in inside[0].split()[0].split("-"))
        assert len(inside) == 1 and all(first <= t.data_ptr() < last for case in cases for t in (case.images, case.labels))
    assert load_slices(split_cohort[0][:0], inputs, progress=False) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full disk to write to")
def test_a_disk_that_is_full_names_the_folder_and_the_way_out(split_cohort, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "wb"))
    with pytest.raises(InputError, match=f"{tempfile.gettempdir()} has no room for the images of 9 cases .*No space left.*TMPDIR"):
        load_slices(split_cohort[0], Inputs(img_size=32), progress=False)
