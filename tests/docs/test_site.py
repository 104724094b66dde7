"""`make docs` builds the site, and a link or an anchor that leads nowhere makes it fail."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import Done
from tests.docs.blocks import ROOT


def build(root: Path, site: Path) -> Done:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=600)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the site is made of, to be changed."""
    root = tmp_path / "copy"
    for folder in ("docs", "benchmarks", "lightning_stability/tuab/configs", "experiments"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, root / folder)
    for file in (*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "mkdocs.yml"):
        shutil.copy(file, root)
    return root


def test_every_link_and_anchor_of_the_pages_and_the_readme_leads_somewhere(tmp_path):
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    first = (tmp_path / "site/index.html").read_text()
    assert "docs/my_loss_is_nan.html" in first
    # nothing is fetched from elsewhere when a page is read
    for page in (tmp_path / "site").rglob("*.html"):
        html = page.read_text()
        assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^"]*"', html) == [], page
        assert "```" not in html, f"{page} shows a fence: a block within a list does not become one"


@pytest.mark.parametrize(
    ("page", "link"),
    [
        ("README.md", "[x](docs/nowhere.md)"),
        ("docs/installed.md", "[x](nan_early_stop.md#nowhere)"),
        ("docs/installed.md", "[x](../lightning_stability/nowhere.yaml)"),
        ("benchmarks/README.md", "![x](nowhere.png)"),
    ],
)
def test_a_link_that_leads_nowhere_is_an_error(copy, tmp_path, page, link):
    with (copy / page).open("a") as file:
        file.write(f"\n{link}\n")
    done = build(copy, tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere" in done.stdout + done.stderr


def test_a_page_that_is_not_in_the_navigation_is_an_error(copy, tmp_path):
    (copy / "docs/forgotten.md").write_text("# Forgotten\n")
    done = build(copy, tmp_path / "site")
    assert done.returncode != 0
    assert "forgotten.md" in done.stdout + done.stderr
