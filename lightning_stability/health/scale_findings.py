"""Which layers get numbers of a scale that hurts, and which layer makes them so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from lightning_stability.health.layer_scales import LayerScale, Scale, Side

NEAR_LIMIT = 10.0
"""A magnitude within this factor of the largest number of a 16-bit format is near it."""

HOLDS_MASKS = ("Softmax", "LogSoftmax", "Softmax2d")  # what enters these may be -inf or next to it by design


@dataclass(slots=True)
class ScaleFinding:
    """Layers that are far from unit scale for one reason: the first of them, and the rest.

    Attributes:
        side: What of the first is far from it.
        cause: The layer that multiplies; None for what is before all layers.
        others: Those whose input is so too, in forward order.
    """

    layer: LayerScale
    side: Side
    cause: LayerScale | None
    others: list[LayerScale] = field(default_factory=list)

    @property
    def scale(self) -> Scale:
        """Of the first layer's input or output."""
        scale = self.layer.input if self.side == "input" else self.layer.output
        assert scale is not None
        return scale


@dataclass(slots=True, frozen=True)
class UnitScale:
    """What counts as far from unit scale.

    Attributes:
        max_ratio: A standard deviation above this, or below one over this and not 0.
        limit: The largest number of the 16-bit format that is trained in; None in others.
    """

    max_ratio: float
    limit: float | None = None

    def is_off(self, ratio: float) -> bool:
        """Whether a standard deviation is, or a ratio of two."""
        return ratio > self.max_ratio or 0.0 < ratio < 1.0 / self.max_ratio

    def is_near_limit(self, scale: Scale) -> bool:
        """Whether the 16-bit format has overflown, or is about to."""
        return self.limit is not None and not scale.abs_max < self.limit / NEAR_LIMIT

    def findings(self, layers: list[LayerScale]) -> Iterator[ScaleFinding]:
        """The causes in forward order, each with the layers that it reaches."""
        finding: ScaleFinding | None = None
        cause: LayerScale | None = None
        for layer in layers:
            if layer.input is not None and layer.kind not in HOLDS_MASKS and self._is_far(layer.input):
                reason = cause if self._explains(cause, layer) else None
                if finding is not None and (finding.cause is reason or self._is_overflow_of(finding, layer)):
                    finding.others.append(layer)
                else:
                    finding = ScaleFinding(layer, "input", reason)
                    yield finding
            if self._makes_far(layer):
                cause = layer
        last = layers[-1] if layers else None
        if last is None or last.output is None or (finding is not None and last in (finding.layer, *finding.others)):
            return
        if not last.output.is_finite or self.is_near_limit(last.output):
            yield ScaleFinding(last, "output", cause)

    def _is_far(self, scale: Scale) -> bool:
        return self.is_off(scale.std) or not scale.is_finite or self.is_near_limit(scale)

    def _makes_far(self, layer: LayerScale) -> bool:
        """Whether a layer's output is out of scale, and its input is another scale."""
        if layer.output is None:
            return False
        if not layer.output.is_finite:
            return layer.input is None or layer.input.is_finite
        if not self.is_off(layer.output.std):
            return False
        return layer.input is None or ((ratio := layer.ratio) is not None and self.is_off(ratio))

    def _explains(self, cause: LayerScale | None, layer: LayerScale) -> bool:
        """Whether a layer's input is of the scale of what an earlier one put out."""
        if cause is None or cause.output is None or layer.input is None:
            return False
        if not layer.input.is_finite:
            return not cause.output.is_finite or cause.output.std > self.max_ratio
        return not layer.input.std > 0.0 or not self.is_off(layer.input.std / cause.output.std)

    def _is_overflow_of(self, finding: ScaleFinding, layer: LayerScale) -> bool:
        """Whether a layer's input is not finite, which the large numbers before it bring about."""
        assert layer.input is not None
        return not layer.input.is_finite and not finding.scale.std < 1.0 / self.max_ratio
