"""Mermaid blocks become inline SVG that was drawn before: a page then needs no script and asks for nothing.

mkdocs calls `on_config`. A block without a drawing is an error. To draw all of them again (needs Chromium and npm):

    npm pack mermaid@11.17.2 && tar xzf mermaid-11.17.2.tgz && python docs/diagrams.py package/dist/mermaid.min.js

The drawings are named after the text that they were made of. Their colours are those of the page, light or dark.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
DRAWN = DOCS / "diagrams"

# What Mermaid is told, and what stands for it on the page.
COLOURS = {
    "#f1f2f3": "var(--md-code-bg-color)",
    "#717273": "var(--md-default-fg-color--light)",
    "#414243": "var(--md-default-fg-color)",
    "#fafbfc": "var(--md-default-bg-color)",
}
THEME = {
    "primaryColor": "#f1f2f3",
    "primaryBorderColor": "#717273",
    "primaryTextColor": "#414243",
    "textColor": "#414243",
    "nodeTextColor": "#414243",
    "titleColor": "#414243",
    "lineColor": "#717273",
    "edgeLabelBackground": "#fafbfc",
    "fontFamily": "sans-serif",
    "fontSize": "15px",
}


def name_of(text: str) -> str:
    """The name of a block's drawing."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]


def on_config(config: Any) -> Any:
    """Have the fences of Mermaid shown by `show`."""
    fence = {"name": "mermaid", "class": "mermaid", "format": show}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def show(source: str, language: str, css_class: str, options: Any, md: Any, **kwargs: Any) -> str:
    """The drawing of a block, for superfences."""
    from pymdownx.superfences import SuperFencesException  # its own errors alone reach the user

    drawing = DRAWN / f"{name_of(source)}.svg"
    if not drawing.is_file():
        raise SuperFencesException(
            f"A Mermaid block is not drawn yet; see docs/diagrams.py. It begins with {source[:80]!r}"
        )
    return f'<div class="diagram">{drawing.read_text()}</div>'


def blocks() -> list[str]:
    """The text of all Mermaid blocks."""
    return [
        found[1]
        for page in sorted(DOCS.rglob("*.md"))
        for found in re.finditer(r"^```mermaid\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    ]


def main() -> None:
    """Draw all blocks."""
    sys.path.insert(0, str(DOCS.parent))
    from tests.browser import browser

    settings = {"startOnLoad": False, "theme": "base", "themeVariables": THEME, "htmlLabels": False}
    settings["flowchart"] = {
        "htmlLabels": False,
        "padding": 10,
        "nodeSpacing": 24,
        "rankSpacing": 32,
        "wrappingWidth": 260,
    }
    for old in DRAWN.glob("*.svg"):
        old.unlink()
    DRAWN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        page = Path(folder) / "page.html"
        page.write_text(f"<!doctype html><body><script src='{Path(sys.argv[1]).resolve().as_uri()}'></script></body>")
        for text in blocks():
            name = name_of(text)
            call = f"mermaid.render({json.dumps('d' + name)}, {json.dumps(text)}).then(drawn => drawn.svg, String)"
            [svg] = opened.look(
                page, 1000, False, f"mermaid.initialize({json.dumps(settings)}), {call}", picture=False
            ).values
            if not svg.startswith("<svg"):
                raise SystemExit(f"{svg}\nin\n{text}")
            for told, shown in COLOURS.items():
                svg = svg.replace(told, shown)
            (DRAWN / f"{name}.svg").write_text(svg + "\n")
            print(f"{DRAWN / name}.svg: {len(svg):,} characters")


if __name__ == "__main__":
    main()
