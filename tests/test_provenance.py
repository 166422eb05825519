import nibabel
import numpy as np
import pandas as pd
import pytest
from predicting import Engine, run, sidecar

from wmhlib import derivatives, provenance, scanpages
from wmhlib.files import read_table

pytestmark = pytest.mark.usefixtures("quick_figure")


def test_a_run_again_skips_what_is_done_and_gives_the_same_table(scan, tmp_path, capsys):
    paths, out = [scan("sub-01_FLAIR.nii.gz"), scan("sub-02_FLAIR.nii.gz")], tmp_path / "out"
    first, second = run(Engine(), paths, out), Engine()
    before = (out / derivatives.TABLE).read_bytes()
    pd.testing.assert_frame_equal(derivatives.predict_scans(second, derivatives.find(paths), out), first)
    assert not second.seen and capsys.readouterr().out.count("(done before)") == 2
    assert (out / derivatives.TABLE).read_bytes() == before


@pytest.mark.parametrize("other", [Engine(weight=1.0), Engine(threshold=0.95), Engine(min_mm3=3.0), Engine(unsure_above=0.1),
                                   Engine(recipe="operating.views=4")], ids=["weights", "threshold", "size", "limit", "views"])
def test_other_weights_or_another_point_make_it_again(scan, tmp_path, other):
    flair, out = scan("sub-01_FLAIR.nii.gz"), tmp_path / "out"
    run(Engine(), flair, out)
    before = sidecar(out)["MadeWith"]
    run(other, flair, out)
    assert other.seen == ["sub-01_FLAIR.nii.gz"] and sidecar(out)["MadeWith"] != before


def test_what_other_code_made_is_made_again(scan, tmp_path, monkeypatch):
    flair, out, engine = scan("sub-01_FLAIR.nii.gz"), tmp_path / "out", Engine()
    for code, times in (("a", 1), ("a", 1), ("b", 2)):
        monkeypatch.setattr(provenance, "source_sha256", lambda code=code: code)
        run(engine, flair, out)
        assert len(engine.seen) == times


def test_a_changed_input_or_a_damaged_result_is_made_again(scan, tmp_path):
    flair, out, engine = scan("sub-01_FLAIR.nii.gz"), tmp_path / "out", Engine()
    run(engine, flair, out)
    scan("sub-01_FLAIR.nii.gz", spacing=(1, 1, 2))
    run(engine, flair, out)
    for ending in ("mask.nii.gz", "probseg.nii.gz", "lesions.tsv", "mask.json"):
        path = out / "sub-01" / "anat" / f"sub-01_space-FLAIR_label-WMH_{ending}"
        path.write_bytes(path.read_bytes()[:-9])
        run(engine, flair, out)
    assert len(engine.seen) == 6 and sidecar(out)["Result"]["volume_ml"] == pytest.approx(0.036)


def test_a_mask_that_was_edited_is_not_lost(scan, tmp_path, capsys):
    flair, out, engine = scan("sub-01_FLAIR.nii.gz"), tmp_path / "out", Engine()
    run(engine, flair, out)
    path = out / "sub-01" / "anat" / "sub-01_space-FLAIR_label-WMH_mask.nii.gz"
    image = nibabel.load(path)
    edited = nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine)
    nibabel.save(edited, path)
    kept = path.read_bytes()
    for flairs in (flair, scan("sub-02_FLAIR.nii.gz")):  # named again or not
        run(engine, flairs, out)
        row = read_table(out / "wmh_volumes.csv").iloc[0]
        assert (row.status, row.volume_ml, row.lesions) == ("edited", 0, 0) and "edited by hand" in row.reason
    assert path.read_bytes() == kept and len(engine.seen) == 2 and "edited by hand" in (out / "index.html").read_text()
    nibabel.save(nibabel.Nifti1Image(np.full(image.shape, 7, np.uint8), image.affine), path)
    run(engine, flairs, out)
    assert read_table(out / "wmh_volumes.csv").status.tolist() == ["failed", "done"]
    scan("sub-01_FLAIR.nii.gz", spacing=(1, 1, 2))
    run(engine, [flair, flairs], out)
    assert "is another scan than when its mask was edited" in read_table(out / "wmh_volumes.csv").reason[0] and len(engine.seen) == 2
    path.rename(tmp_path / "mine.nii.gz")
    run(engine, flair, out)
    assert len(engine.seen) == 3


def test_a_t1_counts_as_input_only_where_the_network_looks_at_it(scan, tmp_path):
    flair, t1, out = scan("sub-01_FLAIR.nii.gz"), scan("T1.nii.gz"), tmp_path / "out"
    scans = derivatives.find(flair, t1)
    for engine, again in ((Engine(), 0), (Engine(recipe="inputs.modalities=['flair','t1']"), 1)):
        derivatives.predict_scans(engine, scans, out, progress=False)
        scan("T1.nii.gz", spacing=(1.0, 1.0, 3.0 + 1e-3 * (again + 1)))
        derivatives.predict_scans(engine, scans, out, progress=False)
        assert len(engine.seen) == 1 + again


def test_an_interrupted_scan_is_not_taken_for_done(scan, tmp_path, monkeypatch):
    flair, out = scan("sub-01_FLAIR.nii.gz"), tmp_path / "out"
    run(Engine(), flair, out)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scanpages, "scan_page", stop)
        run(Engine(weight=1.0), flair, out)
    assert not list(out.rglob("*_mask.json")) and not [path for path in out.rglob(".*") if path.name != ".bidsignore"]
    engine = Engine()
    assert run(engine, flair, out).status.tolist() == ["done"] and engine.seen


def test_a_scan_whose_saving_fails_is_made_anew_and_the_reason_names_its_file_in_the_results(scan, tmp_path, monkeypatch):
    paths, out = [scan("sub-01_FLAIR.nii.gz"), scan("sub-02_FLAIR.nii.gz")], tmp_path / "out"
    run(Engine(), paths, out)

    save = derivatives.save_like

    def full(data, volume, path):
        if "sub-01" in path.name:
            raise OSError(28, "No space left on device", str(path))
        save(data, volume, path)

    with monkeypatch.context() as patch:
        patch.setattr(derivatives, "save_like", full)
        assert run(Engine(weight=1.0), paths, out).status.tolist() == ["failed", "done"]
    assert "No space left on device: 'sub-01/anat/" in pd.read_csv(out / derivatives.TABLE).reason[0]
    engine = Engine()
    assert run(engine, paths[0], out).status.tolist() == ["done"] and engine.seen


def test_scans_and_results_moved_together_are_still_done(scan, tmp_path):
    scan("here/sub-01_FLAIR.nii.gz")
    run(Engine(), tmp_path / "here" / "sub-01_FLAIR.nii.gz", tmp_path / "here" / "out")
    (tmp_path / "here").rename(tmp_path / "there")
    engine = Engine()
    table = run(engine, tmp_path / "there" / "sub-01_FLAIR.nii.gz", tmp_path / "there" / "out")
    assert not engine.seen and table.scan.tolist() == ["sub-01"]
