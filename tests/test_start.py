"""Training that starts from the weights of another run (`training.start`)."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import OVERRIDES

from wmhlib import training
from wmhlib.errors import CheckpointError, InputError, MissingStepError
from wmhlib.files import read_table, write_table
from wmhlib.network import build_network
from wmhlib.presets import preset
from wmhlib.sections import SHIPPED
from wmhlib.workspace import MINISAM, RunFolder

FREE = OVERRIDES + " training.lr=0 training.lr_min=0 training.epochs=1 training.ema=0.5"  # nothing moves but the statistics


@pytest.fixture(scope="module")
def first(split_cohort, tmp_path_factory):
    """A run of one epoch: write nothing into it."""
    run = RunFolder(tmp_path_factory.mktemp("first")).open(preset("smoke", f"{OVERRIDES} training.epochs=1"))
    for table, path in zip(split_cohort, (run.cohort_csv, run.split_csv)):
        write_table(table, path)
    training.fit(name_scans(run, "seen"), progress=False)
    return run


def name_scans(run, word):
    """Gives the scans of `run` digests that begin with `word`."""
    cases = read_table(run.cohort_csv)
    write_table(cases.assign(digest=word + cases.case), run.cohort_csv)
    return run


def read_seen(run):
    cases = run.cases()
    return cases.loc[cases.split != "test", ["case", "site", "digest"]].reset_index(drop=True)


def parameters(run):
    names = {name for name, _ in build_network(run.recipe()).named_parameters()}
    return {name: value for name, value in load_file(run.best).items() if name in names}


def test_the_first_weights_are_those_of_the_run_and_what_they_have_seen_is_remembered(new_run, first, capsys):
    run = name_scans(new_run("second", f"{FREE} training.start={first.path}"), "another")
    training.fit(run)
    assert f"the first weights are those of {first.path}" in capsys.readouterr().out
    before, after = parameters(first), parameters(run)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert run.earlier().equals(read_seen(first)) and len(run.seen()) == 2 * len(read_seen(first))


@pytest.mark.parametrize("role, trades", [("train", "val"), ("train", "test"), ("val", "test")])
def test_none_of_them_may_test_and_none_that_trained_may_validate(new_run, first, role, trades):
    run = name_scans(new_run("second", f"{FREE} training.start={first.path}"), "seen")
    split = read_table(run.split_csv)
    pair = split[split.split == role].index[0], split[split.split == trades].index[0]
    split.loc[list(pair), "split"] = trades, role
    write_table(split, run.split_csv)
    with pytest.raises(InputError, match="1 validation or test cases were used to train"):
        training.fit(run, progress=False)
    assert not run.best.exists() and not run.earlier_csv.exists()


def test_a_second_stage_on_the_same_split_may_validate_on_the_same_cases(new_run, first):
    run = name_scans(new_run("second", f"{FREE} training.start={first.path}"), "seen")
    training.fit(run, progress=False)
    assert len(run.seen()) == len(run.earlier()) == len(read_seen(first))
    run.earlier_csv.unlink()
    with pytest.raises(InputError, match="earlier.csv is missing"):
        run.seen()


def test_a_run_that_has_begun_does_not_need_the_other_any_more(new_run, first, tmp_path):
    moved = Path(shutil.copytree(first.path, tmp_path / "moved"))
    run = name_scans(new_run("second", f"{FREE} training.start={moved}"), "another")
    training.fit(run, progress=False)
    ended = run.best.read_bytes()
    shutil.rmtree(moved)
    run.best.unlink()
    training.fit(run, progress=False)
    assert run.best.read_bytes() == ended


def test_weights_that_do_not_fit_are_refused(new_run, first):
    with pytest.raises(CheckpointError, match="does not fit the network"):
        training.fit(name_scans(new_run("second", f"{FREE} adapter.rank_attention=8 training.start={first.path}"), "another"), progress=False)


def test_weights_of_another_method_are_refused_though_they_fit(new_run, first):
    with pytest.raises(CheckpointError, match="has adapter.method=lora"):
        training.fit(name_scans(new_run("second", f"{FREE} adapter.method=rslora training.start={first.path}"), "another"), progress=False)


def test_a_run_whose_split_was_changed_after_its_training_is_refused(new_run, first, tmp_path):
    moved = RunFolder(shutil.copytree(first.path, tmp_path / "moved"))
    split = read_table(moved.split_csv)
    write_table(split.assign(split=split.split.replace({"test": "val"})), moved.split_csv)
    with pytest.raises(CheckpointError, match="another split"):
        training.fit(name_scans(new_run("second", f"{FREE} training.start={moved.path}"), "another"), progress=False)


def test_a_run_that_starts_from_no_other_has_seen_nothing_before(new_run):
    run = name_scans(new_run("alone", FREE), "another")
    write_table(read_seen(run), run.earlier_csv)
    training.fit(run, progress=False)
    assert run.earlier().empty and len(run.seen()) == len(read_seen(run))


def test_weights_of_another_base_are_refused(new_run, first):
    with pytest.raises(CheckpointError, match="start from a run of the same base"):
        training.fit(name_scans(new_run("second", f"{FREE} seed=7 training.start={first.path}"), "another"), progress=False)


def test_a_run_that_has_trained_nothing_is_named(new_run, tmp_path):
    with pytest.raises(MissingStepError, match="nowhere"):
        training.fit(new_run("second", f"{FREE} training.start={tmp_path}/nowhere"), progress=False)


def test_the_shipped_adapter_knows_what_it_has_seen():
    assert RunFolder(MINISAM.path) == MINISAM and MINISAM.path.name == SHIPPED
    assert MINISAM.seen().digest.str.fullmatch("[0-9a-f]{64}").all()
