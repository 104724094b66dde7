"""A page from a template: escaped, in one file, without a request."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

_TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: Any) -> str:
    """The page. All values are escaped but charts, which this package draws.

    Args:
        template: Such as `"incident.html"`.
    """
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["number"] = number
    made.filters["short"] = short
    made.filters["prose"] = prose
    return made


def prose(text: Any, most: int = 400) -> Markup:
    """A text, escaped, in which what stands in backticks is code.

    Example:
        >>> prose("`a` < b")
        Markup('<code>a</code> &lt; b')
    """
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(short(text, most)))))


def number(value: Any) -> str:
    """A number as people read it; a word stays one.

    Args:
        value: A number, a word such as `"nan"`, or None.

    Example:
        >>> number(41200), number(0.693147), number(3.4e38), number(None)
        ('41,200', '0.6931', '3.4e+38', 'unknown')
    """
    if value is None:
        return "unknown"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return short(str(value))
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.4g}"
    return f"{value:,.0f}" if value == int(min(max(value, -1e15), 1e15)) and abs(value) >= 1000 else f"{value:.4g}"


def short(text: Any, most: int = 400) -> str:
    """A text that is cut where it is too long."""
    text = str(text)
    return text if len(text) <= most else f"{text[:most]} ..."
