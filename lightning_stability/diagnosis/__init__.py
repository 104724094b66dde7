"""Why a step went wrong: recording it, running it again, and finding where the first non-finite value was made."""

from __future__ import annotations

from lightning_stability.diagnosis.errors import DiagnosisError
from lightning_stability.diagnosis.incident import Incident, read_incident, write_incident
from lightning_stability.diagnosis.offline import diagnose
from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.search import find_origin
from lightning_stability.diagnosis.step import RecordedStep, capture_state, restore_state

__all__ = [
    "DiagnosisError",
    "Incident",
    "Origin",
    "RecordedStep",
    "capture_state",
    "diagnose",
    "find_origin",
    "read_incident",
    "restore_state",
    "write_incident",
]
