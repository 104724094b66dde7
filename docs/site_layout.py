"""Gives the site the repository's own layout, so that the same relative links lead somewhere in both.

mkdocs calls `on_files` when it has read `docs/`. It moves those pages to `docs/` and adds the files from outside of it
that a reader is sent to. What a page links to and is not among them is a broken link, and `make docs` fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "benchmarks/README.md")
LINKED = ("benchmarks/results/*.json", "lightning_stability/tuab/configs/*", "experiments/**/*")


def on_files(files: Files, config: Any) -> Files:
    """Lay the site's files out as they are in the repository."""
    docs = Path(config.docs_dir)
    paths = [ROOT / name for name in OUTSIDE]
    paths += [path for pattern in LINKED for path in sorted(ROOT.glob(pattern)) if path.suffix != ".py"]
    laid_out = []
    for file in files:
        source = Path(file.abs_src_path or "")
        if docs in source.parents:
            if file.inclusion.is_included():
                paths.append(source)
        else:
            laid_out.append(file)  # the theme's
    laid_out += [
        File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        for path in paths
        if path.is_file()
    ]
    return Files(laid_out)
