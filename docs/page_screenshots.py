"""Make the pictures of pages in docs/images again, in a real headless browser.

usage: python docs/page_screenshots.py NAME PAGE [WIDTH HEIGHT]
       python docs/page_screenshots.py site SITE

NAME is incident_page, run_page or first_report. PAGE is the report.html of an incident, or what
`lightning-stability report` wrote. SITE is the folder that `make docs` writes: five of its pages, in light and dark,
become docs/images/site.
Needs Chromium (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
SITE = {
    "home": "index.html",
    "start": "docs/start.html",
    "callback": "docs/nan_early_stop.html",
    "design": "docs/design.html",
    "api": "docs/api.html",
}
sys.path.insert(0, str(DOCS.parent))

from tests.browser import Browser, browser  # noqa: E402

# A script of the site sets its colours some moments after the page is there.
COLOURED = "new Promise(done => setTimeout(done, 500))"


def shoot(opened: Browser, page: Path, to: Path, width: int, height: int, dark: bool = False) -> None:
    """Save the upper part of a page, in 256 colours."""
    picture = Image.open(io.BytesIO(opened.look(page, width, dark, COLOURED).picture))
    shown = picture.crop((0, 0, width, min(height, picture.height))).convert("RGB")
    to.parent.mkdir(parents=True, exist_ok=True)
    shown.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(to, optimize=True)


def main() -> None:
    name, page = sys.argv[1], Path(sys.argv[2])
    width, height = (int(word) for word in sys.argv[3:5]) if len(sys.argv) > 4 else (1000, 1300)
    with browser() as opened:
        if name != "site":
            shoot(opened, page, IMAGES / f"{name}.png", width, height)
            return
        for each, path in SITE.items():
            for dark in (False, True):
                to = IMAGES / "site" / f"{each}_{'dark' if dark else 'light'}.png"
                shoot(opened, page / path, to, 1280, 1000, dark)


if __name__ == "__main__":
    main()
