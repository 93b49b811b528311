import random
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from groktrace.recording import guard as guard_module
from groktrace.recording.prepare import prepare_task
from groktrace.recording.watch import watch
from groktrace.run import program as program_module
from groktrace.run.store import open_run


@pytest.fixture(autouse=True)
def traced(program, monkeypatch):
    """The real tracing, not the stand-in of the neighbouring tests."""
    monkeypatch.setitem(sys.modules, program_module.__name__, program_module)


class Training:
    """A network with dropout and normalisation, whose loss reads `self.time`."""

    def __init__(self, loss, parameters=()):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.x, self.y = torch.randn(20, 3), torch.randn(20, 1)
        self.loss, self.time = loss, 0
        self.optimizer = torch.optim.Adam([*self.model.parameters(), *parameters], lr=0.01)

    def update(self, updates):
        for _ in range(updates):
            self.time += 1
            self.optimizer.zero_grad()
            self.loss(self.model(self.x), self.y).backward()
            self.optimizer.step()

    def record(self, out, updates=12, every=3, **settings):
        """Train with a recording; what was warned of."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            settings = {"train": (self.x, self.y), "loss": self.loss} | settings
            with watch(self.model, self.optimizer, out=out, every=every, **settings):
                self.update(updates)
        return [str(warning.message) for warning in caught]


def scheduled(out, factor):
    """A loss with a factor that depends on the time, `factor(time)`."""
    training = Training(None)
    training.loss = lambda outputs, targets: factor(training.time) * F.mse_loss(outputs, targets)
    return training.record(out)


def test_a_schedule_held_in_a_variable_is_told_once_and_kept_with_the_run(tmp_path):
    (told,) = scheduled(tmp_path / "run", lambda time: 1 + 0.01 * time)
    assert "at step 3 the loss on 8 training samples is" in told
    assert "register_buffer" in told
    run = open_run(tmp_path / "run")
    (doubt,) = run.doubts
    assert doubt.startswith("step 3: the loss on 8 training samples is")
    assert run.closed


def test_a_schedule_that_begins_after_the_first_check_is_told_at_the_end(tmp_path):
    (told,) = scheduled(tmp_path / "run", lambda time: 1 + (time > 11))
    assert "at step 12 the loss" in told


def test_a_schedule_in_a_buffer_is_recorded_with_each_snapshot(tmp_path):
    training = Training(None)
    training.model.register_buffer("factor", torch.tensor(1.0))

    def loss(outputs, targets):
        return training.model.factor * F.mse_loss(outputs, targets)

    def timed(outputs, targets):
        training.model.factor.fill_(1 + 0.1 * training.time)
        return loss(outputs, targets)

    training.loss = timed
    assert training.record(tmp_path / "run", loss=loss) == []
    run = open_run(tmp_path / "run")
    losses = [float(run.task.forward(snapshot.load(), run.task.train.tensors)[0]) for snapshot in run.snapshots]
    training.model.eval()
    assert losses[-1] == pytest.approx(2.2 * F.mse_loss(training.model(training.x), training.y).item(), rel=1e-5)


def test_a_gradient_that_comes_to_differ_is_told(tmp_path):
    class Gate(torch.autograd.Function):
        """Passes the gradient on, until told otherwise."""

        share = 1.0

        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return Gate.share * grad

    training = Training(lambda outputs, targets: F.mse_loss(Gate.apply(outputs), targets))
    with watch(
        training.model, training.optimizer, train=(training.x, training.y), loss=training.loss, out=tmp_path
    ) as r:
        training.update(2)
        Gate.share = 0.5
        with pytest.warns(RuntimeWarning, match="at step 2 the loss's gradient differs by 1 of its norm"):
            r.close()
    assert "gradient" in open_run(tmp_path).doubts[0]


def test_usual_losses_are_not_doubted(tmp_path):
    assert Training(F.mse_loss).record(tmp_path / "a", every=1) == []
    assert open_run(tmp_path / "a").doubts == ()
    fitted = Training(F.mse_loss)
    fitted.y = torch.zeros(20, 1)
    fitted.model[4].weight.data.mul_(1e-6)
    fitted.model[4].bias.data.zero_()
    assert fitted.record(tmp_path / "b", every=1) == []
    average = Training(F.mse_loss)
    weights = torch.optim.swa_utils.AveragedModel(average.model)
    assert average.record(tmp_path / "c", weights=weights) == []
    half = Training(F.mse_loss)
    half.model.to(torch.bfloat16)
    half.x, half.y = half.x.bfloat16(), half.y.bfloat16()
    assert half.record(tmp_path / "d") == []


def test_gradients_that_are_nan_live_too_are_the_users_own(tmp_path):
    training = Training(
        lambda outputs, targets: (outputs - outputs).square().sum().sqrt() + F.mse_loss(outputs, targets)
    )
    assert training.record(tmp_path / "run", updates=0) == []


class Counting(nn.Module):
    """A loss that counts its calls and keeps what it saw, in places of every kind."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, outputs, targets):
        self.calls += 1
        self.seen.append(outputs.mean().item())
        with torch.no_grad():
            self.mean.mul_(0.9).add_(outputs.mean().detach())
        return F.mse_loss(outputs, targets)


calls = 0


