"""Hooks that count every update of an optimizer exactly once."""

import contextlib
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from groktrace.errors import SettingsError
from groktrace.recording.gradient import UsedGradient, parameters_in, shared_parameters


def hookable(optimizer: Any) -> Any:
    """Find the optimizer that takes step hooks: the argument itself, or one that it wraps.

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


def counted_optimizer(optimizer: Any, model: nn.Module) -> Any:
    """Find the optimizer whose updates of a model can be counted: the argument itself, or one that it wraps.

    Raises:
        SettingsError: there is none, or it holds none of the model's parameters.
    """
    optimizer = hookable(optimizer)
    if not parameters_in(optimizer).keys() & {id(parameter) for parameter in model.parameters()}:
        raise SettingsError("optimizer: holds none of the model's parameters; make it from model.parameters().")
    return optimizer


def updates_made(optimizer: Any) -> int:
    """How many updates an optimizer has made, as far as its own state says; 0 for None."""
    states = getattr(optimizer, "state", {}).values()
    counts = [state["step"] for state in states if isinstance(state, dict) and "step" in state]
    return max((int(count) for count in counts), default=0)


def _takes_hooks(optimizer: Any) -> bool:
    # Wrappers may inherit the method but not what it needs, so the only test is to try.
    try:
        optimizer.register_step_post_hook(_nothing).remove()
    except (AttributeError, TypeError):
        return False
    return hasattr(optimizer, "param_groups")


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


# Rounds of other optimizers' steps after which the counted one is taken to be replaced: if the weights also change
# between the rounds, and if one of them has made updates together with the counted one before.
CHANGED_BETWEEN, COMPANION = 4, 50


@dataclass
class Streak:
    """Consecutive steps of other optimizers, without an update of the counted one since.

    Attributes:
        round: the optimizers that have stepped in the current round, which ends when the first steps again.
        before: the number of earlier rounds.
        longest: the most rounds before an update of the counted optimizer so far; 0 if there was none.
        skip: the last step's `found_inf`.
        skips: the number of earlier rounds that a gradient scaler skipped; None without one.
    """

    round: list[Any] = field(default_factory=list)
    before: int = 0
    longest: int = 0
    skip: Tensor | None = None
    skips: Tensor | None = None

    @property
    def last(self) -> Any:
        """The optimizer that stepped last, where an update of several together ends."""
        return self.round[-1]

    @property
    def updates(self) -> int:
        """The number of updates, skipped ones included."""
        return self.before + bool(self.round)

    @property
    def skipped(self) -> Tensor | None:
        """The number of skipped updates."""
        if self.skip is None:
            return self.skips
        flag = (self.skip > 0).sum()
        return flag if self.skips is None else self.skips + flag

    @property
    def is_long(self) -> bool:
        """Whether an update of the counted optimizer is no longer to be expected."""
        return self.updates >= (4 * self.longest + COMPANION if self.longest else CHANGED_BETWEEN)

    def end_round(self) -> None:
        """End the round, as its first optimizer steps again."""
        self.skips, self.before = self.skipped, self.updates
        self.round, self.skip = [], None


class UpdateHooks:
    """Hooks on an optimizer that call back once per update, and on others that may take its place.

    Args:
        optimizer: what `hookable` returned.
        on_update: called after each outermost step with the optimizer's `found_inf`: above zero where a gradient
            scaler made a fused optimizer skip the update, None without such a scaler. It must not raise.
        on_begin: called before each outermost step; it must not raise either.
        on_other: called after a step of another optimizer that holds some of the same parameters, where no update of
            this one lies within. It must not raise.
        on_again: called before one of those steps once more, with no update since: whether their steps, those of the
            streak included, are to be counted as updates. It must not raise.
        on_return: called before the first step of the optimizer itself where others' were counted already: whether
            that was a mistake, and they are not to be counted any more. It must not raise.
        on_twice: called where two optimizers that are counted are about to have stepped with the same gradient, with
            the two, in their order. It must not raise.
        among: ids of the parameters that matter; None for all of the optimizer's.
    """

    def __init__(
        self,
        optimizer: Any,
        on_update: Callable[[Tensor | None], None],
        on_begin: Callable[[], None],
        on_other: Callable[[Streak], None] | None = None,
        on_again: Callable[[Streak], bool] | None = None,
        on_return: Callable[[], bool] | None = None,
        on_twice: Callable[[Any, Any], None] | None = None,
        among: frozenset[int] | None = None,
    ) -> None:
        self._on_update, self._on_begin, self._on_other, self._on_again = on_update, on_begin, on_other, on_again
        self._on_return, self._on_twice, self._among = on_return, on_twice, among
        self._early = False  # whether others were counted before the optimizer's own first step
        self._counted: list[Any] = []  # the optimizers whose steps are updates
        self._shared: list[Tensor] = []  # parameters that the first and the last of them hold
        self._used: UsedGradient | None = None  # where there are several
        self._depth = self._updates = 0
        # Nesting depth of other optimizers' steps, and the number of updates when the outermost began.
        self._other_depth = self._other_updates = 0
        self._sharing: weakref.WeakKeyDictionary[Any, tuple[int, bool]] = weakref.WeakKeyDictionary()
        self._longest: dict[type, int] = {}  # streak before an update, by type: inner loops make new optimizers
        self.streak: Streak | None = None
        self._handles: list[Any] = []
        self._count(optimizer)
        if on_other is not None:  # global, as the script may make another optimizer at any time
            self._handles += [
                register_optimizer_step_pre_hook(self._before_other),
                register_optimizer_step_post_hook(self._after_other),
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.streak, self._used = [], None, None

    def _count(self, optimizer: Any) -> None:
        self._counted.append(optimizer)
        if len(self._counted) > 1:
            with contextlib.suppress(Exception):  # then nothing is told of pairs
                self._shared = shared_parameters(self._counted[0], optimizer)
        self._handles += [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _drop_others(self) -> None:
        for handle in self._handles[4:]:  # after the optimizer's own and the global ones
            handle.remove()
        for other in self._counted[1:]:
            self._longest[type(other)] = self._updates
        del self._handles[4:], self._counted[1:]
        self._used = None

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # A subclass whose step() calls super().step() comes here twice per update, nested. A step that raised never
        # reaches `_after`, and can be told from that by the call stack alone.
        if self._depth and not _within_step_of(self._counted):
            self._depth = 0
        self._depth += 1
        if self._depth == 1:
            if self._early and optimizer is self._counted[0]:
                self._early = False
                if self._on_return():
                    self._drop_others()
            if self.streak is not None:  # they make one update together
                for other in self.streak.round:
                    self._longest[type(other)] = max(self.streak.updates, self.streak.longest)
                self.streak = None
            self._look_behind(optimizer)
            self._on_begin()

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self._depth = 0
            self._updates += 1
            if len(self._counted) > 1:
                with contextlib.suppress(Exception):
                    self._used = UsedGradient(optimizer, self._shared)
            self._on_update(getattr(optimizer, "found_inf", None))

    def _look_behind(self, optimizer: Any) -> None:
        """Tell where this optimizer steps directly behind another that is counted, in one iteration."""
        used, self._used = self._used, None
        if used is not None and self._on_twice is not None:
            with contextlib.suppress(Exception):
                if used.serves(optimizer):
                    self._on_twice(used.optimizer, optimizer)

    # Every optimizer of the process calls these two. Compiled steps of others are ignored, to keep their graphs whole.
    def _before_other(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if optimizer is self._counted[0] or torch.compiler.is_compiling() or not self._is_other(optimizer):
            return
        if self._depth and _within_step_of(self._counted):
            return
        if self._other_depth and not _within_step_of(None):
            self._other_depth = 0
        self._other_depth += 1
        if self._other_depth > 1:
            return
        self._other_updates = self._updates
        if self.streak is not None and any(optimizer is other for other in self.streak.round):
            if self._on_again(self.streak):
                last, self.streak = self.streak.last, None
                self._early |= not self._updates
                self._updates += 1
                self._count(last)
                if last is optimizer:  # its own hooks, which come after the global ones, are in time for this step
                    self._other_depth = 0
            else:
                self.streak.end_round()

    def _after_other(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if optimizer is self._counted[0] or torch.compiler.is_compiling() or not self._is_other(optimizer):
            return
        if not self._other_depth or (self._depth and _within_step_of(self._counted)):
            return
        self._other_depth -= 1
        if self._other_depth:
            return
        if self._updates != self._other_updates:  # it wraps the counted one, and steps it
            self.streak = None
            return
        if self.streak is None:
            self.streak = Streak()
        self.streak.round.append(optimizer)
        self.streak.longest = max(self.streak.longest, self._longest.get(type(optimizer), 0))
        self.streak.skip = getattr(optimizer, "found_inf", None)
        self._on_other(self.streak)

    def _is_other(self, optimizer: Any) -> bool:
        """Whether this optimizer holds some of the counted one's parameters, and is not counted itself."""
        if any(optimizer is counted for counted in self._counted):
            return False
        try:
            size = _size(optimizer) + _size(self._counted[0])
            known = self._sharing.get(optimizer)
            if known is None or known[0] != size:
                common = parameters_in(self._counted[0]).keys() & parameters_in(optimizer).keys()
                known = (size, bool(common if self._among is None else common & self._among))
                self._sharing[optimizer] = known
            return known[1]
        except (AttributeError, KeyError, TypeError):  # an incomplete wrapper
            return False


