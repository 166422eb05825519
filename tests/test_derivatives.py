import json
import os
import re

import nibabel
import numpy as np
import pandas as pd
import pytest
from predicting import LESION, Engine, run, sidecar

from wmhlib import bids, derivatives, scanpages
from wmhlib.cohort import find_cases
from wmhlib.errors import InputError
from wmhlib.files import write_atomic
from wmhlib.sections import Inputs
from wmhlib.uncertainty import entropy

OVERLAY = scanpages.overlay
pytestmark = pytest.mark.usefixtures("quick_figure")


def test_results_are_named_as_bids_names_them_and_lie_on_the_scans_grid(scan, tmp_path):
    flair = scan("study/sub-01/ses-b/anat/sub-01_ses-b_acq-3D_run-2_FLAIR.nii.gz", axes="LAS")
    run(Engine(), flair, tmp_path / "out")
    stem = "sub-01_ses-b_acq-3D_run-2_space-FLAIR_label-WMH_"
    folder = tmp_path / "out" / "sub-01" / "ses-b" / "anat"
    assert {path.name for path in folder.iterdir()} == {stem + ending for ending in (
        "mask.nii.gz", "mask.json", "probseg.nii.gz", "probseg.json", "stat-entropy_statmap.nii.gz", "stat-entropy_statmap.json",
        "lesions.tsv", "thumbnail.jpg", "report.html")}
    given = nibabel.load(flair)
    for ending, kind in (("mask", np.uint8), ("probseg", np.float32), ("stat-entropy_statmap", np.float32)):
        image = nibabel.load(folder / f"{stem}{ending}.nii.gz")
        assert image.get_data_dtype() == kind and image.shape == given.shape and np.array_equal(image.affine, given.affine)
    lesions = pd.read_csv(folder / f"{stem}lesions.tsv", sep="\t")
    assert lesions.volume_mm3.tolist() == [54] and lesions.max_prob[0] == pytest.approx(0.9)
    columns = json.loads((tmp_path / "out" / "space-FLAIR_label-WMH_lesions.json").read_text())
    assert set(lesions.columns) == set(columns)


