"""What tracing must not change silently: custom backward passes, numbers read for a log; and where it fails."""

import linecache

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from groktrace.errors import TaskError
from groktrace.run.batch import Batch
from groktrace.run.program import Program
from groktrace.run.task import make_forward


def trace(loss, activation=torch.tanh, samples=24):
    """The program of a small network, with the live module and the batch that it was traced from."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x):
            return self.last(activation(self.first(x)))

    batch = Batch((torch.randn(samples, 4), torch.randn(samples, 1)), {"tuple": [0, 1]})
    forward = make_forward(Net(), loss, None, batch)
    return Program.trace(forward, batch), forward, batch


def agrees(traced):
    """Whether the program gives the live loss, at other weights too."""
    program, forward, batch = traced
    for factor in (1.0, 3.0):
        weights = {name: factor * tensor.detach() for name, tensor in forward.model.named_parameters()}
        live = torch.func.functional_call(forward, {f"model.{k}": v for k, v in weights.items()}, batch.tensors)[0]
        if not torch.equal(program.forward(weights, batch.tensors)[0], live):
            return False
    return True


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0).sqrt()


class Unsafe(Function):
    """The derivative that the forward pass has, where it has one; infinite at zero."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 0.5 / x.clamp(min=0).sqrt() * (x >= 0)


class Safe(Function):
    """Zero at zero."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.where(x > 1e-6, grad * 0.5 / x.clamp(min=1e-6).sqrt(), torch.zeros_like(grad))


def test_a_backward_pass_that_is_nan_once_traced_is_refused():
    with pytest.raises(TaskError, match=r"another gradient than live; does it hold a custom autograd.Function"):
        trace("mse", lambda x: Safe.apply(x * (x > 0)))  # infinity times zero


def test_a_backward_pass_whose_derivative_is_nan_once_traced_is_refused():
    with pytest.raises(TaskError, match="gradient has a derivative that is not finite"):
        trace("mse", lambda x: Safe.apply(torch.relu(x)))


def test_gradients_that_are_nan_live_and_traced_are_the_users_own():
    assert agrees(trace(lambda o, t: F.mse_loss(o, t) + 0 * (o - o).sqrt().sum()))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class Once(Doubled):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class Clipped(Doubled):
    """Another gradient, but only where the data do not lead at first."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() < 2.7, grad * x.cos(), torch.zeros_like(grad))


def test_a_backward_pass_that_differs_at_other_weights_is_refused():
    with pytest.raises(TaskError, match="another gradient than live"):
        trace("mse", Clipped.apply)


@pytest.mark.parametrize("function", [Doubled, Once])
def test_a_backward_pass_that_is_the_traced_one_is_taken(function):
    assert agrees(trace("mse", function.apply))


seen = []
lowest = 1e9


def printed(outputs, targets):
    loss = F.mse_loss(outputs, targets)
    seen.append(f"{loss:.3f} {loss.item():.3f} {round(float(loss), 2)}")
    return loss


def remembered(outputs, targets):
    global lowest
    loss = F.mse_loss(outputs, targets)
    if loss.item() < lowest:
        lowest = loss.item()
    return loss


def checked(outputs, targets):
    loss = F.mse_loss(outputs, targets)
    if torch.isnan(loss):
        raise ValueError("diverged")
    return loss


def lists(outputs, targets):
    loss = (outputs - targets).square()
    seen.append(max(loss.mean(0).tolist()))
    return loss.mean()


@pytest.mark.parametrize("loss", [printed, remembered, checked, lists])
def test_numbers_read_for_a_log_do_not_stand_in_the_way(loss):
    readers = {name: getattr(torch.Tensor, name) for name in ("item", "__float__", "__bool__", "__format__")}
    assert agrees(trace(loss))
    assert {name: getattr(torch.Tensor, name) for name in readers} == readers


def branching(outputs, targets):
    loss = F.mse_loss(outputs, targets)
    return loss if loss.item() < 0.5 else loss.sqrt()


def clipped(outputs, targets):
    loss = F.mse_loss(outputs, targets)
    return loss.clamp(max=1e4) if loss.item() > 1e4 else loss


def divided(outputs, targets):
    return F.mse_loss(outputs, targets) / max(1.0, targets.abs().sum().item())


def counted(outputs, targets):
    return F.mse_loss(outputs, targets) * int((targets > 0).sum())


def listed(outputs, targets):
    weights = torch.tensor(targets.abs().tolist())
    return (weights * (outputs - targets).square()).mean() if max(targets) > 0 else outputs.mean()


@pytest.mark.parametrize("loss", [branching, clipped, divided, counted, listed])
def test_numbers_that_the_loss_uses_are_refused(loss):
    with pytest.raises(TaskError, match="cannot be"):
        trace(loss)


def test_the_users_own_line_is_named():
    with pytest.raises(TaskError) as caught:
        trace(branching)
    number = branching.__code__.co_firstlineno + 2
    line = linecache.getline(__file__, number).strip()
    assert f"at test_verification.py:{number}: `{line}`" in str(caught.value)
    assert "it depends on what a tensor holds" in str(caught.value)
    assert "zuf" not in str(caught.value)


def test_the_line_within_the_model_is_named():
    def activation(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(TaskError, match=r"at test_verification.py:\d+: `return x if x.sum\(\) > 0 else -x`"):
        trace("mse", activation)


def test_a_loss_that_is_summed_in_another_order_is_the_same():
    """Traced, the margin loss is made of other operations: its last digit is another one."""
    for seed in range(8):
        torch.manual_seed(seed)
        batch = Batch((torch.randn(96, 5), torch.randint(3, (96,))), {"tuple": [0, 1]})
        forward = make_forward(nn.Linear(5, 3), nn.MultiMarginLoss(), None, batch)
        live = forward(*batch.tensors)[0]
        got = Program.trace(forward, batch).forward(dict(forward.model.named_parameters()), batch.tensors)[0]
        assert got.item() == pytest.approx(live.item(), rel=1e-6)
