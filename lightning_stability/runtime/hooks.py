"""The methods of Lightning that a training step goes through, stood in for while a fit runs.

They are set on the instances, so that the precision plugin keeps its class, which checkpoints are keyed by:

    convert_input       the batch, before a 16-true precision casts it
    pre_backward        the loss, before GradScaler multiplies it
    backward            an exception that leaves it is explained
    post_backward       the forward pass is judged: what it wrote stays or is restored
    _clip_gradients     the last point before clipping: after `unscale_`, after every `on_before_optimizer_step`
    clip_gradients      a module clips by itself, in manual optimization
    clip_grad_by_norm   clips with the norm just measured
    optimizer_step      the whole step; afterwards the record is on its way to the host
    training_step       of the strategy: an exception that leaves it is explained
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from lightning_stability.internals import PLUGIN_METHODS, Overrides


class StepListener(Protocol):
    """What the hooks tell."""

    def on_input(self, batch: Any) -> None: ...

    def on_loss(self, loss: Tensor) -> None: ...

    def on_backward_end(self) -> None: ...

    def on_gradients(self, optimizer: Any) -> None: ...

    def on_own_clipping(self, optimizer: Any) -> None: ...

    def on_clipped(self, optimizer: Any) -> None: ...

    def clips(self, optimizer: Any, max_norm: float) -> bool: ...

    def on_step_begin(self, optimizer: Any) -> None: ...

    def on_step_end(self) -> None: ...

    def after_step(self, optimizer: Any, model: Any, result: Any, kwargs: dict[str, Any]) -> Any: ...

    def training_step(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...

    def backward(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...

    def backward_was_skipped(self) -> bool: ...


class PluginHooks:
    """Stands in for methods of one precision plugin and of the strategy until `remove`."""

    def __init__(self, plugin: Any, strategy: Any, listener: StepListener) -> None:
        self.plugin = plugin
        self._listener = listener
        self._overrides = Overrides()
        self._originals: dict[str, Callable[..., Any]] = {name: getattr(plugin, name) for name in PLUGIN_METHODS}
        for name in PLUGIN_METHODS:
            self._overrides.set(plugin, name, partial(getattr(self, name)))
        training_step = strategy.training_step
        self._overrides.set(strategy, "training_step", lambda *a, **k: listener.training_step(training_step, a, k))

    def remove(self) -> None:
        """Restore the plugin and the strategy."""
        self._overrides.restore()

    def step(self, optimizer: Any, model: Any, closure: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        """One try of an optimizer step."""

        def run_closure() -> Any:
            result = closure()
            return None if self._listener.backward_was_skipped() else result  # a GradScaler has nothing to unscale then

        self._listener.on_step_begin(optimizer)
        result = self._originals["optimizer_step"](optimizer, model=model, closure=run_closure, **kwargs)
        self._listener.on_step_end()
        return result

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        result = self.step(optimizer, model, closure, kwargs)
        return self._listener.after_step(optimizer, model, result, kwargs)

    def pre_backward(self, tensor: Tensor, module: Any) -> Any:
        self._listener.on_loss(tensor)
        return self._originals["pre_backward"](tensor, module)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        return self._listener.backward(self._originals["backward"], args, kwargs)

    def post_backward(self, tensor: Tensor, module: Any) -> Any:
        self._listener.on_backward_end()
        return self._originals["post_backward"](tensor, module)

    def convert_input(self, data: Any) -> Any:
        self._listener.on_input(data)
        return self._originals["convert_input"](data)

    def _clip_gradients(self, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self._listener.on_gradients(optimizer)
        self._originals["_clip_gradients"](model, optimizer, *args, **kwargs)
        self._listener.on_clipped(optimizer)

    def clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self._listener.on_own_clipping(optimizer)
        self._originals["clip_gradients"](optimizer, *args, **kwargs)

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        if not self._listener.clips(optimizer, clip_val):
            self._originals["clip_grad_by_norm"](optimizer, clip_val)
