"""Make the pictures of the reports' pages in docs/images again, in a real headless browser.

usage: python docs/page_screenshots.py NAME PAGE [WIDTH HEIGHT]

NAME is incident_page or run_page, PAGE the report.html of an incident or what `lightning-stability report` wrote.
Needs Chromium (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from tests.browser import browser  # noqa: E402


def main() -> None:
    name, page = sys.argv[1], Path(sys.argv[2])
    width, height = (int(word) for word in sys.argv[3:5]) if len(sys.argv) > 4 else (1000, 1300)
    with browser() as opened:
        picture = Image.open(io.BytesIO(opened.look(page, width, dark=False).picture))
    shown = picture.crop((0, 0, width, min(height, picture.height))).convert("RGB")
    (DOCS / "images").mkdir(exist_ok=True)
    shown.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        DOCS / "images" / f"{name}.png", optimize=True
    )


if __name__ == "__main__":
    main()
