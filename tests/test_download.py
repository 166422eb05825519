import pytest

from wmhlib import cohort, download, opening
from wmhlib.errors import CheckpointError, InputError, MissingStepError, RecipeError
from wmhlib.files import read_table
from wmhlib.presets import preset
from wmhlib.workspace import RunFolder


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "runs" / "a").open(preset("smoke"))


def test_the_synthetic_cohort_is_made_once(monkeypatch, run):
    made = []
    monkeypatch.setattr(download.phantom, "write_cohort", lambda folder, *a, **how: made.append((folder, *a, how)))
    assert download.get_cohort(run) == download.get_cohort(run) == run.path / "data"
    assert made == [(run.path / "data", 12, 42, 3.0, {"scanners": "challenge", "heads": ()})]


def test_a_folder_with_another_synthetic_cohort_or_part_of_one_is_refused(monkeypatch, run, tmp_path):
    monkeypatch.setattr(download.phantom, "write_cohort", lambda *_, **__: 1 / 0)
    for _ in range(2):  # what was interrupted is made again
        with pytest.raises(ZeroDivisionError):
            download.get_cohort(run)
    other = RunFolder(tmp_path / "other").open(preset("smoke", "seed=7"))
    with pytest.raises(InputError, match="another synthetic cohort, or a part of one"):
        download.get_cohort(other, "synthetic", str(run.path / "data"))


def test_your_own_folder_is_taken_as_it_is(run, tmp_path):
    assert download.get_cohort(run, folder=str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["kaggle", "dataverse"])
@pytest.mark.parametrize("change, t1", [("", False), ("inputs.modalities=['flair','t1']", True)])
def test_t1_is_fetched_where_the_recipe_uses_it(monkeypatch, tmp_path, source, change, t1):
    asked = []
    monkeypatch.setattr(download, f"fetch_{source}", lambda folder, **how: asked.append((folder, how)))
    run = RunFolder(tmp_path / "a").open(preset("smoke", change))
    assert download.get_cohort(run, source) == run.path / "data"
    assert asked == [(run.path / "data", {"t1": t1})]


@pytest.mark.parametrize("source", ["folder", "dropbox"])
def test_a_source_that_gives_no_data_is_explained(run, source):
    with pytest.raises(RecipeError, match="set data_dir"):
        download.get_cohort(run, source)


def test_real_presets_ask_for_data(tmp_path):
    run = RunFolder(tmp_path / "b").open(preset("colab"))
    with pytest.raises(RecipeError, match="preset 'colab'"):
        download.get_cohort(run)


@pytest.mark.parametrize("name, choice", [("colab", "or source to 'kaggle' or 'dataverse'$"), ("vessels", "or source to 'synthetic'$"), ("stroke", "your folder of cases$")])
def test_only_sources_that_fit_the_scans_are_taken_and_offered(tmp_path, name, choice):
    run = RunFolder(tmp_path / name).open(preset(name, "encoder.random=true" if name == "colab" else ""))
    for source in ("dropbox", "dataverse" if name != "colab" else "synthetic"):
        with pytest.raises(RecipeError, match=choice):
            download.get_cohort(run, source)


def test_weights_that_do_not_fit_open_no_run_folder(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    run = RunFolder(tmp_path / "c")
    with pytest.raises(CheckpointError):
        opening.open_run(run, preset("smoke"), str(tmp_path / "weights.pth"))
    assert not run.path.exists()


def test_a_run_without_cases_gets_those_of_its_recipe(tmp_path):
    recipe = preset("smoke", "cohort.synthetic_cases=3 cohort.scale=4.0")
    run = opening.prepare(RunFolder(tmp_path / "run"), recipe)
    before = run.split_csv.read_bytes()
    assert len(run.cases()) == 3 and cohort.describe(read_table(run.cohort_csv)) == "synthetic cases"
    assert opening.prepare(run, recipe).split_csv.read_bytes() == before


def test_without_a_cohort_of_its_own_a_run_is_to_be_prepared_first(tmp_path):
    with pytest.raises(MissingStepError, match="split.csv is missing: run notebook 02_split first"):
        opening.prepare(RunFolder(tmp_path / "run"), preset("stroke"))
