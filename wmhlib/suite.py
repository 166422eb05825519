"""Runs the notebooks in order, live in the terminal, and leaves each as an HTML page that needs no network.

    python -m wmhlib.suite --preset demo --run runs/demo
    python -m wmhlib.suite report --run runs/demo
    python -m wmhlib.suite evaluate --data folder
    python -m wmhlib.suite tune --data folder
    python -m wmhlib.suite predict --flair FLAIR.nii.gz --out folder
    python -m wmhlib.suite compare --preset demo --out runs/compare_demo
    python -m wmhlib.suite distill --preset demo --out runs/distill_demo
    python -m wmhlib.suite stroke --preset stroke-demo --out runs/stroke_networks
    python -m wmhlib.suite benchmark --run runs/demo --out runs/benchmark
    python -m wmhlib.suite pool --run "runs/fold0 runs/fold1"
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from . import bids, errors, pages
from .errors import InputError, WMHError, told
from .files import read_table, write_atomic, write_table
from .settings import Recipe
from .workspace import MINISAM, REPOSITORY, RunFolder, run_folders

NOTEBOOKS = ("01_download", "02_split", "03_train", "04_search", "05_report")
_QUIET = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "JUPYTER_PLATFORM_DIRS": "1", "PYTHONWARNINGS": "ignore",
          "WMHLIB_BATCH": "1"}  # no live curves in a notebook that nobody watches


_MEMORY = {f"MALLOC_{of}_THRESHOLD_": str(1 << 34) for of in ("MMAP", "TRIM")}  # glibc keeps what tensors free, in place of page faults for the next: 1.2 times as fast on a CPU
_TAKES = {  # the options that each action takes
    "run": "preset seed run data source medsam overrides", "report": "run", "evaluate": "run data out", "tune": "run data out", "predict": "run flair t1 out",
    "compare": "preset run out overrides share", "distill": "preset run medsam out overrides", "stroke": "preset run out overrides networks folds",
    "benchmark": "run out", "pool": "run out", "notebooks": ""}


class NotebookError(WMHError):
    """A notebook stopped; the message is that of the error in it."""


def run_suite(run: RunFolder, preset: str, **first) -> None:
    """Notebooks 01 to 05 in `run`; `first` are further parameters of 01. Raises NotebookError where one stops.

    In a run folder that was begun before, training goes on from its last checkpoint and the rest is made again.
    """
    shared = {"preset": preset, "run_dir": str(run.path)}
    for number, name in enumerate(NOTEBOOKS, 1):
        print(f"[{number}/{len(NOTEBOOKS)}] {name}", flush=True)
        start = time.monotonic()
        _page(name, run.notebooks / f"{name}.ipynb", shared | (first if name == "01_download" else {}))
        print(f"[{number}/{len(NOTEBOOKS)}] {name} done in {time.monotonic() - start:.0f} s", flush=True)


def report(run: RunFolder, data: str = "", out: str = "") -> Path:
    """Notebook 05 again, or with `data` (a folder or CSV of labelled cases) as an evaluation of the run's weights on them, in
    `out` ("": the run's evaluations/<name of data>). Returns its HTML page."""
    folder = run.elsewhere("evaluations", data, out) if data else run
    print(f"05_report on {data or run.path}", flush=True)
    return _page("05_report", folder.notebooks / "05_report.ipynb",
                 {"preset": run.recipe().name, "run_dir": str(run.path), "data_dir": data, "out_dir": str(folder.path) if data else ""})


def tune(run: RunFolder, data: str, out: str = "") -> Path:
    """Notebook 04 on labelled cases of `data` (a folder or CSV): the weights of `run` with the operating point that suits these, as a run folder, `out`
    ("": the run's tuned/<name of data>). Returns its HTML page."""
    folder = run.elsewhere("tuned", data, out)
    return _page("04_search", folder.notebooks / "04_search.ipynb",
                 {"preset": run.recipe().name, "run_dir": str(run.path), "data_dir": data, "out_dir": str(folder.path)})


def predict(runs: list[RunFolder], flair: str, out: str = "", t1: str = "") -> Path:
    """Notebook 06 on scans (`derivatives.find`) with the weights of a run, or the mean of several: BIDS derivatives in `out` ("": the
    derivatives of `results` of the first). Returns its HTML page; raises InputError, at the end, if a scan failed. With weights for images:
    `album.segment_images`, and its table ("": images beside the derivatives)."""
    run = runs[0]
    if run.recipe().inputs.images:
        if t1:
            raise InputError(f"these weights are for images, which have no T1: leave {t1} out")
        return _predict_images(runs, flair, out or run.results() / "images")
    folder = Path(out).expanduser() if out else run.results() / "derivatives"
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "06_predict.ipynb")
        execute("06_predict", output, {"run_dir": shlex.join(str(run.path) for run in runs), "flair": str(flair), "t1": str(t1),
                                       "out_dir": str(folder)})
        page = pages.export_html(output, folder / "report.html")
    scans = read_table(folder / bids.TABLE)
    failed = (scans.status == "failed").sum()
    if failed:
        raise InputError(f"{failed} of {len(scans)} scans failed, the others are done: {folder / bids.INDEX} says why")
    return page


