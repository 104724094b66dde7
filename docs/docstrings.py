"""Reads this package's docstrings as the API page needs them; mkdocstrings loads it."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Takes `Example:`, as Lightning writes it, for the section that griffe knows as `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
