"""The fenced blocks of the README and the pages: what a reader copies, types, or is shown."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: The page, relative to the repository.
        line: Where its fence opens.
        language: What stands behind the fence.
        text: What is in it.
        title: The name under which a reader saves it as a file.
    """

    page: str
    line: int
    language: str
    text: str
    title: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a console block, and what the page shows of its output ("" for nothing)."""

    words: list[str]
    shown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return shlex.join(self.words)


def pages() -> list[str]:
    """Every page that a reader is sent to."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/**/*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def blocks_of(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in order, of some languages or of all."""
    found: list[Block] = []
    fence, language, title, start, lines = "", "", "", 0, list[str]()
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        mark = re.match(r"( *)(`{3,})(\w*)(?: title=\"(.+)\")?\s*$", line)
        if mark and not fence:
            fence, language, title, start, lines = mark[2], mark[3], mark[4] or "", number, []
            indent = len(mark[1])
        elif mark and mark[2] == fence and not mark[3]:
            found.append(Block(page, start, language, "\n".join(lines) + "\n", title))
            fence = ""
        elif fence:
            lines.append(line[indent:] if not line[:indent].strip() else line)
    assert not fence, f"{page}:{start}: the block is not closed"
    return [block for block in found if not languages or block.language in languages]


def files_of(page: str) -> dict[str, str]:
    """The files that a page has a reader save, by name."""
    return {block.title: block.text for block in blocks_of(page) if block.title}


def commands_of(block: Block) -> list[Command]:
    """The commands of a console block.

    Where a line starts with `$ `, such lines are commands and the others are their output; else all lines are commands.
    """
    lines = block.text.replace("\\\n", " ").splitlines()
    session = any(line.startswith("$ ") for line in lines)
    commands: list[Command] = []
    for line in lines:
        if session and not line.startswith("$ "):
            commands[-1].shown.append(line)
        else:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                commands.append(Command(words))
    return commands


def matches(shown: str, output: str, same_numbers: bool) -> bool:
    """Whether an output is in the other one, whatever its line breaks; `...` stands for anything.

    Args:
        shown: What the page shows.
        output: What was written.
        same_numbers: Whether numbers have to be the same; else any number does. (The last digit of one like 7.946e+04
            differs between processors, which add in another order.)
    """
    pattern = re.escape(" ".join(shown.split())).replace(r"\.\.\.", ".*?").replace(r"\ ", " ")
    if same_numbers:
        pattern = re.sub(r"(\d\\\.\d+)\d(e\\[-+]\d+)", r"\1\\d\2", pattern)
    else:
        pattern = re.sub(
            r"(?:\\[-+])?\d[\d,]*(?:\\\.\d+)?(?:e(?:\\?[-+])\d+)?",
            r"[-+]?\\d[\\d,]*(?:\\.\\d+)?(?:e[-+]\\d+)?",
            pattern,
        )
    return re.search(pattern, " ".join(output.split())) is not None
