import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path

import jupytext
import pytest

from wmhlib import workspace

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """Stands in for Colab: google.colab with Drive and secrets, pip and git that only write down how they are called."""
    did = types.SimpleNamespace(mounts=[], runs=[], constraints=[], secrets={}, refuse=False)

    def mount(place):
        did.mounts.append(place)
        if did.refuse:
            raise ValueError("mount failed")
        (Path(place) / "MyDrive").mkdir(parents=True)

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
    monkeypatch.setattr(workspace, "_DRIVE", tmp_path / "drive")
    return did


def without(monkeypatch, *absent):
    """As if these distributions were not installed."""
    real = importlib.metadata.version

    def version(name):
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_outside_colab_nothing_happens(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a command was run"))
    assert workspace.bootstrap() == "runs"


def test_colab_gets_what_is_missing_and_keeps_torch_and_numpy(colab, monkeypatch, tmp_path):
    without(monkeypatch, "papermill", "torch")
    assert workspace.bootstrap() == str(tmp_path / "drive" / "MyDrive" / "wmh-lora")
    (command,) = colab.runs
    assert [word for word in command if ">=" in word] == ["papermill>=2.6"]
    assert not any(word.startswith(("torch", "numpy")) for word in command)
    assert f"numpy=={importlib.metadata.version('numpy')}" in colab.constraints


def test_a_second_call_mounts_and_installs_nothing(colab):
    workspace.bootstrap()
    workspace.bootstrap()
    assert len(colab.mounts) == 1 and not colab.runs


def test_processes_that_the_library_starts_in_colab_find_it_where_it_is_not_installed(colab, tmp_path):
    bare = [sys.executable, "-S", "-c", "import importlib.util; print(importlib.util.find_spec('wmhlib').origin)"]  # -S: what is installed is not seen
    with subprocess.Popen(bare, cwd=tmp_path, stderr=subprocess.PIPE) as before:
        assert b"NoneType" in before.communicate()[1]
    workspace.bootstrap()
    workspace.bootstrap()
    with subprocess.Popen(bare, cwd=tmp_path, stdout=subprocess.PIPE) as after:
        assert Path(after.communicate()[0].decode().strip()) == Path(workspace.__file__).with_name("__init__.py")
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(workspace.REPOSITORY), "elsewhere"]


def test_a_refused_drive_is_said_and_the_session_goes_on(colab, capsys):
    colab.refuse = True
    assert workspace.bootstrap() == "/content/wmh-lora-runs"
    assert "vanish with this session" in capsys.readouterr().out


def test_colab_secrets_come_after_the_environment_and_may_be_absent(colab, monkeypatch):
    colab.secrets["KEY"] = "from colab"
    assert workspace.secret("KEY") == "from colab" and workspace.secret("OTHER") is None
    monkeypatch.setenv("KEY", "from environment")
    assert workspace.secret("KEY") == "from environment"


@pytest.mark.parametrize("source", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.stem)
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
    workspace.bootstrap()
    assert [word for word in colab.runs[0] if word.startswith("kaggle")] == ["kaggle>=2.0"]
