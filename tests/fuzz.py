"""Feeds the readers of scans, tables, JSON files and weights with damaged and hostile files.

    python tests/fuzz.py --inputs 20000 --seed 0

Each input lies alone in a folder and is read in a process that may use no more than `MEMORY` bytes above what it starts with and
no more than `SECONDS`. It must load, and what is loaded must be sound, or be refused by a typed error; nothing may be left behind.
Input number n of a seed is always the same: `--only n` reads it again and shows the traceback.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import gzip
import io
import json
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import torch
from safetensors.torch import save as to_safetensors

from wmhlib import bids, canvas, cohort, derivatives, layouts, medsam, nifti, splits, storage, volumes
from wmhlib.errors import CheckpointError, WMHError
from wmhlib.network import WMHNet, load_network
from wmhlib.presets import preset
from wmhlib.sections import Encoder, Inputs
from wmhlib.trained import weights_bytes
from wmhlib.workspace import RunFolder, read_table

SECONDS = 10.0  # for one input, of this machine when nothing else runs on it
MEMORY = 2 << 30  # bytes, for one input
_EXTREME = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 32767, -32768, 65535, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63), 10**30)
_REALS = (0.0, -0.0, 1e-45, 1e-30, 1e-6, 0.5, -1.0, 1e6, 1e30, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", " ", "\0", "..", "../../x", "/etc/passwd", "/dev/zero", "~nobody-at-all/x", "x" * 5000, "=1+1", "<script>", "é\u202e", "\ud800",
          "NaN", "1e999", "null", '"', "'", ",", "\n", "{", "[[", "-", "%s%n", "C:\\x", "9" * 5000)
_ENCODER = Encoder(dim=16, depth=1, heads=1, global_blocks=(), window=2, grid=2)


def _scan(shape=(14, 16, 6), dtype=np.float32) -> bytes:
    places = np.indices(shape) - (np.array(shape)[:, None, None, None] - 1) / 2
    inside = ((places / (0.45 * np.array(shape))[:, None, None, None]) ** 2).sum(0) < 1
    data = (inside * 100 + np.random.default_rng(0).normal(8, 2, shape)).astype(dtype)
    return nibabel.Nifti1Image(data, np.diag([10.0, 10.0, 20.0, 1.0])).to_bytes()


def _mask() -> bytes:
    data = np.zeros((14, 16, 6), np.uint8)
    data[6:8, 6:9, 3], data[2, 2, 2] = 1, 2
    return nibabel.Nifti1Image(data, np.diag([10.0, 10.0, 20.0, 1.0])).to_bytes()


class Seeds:
    """The sound files that inputs are made of."""

    def __init__(self):
        recipe = preset("smoke")
        self.scans = [_scan(), _scan(dtype=np.int16), _nifti2(_scan())]
        self.mask = _mask()
        network = WMHNet(recipe)
        self.origin = {"recipe": recipe.to_json(), "base_sha256": network.base_sha256, "split": "case,split\na,train\n"}
        self.weights, self.state = weights_bytes(network, self.origin), network.trained_state()
        self.encoder = medsam.ImageEncoder(_ENCODER).state_dict()
        self.checkpoints = [_torch_bytes(self.encoder), _torch_bytes(self.encoder, _use_new_zipfile_serialization=False)]
        self.recipe = json.loads(recipe.to_json())
        self.point = {"threshold": 0.5, "min_voxels": 3, "min_mm3": 0.0, "tta": True, "dsc": 0.7, "se": 0.1, "n": 3, "best_dsc": 0.7,
                      "plateau_points": 4, "zscore_threshold": 2.0, "unsure_above": 0.5, "poor_below": 0.6}
        self.sidecar = {"FLAIR": "../x.nii.gz", "MadeWith": {"version": "1", "threshold": 0.5, "min_voxels": 3, "min_mm3": 0.0, "tta": True},
                        "Result": {"volume_ml": 1.5, "lesions": 2, "uncertainty": 0.1, "unsure": False}, "Files": {"a.nii.gz": "0" * 64}}
        self.description = {"Name": "x", "BIDSVersion": "1.10.0", "GeneratedBy": [{"Name": "wmhlib", "Version": "1"}]}
        cases = [f"Utrecht_{i}" for i in range(4)]
        self.cohort = "case,subject,site,flair,t1,mask,ventricles,group,lesion_ml,origin\n" + "".join(
            f"{case},{case},Utrecht,/a/{case}.nii,,/a/{case}_wmh.nii,,training,{i}.5,real\n" for i, case in enumerate(cases))
        self.split = "case,subject,site,lesion_ml,split\n" + "".join(
            f"{case},{case},Utrecht,{i}.5,{part}\n" for i, (case, part) in enumerate(zip(cases, ("train", "train", "val", "test"))))
        self.history = "epoch,lr,train_loss,val_loss,val_dice\n1,0.003,1.2,1.1,0.1\n2,0.002,1,0.9,0.3\n"
        self.cases = "subject,site,flair,mask,t1\na,U,FLAIR.nii,wmh.nii,\nb,U,other.nii,other_wmh.nii,\n"
        self.participants = "participant_id\tsite\nsub-01\tUtrecht\nsub-02\tn/a\n"


# How inputs are made: each takes the seeds and a generator, and gives bytes.

def _nifti2(content: bytes) -> bytes:
    image = nibabel.Nifti1Image.from_bytes(content)
    return nibabel.Nifti2Image(np.asarray(image.dataobj), image.affine).to_bytes()


def _torch_bytes(content, **how) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def _mutated(content: bytes, rng: np.random.Generator, head: int = 0) -> bytes:
    """One to eight changes anywhere, or within the first `head` bytes: bits, bytes, numbers, cuts, repeats, foreign bytes."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        size = len(data) if not head or rng.random() < 0.1 else min(head, len(data))
        if size < 8:
            break
        at, length = int(rng.integers(size)), int(rng.integers(1, 64))
        kind = rng.integers(9)
        if kind < 2:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[at] = int(rng.integers(256))
        elif kind == 3:
            form = str(rng.choice(["<h", ">h", "<i", ">i", "<q", "<f", "<d"]))
            number = _some(_REALS, rng) if form[1] in "fd" else _some(_EXTREME, rng)
            with contextlib.suppress(struct.error, OverflowError):
                data[at: at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 4 and rng.random() < 0.5:
            del data[at:]
        elif kind == 5:
            del data[at: at + length]
        elif kind == 6:
            data[at:at] = data[at: at + length] * int(rng.choice([1, 2, 50]))
        elif kind == 7:
            data[at:at] = rng.bytes(length)
        else:
            data[at: at + length] = bytes([int(rng.choice([0, 255]))]) * length
    return bytes(data)


def _some(values, rng: np.random.Generator):
    return values[int(rng.integers(len(values)))]


_FIELDS = {"dim": ("h", 40, 8), "datatype": ("h", 70, 1), "bitpix": ("h", 72, 1), "pixdim": ("f", 76, 8), "vox_offset": ("f", 108, 1),
           "scl": ("f", 112, 2), "xyzt": ("b", 123, 1), "cal": ("f", 124, 2), "codes": ("h", 252, 2), "quatern": ("f", 256, 6),
           "srow": ("f", 280, 12), "magic": ("4s", 344, 1), "sizeof_hdr": ("i", 0, 1), "extension": ("b", 348, 1)}


def _header(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three fields of a NIfTI-1 header set to something else."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        form, start, count = _FIELDS[_some(list(_FIELDS), rng)]
        at = start + struct.calcsize(form) * int(rng.integers(count))
        if form == "4s":
            value = _some((b"ni1\0", b"n+2\0", b"\0\0\0\0", b"n+1\1", b"abcd"), rng)
        elif form == "f":
            value = _some(_REALS, rng) if rng.random() < 0.7 else float(rng.normal(0, 100))
        else:
            bits = 8 * struct.calcsize(form) - 1
            value = int(_some(_EXTREME, rng) if rng.random() < 0.7 else rng.integers(-300, 3000))
            value = max(-(1 << bits), min((1 << bits) - 1, value))
        struct.pack_into(f"<{form}", data, at, value)
    return bytes(data)


def _bomb(content: bytes, rng: np.random.Generator) -> bytes:
    """A short file that claims to be large, or inflates to much: dims, extensions of any length, zeros."""
    data = bytearray(content[:352] + content[352: 352 + 64])
    kind = int(rng.integers(4))
    if kind < 2:
        side = int(_some((300, 600, 800, 2000, 32767), rng))
        struct.pack_into("<8h", data, 40, 3, side, side, side if kind else 1, 1, 1, 1, 1)
    if kind == 2:
        data[348] = 1
        struct.pack_into("<f", data, 108, float(_some((1e5, 1e9, 1e15), rng)))
        struct.pack_into("<ii", data, 352, int(_some((0, 8, -1, 16, 2**31 - 1), rng)), 6)
    if kind == 3:
        struct.pack_into("<h", data, 70, 64)
        struct.pack_into("<8h", data, 40, 3, 512, 512, 100, 1, 1, 1, 1)
    zeros = bytes(1 << 20)
    return bytes(data) + zeros * int(_some((0, 1, 20, 200), rng))


def _scan_input(seeds: Seeds, rng: np.random.Generator) -> tuple[bytes, str]:
    """A scan and the ending of its name."""
    content, kind = _some(seeds.scans, rng), rng.random()
    if kind < 0.4:
        content = _header(seeds.scans[0], rng)
    elif kind < 0.7:
        content = _mutated(content, rng, head=352)
    elif kind < 0.85:
        content = _mutated(content, rng)
    elif kind < 0.86:
        return gzip.compress(_bomb(seeds.scans[0], rng), 9), ".nii.gz"
    elif kind < 0.9:
        data = np.frombuffer(content[352:], np.float32).copy() if content is seeds.scans[0] else None
        if data is not None:
            data[rng.integers(len(data), size=int(rng.choice([1, 30, len(data)])))] = _some(_REALS, rng)
            content = content[:352] + data.tobytes()
    else:
        return _mutated(gzip.compress(content, 1), rng, head=int(rng.choice([0, 20]))), _some((".nii.gz", ".nii.gz", ".nii"), rng)
    return (content, ".nii") if rng.random() < 0.7 else (gzip.compress(content, 1), ".nii.gz")


def _json_input(tree: dict, rng: np.random.Generator) -> bytes:
    """JSON with values, keys or bytes that it should not have."""
    tree, kind = json.loads(json.dumps(tree)), rng.random()
    if kind < 0.65:
        for _ in range(int(rng.integers(1, 4))):
            node, path = tree, None
            while isinstance(node, (dict, list)) and len(node) and (path is None or rng.random() < 0.9):
                path = (node, _some(list(node), rng) if isinstance(node, dict) else int(rng.integers(len(node))))
                node = path[0][path[1]]
            if path is None:
                break
            value = _some((*_EXTREME, *_REALS, *_TEXTS, True, None, [], {}, [[]], {"a": {}}, [1] * 1000), rng)
            if rng.random() < 0.15 and isinstance(path[0], dict):
                path[0].pop(path[1])
                path[0][str(_some(_TEXTS, rng))] = value
            elif rng.random() < 0.15:
                del path[0][path[1]]
            else:
                path[0][path[1]] = value
        return json.dumps(tree).encode(errors="surrogatepass")
    if kind < 0.9:
        return _mutated(json.dumps(tree, indent=1).encode(), rng)
    return _some((b"", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 100_000, b'{"seed": ' + b"9" * 9000 + b"}", b"\xff\xfe{\0}\0", b"null", b"[]", b'"x"',
                  b"{}", b"NaN", b"\0" * 100, b'{"seed": 1e999}', "{\"é\": 1}".encode("latin-1")), rng)


def _text_input(text: str, rng: np.random.Generator) -> bytes:
    """A table with cells, columns, quotes, encodings or bytes that it should not have."""
    kind = rng.random()
    delimiter = "\t" if "\t" in text else ","
    if kind < 0.6:
        cells = [line.split(delimiter) for line in text.splitlines()]
        for _ in range(int(rng.integers(1, 5))):
            row = cells[int(rng.integers(len(cells)))] if rng.random() < 0.8 else cells[0]
            at, how = int(rng.integers(len(row))) if row else 0, rng.random()
            if how < 0.6 and row:
                row[at] = str(_some((*_TEXTS, *_EXTREME, *_REALS), rng))
            elif how < 0.7:
                row.append(str(_some(_TEXTS, rng)))
            elif how < 0.8 and row:
                del row[at]
            elif how < 0.9 and row:
                row[at] = row[int(rng.integers(len(row)))]
            else:
                cells.append(list(_some(cells, rng)))
        return "\n".join(delimiter.join(row) for row in cells).encode(errors="surrogatepass")
    if kind < 0.9:
        return _mutated(text.encode(), rng)
    return _some((b"", b"\n\n", b"\xff\xfe" + text.encode("utf-16-le"), b"\xef\xbb\xbf" + text.encode(), text.replace(",", ";").encode(),
                  text.encode() + b'"' * 3, b"a" * 200_000 + b"\n", text.encode().replace(b"\n", b"\r"), b"\0" * 500,
                  text.encode() + b'"' + b"x" * 200_000, b"," * 10_000 + b"\n", text.encode() * 30), rng)


class _Runs:
    """Would write a file if it were unpickled."""

    def __reduce__(self):
        return os.system, ("touch code-ran",)


def _checkpoint_input(seeds: Seeds, rng: np.random.Generator) -> bytes:
    kind = rng.random()
    if kind < 0.6:
        return _mutated(_some(seeds.checkpoints, rng), rng, head=int(rng.choice([0, 600])))
    if kind < 0.8:  # the members of the zip file, changed each for itself
        file, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(seeds.checkpoints[0]))
        with zipfile.ZipFile(file, "w", int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as target:
            for name in source.namelist():
                content = source.read(name)
                if name.endswith("data.pkl") and rng.random() < 0.7 or rng.random() < 0.05:
                    content = _mutated(content, rng)
                target.writestr(name, content if rng.random() < 0.98 else bytes(100 << 20))
        return file.getvalue()
    state = dict(seeds.encoder)
    name = _some(list(state), rng)
    state[name] = _some((_Runs(), None, 1, [state[name]], torch.full_like(state[name], float("nan")), state[name].to_sparse(),
                         state[name].to(torch.complex64), torch.zeros(0), state[name].double(), torch.zeros(1).expand(10**9), {"a": state[name]}), rng)
    if kind < 0.9:
        return _torch_bytes(state)
    return _some((pickle.dumps({name: _Runs()}), pickle.dumps(_Runs()), b"", bytes(1000), _torch_bytes([1, 2]), _torch_bytes({1: state[name]}),
                  _torch_bytes(_Runs()), _torch_bytes(seeds.encoder)[:-30]), rng)


def _weights_input(seeds: Seeds, rng: np.random.Generator) -> bytes:
    kind = rng.random()
    header = struct.unpack("<Q", seeds.weights[:8])[0]
    if kind < 0.35:
        return _mutated(seeds.weights, rng, head=8 + header)
    if kind < 0.45:
        return _mutated(seeds.weights, rng)
    if kind < 0.55:
        return struct.pack("<Q", _some((0, 1, 2**31, 2**40, 2**63, header - 1, header + 1, 100_000_000), rng)) + seeds.weights[8:]
    if kind < 0.85:
        origin = dict(seeds.origin)
        key = _some(list(origin), rng)
        origin[key] = _some((None, 1, [], {}, "x", _json_input(seeds.recipe, rng).decode(errors="replace")), rng)
        text = _some((json.dumps(origin), json.dumps(origin), json.dumps([origin]), "[" * 100_000, "x" * 10**6), rng)
        return to_safetensors(seeds.state, {"wmhlib": text})
    state = dict(seeds.state)
    name = _some(list(state), rng)
    if rng.random() < 0.3:
        del state[name]
    else:
        state[name] = _some((torch.zeros(0), state[name].double(), torch.full_like(state[name], _some((0, 1, 7), rng)),
                             torch.full_like(state[name].float(), float("nan")), torch.zeros(1, 1, 1), state[name].to(torch.int32)), rng)
    return to_safetensors(state, {"wmhlib": json.dumps(seeds.origin)})


# How inputs are read: each takes the folder and the seeds, and checks what it gets.

def _read_scan(path: Path, seeds: Seeds) -> None:
    case = volumes.load_case(path, inputs=Inputs(img_size=32))
    assert np.isfinite(case.images).all() and case.images.shape[1:] == case.volume.data.shape == case.inner.shape
    shown = volumes.case_canvas(case, 32)
    back = canvas.from_canvas(shown[0], case.grid)
    assert back.shape == case.volume.data.shape and np.isfinite(back).all()
    saved = nifti.save_like(case.inner.astype(np.uint8), case.volume, path.with_name("saved.nii.gz"))
    assert np.array_equal(np.asarray(nibabel.load(saved).dataobj), case.inner)
    saved.unlink()


def _read_mask(path: Path, seeds: Seeds) -> None:
    good = path.with_name("good.nii")
    good.write_bytes(seeds.scans[0])
    try:
        like = nifti.load_volume(good)
        mask = nifti.load_mask(path, like)
        assert mask.dtype == np.uint8 and mask.shape == like.data.shape and set(np.unique(mask)) <= {0, 1, 2}
        cohort.load_ventricles(str(path), like)
    finally:
        good.unlink()


def _read_cases(path: Path, seeds: Seeds) -> None:
    files = [path.with_name(name) for name in ("FLAIR.nii", "wmh.nii", "other.nii", "other_wmh.nii")]
    for file in files:
        file.touch()
    try:
        rows = layouts.candidates(path, labelled=False)
        cohort.find_scans(path)
        rows += layouts.candidates(path, labelled=True)
        assert not any("/" in row["case"] or ".." in row["case"] for row in rows)
        cohort.find_cases(path)
    finally:
        for file in files:
            file.unlink()


def _read_participants(path: Path, seeds: Seeds) -> None:
    scan = path.parent / "sub-01" / "anat" / "sub-01_FLAIR.nii"
    scan.parent.mkdir(parents=True)
    scan.touch()
    try:
        assert cohort.find_scans(path.parent).case[0] == "sub-01"
    finally:
        shutil.rmtree(scan.parents[1])


def _read_run(path: Path, seeds: Seeds) -> None:
    run = RunFolder(path.parent)
    other = run.split_csv if path.name == "cohort.csv" else run.cohort_csv
    other.write_text(seeds.split if path.name == "cohort.csv" else seeds.cohort)
    try:
        cases = run.cases()
        splits.check_split(read_table(run.split_csv), cases)
        assert all(Path(case).name == case for case in cases.case)
        run.split_text()
    finally:
        other.unlink()


def _read_sidecar(path: Path, seeds: Seeds) -> None:
    mask = bids.sidecar(bids.paths(path.parent, "sub-01")["mask"])
    mask.parent.mkdir(parents=True)
    shutil.copy(path, mask)
    try:
        derivatives._write_overview([], path.parent, bids.WMH)
    finally:
        for name in (derivatives.TABLE, derivatives.INDEX):
            (path.parent / name).unlink(missing_ok=True)
        shutil.rmtree(path.parent / "sub-01")


def _read_description(path: Path, seeds: Seeds) -> None:
    layouts._our_own(path.parent)
    bids.write_dataset(path.parent / "none", {})
    shutil.rmtree(path.parent / "none")
    before = path.read_bytes()
    try:
        bids.write_dataset(path.parent, {})
    finally:
        for name in ("README", f"{bids.WMH.entities}_lesions.json", ".bidsignore"):
            (path.parent / name).unlink(missing_ok=True)
        path.write_bytes(before)


def _read_checkpoint(path: Path, seeds: Seeds) -> None:
    with contextlib.suppress(CheckpointError):
        assert isinstance(storage.load_checkpoint(path), dict)
    encoder = medsam.ImageEncoder(_ENCODER)
    medsam.load_checkpoint(encoder, path)
    assert all(torch.isfinite(value).all() for value in encoder.state_dict().values())


def _read_weights(path: Path, seeds: Seeds) -> None:
    network, split = load_network(path)
    assert all(torch.isfinite(value).all() for value in network.trained_state().values()) and isinstance(split, str)


_TARGETS = {  # share of the inputs: name, how it is made, how it is read
    "scan": (0.34, _scan_input, _read_scan),
    "mask": (0.08, lambda s, r: (_header(s.mask, r) if r.random() < 0.5 else _mutated(s.mask, r), ".nii"), _read_mask),
    "cases.csv": (0.09, lambda s, r: _text_input(s.cases, r), _read_cases),
    "cohort.csv": (0.07, lambda s, r: _text_input(s.cohort, r), _read_run),
    "split.csv": (0.07, lambda s, r: _text_input(s.split, r), _read_run),
    "history.csv": (0.04, lambda s, r: _text_input(s.history, r), lambda path, seeds: read_table(path)),
    "participants.tsv": (0.03, lambda s, r: _text_input(s.participants, r), _read_participants),
    "recipe.json": (0.08, lambda s, r: _json_input(s.recipe, r), lambda path, seeds: RunFolder(path.parent).recipe()),
    "operating_point.json": (0.05, lambda s, r: _json_input(s.point, r), lambda path, seeds: RunFolder(path.parent).point()),
    "sidecar.json": (0.03, lambda s, r: _json_input(s.sidecar, r), _read_sidecar),
    "dataset_description.json": (0.02, lambda s, r: _json_input(s.description, r), _read_description),
    "checkpoint.pt": (0.06, _checkpoint_input, _read_checkpoint),
    "best.safetensors": (0.04, _weights_input, _read_weights),
}


def make(seeds: Seeds, seed: int, number: int) -> tuple[str, str, bytes]:
    """Input `number`: what it attacks, the name of its file, its bytes."""
    rng = np.random.default_rng((seed, number))
    target = str(rng.choice(list(_TARGETS), p=[share for share, *_ in _TARGETS.values()]))
    content = _TARGETS[target][1](seeds, rng)
    content, ending = content if isinstance(content, tuple) else (content, "")
    return target, target + ending, content


def read(seeds: Seeds, target: str, path: Path) -> str:
    """How reading ended: "loaded", "refused (<error>)" or what must not be. What asked for more memory than there is is read once
    more with four times as much, and is at fault only if it fills it: a buffer that is reserved and not used does no harm."""
    outcome = _read(seeds, target, path)
    if outcome == "MEMORY":
        with _memory(4 * MEMORY):
            outcome = _read(seeds, target, path)
    left = sorted(p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*") if p != path)
    return f"LEFT {left}" if left else outcome


def _read(seeds: Seeds, target: str, path: Path) -> str:
    started, outcome = _peak(), "loaded"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            _TARGETS[target][2](path, seeds)
        except WMHError as error:
            cause = error.__context__
            outcome = "MEMORY" if isinstance(cause, MemoryError) or "allocate memory" in str(cause) else f"refused ({type(error).__name__})"
        except MemoryError:
            outcome = "MEMORY"
        except BaseException as error:  # the point of it
            outcome = f"UNTYPED {type(error).__name__}: {str(error)[:150]}"
    if _peak() - started > MEMORY // 2:
        outcome = f"MEMORY {(_peak() - started) >> 20} MB"
    return outcome


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _memory(more: int):
    """This process may take `more` bytes than it has."""
    before, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _work(pipe, seed: int, folder: str) -> None:
    """Reads the inputs whose numbers come through `pipe`, and sends what each attacks and then how it ended."""
    torch.set_num_threads(1)
    logging.disable()
    seeds = Seeds()
    faulthandler.disable()
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    os.chdir(folder)
    with _memory(MEMORY):
        for number in iter(pipe.recv, None):
            place = Path(folder, f"{number}")
            place.mkdir()
            target, name, content = make(seeds, seed, number)
            (place / name).write_bytes(content)
            pipe.send(target)
            outcome = read(seeds, target, place / name)
            shutil.rmtree(place)
            others = os.listdir(folder)
            pipe.send(outcome if not others else f"LEFT {others}")


def fuzz(inputs: int, seed: int, first: int = 0, progress: bool = False) -> tuple[collections.Counter, list[str]]:
    """Reads `inputs` inputs of `seed`, from number `first` on. Returns how often each (target, outcome) was, and a line for each that must not be."""
    counts, faults, worker = collections.Counter(), [], None
    context, start = multiprocessing.get_context("spawn"), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + inputs):
            if worker is None:
                pipe, end = context.Pipe()
                worker = context.Process(target=_work, args=(end, seed, folder), daemon=True)
                worker.start()
                end.close()
            pipe.send(number)
            target = pipe.recv()
            try:
                outcome = pipe.recv() if pipe.poll(SECONDS) else "HANGS"
            except EOFError:
                outcome = "CRASH"
            if outcome in ("HANGS", "CRASH"):
                worker.kill()
                worker.join()
                worker = None
                for name in os.listdir(folder):
                    shutil.rmtree(Path(folder, name))
            counts[target, outcome.split(":")[0]] += 1
            if outcome[:2].isupper():
                faults.append(f"{number} {target}: {outcome}")
                if progress:
                    print(faults[-1], flush=True)
            if progress and (number + 1 - first) % 1000 == 0:
                print(f"{number + 1 - first} inputs in {time.monotonic() - start:.0f} s, {len(faults)} faults", flush=True)
        if worker:
            pipe.send(None)
            worker.join()
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to share the work")
    parser.add_argument("--only", type=int, help="number of one input, read with its traceback")
    given = parser.parse_args()
    if given.only is not None:
        seeds = Seeds()
        target, name, content = make(seeds, given.seed, given.only)
        path = Path(tempfile.mkdtemp(), name)
        path.write_bytes(content)
        print(f"{target}: {len(content)} bytes in {path}")
        try:
            _TARGETS[target][2](path, seeds)
        except Exception:
            traceback.print_exc()
        return 0
    start = time.monotonic()
    counts, faults = fuzz(given.inputs, given.seed, given.first, progress=True)
    inputs = sum(counts.values())
    for (target, outcome), count in sorted(counts.items()):
        print(f"{count:6d}  {target:26s} {outcome}")
    print(f"{inputs} inputs in {time.monotonic() - start:.0f} s, {len(faults)} of them faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
