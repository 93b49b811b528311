import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from groktrace.errors import SettingsError
from groktrace.recording.hooks import UpdateHooks, hookable


def make_optimizer(make=torch.optim.SGD, **settings):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return make([weight], **({"lr": 0.1} | settings))


@pytest.fixture
def count():
    seen = []

    def attach(optimizer):
        return seen, UpdateHooks(optimizer, seen.append, lambda: None)

    return attach


def test_counts_updates_until_removed(count):
    optimizer = make_optimizer()
    seen, hooks = count(optimizer)
    for _ in range(3):
        optimizer.step()
    hooks.remove()
    optimizer.step()
    assert seen == [None] * 3


class Inner(torch.optim.SGD):
    fails = False

    def step(self, closure=None):
        if self.fails:
            raise ArithmeticError
        return super().step(closure)


def test_a_subclass_that_calls_its_parent_counts_once(count):
    make_optimizer()  # once the parent was used, both of its and the subclass's step run hooks
    optimizer = make_optimizer(Inner)
    seen, _ = count(optimizer)
    for _ in range(3):
        optimizer.step()
    assert len(seen) == 3


def test_a_step_that_raised_does_not_count_and_spoils_nothing(count):
    make_optimizer()
    optimizer = make_optimizer(Inner)
    seen, _ = count(optimizer)
    for fails in (False, True, True, False, False):
        optimizer.fails = fails
        if fails:
            with pytest.raises(ArithmeticError):
                optimizer.step()
        else:
            optimizer.step()
    assert len(seen) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_compiled_step_counts(count):
    optimizer = make_optimizer()
    seen, _ = count(optimizer)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(3):
        compiled()
    assert len(seen) == 3


class Wrapper:
    """As accelerate's: no hooks of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


class HalfOptimizer(torch.optim.Optimizer):
    """Inherits the methods, but not the attributes they need."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("wrap", [Wrapper, HalfOptimizer, lambda optimizer: Wrapper(Wrapper(optimizer))])
def test_sees_through_wrappers(wrap):
    optimizer = make_optimizer()
    assert hookable(wrap(optimizer)) is optimizer
    assert hookable(optimizer) is optimizer


@pytest.mark.parametrize("thing", [object(), [1], Wrapper(None), nn.Linear(1, 1)])
def test_refuses_what_cannot_be_hooked(thing):
    with pytest.raises(SettingsError, match=r"optimizer: expected a torch\.optim\.Optimizer"):
        hookable(thing)


def scaled_loop(count, fused):
    """Three updates under a gradient scaler, the second with an infinite gradient."""
    optimizer = make_optimizer(torch.optim.AdamW, fused=fused)
    seen, _ = count(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    weight = optimizer.param_groups[0]["params"][0]
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    return seen, int(optimizer.state[weight]["step"])


def test_skipped_updates_of_an_unfused_optimizer_are_not_told(count):
    seen, truth = scaled_loop(count, fused=False)
    assert len(seen) == truth == 2


def test_skipped_updates_of_a_fused_optimizer_are_marked(count):
    seen, truth = scaled_loop(count, fused=True)
    assert [float(flag) for flag in seen] == [0.0, 1.0, 0.0]
    assert truth == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_a_compiled_step_of_another_optimizer_stays_whole():
    class Plain(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self):
            for weight in self.param_groups[0]["params"]:
                weight.data.sub_(0.1)

    watched = make_optimizer()
    other = Plain([nn.Parameter(torch.ones(2))])
    hooks = UpdateHooks(watched, lambda _: None, lambda: None, lambda _: None, lambda _: False)
    weight = other.param_groups[0]["params"][0]
    compiled = torch.compile(lambda: other.step(), backend="eager", fullgraph=True)
    for _ in range(3):
        compiled()
    assert torch.allclose(weight, torch.full((2,), 0.7))
    hooks.remove()
    compiled()
    assert torch.allclose(weight, torch.full((2,), 0.6))


def test_nothing_is_left_of_the_hooks():
    before = dict(_global_optimizer_pre_hooks)
    optimizer = make_optimizer()
    hooks = UpdateHooks(optimizer, lambda _: None, lambda: None, lambda _: None, lambda _: True)
    successor = torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1)
    successor.step()
    successor.step()
    hooks.remove()
    assert dict(_global_optimizer_pre_hooks) == before
    for stepped in (optimizer, successor):
        assert not stepped._optimizer_step_pre_hooks
        assert not stepped._optimizer_step_post_hooks
