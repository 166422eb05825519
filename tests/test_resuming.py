"""Training that was interrupted, damaged, taken over or done: what it goes on from, and what it leaves alone."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from test_training import OVERRIDES, assert_same, newest_checkpoint, outcome

from wmhlib import training
from wmhlib.checkpoints import Keeper
from wmhlib.errors import CheckpointError
from wmhlib.files import read_table, write_atomic, write_table
from wmhlib.presets import preset

KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from wmhlib import hardware, training
from wmhlib.workspace import RunFolder
hardware.estimate = lambda *_: 0  # a second in each of many processes

def train(folder, kill_after=None):
    child = os.fork()
    if not child:
        training.fit(RunFolder(folder), progress=False)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

start = time.monotonic()
assert train(sys.argv[1]) == 0
whole = time.monotonic() - start
rng = random.Random()
for folder in sys.argv[2:]:
    moment = rng.random() * whole
    code = train(folder, moment)
    left = sorted(os.listdir(folder + "/checkpoints")) if os.path.isdir(folder + "/checkpoints") else []
    print(f"killed after {moment:.3f} of {whole:.3f} s (exit {code}), leaving {left}", flush=True)
    assert train(folder) == 0
"""


def test_a_run_killed_at_any_moment_ends_bit_for_bit_as_an_uninterrupted_one(new_run):
    kills = int(os.environ.get("WMH_KILLS", "3"))
    overrides = OVERRIDES.replace("checkpoint_epochs=2", "checkpoint_epochs=1") + " training.ema=0.9 training.patience=9"
    whole, *killed = (new_run(f"run{i}", overrides) for i in range(kills + 1))
    done = subprocess.run([sys.executable, "-c", KILLER, *(str(run.path) for run in (whole, *killed))], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    expected = outcome(whole)
    for run in killed:
        assert_same(expected, outcome(run))


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(new_run, capsys):
    run = new_run("run")
    training.fit(run, progress=False)
    whole, newest = outcome(run), newest_checkpoint(run)
    newest.write_bytes(newest.read_bytes()[:5000])
    training.fit(run, progress=False)
    assert newest.name in capsys.readouterr().out
    assert_same(whole, outcome(run))


def test_a_checkpoint_of_another_program_is_named_and_passed_over(new_run, capsys):
    run = new_run("run", "inputs.img_size=32 training.epochs=1")
    run.checkpoints.mkdir()
    torch.save({"state_dict": torch.zeros(1)}, run.checkpoints / "epoch_9999.pt")
    assert len(training.fit(run, progress=False)) == 1 and "epoch_9999.pt" in capsys.readouterr().out


def test_two_generations_are_kept_and_a_finished_run_is_left_alone(new_run):
    run = new_run("run")
    history = training.fit(run, progress=False)
    assert sorted(p.name for p in run.checkpoints.glob("*.pt")) == ["epoch_0002.pt", "epoch_0004.pt"]
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    pd.testing.assert_frame_equal(training.fit(run, progress=False), history)
    assert before == {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}


def test_best_weights_that_were_lost_come_back_from_the_checkpoint(new_run):
    run = new_run("run")
    training.fit(run, progress=False)
    best = run.best.read_bytes()
    run.best.unlink()
    training.fit(run, progress=False)
    assert run.best.read_bytes() == best


def test_a_checkpoint_of_another_recipe_is_refused(new_run):
    run, other = new_run("run", "inputs.img_size=32 training.epochs=1"), new_run("other", "training.epochs=2")
    training.fit(run, progress=False)
    run.checkpoints.rename(other.checkpoints)
    with pytest.raises(CheckpointError, match="another recipe"):
        training.fit(other, progress=False)


def test_a_run_goes_on_where_its_base_has_moved_and_the_library_has_a_setting_more():
    def origin(**recipe):
        told = json.loads(preset("smoke", "encoder.checkpoint=/old/base.pth").to_json())
        del told["training"]["patience"]
        return {"recipe": json.dumps(told | recipe), "base_sha256": "a", "split": "b"}

    now = origin() | {"recipe": preset("smoke", "encoder.checkpoint=/new/base.pth").to_json()}
    state = dict.fromkeys(training._STATE)
    assert training._differing(state | {"origin": origin()}, now) == []
    assert training._differing(state | {"origin": origin(seed=7) | {"base_sha256": "c"}}, now) == ["recipe", "base_sha256"]


def test_a_run_whose_split_changed_is_refused(new_run):
    run = new_run("run", "inputs.img_size=32 training.epochs=1")
    training.fit(run, progress=False)
    split = read_table(run.split_csv)
    write_table(split.assign(split=split.split.replace({"val": "test", "test": "val"})), run.split_csv)
    with pytest.raises(CheckpointError, match="another split"):
        training.fit(run, progress=False)


def test_a_session_whose_run_another_has_taken_over_stops_and_leaves_its_files(new_run, monkeypatch):
    run, train_epoch = new_run("run"), training.train_epoch

    def taken_in_the_third(job, monitor, train, epoch, losses):
        if epoch == 3:
            Keeper(run).claim()
        return train_epoch(job, monitor, train, epoch, losses)

    monkeypatch.setattr(training, "train_epoch", taken_in_the_third)
    with pytest.raises(CheckpointError, match="another session"):
        training.fit(run, progress=False)
    assert len(read_table(run.history_csv)) == 2
    monkeypatch.setattr(training, "train_epoch", train_epoch)
    assert len(training.fit(run, progress=False)) == 4 and not run.session.exists()


def test_a_session_that_ends_before_it_trains_stops_no_other(new_run, monkeypatch):
    run, train_epoch = new_run("run", "inputs.img_size=32 training.epochs=2"), training.train_epoch
    monkeypatch.setattr(training, "train_epoch", lambda *arguments: Keeper(run).close() or train_epoch(*arguments))
    assert len(training.fit(run, progress=False)) == 2


def test_weights_whose_checkpoints_are_gone_are_not_trained_over(new_run):
    run = new_run("run", "inputs.img_size=32 training.epochs=3 training.checkpoint_epochs=1")
    history, best = training.fit(run, progress=False), run.best.read_bytes()
    shutil.rmtree(run.checkpoints)
    pd.testing.assert_frame_equal(training.fit(run, progress=False), history, rtol=1e-4, check_dtype=False)
    write_table(history[:2], run.history_csv)
    with pytest.raises(CheckpointError, match="no checkpoint of its training"):
        training.fit(run, progress=False)
    assert run.best.read_bytes() == best and len(read_table(run.history_csv)) == 2


def test_an_operating_point_does_not_outlive_its_weights(new_run):
    run = new_run("run", "inputs.img_size=32 training.epochs=1")
    training.fit(run, progress=False)
    write_atomic(run.operating_point, b"{}")
    training.fit(run, progress=False)
    assert run.operating_point.exists(), "the weights are the same"
    run.best.unlink()
    training.fit(run, progress=False)
    assert run.best.exists() and not run.operating_point.exists()
