"""`make docs` builds the site: its links lead somewhere, it fetches nothing, and it is read in a real browser."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import lightning_stability
from docs.diagrams import name_of
from lightning_stability import diagnosis, plugin
from tests.browser import CHROMIUM, browser
from tests.docs.blocks import ROOT, blocks_of, pages
from tests.docs.site import Page, build

pytestmark = pytest.mark.xdist_group("site")

BROKEN = {
    "README.md": "[x](docs/nowhere.md)",
    "docs/installed.md": "[x](nan_early_stop.md#no-anchor) [x](../lightning_stability/missing.yaml)",
    "docs/status.md": "[x](#no-heading)",
    "benchmarks/README.md": "![x](lost.png)",
}
LOOKED_AT = ("index", "docs/start", "docs/design", "docs/api", "benchmarks/index")
PHONE, DESKTOP = 390, 1280
LARGEST_PICTURE = 150_000  # bytes
SEARCH = """new Promise((resolve, reject) => {
  setTimeout(() => reject(new Error("nothing was found")), 120000)
  const query = document.querySelector("input[name=query]")
  document.querySelector("[data-md-toggle=search]").click()
  query.focus()
  query.value = "PrecisionFallback"
  query.dispatchEvent(new Event("keyup", {bubbles: true}))
  query.dispatchEvent(new Event("input", {bubbles: true}))
  const found = () => {
    const links = document.querySelectorAll("a.md-search-result__link")
    return links.length ? resolve(links[0].getAttribute("href")) : setTimeout(found, 20)
  }
  found()
})"""
# set by a script, some moments after the page is there
COLOURS = """new Promise(resolve => {
  const look = () => {
    const scheme = document.body.getAttribute("data-md-color-scheme")
    return scheme ? resolve(scheme) : setTimeout(look, 20)
  }
  look()
})"""
TOGGLE = """[1, 2, 3].map(() => {
  document.querySelector("form[data-md-component=palette] label:not([hidden])").click()
  return document.body.getAttribute("data-md-color-scheme")
})"""


def is_elsewhere(link: str) -> bool:
    return link.startswith(("http:", "https:", "//"))


def test_every_link_of_the_built_pages_leads_somewhere_and_no_part_is_elsewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    lost = []
    for path, page in pages.items():
        assert [part for part in page.parts if is_elsewhere(part)] == [], path
        for link in page.links | page.parts:
            file, anchor = urldefrag(link)
            if is_elsewhere(link) or link.startswith(("mailto:", "data:")):
                continue
            target = (path.parent / unquote(file)).resolve() if file else path
            there = target in pages if anchor else target.is_file()
            if not there or (anchor and unquote(anchor) not in pages[target].ids):
                lost.append(f"{path.relative_to(site)}: {link}")
    assert lost == []


def test_no_page_shows_a_fence_or_an_unread_directive(site):
    for page in site.rglob("*.html"):
        html = page.read_text()
        assert "```" not in html, f"{page} shows a fence: a block within a list does not become one"
        assert "<p>::: " not in html, page


def test_the_api_page_has_each_public_name_exactly_once(site):
    names = [f"lightning_stability.{name}" for name in lightning_stability.__all__]
    names += [f"lightning_stability.diagnosis.{name}" for name in diagnosis.__all__]
    names += [f"{plugin.__name__}.{name}" for name in ("CALLBACKS", "DEFAULT", "chosen")]
    ids = Counter(Page(site / "docs/api.html").ids)
    assert {name: ids[name] for name in names} == dict.fromkeys(names, 1)
    headings = [line[4:] for line in (ROOT / "docs/api.md").read_text().splitlines() if line.startswith("::: ")]
    last = Counter(name.rpartition(".")[2] for name in headings)
    assert set(last.values()) == {1}, "a name is there twice, by two ways to import it"


def test_a_docstrings_example_is_shown_as_code_and_its_options_as_a_list(site):
    html = (site / "docs/api.html").read_text()
    assert html.count("language-pycon") >= 7
    assert "Examples:" in html
    assert '<details class="example"' not in html


def test_each_mermaid_block_is_drawn_and_no_drawing_is_left_over(site):
    texts = [block.text for page in pages() for block in blocks_of(page, "mermaid")]
    drawn = {path.stem for path in (ROOT / "docs/diagrams").iterdir()}
    assert drawn == {name_of(text) for text in texts}, "draw them again: docs/diagrams.py says how"
    html = (site / "docs/design.html").read_text()
    assert html.count('<div class="diagram"><svg') == 2
    assert "mermaid.min.js" not in html


def test_every_example_has_a_page_with_its_code(site):
    for program in (ROOT / "examples").glob("*.py"):
        html = (site / f"examples/{program.stem}.html").read_text()
        assert "if</span> <span" in html, program
        assert f'href="../examples/{program.stem}.html"' in (site / "docs/examples.html").read_text()


def test_pictures_of_pages_are_small():
    pictures = list((ROOT / "docs/images").rglob("*.png"))
    assert len(pictures) >= 10
    assert [path.name for path in pictures if path.stat().st_size > LARGEST_PICTURE] == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the site is made of, to be changed."""
    root = tmp_path / "copy"
    for folder in ("docs", "benchmarks", "lightning_stability", "experiments", "examples"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "mkdocs.yml"):
        shutil.copy(file, root)
    return root


def test_a_lost_link_and_a_forgotten_page_are_errors(copy, tmp_path):
    for page, text in BROKEN.items():
        with (copy / page).open("a") as file:
            file.write(f"\n{text}\n")
    (copy / "docs/forgotten.md").write_text("# Forgotten\n")
    done = build(copy, tmp_path / "site")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    for name in ("nowhere.md", "no-anchor", "missing.yaml", "no-heading", "lost.png", "forgotten.md"):
        assert name in said, f"{name} is not complained of in\n{said}"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_pages_are_quiet_and_fit_a_phone_and_a_desktop_in_both_colours(site):
    with browser() as opened:
        for name in LOOKED_AT:
            for width in (PHONE, DESKTOP):
                for dark in (False, True):
                    seen = opened.look(site / f"{name}.html", width, dark, COLOURS, picture=False)
                    what = f"{name}, {width} pixels, {'dark' if dark else 'light'}"
                    assert seen.messages == [], what
                    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == [], what
                    assert seen.overflow == 0, what
                    assert seen.values == ["slate" if dark else "default"], what
        # from the disk, without a server
        seen = opened.look(site / "index.html", DESKTOP, False, COLOURS, SEARCH, TOGGLE, picture=False)
        assert "precision_fallback" in json.dumps(seen.values[1])
        assert sorted(seen.values[2]) == ["default", "default", "slate"]
        assert seen.messages == []
        assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []
