import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz
import nibabel
import numpy as np
import pytest
from fuzz_inputs import scan
from fuzz_readers import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st

from wmhlib.errors import InputError, RecipeError, WMHError
from wmhlib.presets import preset
from wmhlib.settings import Recipe
from wmhlib.volumes import load_case
from wmhlib.workspace import RunFolder

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)
SMOKE = json.loads(preset("smoke").to_json())
SETTINGS = [(section, name) for section, values in SMOKE.items() if isinstance(values, dict) for name in values]
few = settings(max_examples=60, deadline=None)


def test_damaged_and_hostile_files_load_or_are_refused_and_leave_nothing():
    done = subprocess.run([sys.executable, fuzz.__file__, "--inputs", "200", "--seed", "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = Counter()
    for number, target, outcome, *_ in (line.split() for line in done.stdout.splitlines()[:-1]):
        counts[target, outcome] += int(number)
    assert sum(counts.values()) == 200 and {target for target, _ in counts} == set(TARGETS)
    assert counts["scan", "loaded"] > 10 and counts["scan", "refused"] > 10


def test_the_fuzzer_sees_what_must_not_be(monkeypatch, tmp_path):
    """A reader that raises an untyped error, takes memory or leaves a file is a fault."""
    def leaves(path, seeds):
        path.with_name("left").touch()

    for reader, outcome in ((lambda path, seeds: {}["x"], "UNTYPED KeyError"), (leaves, "LEFT ['left']"),
                            (lambda path, seeds: (_ for _ in ()).throw(MemoryError), "MEMORY"),
                            (lambda path, seeds: (_ for _ in ()).throw(InputError("no")), "refused (InputError)")):
        monkeypatch.setitem(TARGETS, "mask", (1, None, reader))
        assert fuzz.read(None, "mask", tmp_path / "x").startswith(outcome)
        (tmp_path / "left").unlink(missing_ok=True)


@few
@given(JSON, st.sampled_from(SETTINGS))
def test_any_value_of_a_setting_is_taken_as_it_is_or_refused(value, where):
    section, name = where
    text = json.dumps(SMOKE | {section: SMOKE[section] | {name: value}})
    try:
        found = getattr(getattr(Recipe.from_json(text), section), name)
    except RecipeError:
        return
    assert json.loads(json.dumps(found)) == value


@few
@given(st.dictionaries(st.sampled_from(["threshold", "min_voxels", "min_mm3", "tta", "unsure_above"]), JSON))
def test_any_operating_point_is_usable_or_refused(tmp_path_factory, change):
    run = RunFolder(tmp_path_factory.mktemp("run"))
    run.operating_point.write_text(json.dumps({"threshold": 0.5, "min_voxels": 3, "min_mm3": 0.0, "tta": True} | change))
    try:
        point = run.point()
    except InputError:
        return
    assert 0 < point["threshold"] <= 1 and point["min_voxels"] >= 1 and point["tta"] in (True, False)


@few
@given(st.lists(st.floats(width=32) | st.sampled_from([0.0, 1.0, 10.0]), min_size=16, max_size=16), st.floats(width=32), st.floats(width=32))
def test_any_affine_and_scaling_give_a_sound_case_or_are_refused(tmp_path_factory, numbers, slope, inter):
    path = Path(tmp_path_factory.mktemp("scan"), "FLAIR.nii")
    image = nibabel.Nifti1Image.from_bytes(scan())
    header = image.header
    with np.errstate(all="ignore"):
        header["srow_x"], header["srow_y"], header["srow_z"] = np.reshape(numbers[:12], (3, 4))
        header["scl_slope"], header["scl_inter"] = slope, inter
    path.write_bytes(header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes("F"))
    try:
        case = load_case(path)
    except WMHError:
        return
    assert np.isfinite(case.images).all() and case.inner.any()


@pytest.mark.parametrize("shape", [(30000, 30000, 30000), (800, 800, 400)])
def test_a_short_file_that_claims_a_huge_scan_is_refused_at_once(tmp_path, shape):
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.float64)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    (tmp_path / "FLAIR.nii").write_bytes(header.binaryblock + bytes(100))
    with pytest.raises(InputError, match="FLAIR.nii"):
        load_case(tmp_path / "FLAIR.nii")
