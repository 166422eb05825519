import math
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from wmhlib import training
from wmhlib.cohort import check_cases
from wmhlib.errors import CheckpointError, MissingStepError, WMHError
from wmhlib.phantom import write_cohort
from wmhlib.settings import Training, preset
from wmhlib.splits import split_cases
from wmhlib.workspace import RunFolder, read_table, write_table

OVERRIDES = "inputs.img_size=32 training.checkpoint_epochs=2 training.epochs=4 training.restart_epochs=4 training.accumulation=2 training.batch_size=4"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    cases = write_cohort(tmp_path_factory.mktemp("cohort"), 9, seed=1, scale=4.0, progress=False)
    return cases, split_cases(cases.merge(check_cases(cases)), preset("smoke"))


@pytest.fixture
def new_run(cohort, tmp_path):
    def make(name, overrides=OVERRIDES):
        run = RunFolder(tmp_path / name).open(preset("smoke", overrides))
        write_table(cohort[0], run.cohort_csv)
        write_table(cohort[1], run.split_csv)
        return run

    return make


def outcome(run):
    return load_file(run.best), run.history_csv.read_bytes(), torch.load(training._checkpoints(run)[0], weights_only=True)


def assert_same(first, second):
    (weights, history, last), (weights2, history2, last2) = first, second
    assert history == history2
    assert weights.keys() == weights2.keys() and all(torch.equal(weights[k], weights2[k]) for k in weights)
    assert all(torch.equal(last["network"][k], last2["network"][k]) for k in last["network"])


def test_a_killed_run_ends_bit_for_bit_as_an_uninterrupted_one(new_run):
    whole, killed = new_run("whole"), new_run("killed")
    training.fit(whole, progress=False)
    script = ("import sys, os, signal; from wmhlib import training; from wmhlib.workspace import RunFolder\n"
              "step, left = training._train_epoch, [4]\n"
              "def train_epoch(accelerator, model, optimizer, *rest):\n"
              "    left[0] -= 1\n"
              "    if not left[0]:\n"
              "        optimizer.step = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
              "    return step(accelerator, model, optimizer, *rest)\n"
              "training._train_epoch = train_epoch\n"
              f"training.torch.set_num_threads({torch.get_num_threads()})\n"
              "training.fit(RunFolder(sys.argv[1]), progress=False)")
    process = subprocess.run([sys.executable, "-c", script, str(killed.path)], env=os.environ, check=False)
    assert process.returncode == -signal.SIGKILL and len(read_table(killed.history_csv)) == 3
    training.fit(killed, progress=False)
    assert_same(outcome(whole), outcome(killed))


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(new_run, capsys):
    whole, damaged = new_run("whole"), new_run("damaged")
    training.fit(whole, progress=False)
    training.fit(damaged, progress=False)
    newest = training._checkpoints(damaged)[0]
    newest.write_bytes(newest.read_bytes()[:5000])
    training.fit(damaged, progress=False)
    assert newest.name in capsys.readouterr().out
    assert_same(outcome(whole), outcome(damaged))


def test_a_checkpoint_of_another_program_is_named_and_passed_over(new_run, capsys):
    run = new_run("run", "inputs.img_size=32 training.epochs=1")
    run.checkpoints.mkdir()
    torch.save({"state_dict": torch.zeros(1)}, run.checkpoints / "epoch_9999.pt")
    assert len(training.fit(run, progress=False)) == 1 and "epoch_9999.pt" in capsys.readouterr().out


def test_two_generations_are_kept_and_a_finished_run_is_left_alone(new_run):
    run = new_run("run")
    history = training.fit(run, progress=False)
    assert [p.name for p in training._checkpoints(run)] == ["epoch_0004.pt", "epoch_0002.pt"]
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    pd.testing.assert_frame_equal(training.fit(run, progress=False), history)
    assert before == {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}


def test_training_lowers_the_loss_and_leaves_the_base_frozen(new_run):
    run = new_run("run", "inputs.img_size=32 training.epochs=6 training.restart_epochs=6 training.lr=5e-3")
    history = training.fit(run, progress=False)
    assert history.focal.iloc[-1] < 0.7 * history.focal.iloc[0]
    weights = load_file(run.best)
    assert not any(name.startswith("encoder.") and "lora_" not in name for name in weights)


def test_inputs_with_t1_and_neighbours_train_by_the_same_loop(new_run):
    run = new_run("run", "inputs.img_size=32 inputs.modalities=['flair','t1'] inputs.context=1 training.epochs=1 adapter.method=none")
    assert training.fit(run, progress=False).train_loss.notna().all()


def test_a_checkpoint_of_another_recipe_is_refused(new_run):
    run, other = new_run("run", "inputs.img_size=32 training.epochs=1"), new_run("other", "training.epochs=2")
    training.fit(run, progress=False)
    run.checkpoints.rename(other.checkpoints)
    with pytest.raises(CheckpointError, match="another recipe"):
        training.fit(other, progress=False)


def test_a_run_whose_split_changed_is_refused(new_run):
    run = new_run("run", "inputs.img_size=32 training.epochs=1")
    training.fit(run, progress=False)
    split = read_table(run.split_csv)
    write_table(split.assign(split=split.split.replace({"val": "test", "test": "val"})), run.split_csv)
    with pytest.raises(CheckpointError, match="another split"):
        training.fit(run, progress=False)


def test_validation_cases_without_a_lesion_still_leave_weights(new_run, monkeypatch):
    monkeypatch.setattr(training, "_validate", lambda *_: {"val_loss": 1.0, "val_dice": math.nan})
    run = new_run("run", "inputs.img_size=32 training.epochs=2")
    training.fit(run, progress=False)
    assert run.best.exists()


def test_a_loss_that_is_not_finite_stops_the_run(new_run):
    with pytest.raises(WMHError, match="lower training.lr"):
        training.fit(new_run("run", "inputs.img_size=32 training.lr=1e30 training.clip_norm=1e30"), progress=False)


def test_missing_steps_name_their_notebook(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(MissingStepError, match="01_download"):
        training.fit(run)
    run.open(preset("smoke"))
    with pytest.raises(MissingStepError, match="01_download"):
        training.fit(run)


def test_the_rate_warms_up_then_falls_along_a_cosine_and_starts_again():
    settings = Training()
    assert training.learning_rate(0.0, settings) == 0 and training.learning_rate(2.5, settings) == pytest.approx(1.5e-4)
    assert training.learning_rate(5.0, settings) == pytest.approx(3e-4) == pytest.approx(training.learning_rate(30.0, settings))
    assert training.learning_rate(17.5, settings) == pytest.approx((3e-4 + 1e-6) / 2)
    assert training.learning_rate(math.nextafter(30.0, 0), settings) == pytest.approx(1e-6, rel=1e-3)
