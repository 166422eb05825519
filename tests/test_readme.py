import re
import subprocess
from pathlib import Path

from wmhlib.network import budget_table

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()


def test_every_file_the_readme_shows_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith(("http", "#"))]
    assert links and all((REPOSITORY / link).exists() for link in links)


def test_the_contents_name_every_section_of_the_readme():
    heads = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^## (.+)$", README, re.M)]
    assert re.findall(r"\]\(#([^)]+)\)", README) == heads


def test_every_notebook_of_the_readme_opens_in_colab():
    rows = re.findall(r"^\| (\d\d)(\w+) \|.*\[!\[Colab\]\[badge\]\]\[(\d\d)\] \|$", README, re.M)
    assert [number + name for number, name, _ in rows] == sorted(path.stem for path in (REPOSITORY / "notebooks").glob("*.py"))
    assert all(number == key and f"[{key}]: https://colab.research.google.com/github/wmh-lora/wmh-lora/blob/main/notebooks/{number}{name}.ipynb\n" in README
               for number, name, key in rows)


def test_the_parameter_budget_is_the_networks_own():
    rows = [row for row in budget_table().splitlines() if not row.startswith("| smoke")]
    assert "\n".join(rows) in README


def test_every_make_command_of_the_readme_can_be_made():
    targets = set(re.findall(r"make (\w+)", README))
    assert targets <= set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.M))
    commands = [line for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S) for line in block.splitlines() if line.startswith("make ")]
    for command in commands:
        done = subprocess.run(["bash", "-c", command.replace("make ", "make -n ", 1)], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0 and len(commands) > 20, (command, done.stderr)


def test_values_reach_a_command_as_they_were_typed(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\n')
    python.chmod(0o755)
    flair, out = '"/a b/x.nii.gz" c.nii.gz', "it's `here` $(and) there"
    told = subprocess.run(["make", "-s", "-o", ".venv/installed", f"BIN={tmp_path}", "predict", f"FLAIR={flair}", f"OUT={out.replace('$', '$$')}"],
                          cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert f"--flair>\n<{flair}>" in told and f"--out>\n<{out}>" in told and "<--run>\n<>" in told


def test_a_variable_that_a_target_does_not_use_stops_it():
    for words, fine in (("demo DATA=x", False), ("demo RUN=x", True), ("predict FLAIR=x T1=y", True), ("compare MEDSAM=x", False)):
        done = subprocess.run(["make", "-n", *words.split()], cwd=REPOSITORY, capture_output=True, text=True)
        assert (done.returncode == 0) == fine and ("is not used by make" in done.stderr) != fine, words
