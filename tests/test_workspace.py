import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from wmhlib.errors import InputError, MissingStepError, RecipeError
from wmhlib.files import atomic, read_table, write_atomic, write_table
from wmhlib.naming import natural
from wmhlib.presets import preset
from wmhlib.seeds import stable_seed
from wmhlib.workspace import MINISAM, REPOSITORY, RunFolder, same_split


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run").open(preset("smoke"))


def test_a_run_folder_keeps_its_recipe(run):
    assert run.recipe() == run.open(preset("smoke")).recipe() == preset("smoke")


def test_another_recipe_is_refused_and_the_difference_named(run):
    write_atomic(run.cohort_csv, "case\n")
    before = run.recipe_json.read_bytes()
    with pytest.raises(RecipeError, match="training.epochs is 2 there and 7 here"):
        run.open(preset("smoke", "training.epochs=7"))
    with pytest.raises(RecipeError, match="'smoke' there, 'demo' asked for"):
        run.recipe("demo")
    assert run.recipe_json.read_bytes() == before


def test_a_missing_file_names_the_notebook_that_makes_it(tmp_path, run):
    with pytest.raises(MissingStepError, match=r"split.csv is missing: run notebook 02_split first"):
        run.need(run.split_csv, "02_split")
    with pytest.raises(MissingStepError, match="01_download"):
        RunFolder(tmp_path / "nowhere").recipe()


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "scan.nii.gz"
    write_atomic(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        assert temporary.name.endswith(".nii.gz") and temporary.parent == path.parent
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["scan.nii.gz"]


def test_a_disk_that_refuses_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for place in ("file/below/table.csv", "n" * 300):
        with pytest.raises(InputError, match="cannot be read or written .*: free space or name another folder"):
            write_atomic(tmp_path / place, "new")


def test_scans_and_masks_that_trained_or_chose_do_not_change_below_weights(run):
    cases = pd.DataFrame({"case": ["a", "b", "t"], "site": "s", "flair": "f", "t1": "", "mask": "m", "digest": ["1", "2", "3"], "mask_digest": ["4", "5", "6"]})
    write_table(cases[["case"]].assign(split=["train", "val", "test"]), run.split_csv)
    run.write_cases(cases.assign(mask_digest="7"))
    run.write_cases(cases)
    write_atomic(run.best, "weights")
    for column in ("digest", "mask_digest"):
        with pytest.raises(InputError, match="trained when b had other scans or masks"):
            run.write_cases(cases.assign(**{column: [cases[column][0], "8", "9"]}))
    for name in "bt":  # a test case too, without which the split is another
        with pytest.raises(InputError, match=f"trained with {name} in its split, which is not among"):
            run.write_cases(cases.query("case != @name"))
    more = pd.concat([cases.assign(mask_digest=["4", "5", "9"]), cases.tail(1).assign(case="new")], ignore_index=True)
    run.write_cases(more)
    assert read_table(run.cohort_csv).equals(more)


def test_cases_are_those_of_another_run_whatever_their_order_and_place(run, tmp_path):
    columns = ["case", "subject", "site", "flair", "t1", "mask", "digest", "mask_digest", "warnings"]
    cases = pd.DataFrame([[name, name, "A", f"{name}.nii", "", "m.nii", name, name, ""] for name in "abc"], columns=columns)
    write_table(cases, run.cohort_csv)
    write_table(pd.DataFrame({"case": list("abc"), "split": ["train", "val", "test"]}), run.split_csv)
    cell, split = RunFolder(tmp_path / "cell").take_cases(run), run.split_text()
    write_table(cases[::-1].assign(flair="moved.nii", warnings="odd"), run.cohort_csv)
    assert run.split_text() != split and same_split(run.split_text(), split)
    assert cell.take_cases(run).cases().flair.unique().tolist() == ["moved.nii"]
    write_table(cases.assign(digest="other"), run.cohort_csv)
    with pytest.raises(InputError, match="cohort.csv or its split.csv is not that of"):
        cell.take_cases(run)
    assert run.elsewhere("evaluations", f"{tmp_path}/data/..").path == run.path / "evaluations" / tmp_path.name, "never the run itself"


def test_results_of_the_shipped_weights_never_lie_among_them(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert all(RunFolder(path).results() == Path("runs/minisam") for path in ("assets/minisam", MINISAM.path, "wmhlib/../assets/minisam"))


def test_a_failing_write_of_a_new_file_leaves_no_file(tmp_path):
    with pytest.raises(InputError), atomic(tmp_path / "a.csv"):
        pass
    assert not any(tmp_path.iterdir())


def test_tables_come_back_as_they_were(tmp_path):
    table = pd.DataFrame({"case": ["007", "NA"], "t1": ["", "x.nii"], "dsc": [0.123456, None]})
    write_table(table, tmp_path / "a.csv")
    pd.testing.assert_frame_equal(read_table(tmp_path / "a.csv"), table, check_dtype=False)
    assert (tmp_path / "a.csv").read_bytes() == b"case,t1,dsc\n007,,0.123456\nNA,x.nii,\n"


def test_an_empty_table_file_is_named(tmp_path):
    write_atomic(tmp_path / "split.csv", "")
    with pytest.raises(InputError, match="split.csv is not a CSV table"):
        read_table(tmp_path / "split.csv")


def test_a_seed_is_the_same_in_every_process():
    code = "from wmhlib.seeds import stable_seed; print(stable_seed(42, 'Utrecht', 3))"
    other = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    assert stable_seed(42, "Utrecht", 3) == int(other.stdout)
    assert stable_seed("ab", "c") != stable_seed("a", "bc")
    assert all(0 <= stable_seed(i) < 2**31 for i in range(500))


def test_the_manifest_covers_every_file_but_itself_and_the_notebooks(run):
    write_atomic(run.figures / "a.png", b"picture")
    write_atomic(run.notebooks / "01.html", b"page")
    first = json.loads(run.write_manifest().read_text())
    assert set(first["files"]) == {"recipe.json", "figures/a.png"}
    assert first["files"]["figures/a.png"] == hashlib.sha256(b"picture").hexdigest()
    assert first["seed"] == 42 and first["versions"]["torch"]
    assert json.loads(run.write_manifest().read_text()) == first


def test_numbers_in_names_sort_by_value():
    assert sorted(["Utrecht_10", "GE3T_3", "Utrecht_9"], key=natural) == ["GE3T_3", "Utrecht_9", "Utrecht_10"]
