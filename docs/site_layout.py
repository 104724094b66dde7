"""Gives the site the repository's own layout, so that the same relative links lead somewhere in both.

mkdocs calls `on_files` when it has read `docs/`. It moves those pages to `docs/` and adds the files from outside of it
that a reader is sent to. What a page links to and is not among them is a broken link, and `make docs` fails.
Programs of `examples/` become pages, to which links to the programs lead.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

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
    for path in sorted(ROOT.glob("examples/*.py")):
        name = f"examples/{path.stem}.md"
        laid_out.append(File.generated(config, name, content=_as_page(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return Files(laid_out)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Have links to a program of `examples/` lead to its page."""
    return re.sub(r"(\((?:\.\./)*examples/\w+)\.py\)", r"\1.md)", markdown)


def _as_page(path: Path) -> str:
    """A program: what its first lines say, and its code."""
    text = path.read_text()
    module = ast.parse(text)
    code = "".join(text.splitlines(keepends=True)[module.body[0].end_lineno or 0 :]).strip()
    about = re.sub(r"^    (.*)$", r"```console\n\1\n```", ast.get_docstring(module) or "", flags=re.MULTILINE)
    return f'# {path.name}\n{about}\n\n```python title="{path.name}"\n{code}\n```\n'
