"""The site, built once for all tests of it, and what is in its pages."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from tests.command import Done


def build(root: Path, site: Path) -> Done:
    """Build the site as `make docs` does."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, timeout=600)


@dataclass
class Page(HTMLParser):
    """What a page refers to, and what can be referred to in it.

    Attributes:
        links: Of `a`.
        parts: What a browser fetches with the page: scripts, styles, pictures.
        ids: The anchors.
    """

    path: Path
    links: set[str] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)
    ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what it refers to."""
        found = {name: value for name, value in attrs if value}
        self.ids += [value for name, value in found.items() if name == "id"]
        if tag == "a":
            self.links |= {found["href"]} if "href" in found else set()
        else:
            self.parts |= {found[name] for name in ("href", "src") if name in found}