def test_the_dataset_says_what_made_it_and_leads_back_to_its_sources(scan, tmp_path):
    flair, out = scan("study/sub-01/anat/sub-01_FLAIR.nii.gz"), tmp_path / "out"
    run(Engine(unsure_above=0.3), flair, out)
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative" and description["GeneratedBy"][0]["Name"] == "wmhlib"
    mask = sidecar(out)
    dataset, inside = re.fullmatch(r"bids:(\w+):(.+)", mask["Sources"][0]).groups()
    assert (out / description["DatasetLinks"][dataset] / inside).resolve() == flair and mask["SpatialReference"] == mask["Sources"][0]
    assert mask["Type"] == "Lesion" and {"threshold": 0.5, "min_voxels": 1, "tta": True, "unsure_above": 0.3}.items() <= mask["MadeWith"].items()
    assert len(mask["MadeWith"]["weights_sha256"]) == len(mask["MadeWith"]["flair_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(mask) + json.dumps(description)


@pytest.mark.parametrize("name, subject", [("scan_01 FLAIR.nii.gz", "sub-scan01"), ("patient 7/FLAIR.nii", "sub-patient7"),
                                           ("0/pre/FLAIR.nii.gz", "sub-0"), ("Müller_flair_2.nii.gz", "sub-Mller2")])
def test_a_name_that_is_not_bids_becomes_a_subject_of_its_letters_and_digits(name, subject):
    flair = f"/data/{name}"
    assert bids.name_scans(pd.DataFrame([{"flair": flair}]), {}) == {flair: subject}


def test_a_listed_subject_and_session_name_the_results():
    scans = pd.DataFrame([{"flair": "/data/x.nii.gz", "subject": "P-03", "session": "ses-2"}])
    assert bids.name_scans(scans, {}) == {"/data/x.nii.gz": "sub-P03_ses-2"}


def test_the_name_of_a_scan_that_is_gone_stays_taken_but_for_the_scan_itself(tmp_path):
    scans = pd.DataFrame([{"flair": "/here/sub-01/anat/sub-01_FLAIR.nii.gz"}])
    taken = {"sub-01": str(tmp_path / "sub-01_FLAIR.nii.gz")}
    assert re.fullmatch("sub-01[0-9a-f]{6}", *bids.name_scans(scans, taken).values())
    assert [*bids.name_scans(scans, taken, lambda name, flair: name == "sub-01").values()] == ["sub-01"]


def test_a_scan_that_moved_without_its_results_keeps_them(scan, tmp_path):
    out = tmp_path / "out"
    old, new = scan("a/sub-01_FLAIR.nii.gz"), tmp_path / "b" / "sub-01_FLAIR.nii.gz"
    run(Engine(), old, out)
    new.parent.mkdir()
    old.rename(new)
    assert run(Engine(), new, out).scan.tolist() == ["sub-01"]
    scan("c/sub-01_FLAIR.nii.gz", shape=(26, 28, 10))
    new.unlink()
    table = run(Engine(), tmp_path / "c" / "sub-01_FLAIR.nii.gz", out)
    assert table.scan[0] != "sub-01" and bids.paths(out, "sub-01", bids.WMH)["mask"].exists()


@pytest.mark.parametrize("name", ["README", "index.html", "manual/sub-01/anat/mask.nii.gz", "fmriprep/dataset_description.json"])
def test_results_do_not_go_among_files_of_something_else(scan, tmp_path, name):
    flair, out = scan("sub-01_FLAIR.nii.gz"), tmp_path / "out"
    write_atomic(out / name, "mine")
    with pytest.raises(InputError, match=f"holds {name.split('/')[0]} of something else"):
        run(Engine(), flair, out)
    assert (out / name).read_text() == "mine" and not (out / "dataset_description.json").exists()


def test_two_scans_of_one_name_do_not_overwrite_one_another(scan, tmp_path):
    paths, out = [scan(f"{folder}/T 1.nii.gz") for folder in "ab"], tmp_path / "out"
    first = run(Engine(), paths[::-1], out)
    names = dict(zip(first.flair, first.scan))
    assert names[str(paths[0])] == "sub-T1" and re.fullmatch("sub-T1[0-9a-f]{6}", names[str(paths[1])])
    engine = Engine()
    later = run(engine, [scan("A/t1.nii.gz"), *paths], out)
    assert engine.seen == ["t1.nii.gz"] and later.scan.nunique() == 3 and {*later.scan} > {*first.scan}
    assert len(list(out.glob("sub-*/anat/*_mask.nii.gz"))) == 3


def test_a_bad_scan_is_reported_and_the_others_go_on(scan, tmp_path, capsys):
    (tmp_path / "broken.nii.gz").write_bytes(b"not a scan")
    paths = [tmp_path / "broken.nii.gz", scan("sub-01_FLAIR.nii.gz"), tmp_path / "absent.nii.gz", scan("sub-02_FLAIR.nii.gz")]
    table = derivatives.predict_scans(Engine(), derivatives.find(paths), tmp_path / "out")
    assert table.status.tolist() == ["failed", "done", "failed", "done"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and re.match(r"\[1/4\] sub-broken failed: .*broken.nii.gz", printed[0])
    assert re.match(r"\[2/4\] sub-01: 0.1 mL in 1 lesion \(\d+ s, 2 slices without brain skipped\)", printed[1]) and "does not exist" in printed[2]
    written = pd.read_csv(tmp_path / "out" / derivatives.TABLE).set_index("scan")
    assert written.volume_ml["sub-01"] == pytest.approx(0.054) and "absent.nii.gz" in written.reason["sub-absent"]
    assert "absent.nii.gz does not exist" in (tmp_path / "out" / derivatives.INDEX).read_text()
    assert not (tmp_path / "out" / "sub-broken").exists()


def test_one_scan_that_breaks_the_network_does_not_stop_the_batch(scan, tmp_path, monkeypatch):
    engine = Engine()
    predict = engine.predict
    monkeypatch.setattr(engine, "predict", lambda case: 1 / 0 if "sub-01" in case.volume.path.name else predict(case))
    table = run(engine, [scan("sub-01_FLAIR.nii.gz"), scan("sub-02_FLAIR.nii.gz")], tmp_path / "out")
    assert table.status.tolist() == ["failed", "done"] and table.reason[0].startswith("ZeroDivisionError")


def test_not_one_scan_done_is_an_error_that_names_the_first(tmp_path):
    with pytest.raises(InputError, match="none of 1 scans .*absent.nii.gz does not exist"):
        run(Engine(), tmp_path / "absent.nii.gz", tmp_path / "out")
    assert "absent.nii.gz" in (tmp_path / "out" / derivatives.INDEX).read_text()


def test_an_interrupted_batch_leaves_table_and_index_of_what_is_done(scan, tmp_path, monkeypatch):
    paths, out, engine = [scan(f"sub-0{i}_FLAIR.nii.gz") for i in (1, 2, 3)], tmp_path / "out", Engine()
    run(Engine(), paths[2], out)
    segment = engine.segment

    def stop_at_the_second(prediction):
        if len(engine.seen) == 2:
            raise KeyboardInterrupt
        return segment(prediction)

    monkeypatch.setattr(engine, "segment", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(engine, paths, out)
    assert pd.read_csv(out / derivatives.TABLE).scan.tolist() == ["sub-01", "sub-03"]
    assert "sub-01_space-FLAIR_label-WMH_report.html" in (out / derivatives.INDEX).read_text()


def test_a_scan_without_its_content_says_how_to_get_it(scan, tmp_path):
    link = tmp_path / "sub-01_FLAIR.nii.gz"
    link.symlink_to(".git/annex/objects/gone")
    table = run(Engine(), [link, scan("sub-02_FLAIR.nii.gz")], tmp_path / "out")
    assert table.status.tolist() == ["failed", "done"] and "git annex get" in table.reason[0]


def test_what_can_be_given_away_names_no_folder_above_the_results(scan, tmp_path):
    out, t1 = tmp_path / "results" / "out", tmp_path / "no" / "t1.nii"
    engine = Engine(recipe="inputs.modalities=['flair','t1']")
    scans = derivatives.find([scan("sub-01_FLAIR.nii.gz"), scan("sub-02_FLAIR.nii.gz"), tmp_path / "absent.nii.gz"])
    table = derivatives.predict_scans(engine, scans.assign(t1=["", str(t1), ""]), out, progress=False)
    assert str(t1) in table.reason[1]
    for path in (out / derivatives.TABLE, out / derivatives.INDEX, *out.rglob("*_report.html")):
        assert str(tmp_path) not in path.read_text(), path
    written = pd.read_csv(out / derivatives.TABLE)
    assert written.flair.tolist() == ["../../sub-01_FLAIR.nii.gz", "../../sub-02_FLAIR.nii.gz", "../../absent.nii.gz"]
    assert "<code>../../sub-01_FLAIR.nii.gz</code>" in next(out.rglob("*_report.html")).read_text()
    assert [case["case"] for case in derivatives.worth_a_look(written, out)] == ["sub-01"]


@pytest.mark.parametrize(("point", "text"), [
    (dict(min_voxels=3, min_mm3=3.0), "components below 3 voxels or 3 mm³ left out"), (dict(min_mm3=3.0), "components below 3 mm³ left out"),
    (dict(min_voxels=2), "components below 2 voxels left out"), ({}, "components of every size kept")])
def test_a_page_names_the_limits_of_size_that_there_are(scan, tmp_path, point, text):
    run(Engine(**point), scan("sub-01_FLAIR.nii.gz"), tmp_path / "out")
    assert f"{text}, mean over" in " ".join(next((tmp_path / "out").rglob("*_report.html")).read_text().split())


def test_the_table_and_the_index_keep_the_scans_of_earlier_calls(scan, tmp_path):
    out = tmp_path / "out"
    run(Engine(), scan("sub-02_FLAIR.nii.gz"), out)
    table = run(Engine(), scan("sub-01_FLAIR.nii.gz"), out)
    assert table.scan.tolist() == ["sub-01"]
    assert pd.read_csv(out / derivatives.TABLE).scan.tolist() == ["sub-01", "sub-02"]
    assert "sub-02_space-FLAIR_label-WMH_report.html" in (out / derivatives.INDEX).read_text()


def test_the_pages_stand_alone_and_their_links_lead_somewhere(scan, tmp_path):
    out = tmp_path / "out"
    run(Engine(unsure_above=0.0), [scan("sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz"), scan("a <b>.nii.gz")], out)
    for page in (out / derivatives.INDEX, *out.rglob("*_report.html")):
        html = page.read_text()
        assert html.index("default-src 'none'") < html.index("<style>")
        assert not re.findall(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//|@import|url\(["\']?https?:', html) and "<b>." not in html
        links = [link for link in re.findall(r'href="([^"]+)"', html) if not link.startswith(("data:", "#"))]
        assert links and all((page.parent / link).exists() for link in links)
    index = (out / derivatives.INDEX).read_text()
    assert index.count("data:image/jpeg") == 2 and "2 of them unsure" in index


def test_unsure_is_unknown_without_a_limit_and_else_above_it(scan, tmp_path):
    flair = scan("sub-01_FLAIR.nii.gz")
    unsure = [run(Engine(**point), flair, tmp_path / "out").unsure[0] for point in ({}, {"unsure_above": 0.0}, {"unsure_above": 9.0})]
    assert pd.isna(unsure[0]) and unsure[1:] == [True, False]


def test_what_is_odd_about_a_scan_stands_beside_its_volume_and_on_its_page(scan, tmp_path, capsys):
    table = derivatives.predict_scans(Engine(), derivatives.find(scan("sub-01_FLAIR.nii.gz")), tmp_path / "out")
    odd = table.warnings[0]
    assert "less than a head" in odd and odd in capsys.readouterr().out and odd in (tmp_path / "out" / table.page[0]).read_text()


@pytest.mark.parametrize("tta, highest", [(True, 0.9), (False, 0.45)])
def test_the_probability_is_that_of_the_operating_point_and_the_entropy_that_of_all_views(scan, tmp_path, tta, highest):
    out = tmp_path / "out"
    case, = derivatives.worth_a_look(run(Engine(tta=tta), scan("sub-01_FLAIR.nii.gz"), out), out)
    assert case["prob"].max() == pytest.approx(highest)
    assert pd.read_csv(next(out.rglob("*_lesions.tsv")), sep="\t").max_prob.tolist() == pytest.approx([highest])
    np.testing.assert_allclose(case["entropy"], entropy(np.float32(0.9)), rtol=1e-5)  # of 0.1 too


def test_unsure_scans_come_first_and_are_read_back_as_they_were_made(scan, tmp_path):
    out = tmp_path / "out"
    table = run(Engine(), [scan("sub-01_FLAIR.nii.gz"), scan("sub-02_FLAIR.nii.gz", spacing=(1, 1, 4)), scan("sub-03_FLAIR.nii.gz")], out)
    table = table.assign(unsure=[False, False, True])
    shown = list(derivatives.worth_a_look(table, out, 2))
    assert [case["case"] for case in shown] == ["sub-03", "sub-02"]
    assert shown[0]["result"].sum() == 18 and shown[0]["result"][LESION].all() and shown[0]["prob"].max() == pytest.approx(0.9)
    assert shown[0]["entropy"].shape == shown[0]["flair"].shape


def test_paths_are_found_alone_several_and_with_spaces(scan, monkeypatch, tmp_path):
    one, two = scan("my scans/a b.nii.gz"), scan("c.nii.gz")
    monkeypatch.chdir(tmp_path)
    assert derivatives.find(str(one)).flair.tolist() == [str(one)]
    assert derivatives.find("my scans/a b.nii.gz").flair.tolist() == [str(one)]
    assert derivatives.find("'my scans/a b.nii.gz' c.nii.gz").flair.tolist() == [str(one), str(two)]
    assert derivatives.find([one, "c.nii.gz"]).flair.tolist() == [str(one), str(two)]
    many = [f"{tmp_path}/{i:0100d}.nii.gz" for i in range(50)]
    assert derivatives.find(" ".join(many)).flair.tolist() == many
    assert derivatives.find("absent.nii.gz").flair.tolist() == [str(tmp_path / "absent.nii.gz")]


def test_the_figure_shows_lesions_probability_and_entropy(scan, tmp_path):
    case, = derivatives.worth_a_look(run(Engine(), scan("sub-01_FLAIR.nii.gz"), tmp_path / "out"), tmp_path / "out")
    titles = [text.get_text() for ax in OVERLAY(case).axes for text in ax.texts]
    assert {"scan", "lesions found", "probability", "entropy (bits)"} <= set(titles)


@pytest.mark.parametrize("flair, message", [("", "no scan is named"), ([""], "no scan is named"), ("''", "no scan is named"), ("'a.nii", "quotes"), ("a.nii b.nii", "one T1")])
def test_an_argument_that_names_no_scan_is_refused(flair, message):
    with pytest.raises(InputError, match=message):
        derivatives.find(flair, t1="t1.nii.gz")


def test_a_scan_of_another_contrast_is_refused_and_a_t1_of_no_use_is_named(capsys):
    with pytest.raises(InputError, match="look at FLAIR, and _T1w ends the name of .*sub-1_T1w.nii.gz: name"):
        derivatives.find("sub-1_T1w.nii.gz")
    assert derivatives.find("sub-1_T1w.nii.gz sub-2_FLAIR.nii.gz").case.tolist() == ["sub-2_FLAIR"]
    assert "sub-1_T1w.nii.gz: left out" in capsys.readouterr().out
    with pytest.raises(InputError, match="look at T1w scans, and _FLAIR ends the name of .*sub-2_FLAIR.nii"):
        derivatives.find("sub-2_FLAIR.nii", inputs=Inputs(modalities=("t1",)))
    derivatives.find("sub-2_FLAIR.nii", "T1.nii", Inputs(modalities=("flair", "t1")))
    assert not capsys.readouterr().out
    derivatives.find("sub-2_FLAIR.nii", "T1.nii")
    assert "T1.nii is not used" in capsys.readouterr().out


def test_a_bids_folder_is_predicted_and_its_derivatives_are_no_reference(scan, tiny_nifti, tmp_path):
    study = tmp_path / "study"
    for name in ("01", "02"):
        scan(f"study/sub-{name}/anat/sub-{name}_FLAIR.nii.gz")
    manual = tiny_nifti("study/derivatives/manual/sub-01/anat/sub-01_space-FLAIR_label-WMH_mask.nii.gz",
                        data=np.zeros((24, 28, 10), np.uint8))
    table = run(Engine(), str(study), study / "derivatives" / "predicted")
    assert table.scan.tolist() == ["sub-01", "sub-02"] and (table.status == "done").all()
    assert find_cases(study)["mask"].tolist() == [str(manual)]
    assert derivatives.find(str(study)).flair.tolist() == table.flair.tolist()


def test_another_dataset_is_not_written_into(scan, tmp_path):
    flair, other = scan("study/sub-01/anat/sub-01_FLAIR.nii.gz"), tmp_path / "other" / "dataset_description.json"
    other.parent.mkdir()
    other.write_text('{"Name": "other"}')
    with pytest.raises(InputError, match="another dataset"):
        run(Engine(), flair, tmp_path / "other")
    assert other.read_text() == '{"Name": "other"}' and len(list(other.parent.iterdir())) == 1


def test_results_are_not_written_around_their_scans(scan, tmp_path):
    flair = scan("study/sub-01/anat/sub-01_FLAIR.nii.gz")
    (tmp_path / "link").symlink_to(tmp_path / "study")
    for out in ("study", "link", "study/sub-01", "study/derivatives/.."):
        with pytest.raises(InputError, match="holds the scan .*sub-01_FLAIR.nii.gz.*/derivatives/wmhlib"):
            run(Engine(), flair, tmp_path / out)
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["sub-01"]


def test_a_folder_for_results_may_begin_with_a_tilde(scan, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(Engine(), scan("sub-01_FLAIR.nii.gz"), "~/out")
    assert (tmp_path / "out" / derivatives.INDEX).exists()


def test_a_table_of_scans_is_predicted(scan, tmp_path):
    scan("x.nii.gz")
    (tmp_path / "scans.CSV").write_text("subject,site,flair,session\n007,A,x.nii.gz,1\n")
    row = run(Engine(), tmp_path / "scans.CSV", tmp_path / "out").iloc[0]
    assert (row.subject, row.session) == ("sub-007", "ses-1") and os.path.isabs(row.flair)
