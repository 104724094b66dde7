"""The sentences of a page: what a reader reads, without code, tables, headings and addresses.

`python -m tests.docs.prose PAGE...` prints the figures of a page, its longest sentences and its house words.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

LONGEST = 30
MEDIAN = 20

# What we said once, and what the field says.
HOUSE_WORDS = {
    r"bit-equal": "bitwise identical",
    r"called out": "warned of",
    r"(stand|stands|stood) aside": "disable itself",
    r"(give|gives|gave|given|giving) back": "restore",
    r"(put|puts|putting) back": "restore",
    r"(go|goes|going|gone|went) on": "continue, resume",
    r"(let|lets) be": "restore, disable",
    r"but for": "except",
    r"of yours|of ours": "custom, your own",
    r"proved on": "tested on",
    r"stand-ins?": "wrapper",
    r"forgiv\w+": "exclude from GradScaler",
    r"(?<!standard )deviations?": "standard deviation",
    r"look at the layers": "layer scale check",
    r"borders?": "boundary",
    r"rooms": "package layout",
}
_ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|vs|cf|etc|approx)\.")
_END = re.compile(r"""(?<=[.!?])["'*_)\]]*\s+(?=["'*_(\[]*[A-Z0-9`§])""")
_ITEM = re.compile(r"\s*([-*+]|\d+\.)\s+")


def paragraphs(text: str) -> list[str]:
    """The running text of a page; of a list, each item is one."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    found: list[list[str]] = [[]]
    fence = ""
    for line in text.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark:
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
            found.append([])
        elif fence:
            continue
        elif not line.strip() or re.match(r"\s*([|#>]|!\[|!!!|<)", line):  # a table, a heading, a picture
            found.append([])
        elif _ITEM.match(line):
            found.append([line[_ITEM.match(line).end() :]])  # type: ignore[union-attr]
        elif line.startswith("    ") and not found[-1]:  # code by its indent
            continue
        else:
            found[-1].append(line.strip())
    return [" ".join(lines) for lines in found if lines]


def plain(paragraph: str) -> str:
    """A paragraph as it is read: a name in code is one word, a link is its text."""
    text = re.sub(r"`[^`]+`", "§", paragraph)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return _ABBREVIATIONS.sub(lambda found: found[1].replace(".", ""), text)


def sentences(text: str) -> list[str]:
    """The sentences of a page."""
    return [each for paragraph in paragraphs(text) for each in _END.split(plain(paragraph)) if length(each) > 0]


def length(sentence: str) -> int:
    """How many words it has."""
    return sum(any(c.isalnum() or c == "§" for c in word) for word in sentence.split())


def house_words(text: str) -> list[str]:
    """Which of our own words a page still has."""
    said = " ".join(plain(paragraph) for paragraph in paragraphs(text))
    said += " " + re.sub(r"`[^`]+`", "§", " ".join(line for line in text.splitlines() if line.startswith("|")))
    pattern = re.compile("|".join(rf"\b{word}\b" for word in HOUSE_WORDS), re.IGNORECASE)
    return [said[max(0, found.start() - 30) : found.end() + 20] for found in pattern.finditer(said)]


def main() -> None:
    """Print what is to be mended."""
    for page in sys.argv[1:]:
        text = Path(page).read_text()
        lengths = [length(each) for each in sentences(text)]
        above = sum(each > 25 for each in lengths)
        print(f"{page}: {len(lengths)} sentences, mean {statistics.mean(lengths):.1f}, median", end=" ")
        print(f"{statistics.median(lengths)}, longest {max(lengths)}, {above} above 25")
        for each in sentences(text):
            if length(each) > 25:
                print(f"  {length(each)}: {each}")
        for each in house_words(text):
            print(f"  house word: ...{each}...")


if __name__ == "__main__":
    main()
