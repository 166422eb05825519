import re
from pathlib import Path

from wmhlib.network import budget_table

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()


def test_every_file_the_readme_shows_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((REPOSITORY / link).exists() for link in links)


def test_the_parameter_budget_is_the_networks_own():
    rows = [row for row in budget_table().splitlines() if not row.startswith("| smoke")]
    assert "\n".join(rows) in README


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"make (\w+)", README))
    assert targets <= set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.M))
