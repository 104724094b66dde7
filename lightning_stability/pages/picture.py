"""Images inside of a page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib.image import imsave


def picture(pixels: Any) -> str:
    """An image as the text of a data URI; pixels that are not finite are red.

    Args:
        pixels: An array of [height, width] or [height, width, 3].
    """
    values = np.asarray(pixels, dtype=np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 1.0)
    scaled = np.where(finite, (np.where(finite, values, low) - low) / ((high - low) or 1.0), 0.0)
    colours = np.repeat(scaled[..., None], 3, axis=-1) if scaled.ndim == 2 else scaled
    bad = ~finite if finite.ndim == 2 else ~finite.all(axis=-1)
    colours[bad] = (0.85, 0.1, 0.15)
    buffer = io.BytesIO()
    imsave(buffer, colours, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
