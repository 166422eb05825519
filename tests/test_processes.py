import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch

from wmhlib import training
from wmhlib.errors import WMHError
from wmhlib.network import WMHNet
from wmhlib.presets import preset
from wmhlib.processes import Average, StepStatistics
from wmhlib.storage import load_checkpoint

# Micro-batches of 3, so that two processes share 3 of a step, and a last step is left over.
OVERRIDES = "inputs.img_size=32 training.epochs=2 training.restart_epochs=2 training.batch_size=3 training.accumulation=3 training.ema=0.9"


def in_two_processes(run):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "wmhlib.training",
                           str(run.path)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_two_processes_go_on_to_the_weights_of_one_and_only_one_of_them_writes_and_speaks(new_run):
    one, two = new_run("one"), new_run("two")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of two
    training.fit(one, progress=False)
    torch.set_num_threads(threads)
    shutil.copytree(one.checkpoints, two.checkpoints, ignore=shutil.ignore_patterns("epoch_0002*"))
    done = in_two_processes(two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on from epoch_0001.pt") == 1 and done.stdout.count("epoch   2/2") == 1
    half = -(-int((one.cases().split == "train").sum()) // 2)
    assert f"| {half}/{half} [" in done.stderr  # cases that the main process read
    first, expected, found = (load_checkpoint(run.checkpoints / f"epoch_000{n}.pt") for run, n in ((one, 1), (one, 2), (two, 2)))
    for part in ("network", "average"):
        for name, tensor in expected[part].items():
            torch.testing.assert_close(found[part][name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert max((tensor - first["network"][name]).abs().max() for name, tensor in expected["network"].items()) > 1e-3
    assert {k: pytest.approx(v, rel=1e-5, abs=1e-6, nan_ok=True) for k, v in expected["history"][1].items()} == found["history"][1]


def test_a_notebook_starts_a_process_for_each_gpu_and_they_share_patches_and_whole_boxes_as_one_does(new_run, monkeypatch, capsys):
    volumes = ("volume.network=attention volume.spacing=5 volume.box=[32,48,32] volume.patch=[32,32,32] volume.patches=1 training.epochs=1 training.warmup_epochs=0 "
               "training.batch_size=1 training.accumulation=3")
    one, two = new_run("one", volumes), new_run("two", volumes)
    expected = training.fit(one, progress=False)
    monkeypatch.setattr(training.torch.cuda, "device_count", lambda: 2)  # here; the processes themselves find none
    found, said = training.launch(two), capsys.readouterr().out
    assert said.count("epoch   1/1") == 1 and "patches/s" in said
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4, check_dtype=False)
    two.cohort_csv.unlink()
    with pytest.raises(WMHError, match="2 GPUs stopped"):
        training.launch(two)
    assert "run notebook 01_download first" in capsys.readouterr().out


def test_an_error_is_said_once_and_stops_both_processes(new_run):
    run = new_run("run", OVERRIDES + " training.lr=1e11 training.clip_norm=1e11")
    done = in_two_processes(run)
    assert done.returncode != 0 and done.stderr.count("training stopped in epoch") == 1 and "Traceback" not in done.stderr.split("training stopped")[0]
    assert (run.path / "failed_batch.safetensors").exists()


def test_checkpointed_gradients_are_the_same_gradients():
    images = torch.randn(2, 1, 64, 64)
    found = []
    for on in ("false", "true"):
        network = WMHNet(preset("smoke", f"training.gradient_checkpointing={on} adapter.dropout=0.2")).train()
        torch.manual_seed(1)
        network(images)[0].square().mean().backward()
        found.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-6, msg=name)


def test_batch_statistics_move_once_a_step_by_the_mean_of_its_micro_batches():
    norm = torch.nn.BatchNorm2d(3)
    network = torch.nn.Sequential(norm).train()
    batches = torch.randn(3, 4, 3, 5, 5) + 2
    statistics = StepStatistics(network)
    for _ in range(2):
        statistics.begin()
        for batch in batches:
            statistics.forward()
            network(batch)
        statistics.sums(3)
        statistics.end(3)
    mean, variance = batches.mean((1, 3, 4)).mean(0), batches.transpose(1, 2).flatten(2).var(2).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.19 * mean)
    torch.testing.assert_close(norm.running_var, 0.81 + 0.19 * variance)
    assert norm.num_batches_tracked == 2


def test_an_average_forgets_its_start_and_swaps_back():
    live = {"w": torch.zeros(2), "n": torch.tensor(0)}
    average = Average(live, 0.9)
    for step in range(300):
        live["w"].fill_(1.0)
        live["n"] += 1
        average.update(step)
    live["w"].fill_(5.0)
    with average.swapped_in():
        assert live["w"].tolist() == pytest.approx([1, 1]) and live["n"] == 300
    assert live["w"].tolist() == [5, 5]
