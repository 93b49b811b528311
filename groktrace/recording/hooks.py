"""Being told of every update that an optimizer makes, once each."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from groktrace.errors import SettingsError


def hookable(optimizer: Any) -> Any:
    """The optimizer that takes step hooks: the argument itself, or the one it wraps.

    Raises:
        SettingsError: there is none.
    """
    inner = optimizer
    for _ in range(8):
        if _takes_hooks(inner):
            return inner
        inner = getattr(inner, "optimizer", None)
    raise SettingsError(
        f"optimizer: expected a torch.optim.Optimizer or a wrapper around one, got {type(optimizer).__name__}; "
        "with another one leave optimizer out and call recorder.step() once per update."
    )


def _takes_hooks(optimizer: Any) -> bool:
    # Wrappers may inherit the method but not what it needs, so the only test is to try.
    try:
        optimizer.register_step_post_hook(_nothing).remove()
    except (AttributeError, TypeError):
        return False
    return hasattr(optimizer, "param_groups")


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


class UpdateHooks:
    """Hooks on an optimizer that call back once per update.

    Args:
        optimizer: what `hookable` returned.
        on_update: called after each outermost step with the optimizer's `found_inf`: above zero where a gradient
            scaler made a fused optimizer skip the update, None without such a scaler. It must not raise.
        on_begin: called before each outermost step; it must not raise either.
    """

    def __init__(
        self, optimizer: Any, on_update: Callable[[Tensor | None], None], on_begin: Callable[[], None]
    ) -> None:
        self._on_update = on_update
        self._on_begin = on_begin
        self._depth = 0
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # A subclass whose step() calls super().step() comes here twice per update, the second time from within the
        # first. A step that raised never reaches `_after`, and looks the same but for the call stack.
        if self._depth and not _within_step_of(optimizer):
            self._depth = 0
        self._depth += 1
        if self._depth == 1:
            self._on_begin()

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self._depth = 0
            self._on_update(getattr(optimizer, "found_inf", None))

    # For scripts that compile optimizer.step: the compiler calls these as they are instead of tracing them. This is
    # the mark that torch.compiler.disable sets; that function itself would put a frame between hook and step.
    _before._torchdynamo_disable = _after._torchdynamo_disable = True


def _within_step_of(optimizer: Any) -> bool:
    """Whether the step that calls this hook runs inside another step of the same optimizer."""
    with contextlib.suppress(ValueError):
        wrapper = sys._getframe(2)  # torch's wrapper around step(), of which this hook's caller is one
        frame = wrapper.f_back
        while frame is not None:
            if frame.f_code is wrapper.f_code and frame.f_locals.get("self", optimizer) is optimizer:
                return True
            frame = frame.f_back
    return False
