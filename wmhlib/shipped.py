"""The weights that come with the suite: a small base pretrained on synthetic heads, and the adapter with which it finds WMH.

    make weights                                    # both from nothing: hours on two cores
    python -m wmhlib.shipped base RUN_FOLDER        # the network of preset base, as the base of others
    python -m wmhlib.shipped adapter RUN_FOLDER     # what a run on that base has trained, with its operating point

`assets/minisam` is laid out as a run folder, so whatever reads a run reads it too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .errors import InputError, WMHError, told
from .files import read_table, write_atomic, write_table
from .network import load_network
from .sections import SHIPPED
from .weights import BASE, half, tensors_bytes
from .workspace import MINISAM, RunFolder

_COLUMNS = ["case", "subject", "site", "group", "origin", "lesion_ml", "digest"]  # of a cohort, that tell what the weights have seen


def export_base(run: RunFolder, path: Path = BASE) -> Path:
    """Writes the network of `run`, whose encoder was trained in full or not at all, and which learnt prompts, as a base file: the keys
    of a SAM state dict, and channel adapter, decoder and skip to start from, matrices in half precision. InputError for another run."""
    network, _ = load_network(run.need(run.best, "03_train"), run.recipe().encoder.checkpoint)
    if network.recipe.adapter.method not in ("full", "none") or not network.recipe.pretext.prompts:
        raise InputError(f"{run.path} did not train a base: expected one of preset base (adapter.method full or none, pretext.prompts above 0)")
    names = {"encoder.": "image_encoder.", "pretext.promptable.": "", "channel_adapter.": "channel_adapter.", "decoder.": "decoder.", "skip.": "skip."}
    state = {new + key.removeprefix(old): half(value) for key, value in network.state_dict().items()
             for old, new in names.items() if key.startswith(old)}
    write_atomic(path, tensors_bytes(state, {"recipe": network.recipe.to_json()}))
    return path


def export_adapter(run: RunFolder, folder: Path = MINISAM.path) -> Path:
    """Writes `run`, which adapts the shipped base, to `folder`: trained weights (matrices in half precision), recipe, operating point
    and tables, without its cases' files and their geometry. InputError for a run on another base."""
    network, split = load_network(run.need(run.best, "03_train"))
    if network.recipe.encoder.checkpoint != SHIPPED:
        raise InputError(f"{run.path} adapts {network.recipe.encoder.checkpoint or 'random weights'}: expected encoder.checkpoint={SHIPPED}")
    there, point = RunFolder(folder), run.point(network.fingerprint())
    origin = {"recipe": network.recipe.to_json(), "base_sha256": network.base_sha256, "split": split}
    state = {key: half(value) for key, value in network.trained_state().items()}
    heatmap = run.figures / "search_heatmap.png"  # which a report shows
    copies = {folder / path.relative_to(run.path): run.need(path, "04_search").read_bytes()
              for path in (run.history_csv, run.split_csv, run.recipe_json, heatmap)}
    cohort = read_table(run.cohort_csv)[_COLUMNS].assign(flair="", t1="", mask="", ventricles="")
    there.earlier_csv.unlink(missing_ok=True)
    if run.earlier_csv.exists():
        copies[there.earlier_csv] = run.earlier_csv.read_bytes()
    for path, data in copies.items():
        write_atomic(path, data)
    write_table(cohort, there.cohort_csv)
    write_atomic(there.best, tensors_bytes(state, origin))
    point["weights_sha256"] = load_network(there.best)[0].fingerprint()  # in half precision they are others
    write_atomic(there.operating_point, json.dumps(point, indent=2) + "\n")
    return folder


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 1 where a WMHError stopped it."""
    parser = argparse.ArgumentParser(prog="python -m wmhlib.shipped", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("base", "adapter"))
    parser.add_argument("run", help="the run folder that trained it")
    given = parser.parse_args(arguments)
    try:
        print({"base": export_base, "adapter": export_adapter}[given.what](RunFolder(given.run)))
    except WMHError as error:
        return told(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
