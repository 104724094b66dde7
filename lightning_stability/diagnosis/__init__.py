"""Why a step went wrong: recording it, running it again, and finding where the first non-finite value was made."""

from __future__ import annotations
