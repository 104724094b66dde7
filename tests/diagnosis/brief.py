"""Diagnoses without `repro.py`, whose check imports torch anew, and without a page of pictures: most of their time.

Both are looked at in test_repro.py and test_html.py, and written by some of the other tests.
"""

from __future__ import annotations

import sys
from typing import Any

from lightning_stability.callbacks import incident_writing
from lightning_stability.cli import main
from lightning_stability.diagnosis import offline

CHANGES: list[tuple[Any, str, Any]] = [
    (offline, "write_repro", lambda *words: {"path": None, "why_not": "left out"}),
    (offline, "write_page", lambda *words: None),
    (incident_writing, "write_page", lambda *words: None),
]


def run(words: list[str]) -> int:
    """The command line, with diagnoses that are brief."""
    for module, name, value in CHANGES:
        setattr(module, name, value)
    sys.argv = ["lightning-stability", *words]
    return main()