def _size(optimizer: Any) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _within_step_of(optimizers: list[Any] | None) -> bool:
    """Whether the step that calls this hook runs inside another step of these optimizers; None for any."""
    with contextlib.suppress(ValueError):
        wrapper = sys._getframe(2)  # torch's wrapper around step(), of which this hook's caller is one
        frame = wrapper.f_back
        while frame is not None:
            if frame.f_code is wrapper.f_code:
                owner = frame.f_locals.get("self")
                if owner is None or optimizers is None or any(owner is candidate for candidate in optimizers):
                    return True
            frame = frame.f_back
    return False


def _spare_compiler() -> None:
    """Keep torch.compile from tracing the hooks of a compiled optimizer.step."""
    # The mark that torch.compiler.disable sets; that function itself would put a frame between hook and step.
    UpdateHooks._before._torchdynamo_disable = UpdateHooks._after._torchdynamo_disable = True
    with contextlib.suppress(ImportError, AttributeError, TypeError):  # not public; without it, it compiles them apart
        from torch._C._dynamo import eval_frame

        leave = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
        for hook in (UpdateHooks._before, UpdateHooks._after, UpdateHooks._before_other, UpdateHooks._after_other):
            eval_frame.set_code_exec_strategy(hook.__code__, leave)


_spare_compiler()
