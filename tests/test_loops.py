"""Training loops of many kinds, each recorded as its users would and analysed by the command line's own function."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, IterableDataset

import groktrace
from groktrace.run import layout

UPDATES = 6
FEW = {"chains": 1, "burn_in": 4, "draws": 8}


class Loop:
    """A small classifier and its data; `backward` is one pass over a batch."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        self.x, self.y = torch.randn(24, 4), torch.randint(0, 3, (24,))

    @property
    def parameters(self):
        return list(self.model.parameters())

    @property
    def about(self):
        return {"train": (self.x, self.y), "loss": "cross_entropy", "every": 2}

    def loss(self, part=slice(None)):
        return F.cross_entropy(self.model(self.x[part]), self.y[part])


def plain(loop, out):
    optimizer = torch.optim.AdamW(loop.parameters, lr=0.01)
    groktrace.watch(loop.model, optimizer, **loop.about, out=out)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        loop.loss().backward()
        optimizer.step()


def accumulation(loop, out):
    optimizer = torch.optim.SGD(loop.parameters, lr=0.1)
    groktrace.watch(loop.model, optimizer, **loop.about, out=out)
    for micro in range(4 * UPDATES):
        (loop.loss(slice(6 * (micro % 4), 6 * (micro % 4) + 6)) / 4).backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


