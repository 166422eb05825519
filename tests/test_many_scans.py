"""Segmenting scans by command, in one process and in several."""

import os
import subprocess
import sys

import torch
from test_engine import network

from wmhlib import derivatives
from wmhlib.files import read_table, write_atomic
from wmhlib.trained import weights_bytes
from wmhlib.workspace import RunFolder


def trained_run(path):
    run, model = RunFolder(path), network("inputs.img_size=32 operating.threshold=0.001")
    run.open(model.recipe)
    write_atomic(run.best, weights_bytes(model, {"recipe": model.recipe.to_json(), "base_sha256": model.base_sha256, "split": ""}))
    return run


def command(launcher, run, *arguments):
    return subprocess.run([sys.executable, *launcher, "-m", "wmhlib.derivatives", str(run.path), *map(str, arguments)],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_leave_the_files_of_one_and_name_the_scan_that_failed(tiny_nifti, tmp_path, capsys):
    run = trained_run(tmp_path / "run")
    scans = [tiny_nifti(f"study/sub-0{i}/anat/sub-0{i}_FLAIR.nii.gz", spacing=(1, 1, 2 + 0.5 * i)) for i in (1, 2, 4)]
    scans.insert(2, tmp_path / "study" / "sub-03_FLAIR.nii.gz")
    scans[2].write_bytes(b"not a scan")
    done = command(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], run, *scans, tmp_path / "two")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert sorted(line[:12] for line in lines[:4]) == [f"[{i}/4] sub-0{i}" for i in (1, 2, 3, 4)] and "failed" in "".join(lines[:4])
    assert lines[4:] == [f"3 of 4 scans are done: {tmp_path / 'two' / derivatives.INDEX}"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of two
    assert derivatives.main([str(run.path), *map(str, scans), str(tmp_path / "one")]) == 1
    torch.set_num_threads(threads)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert len(one) > 3 * 9 and one == two
    table = read_table(tmp_path / "two" / derivatives.TABLE)
    assert table.status.tolist() == ["done", "done", "failed", "done"] and (table.lesions.dropna() > 0).all()
    assert derivatives.main([str(run.path), *map(str, scans[:2]), str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out.count("(done before)") == 2


def test_the_command_says_what_stopped_it(tmp_path, capsys):
    assert derivatives.main([str(tmp_path / "run"), "a.nii", str(tmp_path / "out")]) == 1
    assert "run notebook 03_train first" in capsys.readouterr().err