def _predict_images(runs: list[RunFolder], place: str, out: str | Path) -> Path:
    from .album import TABLE, segment_images  # imports torch, which nothing else here needs
    from .ensemble import open_engine

    table = segment_images(open_engine(runs), place, out)
    failed = table[table.status == "failed"]
    if len(failed):
        raise InputError(f"{len(failed)} of {len(table)} images failed, the others are done; the first: {failed.reason.iloc[0]}")
    return Path(out).expanduser() / TABLE


def pool(runs: list[RunFolder], out: str = "") -> Path:
    """The test cases of several runs, such as all folds of a cross-validation, as one table, metrics.csv in `out` ("": pooled beside the first), which is
    returned; results and agreement of volumes are printed."""
    from .cohort import describe
    from .evaluation import SYSTEMS, pooled
    from .report import as_text, results_table, volume_table

    table, recipe = pooled(runs), runs[0].recipe()
    data = describe(read_table(runs[0].cohort_csv), recipe.inputs)
    write_table(table, path := Path(out or runs[0].path.parent / "pooled").expanduser() / "metrics.csv")
    for shown in (results_table(table, recipe.seed), volume_table(table[table.system == SYSTEMS[0]])):
        print(f"\n{as_text(shown, data)}\n")
    return path


def benchmark(run: RunFolder, out: str = "") -> Path:
    """Notebook 10: how fast each part is on this machine; one scan is predicted with the weights of `run`, where it has any.
    Tables and figures in `out` ("": benchmark beside the run). Returns its HTML page."""
    folder = Path(out).expanduser() if out else run.path.parent / "benchmark"
    return _page("10_benchmark", folder / "10_benchmark.ipynb", {"run_dir": str(run.path), "out_dir": str(folder)})


def distill(preset: str, run: str = "", teacher: str = "", out: str = "", overrides: str = "") -> Path:
    """Notebook 08: a small student of a teacher (`teacher`: its file, "" the preset's own), in 4 bits under adapters, on the cases of
    the folder `run` ("": synthetic ones for the presets demo and smoke). All of it in `out` ("": runs/distill_<preset>). Returns its HTML page."""
    folder = Path(out or f"runs/distill_{preset}").expanduser()
    return _page("08_distill", folder / "08_distill.ipynb",
                 {"preset": preset, "run_dir": run, "out_dir": str(folder), "teacher": teacher, "overrides": overrides})


def compare(preset: str, run: str = "", out: str = "", overrides: str = "", share: str = "1/1") -> Path:
    """Notebook 07: adapters and parts of the recipe on equal terms, on the cases of the folder `run` ("": synthetic ones for the presets
    demo, vessels and smoke). The grid, of which this is the `share` "i/n", in `out` ("": runs/compare_<preset>). Returns its HTML page."""
    from .compare import job_of
    job_of(share)  # before cases are made
    folder = Path(out or f"runs/compare_{preset}").expanduser()
    name = "07_compare" + ("" if share == "1/1" else f"_{share.replace('/', '_of_')}")
    return _page("07_compare", folder / f"{name}.ipynb", {"preset": preset, "run_dir": run, "out_dir": str(folder), "overrides": overrides, "share": share})