def scaled(loop, out, fused):
    """Mixed precision with a gradient scaler; two of eight updates overflow and are skipped."""
    optimizer = torch.optim.AdamW(loop.parameters, lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    groktrace.watch(loop.model, optimizer, **loop.about, out=out)
    for update in range(UPDATES + 2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loop.loss()
        scaler.scale(loss * (float("inf") if update in (1, 4) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()


def compiled(loop, out):
    optimizer = torch.optim.Adam(loop.parameters, lr=0.01)
    model = torch.compile(loop.model, backend="aot_eager")
    groktrace.watch(model, optimizer, **loop.about, out=out)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        F.cross_entropy(model(loop.x), loop.y).backward()
        optimizer.step()


def compiled_in_place(loop, out):
    loop.model.compile(backend="aot_eager")
    plain(loop, out)


def lbfgs(loop, out):
    optimizer = torch.optim.LBFGS(loop.parameters, lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = loop.loss()
        loss.backward()
        return loss

    groktrace.watch(loop.model, optimizer, **loop.about, out=out)
    for _ in range(UPDATES):
        optimizer.step(closure)


def step_in_backward(loop, out):
    """An optimizer for each parameter, stepped as soon as its gradient is there."""
    optimizers = {parameter: torch.optim.Adam([parameter], lr=0.01) for parameter in loop.parameters}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in loop.parameters:
        parameter.register_post_accumulate_grad_hook(update)
    recorder = groktrace.watch(loop.model, **loop.about, out=out)
    for _ in range(UPDATES):
        loop.loss().backward()
        recorder.step()


def by_hand(loop, out):
    with groktrace.watch(loop.model, **loop.about, out=out) as recorder:
        for _ in range(UPDATES):
            gradients = torch.autograd.grad(loop.loss(), loop.parameters)
            with torch.no_grad():
                for parameter, gradient in zip(loop.parameters, gradients, strict=True):
                    parameter -= 0.1 * gradient
            recorder.step()


def two_optimizers(loop, out):
    """Matrices and vectors with an optimizer each; the one that steps last counts."""
    first = torch.optim.SGD([p for p in loop.parameters if p.ndim > 1], lr=0.1)
    last = torch.optim.AdamW([p for p in loop.parameters if p.ndim == 1], lr=0.01)
    groktrace.watch(loop.model, last, **loop.about, out=out)
    for _ in range(UPDATES):
        loop.loss().backward()
        for optimizer in (first, last):
            optimizer.step()
            optimizer.zero_grad()


def accelerated(loop, out):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = torch.utils.data.TensorDataset(loop.x, loop.y)
    optimizer = torch.optim.AdamW(loop.parameters, lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    loader = torch.utils.data.DataLoader(data, batch_size=6, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(loop.model, optimizer, loader, schedule)
    groktrace.watch(model, optimizer, **(loop.about | {"train": loader}), out=out)
    for _ in range(UPDATES // 2):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


LOOPS = {
    "plain": plain,
    "accumulation": accumulation,
    "AMP": lambda loop, out: scaled(loop, out, fused=False),
    "AMP, fused": lambda loop, out: scaled(loop, out, fused=True),
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "LBFGS": lbfgs,
    "step in backward": step_in_backward,
    "by hand": by_hand,
    "two optimizers": two_optimizers,
    "Accelerate": accelerated,
}


def check(out, model, steps, loss):
    """The run holds these steps, the last with the model's weights, and its analysis knows their loss."""
    for recorder in list(groktrace.recording.recorder.open_recorders):
        recorder.close()
    run = groktrace.open_run(out)
    assert [snapshot.step for snapshot in run.snapshots] == steps
    assert run.doubts == ()
    assert (out / layout.PROGRAM_FILE).exists()
    last, state = run.snapshots[-1].load(), model.state_dict()
    assert last.keys() == state.keys()
    assert all(torch.equal(last[name], state[name]) for name in last)
    trajectory = groktrace.analyze(out, **FEW)
    assert [point.step for point in trajectory.points] == steps
    assert all(point.llc == point.llc for point in trajectory.points)  # not NaN
    model.eval()
    with torch.no_grad():
        assert trajectory.points[-1].train_loss == pytest.approx(loss(model).item(), rel=1e-5)


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # of a test that counts on skipped updates
def test_a_loop_is_recorded_and_analysed(kind, tmp_path):
    loop = Loop()
    LOOPS[kind](loop, tmp_path / "run")
    check(tmp_path / "run", loop.model, [0, 2, 4, 6], lambda model: F.cross_entropy(model(loop.x), loop.y))


class Stream(IterableDataset):
    """Pairs without an end, from a generator of its own and the global one."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def __iter__(self):
        while True:
            x = torch.randn(4, generator=self.generator) + 0.1 * torch.randn(4)
            yield x, (x[:3].sum() > 0).long()


def of_loader():
    return DataLoader(Stream(), batch_size=8), lambda loader: iter(loader)


def of_batches():
    def draw():
        x = torch.randn(8, 4)
        return x, torch.randint(0, 3, (8,))

    return [draw() for _ in range(5)], lambda _: iter(draw, None)


@pytest.mark.parametrize("make", [of_loader, of_batches])
def test_a_stream_is_recorded_by_a_sample_and_trains_on_as_without(make, tmp_path):
    def trained(out):
        loop = Loop()
        data, drawn = make()
        optimizer = torch.optim.Adam(loop.parameters, lr=0.01)
        if out is not None:
            groktrace.watch(loop.model, optimizer, train=data, loss="cross_entropy", n=4000, out=out, every=2)
        for _, (loop.x, loop.y) in zip(range(UPDATES), drawn(data), strict=False):
            optimizer.zero_grad()
            loop.loss().backward()
            optimizer.step()
        return loop.model, torch.get_rng_state()

    (model, state), (alone, other) = trained(tmp_path / "run"), trained(None)
    assert torch.equal(state, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    data = groktrace.open_run(tmp_path / "run").data
    assert (data.n, len(data.train)) == (4000, 4000 if make is of_loader else 40)
    x, y = data.train.nested()
    check(tmp_path / "run", model, [0, 2, 4, 6], lambda model: F.cross_entropy(model(x), y))


class Autoencoder(nn.Module):
    """A variational one, which draws a code for each sample."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x):
        code = torch.distributions.Normal(*self.statistics(x))
        return self.decoder(code.rsample())

    def statistics(self, x):
        mean, log_std = self.encoder(x).chunk(2, -1)
        return mean, log_std.exp()


def variational(model, batch):
    (x,) = batch
    mean, std = model.statistics(x)
    divergence = (mean.square() + std.square() - 1 - 2 * std.log()).sum(-1).mean() / 2
    return (model(x) - x).square().sum(-1).mean() + divergence


def denoising(model, batch):
    (x,) = batch
    noise, share = torch.randn_like(x), torch.rand(len(x), 1)
    return (model((1 - share) * x + share * noise) - noise).square().mean()


def denoiser():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize(("make", "loss"), [(Autoencoder, variational), (denoiser, denoising)])
def test_noise_in_the_loss_is_fixed_for_the_analysis_alone(make, loss, tmp_path):
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))

    def trained(out, **recording):
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if out is not None:
            groktrace.watch(model, optimizer, train=(x,), batch_loss=loss, out=out, every=2, **recording)
        for _ in range(UPDATES):
            optimizer.zero_grad()
            loss(model, (x,)).backward()
            optimizer.step()
        return model, torch.get_rng_state()

    (model, state), (alone, other) = trained(tmp_path / "run", noise="fixed", val=(x[:9] + 0.1,)), trained(None)
    assert torch.equal(state, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    trained(tmp_path / "again", noise="fixed", val=(x[:9] + 0.1,))

    first, second, again = (groktrace.analyze(tmp_path / name, **FEW) for name in ("run", "run", "again"))
    llc = [point.llc for point in first.points]
    assert llc == [point.llc for point in second.points] == [point.llc for point in again.points]
    assert all(value == value for value in llc)
    assert all(point.val_loss is not None for point in first.points)
    run = groktrace.open_run(tmp_path / "run")
    assert run.doubts == ()
    last, task = run.snapshots[-1].load(), run.task
    whole = task.forward(last, task.train.tensors)[0]
    singly = [task.forward(last, task.train.take(slice(i, i + 1)).tensors)[0] for i in range(len(x))]
    torch.testing.assert_close(torch.stack(singly).mean(), whole)
    assert first.points[-1].train_loss == pytest.approx(whole.item(), rel=1e-6)
    by_batches = groktrace.analyze(tmp_path / "again", **FEW, batch_size=8)
    assert by_batches.points[-1].train_loss == first.points[-1].train_loss

    factory = groktrace.Task.from_model(make(), batch_loss=loss)  # with the noise that the run holds
    by_task = groktrace.analyze(tmp_path / "run", task=factory, **FEW)
    assert [point.train_loss for point in by_task.points] == pytest.approx([p.train_loss for p in first.points])

    with pytest.warns(RuntimeWarning, match='draws random numbers; noise="fixed" keeps one draw for each sample'):
        trained(tmp_path / "without")


def test_adversaries_are_two_recordings(tmp_path):
    torch.manual_seed(0)
    maker, critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)), nn.Linear(2, 1)
    for_maker, for_critic = (torch.optim.Adam(model.parameters(), lr=0.01) for model in (maker, critic))
    noise, real = torch.randn(16, 2), torch.randn(16, 2) + 1
    groktrace.watch(
        maker,
        for_maker,
        train={"noise": noise},
        batch_loss=lambda m, b: F.softplus(-critic(m(b["noise"]))).mean(),
        out=tmp_path / "maker",
        every=2,
    )
    groktrace.watch(
        critic,
        for_critic,
        train=(real, torch.ones(16, 1)),
        loss=nn.BCEWithLogitsLoss(),
        out=tmp_path / "critic",
        every=4,
    )
    for _ in range(4):
        for _ in range(2):  # the critic learns twice as often
            for_critic.zero_grad()
            (F.softplus(-critic(real)) + F.softplus(critic(maker(noise).detach()))).mean().backward()
            for_critic.step()
        for_maker.zero_grad()
        F.softplus(-critic(maker(noise))).mean().backward()
        for_maker.step()
    check(tmp_path / "critic", critic, [0, 4, 8], lambda model: F.softplus(-model(real)).mean())
    assert layout.snapshot_steps(tmp_path / "maker") == [0, 2, 4]
    assert len(groktrace.analyze(tmp_path / "maker", **FEW).points) == 3
    run = groktrace.open_run(tmp_path / "maker")
    assert run.doubts == ()  # each snapshot keeps the critic, by which the loss goes
    last = run.snapshots[-1].load(with_loss=True)
    assert torch.equal(last["loss.critic.weight"], critic.weight)
    torch.testing.assert_close(run.task.forward(last, (noise,))[0], F.softplus(-critic(maker(noise))).mean())


def test_the_average_of_the_weights(tmp_path):
    loop = Loop()
    optimizer = torch.optim.SGD(loop.parameters, lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(
        loop.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    truth = {}
    with groktrace.watch(loop.model, optimizer, weights=average, **loop.about, out=tmp_path / "run") as recorder:
        for update in range(5):
            optimizer.zero_grad()
            loop.loss().backward()
            optimizer.step()
            average.update_parameters(loop.model)
            recorder.log(update=update)
            truth[update + 1] = {name: value.clone() for name, value in average.module.state_dict().items()}
    run = groktrace.open_run(tmp_path / "run")
    assert [snapshot.step for snapshot in run.snapshots] == [0, 2, 4, 5]
    for snapshot in run.snapshots[1:]:
        weights = snapshot.load()
        assert all(torch.equal(value, truth[snapshot.step][name]) for name, value in weights.items()), snapshot.step
        assert snapshot.metrics() in ({"update": snapshot.step - 1.0}, {})
    check(tmp_path / "run", average.module, [0, 2, 4, 5], lambda model: F.cross_entropy(model(loop.x), loop.y))


@pytest.mark.parametrize("weights", [nn.Linear(1, 1), 3], ids=["other tensors", "no module"])
def test_weights_of_another_network_are_refused(weights, tmp_path):
    with pytest.raises(groktrace.GroktraceError, match=r"weights: expected a"):
        groktrace.watch(Loop().model, weights=weights, out=tmp_path / "run")


class LowRank(nn.Module):
    """A frozen layer with a trained correction of low rank."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(50, 30)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(50, 1, bias=False), nn.Linear(1, 30, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_frozen_weights_are_kept_once(tmp_path):
    torch.manual_seed(0)
    model, x, y = LowRank(), torch.randn(20, 50), torch.randn(20, 30)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def train(updates):
        with groktrace.watch(model, optimizer, train=(x, y), loss="mse", out=out, every=2, start_step=train.done):
            for _ in range(updates):
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                train.done += 1

    train.done, out = 0, tmp_path / "run"
    train(4)
    sizes = [entry.stat().st_size for entry in (out / layout.WEIGHTS_FOLDER).iterdir()]
    assert max(sizes) < 4 * (50 * 30) < (out / layout.FROZEN_FILE).stat().st_size
    before = (out / layout.FROZEN_FILE).read_bytes()
    check(out, model, [0, 2, 4], lambda model: F.mse_loss(model(x), y))
    train(1)  # in a later process
    with torch.no_grad():
        model.base.weight.add_(1)  # merged, say; from here on it differs from what is kept
    train(1)
    model.base.requires_grad_(True)
    optimizer.add_param_group({"params": [model.base.bias]})
    train(1)
    assert (out / layout.FROZEN_FILE).read_bytes() == before
    check(out, model, [0, 2, 4, 5, 6, 7], lambda model: F.mse_loss(model(x), y))


def test_a_schedule_free_optimizer_is_told_what_is_kept(tmp_path):
    loop = Loop()
    optimizer = torch.optim.SGD(loop.parameters, lr=0.1)
    optimizer.param_groups[0]["train_mode"] = True  # as the schedule-free optimizers have it
    with pytest.warns(RuntimeWarning, match=r"schedule-free optimizer trains other weights than it evaluates"):
        groktrace.watch(loop.model, optimizer, **loop.about, out=tmp_path / "run")
    optimizer.step()
    check(tmp_path / "run", loop.model, [0, 1], lambda model: F.cross_entropy(model(loop.x), loop.y))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
def test_workers_of_a_loader_change_nothing(tmp_path):
    loop = Loop()
    optimizer = torch.optim.SGD(loop.parameters, lr=0.1)
    data = torch.utils.data.TensorDataset(loop.x, loop.y)
    loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context="fork")
    groktrace.watch(loop.model, optimizer, **(loop.about | {"train": loader}), out=tmp_path / "run")
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(loop.model(x), y).backward()
            optimizer.step()
    check(tmp_path / "run", loop.model, [0, 2, 4, 6], lambda model: F.cross_entropy(model(loop.x), loop.y))
