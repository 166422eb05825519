import base64
import json
import re
import shutil
import subprocess

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from wmhlib import pages
from wmhlib.viewer import viewer

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/x)"
PNG = base64.b64encode(bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001e221bc33"
    "0000000049454e44ae426082")).decode()
TABLE = pd.DataFrame({"case": ["Utrecht_10", "Utrecht_2", "GE3T_1", "GE3T_3"],
                      "dsc": ["0.75 [0.64, 0.84]", "NaN", "0.9 [0.8, 1]", "-inf"],
                      "grid": ["9 x 2", "10 x 1", "1 x 1", "2 x 1"]}, index=pd.Index([3, 1, 2, 0], name="row"))
BROWSER = next((found for name in pages._BROWSERS if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


def shown(**data):
    return new_output("display_data", data={kind.replace("_", "/"): value for kind, value in data.items()})


@pytest.fixture(scope="module")
def page(tmp_path_factory, disc_case):
    """The page of an executed notebook with every kind of output."""
    folder = tmp_path_factory.mktemp("pages")
    case = disc_case() | {"result": disc_case()["reference"] == 1, "dsc": 1.0}
    cells = [
        new_markdown_cell(f"{BADGE}\n\n# 5 · Results & more\n\nWhat it does.\n\nThe first cell below prepares Colab."),
        new_code_cell("secret_code = bootstrap()"),
        new_markdown_cell("## A *first* part\n\nSee https://doi.org/10.1/x and [the site](https://wmh.isi.uu.nl/)."),
        new_code_cell("figure", outputs=[shown(image_png=PNG), new_output("stream", name="stderr", text="a warning"),
                                         shown(text_markdown="Dice of **9** cases. Good: high."),
                                         shown(text_markdown="### Methods\n\nTrained.\n\nTested.")]),
        new_markdown_cell("## Tables"),
        new_code_cell("table", outputs=[new_output("stream", name="stderr", text="50%|## 3/9 [00:13<00:27, 4.5it/s]"),
                                        new_output("stream", name="stdout", text="epoch 1/2 <loss> \x1b[1m0.3\x1b[0m\n"),
                                        shown(text_html=TABLE.to_html(notebook=True))]),
        new_markdown_cell("## Viewers"),
        new_code_cell("viewer", outputs=[shown(text_html=viewer([case, case | {"case": "</script>"}])), shown(text_markdown="Slices."),
                                         shown(text_html=viewer([case]))]),
    ]
    nbformat.write(new_notebook(cells=cells), folder / "executed.ipynb")
    return pages.export_html(folder / "executed.ipynb", folder / "out" / "page.html")


def test_a_page_stands_alone_without_code_badge_or_progress(page):
    html = page.read_text()
    assert not re.findall(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//|@import|url\(["\']?https?:', html)
    for hidden in ("secret_code", "colab-badge", "The first cell below", "it/s]", "a warning", "<style scoped>"):
        assert hidden not in html
    assert f"data:image/png;base64,{PNG}" in html and "epoch 1/2 &lt;loss&gt;" in html
    assert "https://doi.org/10.1/x" in html and "the site (https://wmh.isi.uu.nl/)" in html


def test_the_frame_of_a_page_is_light(tmp_path):
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Title")]), tmp_path / "a.ipynb")
    assert len(pages.export_html(tmp_path / "a.ipynb", tmp_path / "a.html").read_bytes()) < 20_000


def test_the_title_is_the_first_heading_and_the_contents_lead_to_the_others(page):
    html = page.read_text()
    assert "<title>5 · Results &amp; more</title>" in html
    links = re.findall(r'<li class="level-(\d)"><a href="#([^"]+)">([^<]+)', html)
    assert [(level, text) for level, _, text in links] == [("2", "A first part"), ("3", "Methods"), ("2", "Tables"), ("2", "Viewers")]
    assert all(html.count(f'id="{anchor}"') == 1 for _, anchor, _ in links)


def test_a_paragraph_after_a_figure_is_its_caption(page):
    html = page.read_text()
    captions = re.findall(r"<figcaption>\s*<p>(.*?)</p>", html)
    assert captions == ["Dice of <strong>9</strong> cases. Good: high.", "Slices."]
    assert 'alt="Dice of 9 cases"' in html and html.count("<figure>") == html.count("</figure>") == 2


def test_the_same_notebook_gives_the_same_page(page, tmp_path):
    again = pages.export_html(page.parent.parent / "executed.ipynb", tmp_path / "again.html")
    assert again.read_bytes() == page.read_bytes()


ACTIONS = """<script>
const log = {}, table = document.querySelector("table.dataframe"), heads = [...table.tHead.rows[0].cells];
const column = name => { const i = heads.findIndex(head => head.textContent === name);
  return [...table.tBodies[0].rows].map(row => row.cells[i].textContent); };
const sort = name => heads.find(head => head.textContent === name).querySelector("button").click();
log.rows = table.tHead.rows.length;
for (const name of ["case", "dsc", "row"]) { sort(name); log[name] = column(name); }
sort("dsc"); sort("dsc"); log.down = column("dsc"); log.aria = heads.map(head => head.getAttribute("aria-sort"));
log.numbers = heads.filter(head => head.classList.contains("number")).map(head => head.textContent);
const [one, two] = document.querySelectorAll(".wmh-viewer"), place = root => root.querySelector(".wmh-place").textContent;
log.start = [place(one), place(two)];
two.querySelectorAll("button")[0].click(); log.below = [place(one), place(two)];
const key = name => one.querySelector("svg").dispatchEvent(new KeyboardEvent("keydown", {key: name, cancelable: true}));
key("ArrowDown"); log.once = place(one); for (let i = 0; i < 9; i++) key("ArrowUp"); log.top = place(one);
one.querySelector("select").selectedIndex = 1; one.querySelector("select").dispatchEvent(new Event("change"));
log.other = [one.querySelector(".wmh-title").textContent, place(one)];
const drawn = () => one.querySelectorAll(".wmh-layers path").length;
log.drawn = [drawn()];
for (const box of one.querySelectorAll("input[type=checkbox]")) { box.click(); log.drawn.push(drawn()); }
log.sides = [...one.querySelectorAll(".wmh-marks text")].map(text => text.textContent);
document.querySelector("button.zoom").click(); log.large = document.querySelector("dialog").open;
document.body.insertAdjacentHTML("beforeend", "<pre id=log></pre>");
document.getElementById("log").textContent = JSON.stringify(log);
</script></body>"""


@pytest.fixture(scope="module")
def log(page, tmp_path_factory):
    """What a reader sees after clicking through the page."""
    folder = tmp_path_factory.mktemp("clicked")
    (folder / "page.html").write_text(page.read_text().replace("</body>", ACTIONS))
    done = subprocess.run([BROWSER, *pages._QUIET, f"--user-data-dir={folder}/profile", "--dump-dom", (folder / "page.html").as_uri()],
                          capture_output=True, text=True, timeout=60)
    return json.loads(re.search(r'<pre id="log">(.*?)</pre>', done.stdout, re.S)[1].replace("&lt;", "<").replace("&gt;", ">"))


@needs_browser
def test_tables_sort_by_number_and_by_name_with_what_is_missing_last(log):
    assert log["rows"] == 1 and log["row"] == ["0", "1", "2", "3"]
    assert log["case"] == ["GE3T_1", "GE3T_3", "Utrecht_2", "Utrecht_10"]
    assert log["dsc"] == ["-inf", "0.75 [0.64, 0.84]", "0.9 [0.8, 1]", "NaN"]
    assert log["down"] == ["0.9 [0.8, 1]", "0.75 [0.64, 0.84]", "-inf", "NaN"]
    assert log["aria"] == ["none", "none", "descending", "none"] and log["numbers"] == ["row", "dsc"]


@needs_browser
def test_two_viewers_on_a_page_browse_on_their_own(log):
    assert log["start"] == ["slice 5 of 6 · z = 62 mm"] * 2
    assert log["below"] == ["slice 5 of 6 · z = 62 mm", "slice 4 of 6 · z = 59 mm"]
    assert log["once"] == "slice 4 of 6 · z = 59 mm"
    assert log["top"] == "slice 6 of 6 · z = 65 mm"
    assert log["other"] == ["</script> · Utrecht · Dice 1.00", "slice 5 of 6 · z = 62 mm"]


@needs_browser
def test_overlays_go_on_and_off_and_figures_open_large(log):
    assert log["drawn"] == [4, 2, 0, 1]  # two outlines with a halo each; the last box is the error map, all of it found
    assert log["sides"] == ["R", "L", "A", "P", "20 mm"] and log["large"]


@needs_browser
def test_a_page_is_printed_beside_itself(page):
    pdf = pages.export_pdf(page)
    assert pdf == page.with_suffix(".pdf") and pdf.read_bytes().startswith(b"%PDF")
    assert {path.name for path in page.parent.iterdir()} == {"page.html", "page.pdf"}


def test_without_a_browser_there_is_no_pdf_and_a_line_says_what_to_install(page, monkeypatch, capsys):
    monkeypatch.setattr(pages.shutil, "which", lambda name: None)
    assert pages.export_pdf(page) is None
    assert "install Chromium" in capsys.readouterr().out


def test_a_browser_that_fails_leaves_no_pdf(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages.shutil, "which", lambda name: "/bin/false")
    (tmp_path / "a.html").write_text("x")
    assert pages.export_pdf(tmp_path / "a.html") is None and not (tmp_path / "a.pdf").exists()
    assert "/bin/false did not print it" in capsys.readouterr().out


def test_other_html_stays_and_colabs_buttons_go(tmp_path):
    table = pd.DataFrame({"a": [np.nan]}).to_html(notebook=True)
    colab = f'<div id="df-1" class="colab-df-container">{table}<div class="colab-df-buttons"><script>google.colab</script></div></div>'
    bare = "<b>bold</b>" + pd.DataFrame({"b": [1]}).to_html()
    nbformat.write(new_notebook(cells=[new_code_cell("# Parameters", outputs=[shown(text_html=html) for html in (colab, bare)])]),
                   tmp_path / "bare.ipynb")
    html = pages.export_html(tmp_path / "bare.ipynb", tmp_path / "bare.html").read_text()
    assert "<title>bare</title>" in html and "<b>bold</b>" in html and "colab" not in html
    assert html.count('<div class="table" tabindex="0"><table class="dataframe">') == 2
