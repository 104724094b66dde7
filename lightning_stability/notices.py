"""Saying something in a way that ends no run, whatever the user's filters for warnings are."""

from __future__ import annotations

import warnings

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn


def warn_always(message: str, on_this_rank: bool = False) -> None:
    """Warn, also where the same was said before or warnings are switched off or made errors: this is no advice.

    Args:
        message: What has happened to the run.
        on_this_rank: Whether other ranks than the first shall say it too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        if on_this_rank:
            warnings.warn(message, stacklevel=2)
        else:
            rank_zero_warn(message)


def warn(message: str) -> None:
    """Give advice, as the user's filters want it; where they make errors of warnings it is a line, and ends no run."""
    try:
        rank_zero_warn(message)
    except Warning:
        rank_zero_info(message)