def test_checks_leave_no_trace_in_the_training(tmp_path):
    random.seed(0)
    np.random.seed(0)
    seen = []

    def counted(outputs, targets):
        global calls
        calls += 1
        seen.append(calls)
        random.random()
        return F.mse_loss(outputs, targets)

    def results(out, loss):
        global calls
        calls = 0
        seen.clear()
        random.seed(0)
        training = Training(loss)
        if out is None:
            training.update(12)
        else:
            assert training.record(out, every=1) == []
        state = [*training.model.state_dict().values(), *(p.grad for p in training.model.parameters())]
        flags = [module.training for module in training.model.modules()]
        return state, flags, torch.get_rng_state(), random.getstate(), calls, list(seen)

    for make in (Counting, lambda: counted):
        one, other = make(), make()
        plain, recorded = results(None, one), results(tmp_path / make.__name__, other)
        assert all(torch.equal(a, b) for a, b in zip(plain[0], recorded[0], strict=True))
        assert torch.equal(plain[2], recorded[2])
        assert (plain[1], *plain[3:]) == (recorded[1], *recorded[3:])
        if isinstance(one, Counting):
            assert (one.calls, one.seen) == (other.calls, other.seen) == (12, other.seen)
            assert torch.equal(one.mean, other.mean)


def test_tensors_that_are_no_buffers_are_put_back():
    loss = Counting()
    loss.centre = torch.zeros(1)
    with guard_module.restored_attributes(nn.Linear(1, 1), loss, None, "mse"):
        loss.centre += 1
        loss.later, loss.calls = 3, 9
    assert (loss.centre.item(), loss.calls, hasattr(loss, "later")) == (0.0, 0, False)


def test_a_loss_that_fails_later_is_told_as_that(tmp_path):
    training = Training(F.mse_loss)

    def loss(outputs, targets):
        if training.time:
            raise ZeroDivisionError("gone")
        return F.mse_loss(outputs, targets)

    (told,) = training.record(tmp_path / "run", loss=loss)
    assert "from step 3 on it cannot be checked" in told
    assert "ZeroDivisionError: gone" in told
    assert open_run(tmp_path / "run").doubts == ()


def test_checks_become_rare_and_stay_within_their_share(monkeypatch):
    training = Training(F.mse_loss)
    training.model.eval()
    guard = prepare_task(training.model, (training.x, training.y), None, F.mse_loss, None, 0).guard
    now = [guard_module.time.perf_counter()]
    monkeypatch.setattr(guard_module.time, "perf_counter", lambda: now[0])
    guard._spent, guard._last, guard._began = 0.0, 1.0, now[0]
    due = [guard.due() for _ in range(9)]
    assert due == [True] + 8 * [False]  # each would cost a second
    now[0] += 1000
    due = [guard.due() for _ in range(30)]
    assert [i + 10 for i, is_due in enumerate(due) if is_due] == [10, 20]


def test_doubts_of_an_earlier_recording_stay(tmp_path):
    scheduled(tmp_path / "run", lambda time: 1 + 0.01 * time)
    before = open_run(tmp_path / "run").doubts
    training = Training(F.mse_loss)
    watch(
        training.model,
        training.optimizer,
        train=(training.x, training.y),
        loss="mse",
        out=tmp_path / "run",
        start_step=12,
    ).close()
    assert open_run(tmp_path / "run").doubts[: len(before)] == before  # and that these are other weights


class Weighted(nn.Module):
    """A loss with weights of its own, a buffer that moves, and a penalty on weights that it holds by themselves."""

    def __init__(self, held=()):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(1))
        self.held = list(held)

    def forward(self, outputs, targets):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(targets.mean() + outputs.mean().detach(), alpha=0.1)
        error = F.mse_loss(outputs, targets + self.mean) * self.log_scale.exp().squeeze()
        return error - self.log_scale.sum() + 0.01 * sum(tensor.abs().square().sum() for tensor in self.held)


class Shared(nn.Module):
    """Layers of which one lies in the memory of the other, transposed or in part, around complex weights."""

    def __init__(self, whole):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 6, bias=False), nn.Linear(6, 3 if whole else 2, bias=False)
        self.turn = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        weight = self.encode.weight
        part = weight.data.t() if whole else weight.data.view(-1)[2:14].view(2, 6)
        self.decode.weight = nn.Parameter(part)

    def forward(self, x):
        return self.decode((self.encode(x) * self.turn).abs().tanh()).sum(1, keepdim=True)


@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("model", ["plain", "transposed", "part"])
def test_tensors_of_the_loss_shared_memory_and_complex_weights_are_not_doubted(tmp_path, model, held, averaged, logged):
    training = Training(None)
    if model != "plain":
        training.model = Shared(model == "transposed")
    loss = Weighted([next(training.model.parameters())] if held else ())
    log = []

    def logging(outputs, targets):
        value = loss(outputs, targets)
        log.append(value.item())
        return value

    training.loss = logging if logged else loss
    training.optimizer = torch.optim.SGD([*training.model.parameters(), *loss.parameters()], lr=0.01)
    average = torch.optim.swa_utils.AveragedModel(training.model) if averaged else None
    if averaged:
        training.optimizer.register_step_post_hook(lambda *_: average.update_parameters(training.model))
    told = training.record(tmp_path / "run", **({"weights": average.module} if averaged else {}))
    assert told == []
    run = open_run(tmp_path / "run")
    assert run.doubts == ()
    assert run.task is not None


def test_a_loss_with_weights_of_its_own_that_comes_to_differ_is_told(tmp_path):
    loss = Weighted()
    training = Training(None, loss.parameters())
    training.loss = lambda outputs, targets: (1 + 0.01 * training.time) * loss(outputs, targets)
    (told,) = training.record(tmp_path / "run")
    assert "at step 3 the loss on 8 training samples is" in told
