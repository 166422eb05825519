"""What Colab needs, held without Colab: a fixture stands in for its modules."""

import ast
import importlib.metadata
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jupytext
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import wmhlib
from wmhlib.colab import bootstrap, secret
from wmhlib.errors import WMHError

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
FREEZES = {"3.13": TESTS / "colab_constraints.txt", "3.12": TESTS / "colab_constraints_2026.01.txt"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
REQUIREMENTS = (ROOT / "requirements.txt").read_text()
each_freeze = pytest.mark.parametrize("python", FREEZES)
each_notebook = pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """Stands in for Colab: google.colab with Drive and secrets, pip and git that only write down how they are called."""
    did = types.SimpleNamespace(mounts=[], runs=[], constraints=[], secrets={}, refuse=False, alive=False)

    def mount(place, force_remount):
        did.mounts.append(place)
        if did.refuse:
            raise ValueError("mount failed")
        did.alive = force_remount

    def get(name):
        if name not in did.secrets:
            raise LookupError(f"Secret {name} does not exist.")
        return did.secrets[name]

    def run(command, **_):
        did.runs.append(command)
        if "-c" in command:
            did.constraints += Path(command[command.index("-c") + 1]).read_text().split()
        return types.SimpleNamespace(stdout="", returncode=0)

    modules = {"google": types.ModuleType("google"), "google.colab": types.ModuleType("google.colab")}
    modules["google"].colab = modules["google.colab"]
    modules["google.colab"].drive = types.SimpleNamespace(mount=mount)
    modules["google.colab"].userdata = types.SimpleNamespace(get=get)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setattr("wmhlib.colab._DRIVE", tmp_path / "drive")
    monkeypatch.setattr("wmhlib.colab.os.path.ismount", lambda path: did.alive)
    return did


def without(monkeypatch, *absent):
    """As if these distributions were not installed."""
    real = importlib.metadata.version

    def version(name):
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def freeze(python) -> dict[str, str]:
    lines = [line.split("#")[0].strip().split("==") for line in FREEZES[python].read_text().splitlines()]
    return {canonicalize_name(line[0]): line[1] for line in lines if len(line) == 2}


def required() -> dict[str, Requirement]:
    found = [Requirement(line) for line in REQUIREMENTS.splitlines() if line.split("#")[0].strip()]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_requirements_are_lower_bounds_alone():
    assert {specifier.operator for requirement in required().values() for specifier in requirement.specifier} == {">="}


@each_freeze
def test_what_colab_has_is_new_enough(python):
    """All but Kaggle's client and peft, which `bootstrap` brings up in Colab's older runtime."""
    there = freeze(python)
    old = [name for name, requirement in required().items() if name in there and not requirement.specifier.contains(there[name])]
    assert set(old) <= {"kaggle", "peft"} and {"torch", "numpy", "pandas", "matplotlib"} <= set(there)


@each_freeze
def test_the_requirements_resolve_beside_colabs_packages_and_change_none(python, tmp_path):
    """The resolver asks the package index, for Linux and that Python, what the bootstrap would install."""
    uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    if not uv:
        pytest.skip("uv, which resolves for another Python than this, is not installed")
    there = freeze(python)
    missing = {name for name, requirement in required().items() if not requirement.specifier.contains(there.get(name, "0"))}
    kept = {name: version for name, version in there.items() if name not in missing}
    (tmp_path / "keep.txt").write_text("".join(f"{name}=={version}\n" for name, version in kept.items()))
    done = subprocess.run([uv, "pip", "compile", str(ROOT / "requirements.txt"), "-c", str(tmp_path / "keep.txt"), "--python-version", python,
                           "--python-platform", "x86_64-unknown-linux-gnu", "--only-binary", ":all:", "--no-header", "--no-annotate", "--quiet"],
                          capture_output=True, text=True, timeout=180)
    if any(word in done.stderr for word in ("error sending request", "dns error", "Failed to fetch", "Network", "timed out")):
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    chosen = {canonicalize_name(name): version for name, version in (line.split("==") for line in done.stdout.split() if "==" in line)}
    assert set(required()) <= set(chosen)
    assert {name: chosen[name] for name in kept if name in chosen} == {name: kept[name] for name in kept if name in chosen}
    assert (chosen["torch"], chosen["numpy"]) == (there["torch"], there["numpy"])


def test_outside_colab_nothing_happens(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a command was run"))
    assert bootstrap() == "runs"


def test_colab_gets_what_is_missing_and_keeps_torch_and_numpy(colab, monkeypatch, tmp_path):
    without(monkeypatch, "papermill", "torch")
    assert bootstrap() == str(tmp_path / "drive" / "MyDrive" / "wmh-lora")
    (command,) = colab.runs
    assert [word for word in command if ">=" in word] == ["papermill>=2.6"]
    assert not any(word.startswith(("torch", "numpy")) for word in command)
    assert f"numpy=={importlib.metadata.version('numpy')}" in colab.constraints


def test_a_second_call_mounts_and_installs_nothing(colab):
    bootstrap()
    bootstrap()
    assert len(colab.mounts) == 1 and not colab.runs


def test_a_drive_that_has_died_is_mounted_anew_whatever_lies_in_its_place(colab, tmp_path):
    bootstrap()
    colab.alive = False
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    assert bootstrap() == str(tmp_path / "drive" / "MyDrive" / "wmh-lora") and len(colab.mounts) == 2


def test_processes_that_the_library_starts_in_colab_find_it_where_it_is_not_installed(colab, tmp_path):
    bare = [sys.executable, "-S", "-c", "import importlib.util; print(importlib.util.find_spec('wmhlib').origin)"]  # -S: what is installed is not seen
    with subprocess.Popen(bare, cwd=tmp_path, stderr=subprocess.PIPE) as before:
        assert b"NoneType" in before.communicate()[1]
    bootstrap()
    bootstrap()
    with subprocess.Popen(bare, cwd=tmp_path, stdout=subprocess.PIPE) as after:
        assert Path(after.communicate()[0].decode().strip()) == Path(wmhlib.__file__)
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "elsewhere"]


def test_a_refused_drive_is_said_and_the_session_goes_on(colab, capsys):
    colab.refuse = True
    assert bootstrap() == "/content/wmh-lora-runs"
    assert "vanish with this session" in capsys.readouterr().out


def test_a_secret_comes_from_the_environment_or_is_absent(monkeypatch):
    monkeypatch.setenv("WMH_TEST_SECRET", "value")
    assert secret("WMH_TEST_SECRET") == "value"
    assert secret("WMH_TEST_SECRET_ABSENT") is None


def test_colab_secrets_come_after_the_environment_and_may_be_absent(colab, monkeypatch):
    colab.secrets["KEY"] = "from colab"
    assert secret("KEY") == "from colab" and secret("OTHER") is None
    monkeypatch.setenv("KEY", "from environment")
    assert secret("KEY") == "from environment"
    monkeypatch.setenv("KEY", "long " * 100)  # no file can have such a name
    assert secret("KEY") == ("long " * 100).strip()


@each_notebook
def test_the_bootstrap_cell_clones_where_the_library_is_not_there_yet(source, colab, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wmhlib" else real(name, *a))
    monkeypatch.setattr(sys, "path", list(sys.path))
    cell = next(c for c in jupytext.read(source).cells if "bootstrap" in c.metadata.get("tags", []))
    scope = {}
    exec(cell.source, scope)
    assert [command[:2] for command in colab.runs] == [["git", "clone"]]
    assert sys.path[0] == "/content/wmh-lora" and scope["root"].endswith("MyDrive/wmh-lora")
    assert len(colab.mounts) == 1


def test_a_package_older_than_the_suite_needs_is_brought_up(colab, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.7.4" if name == "kaggle" else real(name))
    bootstrap()
    assert [word for word in colab.runs[0] if word.startswith("kaggle")] == ["kaggle>=2.0"]


def test_pip_is_told_to_leave_every_installed_package_as_it_is(colab, monkeypatch):
    without(monkeypatch, "papermill")
    bootstrap()
    kept = dict(line.split("==") for line in colab.constraints)
    assert {"torch", "numpy", "pandas", "requests", "ipykernel"} <= set(kept) and "papermill" not in kept
    assert kept["pandas"] == importlib.metadata.version("pandas")


def test_an_installation_that_fails_says_what_to_do(colab, monkeypatch):
    without(monkeypatch, "papermill")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "no space left"))
    with pytest.raises(WMHError, match="could not install papermill>=2.6 .*no space left.*Disconnect and delete runtime"):
        bootstrap()


@pytest.mark.parametrize("gpu", [True, False])
def test_a_runtime_without_gpu_is_told_where_one_is_chosen(gpu, colab, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: int(gpu))
    bootstrap()
    assert ("Runtime > Change runtime type > T4 GPU or better" in capsys.readouterr().out) != gpu


@each_notebook
def test_the_bootstrap_cell_run_again_does_nothing_again(source, colab, monkeypatch, tmp_path):
    """Twice in a session, and once more after the kernel was restarted: one clone, one mount, one installation."""
    clone, real, absent = tmp_path / "clone", importlib.util.find_spec, ["papermill"]

    def run(command, **_):
        colab.runs.append(command)
        if command[0] == "git":
            clone.mkdir()
        else:
            absent.clear()
        return subprocess.CompletedProcess(command, 0, "", "")

    version = importlib.metadata.version
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name in absent else version(name))
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *a: real(name, *a) if name != "wmhlib" or str(clone) in sys.path else None)
    cell = next(c for c in jupytext.read(source).cells if "bootstrap" in c.metadata.get("tags", []))
    code = cell.source.replace("/content/wmh-lora", str(clone))
    roots = []
    for restart in (False, False, True):
        if restart:
            sys.path.remove(str(clone))
        scope = {}
        exec(code, scope)
        roots.append(scope["root"])
        assert sys.path.count(str(clone)) == 1
    assert [command[0] for command in colab.runs] == ["git", sys.executable] and len(colab.mounts) == 1
    assert len(set(roots)) == 1


def test_a_missing_secret_is_a_step_to_take(colab, monkeypatch, tmp_path):
    from wmhlib import download, fetch

    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    answer = fetch.requests.Response()
    answer.status_code, answer.url, answer.raw = 401, "https://www.kaggle.com", io.BytesIO()
    monkeypatch.setattr(download, "_kaggle", lambda: lambda headers: answer.raise_for_status())
    with pytest.raises(WMHError, match="KAGGLE_API_TOKEN .*Colab's secrets .*notebook access on"):
        download.fetch_kaggle(tmp_path)


def test_one_module_alone_imports_google():
    for path in (*sorted((ROOT / "wmhlib").rglob("*.py")), *NOTEBOOKS):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert path.name == "colab.py" or not any(name.split(".")[0] == "google" for name in names), f"{path}:{node.lineno}"


def test_every_notebook_has_the_same_bootstrap_cell():
    cells = {next(c.source for c in jupytext.read(path).cells if "bootstrap" in c.metadata.get("tags", [])) for path in NOTEBOOKS}
    assert len(cells) == 1 and os.path.exists(ROOT / "requirements.txt")
