import ast
import gzip
import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import Payload
from safetensors.torch import save
from test_engine import network, origin

from wmhlib import bids, evaluation, medsam, provenance
from wmhlib.engine import WMHInferenceEngine
from wmhlib.errors import CheckpointError, InputError, RecipeError, WMHError
from wmhlib.files import write_atomic
from wmhlib.network import load_network
from wmhlib.nifti import load_volume
from wmhlib.presets import preset
from wmhlib.sections import Encoder
from wmhlib.settings import Recipe
from wmhlib.trained import weights_bytes
from wmhlib.workspace import RunFolder

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "wmhlib").rglob("*.py")), *sorted((ROOT / "notebooks").glob("*.py"))]
SMALL = Encoder(dim=16, depth=1, heads=1, global_blocks=(), window=2, grid=2)
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "telnetlib"}


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "code-ran"
    yield path
    assert not path.exists()


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_file_is_read_as_code(source):
    """No pickle, no eval, no shell, no connection that is not verified; torch.load takes tensors alone."""
    tree = ast.parse(source.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not FORBIDDEN & {name.split(".")[0] for name in names}, f"{source}:{node.lineno}"
    for call in calls(tree):
        name, words = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), f"{source}:{call.lineno}"
        assert name.split(".")[-1] not in ("read_pickle", "to_pickle", "unsafe_load"), f"{source}:{call.lineno}"
        assert name != "torch.load" or words.get("weights_only") == "True", f"{source}:{call.lineno}"
        assert words.get("allow_pickle", "False") == "False" and words.get("shell", "False") == "False", f"{source}:{call.lineno}"
        assert words.get("verify", "True") != "False" and words.get("trust_remote_code", "False") == "False", f"{source}:{call.lineno}"