def stroke(preset: str, run: str = "", out: str = "", overrides: str = "", networks: str = "", folds: int = 0) -> Path:
    """Notebook 09: the three networks of volumes (or those of `networks`) on the cases of the folder `run` ("": synthetic ones for the presets
    stroke-demo and stroke-smoke), the best of them over `folds` too. All of it in `out` ("": runs/<preset>_networks). Returns its HTML page."""
    folder = Path(out or f"runs/{preset}_networks").expanduser()
    name = "_".join(("09_stroke", *networks.split()))
    return _page("09_stroke", folder / f"{name}.ipynb", {"preset": preset, "run_dir": run, "out_dir": str(folder), "overrides": overrides,
                                                         "networks": networks, "folds": folds})


def _page(name: str, output: Path, parameters: dict) -> Path:
    """Runs a notebook into `output`; its HTML page, and for the report a PDF, beside it."""
    execute(name, output, parameters)
    page = pages.export_html(output, output.with_suffix(".html"))
    if name == "05_report":
        pages.export_pdf(page)
    return page


def execute(name: str, output: Path, parameters: dict) -> None:
    """Runs notebook `name` with `parameters`, its prints going to the terminal as they come; the result in `output`, or
    nothing there if it stops (NotebookError)."""
    os.environ.update(_MEMORY | os.environ | _QUIET)
    import papermill
    from nbclient.exceptions import DeadKernelError

    with tempfile.TemporaryDirectory() as scratch:
        executed = Path(scratch, "executed.ipynb")
        try:
            papermill.execute_notebook(REPOSITORY / "notebooks" / f"{name}.ipynb", executed, parameters, kernel_name="python3",
                                       progress_bar=False, extra_arguments=["--log-level=ERROR"], stdout_file=sys.stdout,
                                       shutdown_kernel="immediate",  # all is written; to unload what it has imported takes seconds
                                       stderr_file=sys.stderr if sys.stderr.isatty() else None)
        except papermill.PapermillExecutionError as error:
            story = "" if hasattr(errors, error.ename) else "\n" + "\n".join(error.traceback)
            raise NotebookError(f"{name} stopped: {error.evalue} ({error.ename}){story}") from None
        except DeadKernelError:
            raise NotebookError(f"{name} stopped: its process died, most often for want of memory; close what else runs, or "
                                "make training.batch_size or inputs.img_size (of volumes volume.patch) smaller") from None
        write_atomic(output, executed.read_bytes())


def generate_notebooks() -> None:
    """Writes each .ipynb from its .py: no outputs, cell ids that stay, so that the same source gives the same bytes."""
    for source in sorted(REPOSITORY.glob("notebooks/*.py")):
        write_atomic(source.with_suffix(".ipynb"), notebook_text(source))


