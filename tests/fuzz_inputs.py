"""Sound files, and damaged and hostile ones made of them: each maker takes the seeds and a generator, and gives bytes."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import struct
import zipfile

import nibabel
import numpy as np
import torch
from hostile import Payload
from safetensors.torch import save as to_safetensors

from wmhlib import medsam
from wmhlib.network import WMHNet
from wmhlib.presets import preset
from wmhlib.sections import Encoder
from wmhlib.trained import weights_bytes

_EXTREME = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 32767, -32768, 65535, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63), 10**30)
_REALS = (0.0, -0.0, 1e-45, 1e-30, 1e-6, 0.5, -1.0, 1e6, 1e30, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", " ", "\0", "..", "../../x", "/etc/passwd", "/dev/zero", "~nobody-at-all/x", "x" * 5000, "=1+1", "<script>", "é\u202e", "\ud800",
          "NaN", "1e999", "null", '"', "'", ",", "\n", "{", "[[", "-", "%s%n", "C:\\x", "9" * 5000)
ENCODER = Encoder(dim=16, depth=1, heads=1, global_blocks=(), window=2, grid=2)


def scan(shape=(14, 16, 6), dtype=np.float32) -> bytes:
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
        self.scans = [scan(), scan(dtype=np.int16), _nifti2(scan())]
        self.mask = _mask()
        network = WMHNet(recipe)
        self.origin = {"recipe": recipe.to_json(), "base_sha256": network.base_sha256, "split": "case,split\na,train\n"}
        self.weights, self.state = weights_bytes(network, self.origin), network.trained_state()
        self.encoder = medsam.ImageEncoder(ENCODER).state_dict()
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


def _nifti2(content: bytes) -> bytes:
    image = nibabel.Nifti1Image.from_bytes(content)
    return nibabel.Nifti2Image(np.asarray(image.dataobj), image.affine).to_bytes()


def _torch_bytes(content, **how) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def mutated(content: bytes, rng: np.random.Generator, head: int = 0) -> bytes:
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


def changed_header(content: bytes, rng: np.random.Generator) -> bytes:
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


def scan_input(seeds: Seeds, rng: np.random.Generator) -> tuple[bytes, str]:
    """A scan and the ending of its name."""
    content, kind = _some(seeds.scans, rng), rng.random()
    if kind < 0.4:
        content = changed_header(seeds.scans[0], rng)
    elif kind < 0.7:
        content = mutated(content, rng, head=352)
    elif kind < 0.85:
        content = mutated(content, rng)
    elif kind < 0.86:
        return gzip.compress(_bomb(seeds.scans[0], rng), 9), ".nii.gz"
    elif kind < 0.9:
        data = np.frombuffer(content[352:], np.float32).copy() if content is seeds.scans[0] else None
        if data is not None:
            data[rng.integers(len(data), size=int(rng.choice([1, 30, len(data)])))] = _some(_REALS, rng)
            content = content[:352] + data.tobytes()
    else:
        return mutated(gzip.compress(content, 1), rng, head=int(rng.choice([0, 20]))), _some((".nii.gz", ".nii.gz", ".nii"), rng)
    return (content, ".nii") if rng.random() < 0.7 else (gzip.compress(content, 1), ".nii.gz")


def json_input(tree: dict, rng: np.random.Generator) -> bytes:
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
        return mutated(json.dumps(tree, indent=1).encode(), rng)
    return _some((b"", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 100_000, b'{"seed": ' + b"9" * 9000 + b"}", b"\xff\xfe{\0}\0", b"null", b"[]", b'"x"',
                  b"{}", b"NaN", b"\0" * 100, b'{"seed": 1e999}', "{\"é\": 1}".encode("latin-1")), rng)


def text_input(text: str, rng: np.random.Generator) -> bytes:
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
        return mutated(text.encode(), rng)
    return _some((b"", b"\n\n", b"\xff\xfe" + text.encode("utf-16-le"), b"\xef\xbb\xbf" + text.encode(), text.replace(",", ";").encode(),
                  text.encode() + b'"' * 3, b"a" * 200_000 + b"\n", text.encode().replace(b"\n", b"\r"), b"\0" * 500,
                  text.encode() + b'"' + b"x" * 200_000, b"," * 10_000 + b"\n", text.encode() * 30), rng)


def checkpoint_input(seeds: Seeds, rng: np.random.Generator) -> bytes:
    kind = rng.random()
    if kind < 0.6:
        return mutated(_some(seeds.checkpoints, rng), rng, head=int(rng.choice([0, 600])))
    if kind < 0.8:  # the members of the zip file, changed each for itself
        file, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(seeds.checkpoints[0]))
        with zipfile.ZipFile(file, "w", int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as target:
            for name in source.namelist():
                content = source.read(name)
                if name.endswith("data.pkl") and rng.random() < 0.7 or rng.random() < 0.05:
                    content = mutated(content, rng)
                target.writestr(name, content if rng.random() < 0.98 else bytes(100 << 20))
        return file.getvalue()
    state = dict(seeds.encoder)
    name = _some(list(state), rng)
    state[name] = _some((Payload("code-ran"), None, 1, [state[name]], torch.full_like(state[name], float("nan")), state[name].to_sparse(),
                         state[name].to(torch.complex64), torch.zeros(0), state[name].double(), torch.zeros(1).expand(10**9), {"a": state[name]}), rng)
    if kind < 0.9:
        return _torch_bytes(state)
    return _some((pickle.dumps({name: Payload("code-ran")}), pickle.dumps(Payload("code-ran")), b"", bytes(1000), _torch_bytes([1, 2]), _torch_bytes({1: state[name]}),
                  _torch_bytes(Payload("code-ran")), _torch_bytes(seeds.encoder)[:-30]), rng)


def weights_input(seeds: Seeds, rng: np.random.Generator) -> bytes:
    kind = rng.random()
    header = struct.unpack("<Q", seeds.weights[:8])[0]
    if kind < 0.35:
        return mutated(seeds.weights, rng, head=8 + header)
    if kind < 0.45:
        return mutated(seeds.weights, rng)
    if kind < 0.55:
        return struct.pack("<Q", _some((0, 1, 2**31, 2**40, 2**63, header - 1, header + 1, 100_000_000), rng)) + seeds.weights[8:]
    if kind < 0.85:
        origin = dict(seeds.origin)
        key = _some(list(origin), rng)
        origin[key] = _some((None, 1, [], {}, "x", json_input(seeds.recipe, rng).decode(errors="replace")), rng)
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