def hostile(marker, path, kind):
    payload = {"x": Payload(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif kind == "torch":
        torch.save(payload, path)
    elif kind == "legacy":
        torch.save(payload, path, _use_new_zipfile_serialization=False)
    elif kind == "tensors and more":
        torch.save(medsam.ImageEncoder(SMALL).state_dict() | payload, path)
    else:
        torch.save(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize("kind", ["pickle", "torch", "legacy", "tensors and more", "module"])
def test_a_checkpoint_runs_no_code(kind, marker, tmp_path):
    path = tmp_path / "medsam.pth"
    hostile(marker, path, kind)
    with pytest.raises(CheckpointError, match="medsam.pth"):
        medsam.load_checkpoint(medsam.ImageEncoder(SMALL), path)
    with pytest.raises(CheckpointError, match="medsam.pth"):
        load_network(path)


def test_the_payload_would_run_if_it_were_unpickled(tmp_path):
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()


def test_a_checkpoint_that_unpacks_to_more_than_it_holds_is_refused(tmp_path):
    torch.save(medsam.ImageEncoder(SMALL).state_dict(), tmp_path / "sound.pth")
    with zipfile.ZipFile(tmp_path / "sound.pth") as sound, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in sound.namelist():
            bomb.writestr(name, bytes(50 << 20) if name.endswith("data/0") else sound.read(name))
    with pytest.raises(CheckpointError, match="bomb.pth unpacks to more"):
        medsam.load_checkpoint(medsam.ImageEncoder(SMALL), tmp_path / "bomb.pth")


def test_a_scan_that_unpacks_without_end_is_refused_before_it_fills_memory(tmp_path, tiny_nifti, monkeypatch):
    monkeypatch.setattr("wmhlib.nifti.MAX_VOXELS", 1 << 20)
    content = bytearray(tiny_nifti("a.nii").read_bytes()[:352])
    content[348] = 1
    struct.pack_into("<f", content, 108, 1e9)
    with gzip.open(tmp_path / "bomb.nii.gz", "wb") as file:
        file.write(content)
        file.write(bytes(20 << 20))
    with pytest.raises(InputError, match="unpacks to more than 8 MB"):
        load_volume(tmp_path / "bomb.nii.gz")


def with_metadata(path, content):
    path.write_bytes(save({"a": torch.zeros(1)}, content))


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, "null", "[]", '{"recipe": 1, "base_sha256": "x"}', '{"recipe": "{}", "base_sha256": 1}',
                                  '{"recipe": "x", "base_sha256": "x"}', "x" * 5_000_000])
def test_weights_with_absurd_metadata_are_refused(text, tmp_path):
    with_metadata(tmp_path / "best.safetensors", {"wmhlib": text})
    with pytest.raises(WMHError, match="best.safetensors"):
        load_network(tmp_path / "best.safetensors")


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    model = network()
    with torch.no_grad():
        model.decoder.heads[0].bias.fill_(float("nan"))
    write_atomic(tmp_path / "best.safetensors", weights_bytes(model, origin(model)))
    with pytest.raises(CheckpointError, match="heads.0.bias holds numbers that are NaN"):
        load_network(tmp_path / "best.safetensors")


@pytest.mark.parametrize("place", ["/etc/passwd", "/dev/zero", "/", "../../etc/shadow", "http://127.0.0.1/x"])
def test_a_recipe_leads_to_no_other_file_than_a_checkpoint(place, tmp_path):
    run = RunFolder(tmp_path / "run").open(preset("smoke", f'encoder.checkpoint="{place}"'))
    model = network()
    write_atomic(run.best, weights_bytes(model, origin(model)))
    with pytest.raises(CheckpointError) as error:
        WMHInferenceEngine.from_run(run)
    assert "root:" not in str(error.value)


@pytest.mark.parametrize("change", ["encoder.dim=1000000", "encoder.depth=1000000", "inputs.img_size=1000000000", "adapter.rank_mlp=100000000",
                                    "encoder.grid=100000", "training.lr=1e999", "seed=1e5", "training.epochs=" + "9" * 5000])
def test_a_recipe_that_would_fill_memory_or_is_no_number_is_refused(change):
    with pytest.raises(RecipeError):
        preset("smoke", change)


@pytest.mark.parametrize("name", ["../../evil", "/etc/cron.d/evil", "a\\b", "", "..", "a\nb", ".hidden", "=1+1", "<b>"])
def test_a_case_of_a_foreign_run_is_no_path(name, tmp_path):
    run = RunFolder(tmp_path)
    write_atomic(run.cohort_csv, f'case,subject,site,flair,t1,mask,ventricles\n"{name}",a,U,f,,m,\n')
    write_atomic(run.split_csv, f'case,split\n"{name}",test\n')
    with pytest.raises(InputError, match="cohort.csv"):
        run.cases()


def test_results_replace_a_link_and_do_not_write_through_it(tmp_path, tiny_nifti, disc_case):
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    folder = tmp_path / "predictions"
    folder.mkdir()
    (folder / "Utrecht_1_wmh.nii.gz").symlink_to(mine)
    case = disc_case() | {"volume": load_volume(tiny_nifti("a.nii", shape=(40, 48, 6)))}
    list(evaluation.save_masks([case], dict(threshold=0.4, min_voxels=1, tta=False), folder))
    assert mine.read_text() == "precious" and not (folder / "Utrecht_1_wmh.nii.gz").is_symlink()


@pytest.mark.parametrize("sidecar", [[], {"FLAIR": 1}, {"FLAIR": "x", "MadeWith": [], "Result": {}, "Files": {}},
                                     {"FLAIR": "x", "MadeWith": {}, "Result": {"lesions": "=1+1"}, "Files": {}},
                                     {"FLAIR": "x\0", "MadeWith": {}, "Result": {"lesions": 1, "volume_ml": 1}, "Files": {}}])
def test_a_foreign_sidecar_is_passed_over(sidecar, tmp_path):
    path = bids.sidecar(bids.paths(tmp_path, "sub-01", bids.WMH)["mask"])
    write_atomic(path, json.dumps(sidecar))
    assert provenance.done_before(tmp_path, bids.WMH) == {}


def contents(folder):
    """Every file below `folder` and its bytes, compressed ones unpacked too."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        yield path, data + (gzip.decompress(data) if path.name.endswith(".gz") else b"")


def test_no_secret_is_left_in_anything_a_run_leaves(smoke_run, planted_secrets):
    """Recipe, tables, weights, checkpoints, manifest, notebooks with their outputs, pages, and what was printed."""
    run, printed = smoke_run
    seen = 0
    for path, data in contents(run.path):
        seen += 1
        for secret in planted_secrets:
            assert secret.encode() not in data and secret.encode("utf-16-le") not in data, path
    assert seen > 30 and not any(secret in printed for secret in planted_secrets)


def test_the_search_for_secrets_finds_one(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"..KGAT_planted.."))
    assert [path.name for path, data in contents(tmp_path) if b"KGAT_planted" in data] == ["a.nii.gz"]


def test_a_recipe_in_json_makes_no_object_but_a_recipe():
    assert type(Recipe.from_json('{"name": "__import__"}')) is Recipe
    with pytest.raises(RecipeError):
        Recipe.from_json('{"__class__": "os.system"}')