def notebook_text(source: Path) -> str:
    """The .ipynb of a percent-format .py; Colab opens those that run a network on a GPU."""
    import jupytext

    content = jupytext.read(source)
    if source.stem[:2] > "02":
        content.metadata["accelerator"] = "GPU"
    for number, cell in enumerate(content.cells):
        cell["id"] = f"{source.stem[:2]}-{number:02d}"
    return nbformat.writes(content) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 1 where a WMHError stopped it."""
    parser = argparse.ArgumentParser(prog="python -m wmhlib.suite", description=__doc__.splitlines()[0])
    parser.add_argument("action", nargs="?", default="run", choices=tuple(_TAKES))
    parser.add_argument("--run", default="", help="run folder (default runs/<preset>; for pool several; for predict, where several are an ensemble, evaluate and tune the weights that come with the suite; "
                        "for compare, distill and stroke with a preset that has synthetic cases a folder made for them)")
    parser.add_argument("--preset", default="demo", help="recipe of the run")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--data", default="", help="folder or CSV of cases; without it a preset's synthetic cohort")
    parser.add_argument("--source", default="", help="synthetic, folder, kaggle or dataverse")
    parser.add_argument("--medsam", default="", help="zenodo, or a checkpoint file; for distill the file of the teacher")
    parser.add_argument("--overrides", default="", help='e.g. "training.epochs=3 skip=false"')
    parser.add_argument("--flair", default="", help="scans to segment: a file, several, or a folder")
    parser.add_argument("--t1", default="", help="its T1, on the same grid")
    parser.add_argument("--out", default="", help="folder for the results of predict, evaluate, tune, compare, distill, stroke or benchmark")
    parser.add_argument("--share", default="1/1", help="for compare: 2/8 does every eighth cell from the second, for eight jobs at once")
    parser.add_argument("--networks", default="", help='for stroke: some of its networks, e.g. "attention mamba"')
    parser.add_argument("--folds", type=int, default=0, help="for stroke: folds to cross-validate the best network in")
    given = parser.parse_args(arguments)
    strange = [f"--{name}" for name, value in vars(given).items() if value != parser.get_default(name) and name not in ("action", *_TAKES[given.action].split())]
    if strange:
        parser.error(f"{given.action} takes no {', '.join(strange)}")
    run = MINISAM if given.action in ("predict", "evaluate", "tune") and not given.run else RunFolder(given.run or f"runs/{given.preset}")
    start = time.monotonic()
    try:
        if given.action == "notebooks":
            generate_notebooks()
        elif given.action == "predict":
            if not given.flair:
                parser.error("predict needs --flair, the scans to segment")
            print(f"report {predict(run_folders(given.run) or [run], given.flair, given.out, given.t1)}")
        elif given.action == "distill":
            print(f"report {distill(given.preset, given.run, given.medsam, given.out, given.overrides)}")
        elif given.action == "compare":
            print(f"report {compare(given.preset, given.run, given.out, given.overrides, given.share)}")
        elif given.action == "stroke":
            print(f"report {stroke(given.preset, given.run, given.out, given.overrides, given.networks, given.folds)}")
        elif given.action == "pool":
            if not given.run:
                parser.error("pool needs --run, the run folders to join")
            print(f"metrics {pool(run_folders(given.run), given.out)}")
        elif given.action == "benchmark":
            print(f"report {benchmark(run, given.out)}")
        elif given.action == "tune":
            if not given.data:
                parser.error("tune needs --data, the labelled cases to choose the operating point on")
            page = tune(run, given.data, given.out)
            print(f"run folder {page.parent.parent}\nreport {page}")
        elif given.action in ("report", "evaluate"):
            if given.action == "evaluate" and not given.data:
                parser.error("evaluate needs --data, the labelled cases to evaluate on")
            page = report(run, given.data if given.action == "evaluate" else "", given.out)
            _results(RunFolder(page.parent.parent), run.recipe())
            print(f"report {page}")
        else:
            run_suite(run, given.preset, seed=given.seed, data_dir=given.data, source=given.source, medsam=given.medsam,
                      overrides=given.overrides)
            _conclude(run, time.monotonic() - start)
    except WMHError as error:
        return told(error)
    return 0


def _conclude(run: RunFolder, seconds: float) -> None:
    _results(run, run.recipe())
    print(f"finished in {seconds / 60:.1f} minutes; reports, first the one with the results:")
    for name in reversed(NOTEBOOKS):
        print(f"  {run.notebooks / name}.html")


def _results(folder: RunFolder, recipe: Recipe) -> None:
    from .cohort import describe  # imports torch, which the notebooks' own processes need and this one does not
    from .report import as_text, results_table

    data = describe(read_table(folder.cohort_csv), recipe.inputs)
    print(f"\n{as_text(results_table(read_table(folder.metrics_csv), recipe.seed), data)}\n")


if __name__ == "__main__":
    sys.exit(main())
