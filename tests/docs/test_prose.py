"""Pages are read by people whose first language is another one: short sentences, and the field's words."""

from __future__ import annotations

import inspect
import re
import statistics

import pytest

import lightning_stability
from tests.docs.blocks import ROOT
from tests.docs.prose import LONGEST, MEDIAN, house_words, length, sentences

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
        *ROOT.glob("docs/**/*.md"),
    )
)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_short_sentences(page):
    """`python -m tests.docs.prose PAGE` prints those that are to be mended."""
    found = sentences((ROOT / page).read_text())
    assert [each for each in found if length(each) > LONGEST] == []
    assert statistics.median(map(length, found)) <= MEDIAN


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_things_in_the_fields_words(page):
    assert house_words((ROOT / page).read_text()) == []


PUBLIC = {name: inspect.getdoc(getattr(lightning_stability, name)) or "" for name in lightning_stability.__all__[:-1]}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_is_as_readable(name):
    text = PUBLIC[name]
    about = re.split(r"^(?:Args|Attributes):$", text, flags=re.MULTILINE)[0]
    assert [each for each in sentences(about) if length(each) > LONGEST] == []
    assert house_words(text) == []


def test_what_is_no_sentence_is_not_counted():
    page = """# A heading that nobody would call a sentence

One sentence of a paragraph, with `some code` in it,
and [a link](https://example.org/a/b). Another one! Is it e.g. a third?

| a table | of | many cells |
|---|---|---|

- **An item.** It has two.
- a second item
  that goes over two lines

```python
code = "is not read aloud"
```

    nor is this

![A picture](x.png)
"""
    assert [length(each) for each in sentences(page)] == [12, 2, 5, 2, 3, 8]
    assert len(house_words("It went on.\n\n`it goes on`\n\n| go on |\n|---|")) == 2
