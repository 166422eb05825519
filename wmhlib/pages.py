"""An executed notebook as a page to read: one HTML file that needs no network and shows no code, and its PDF."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import nbformat
from jinja2 import Environment, FileSystemLoader

from .errors import InputError
from .files import write_atomic

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_NOT_IN_A_REPORT = re.compile(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)\s*|The first cell below .*")  # badge and instructions
_TABLE = re.compile(r'(<table[^>]*class="[^"]*\bdataframe\b.*?</table>)(?:\s*<p>(\d+ rows × \d+ columns)</p>)?', re.S)
_SEVERAL_PARTS = re.compile(r"\n\s*\n|^\s*([#|>]|[*+-] |\d+\. )")  # Markdown that is more than one paragraph
_FIGURES = {"image/png", "image/jpeg", "image/svg+xml", "text/html"}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge", "microsoft-edge",
             "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
_QUIET = ("--headless", "--disable-gpu", "--disable-quic", "--disable-background-networking",
          "--disable-component-update", "--disable-sync", "--no-first-run",
          *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []))  # root has no sandbox
_LONGEST_S = 120


def render(template: str, **content) -> str:
    """A template of this library filled with `content`, whose text is escaped."""
    environment = Environment(loader=FileSystemLoader([_TEMPLATES, _TEMPLATES / "report"]), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    return environment.get_template(template).render(**content)


def export_html(notebook: str | Path, page: str | Path) -> Path:
    """The executed `notebook` as one HTML file, written to `page`: no code, no stderr, images embedded, nothing loaded
    from anywhere and nothing linked to outside.

    A Markdown output of one paragraph right after a figure, table or viewer of the same cell is its caption. The first
    heading is the title; second and third level headings make the contents. Tables of pandas can be sorted.
    """
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, as_version=4)
    content.cells = [cell for cell in content.cells if cell.cell_type == "markdown" or cell.get("outputs")]
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = _NOT_IN_A_REPORT.sub("", cell.source)
        else:
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]  # progress bars, warnings
            _prepare(cell.outputs)
    headings: list[tuple[int, str, str]] = []
    exporter = HTMLExporter(template_name="report", extra_template_basedirs=[str(_TEMPLATES)], exclude_input=True,
                            exclude_anchor_links=True, embed_images=True)
    exporter.register_filter("prose", lambda html: _prose(html, headings))
    exporter.environment.globals["headings"] = headings
    words = "\n".join(cell.source for cell in content.cells if cell.cell_type == "markdown")
    title = found[1] if (found := re.search(r"^# (.+)", words, re.M)) else Path(notebook).stem
    html, _ = exporter.from_notebook_node(content, {"title": title, "metadata": {"path": str(Path(notebook).parent)}})
    write_atomic(page, html)
    return Path(page)


def export_pdf(page: str | Path) -> Path | None:
    """`page` (HTML) as a PDF beside it, printed by Chromium or Chrome; None, and a line that says why, where that fails."""
    page = Path(page).resolve()
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(f"no PDF of {page.name}: install Chromium or Google Chrome to get one")
        return None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        printed = Path(folder, "page.pdf")
        try:
            subprocess.run([browser, *_QUIET, f"--user-data-dir={folder}/profile", "--no-pdf-header-footer",
                            "--generate-pdf-document-outline",
                            f"--print-to-pdf={printed}", page.as_uri()], capture_output=True, timeout=_LONGEST_S, check=True)
            write_atomic(page.with_suffix(".pdf"), printed.read_bytes())
        except (OSError, InputError, subprocess.SubprocessError) as error:
            print(f"no PDF of {page.name}: {browser} did not print it ({error})")
            return None
    return page.with_suffix(".pdf")


def _prepare(outputs: list) -> None:
    """Tables in a box of their own; figures, tables and viewers joined with the caption that follows them."""
    for out in outputs:
        out.setdefault("metadata", {})["alt"] = "figure"
        if html := out.get("data", {}).get("text/html"):
            own_style = "<style scoped>" in html  # pandas' own view of a table, with or without Colab's buttons
            out.data["text/html"] = "".join(map(_boxed, _TABLE.finditer(html))) if own_style else _TABLE.sub(_boxed, html)
    for shown, caption in zip(outputs, outputs[1:]):
        text = caption.get("data", {}).get("text/markdown", "").strip()
        if text and not _SEVERAL_PARTS.search(text) and _FIGURES & set(shown.get("data", {})):
            shown.metadata |= {"opens": True, "alt": re.sub(r"[*_`]", "", text.split(". ")[0])}
            caption.metadata["closes"] = True


def _boxed(table: re.Match) -> str:
    shape = f'<p class="shape">{table[2]}</p>' if table[2] else ""
    return '<div class="table" tabindex="0">' + table[1].replace(' border="1"', "", 1) + f"</div>{shape}"


def _prose(html: str, headings: list[tuple[int, str, str]]) -> str:
    """Rendered Markdown, its headings (level, anchor, text) noted and given anchors, its links to elsewhere turned to text."""
    def anchor(found: re.Match) -> str:
        headings.append((int(found[1]), f"part-{len(headings) + 1}", re.sub(r"<[^>]+>", "", found[2])))
        return f'<h{found[1]} id="{headings[-1][1]}">{found[2]}</h{found[1]}>'

    def plain(link: re.Match) -> str:
        return link[2] if link[2] in link[1] else f"{link[2]} ({link[1]})"

    html = re.sub(r"<h([23])>(.*?)</h\1>", anchor, html, flags=re.S)
    return re.sub(r'<a href="(https?://[^"]*)"[^>]*>(.*?)</a>', plain, html, flags=re.S)
