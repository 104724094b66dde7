"""Setting attributes of instances for a while."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Overrides:
    """Attributes that are set on instances for a while; `restore` undoes them, the last one first.

    What somebody else has set over one of ours in the meantime is left as it is.

    Example:
        >>> class Loop:
        ...     def advance(self):
        ...         return "its own"
        >>> loop, overrides = Loop(), Overrides()
        >>> overrides.set(loop, "advance", lambda: "ours")
        >>> loop.advance()
        'ours'
        >>> overrides.restore()
        >>> loop.advance()
        'its own'
    """

    def __init__(self) -> None:
        self._stack: list[tuple[Any, str, Any, Any]] = []

    def set(self, instance: Any, name: str, value: Any) -> None:
        """Set an attribute of one instance; its class is left alone. A function is set as an `_Override`."""
        before = vars(instance).get(name, _ABSENT)
        if callable(value) and not isinstance(value, types.MethodType) and not isinstance(instance, type):
            value = _Override.of(instance, name, value)
        setattr(instance, name, value)
        self._stack.append((instance, name, value, before))

    def restore(self) -> None:
        """Undo everything that was set."""
        while self._stack:
            instance, name, value, before = self._stack.pop()
            if vars(instance).get(name, _ABSENT) is not value:
                continue
            if before is _ABSENT:
                delattr(instance, name)
            else:
                setattr(instance, name, before)


class _Override(functools.partial[Any]):
    """A function set on an instance; a copy of the instance, pickled or deep, gets its class's own method.

    (A `partial`, since its call costs no frame of Python's: some of these are called at every step.)
    """

    _instance: Any
    _name: str

    @classmethod
    def of(cls, instance: Any, name: str, function: Callable[..., Any]) -> _Override:
        override = cls(function)
        override._instance, override._name = instance, name
        return override

    def __reduce__(self) -> tuple[Any, ...]:
        # (the instance is known to the pickler by now, and has no state yet: its class answers)
        return getattr, (self._instance, self._name)
