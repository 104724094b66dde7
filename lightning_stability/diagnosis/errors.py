"""What a diagnosis can fail with."""

from __future__ import annotations


class DiagnosisError(Exception):
    """A step cannot be diagnosed; the message says why and what to do."""


class OutOfTimeError(DiagnosisError):
    """The time given for a diagnosis is up."""

    def __init__(self) -> None:
        super().__init__("the time given for the diagnosis was up")
