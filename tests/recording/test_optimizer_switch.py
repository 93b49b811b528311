"""Which steps are updates where several optimizers, or none that can be seen, move the weights."""

import copy
import time
import warnings

import pytest
import torch
from torch import nn

from groktrace.recording import probe as probe_module
from groktrace.recording import writer as writer_module
from groktrace.recording.watch import watch
from groktrace.run.store import open_run


class Loop:
    """A training that notes the weights after each of its updates."""

    def __init__(self, training, out, every=1):
        self.training, self.out, self.every = training, out, every
        self.parameters = list(training.model.parameters())
        self.truth = {0: self.copy()}

    def copy(self):
        return {name: value.clone() for name, value in self.training.model.state_dict().items()}

    def watch(self, optimizer=None, **settings):
        self.recorder = watch(self.training.model, optimizer, out=self.out, every=self.every, **settings)
        return self.recorder

    def backward(self):
        self.training.model.zero_grad()
        loss = nn.functional.mse_loss(self.training.model(self.training.x), self.training.y)
        loss.backward()
        return loss

    def updated(self):
        self.truth[len(self.truth)] = self.copy()

    def run(self, *optimizers, updates=5):
        for _ in range(updates):
            self.backward()
            for optimizer in optimizers:
                optimizer.step()
            self.updated()

    def kept(self):
        """The steps that were kept, all of them with their own weights."""
        self.recorder.close()
        snapshots = open_run(self.out).snapshots
        for snapshot in snapshots:
            weights = snapshot.load()
            assert all(torch.equal(weights[name], value) for name, value in self.truth[snapshot.step].items())
        return [snapshot.step for snapshot in snapshots]


@pytest.fixture
def loop(training, tmp_path):
    return Loop(training, tmp_path / "run")


def sgd(parameters, **settings):
    return torch.optim.SGD(parameters, **({"lr": 0.05} | settings))


@pytest.mark.parametrize("before", [0, 5], ids=["from the start", "later"])
def test_an_optimizer_that_takes_the_place_is_counted_and_told_once(loop, before):
    optimizer = torch.optim.Adam(loop.parameters)
    loop.watch(optimizer)
    loop.run(optimizer, updates=before)
    with pytest.warns(RuntimeWarning, match="SGD steps the weights of the Adam that watch") as caught:
        loop.run(sgd(loop.parameters), updates=4)
    assert len(caught) == 1
    assert loop.recorder.steps == before + 4
    assert loop.kept() == list(range(before + 5))


def test_two_that_share_the_weights_take_the_place_together(loop):
    first = torch.optim.Adam(loop.parameters)
    loop.watch(first)
    loop.run(first)
    with pytest.warns(RuntimeWarning, match="another Adam steps the weights"):
        loop.run(sgd(loop.parameters[:2]), torch.optim.Adam(loop.parameters[2:]))
    assert loop.kept() == list(range(11))


def test_one_last_step_of_another_optimizer_counts(loop):
    optimizer = torch.optim.Adam(loop.parameters)
    loop.watch(optimizer)
    loop.run(optimizer)
    polish = torch.optim.LBFGS(loop.parameters, max_iter=4)
    polish.step(loop.backward)
    loop.updated()
    with pytest.warns(RuntimeWarning, match="LBFGS steps the weights of the Adam"):
        assert loop.kept() == list(range(7))


def test_optimizers_by_turns_all_count(loop):
    first, second = sgd(loop.parameters), torch.optim.Adam(loop.parameters)
    loop.watch(first)
    loop.run(first, updates=3)
    with pytest.warns(RuntimeWarning, match="Adam steps the weights of the SGD") as caught:
        loop.run(second, updates=3)
    loop.run(first, updates=3)
    loop.run(second, updates=3)
    assert len(caught) == 1
    assert loop.kept() == list(range(13))
    assert open_run(loop.out).doubts == ()


@pytest.mark.parametrize("watched_last", [True, False])
def test_two_that_step_in_one_iteration_are_told_to_count_twice(loop, watched_last):
    watched, other = torch.optim.Adam(loop.parameters[2:]), sgd(loop.parameters)
    loop.watch(watched)

    def train():
        for iteration in range(1, 11):
            loop.backward()
            both = [other, watched] if watched_last else [watched, other]
            for optimizer in both if iteration % 5 == 0 else [other]:
                optimizer.step()
                loop.updated()

    with pytest.warns(RuntimeWarning) as caught:
        train()
    switched, twice = (str(warning.message) for warning in caught)
    assert (
        "SGD steps the weights of the Adam that watch() was given, which has not stepped in between: from" in switched
    )
    assert "from here on the steps of both are counted. If" in switched
    names = "SGD and Adam" if watched_last else "Adam and SGD"
    assert f"{names} step one behind the other with the same gradient, and the steps of both are counted" in twice
    assert loop.kept() == list(range(13))
    (doubt,) = open_run(loop.out).doubts  # which the analysis repeats
    assert doubt.startswith(f"step 5: {names} step one behind the other")


def test_a_successor_whose_weights_are_clamped_is_counted_in_the_end(loop):
    first, second = sgd(loop.parameters), torch.optim.Adam(loop.parameters)
    loop.watch(first)
    loop.run(first)

    def clamped():
        for _ in range(6):
            loop.run(second, updates=1)
            with torch.no_grad():
                for parameter in loop.parameters:
                    parameter.clamp_(-0.2, 0.2)

    with pytest.warns(RuntimeWarning, match="Adam steps the weights of the SGD"):
        clamped()
    loop.run(second, updates=1)
    assert loop.recorder.steps == 12
    assert set(loop.kept()) > {0, 5, 10, 12}


def test_an_optimizer_of_other_weights_changes_nothing(loop):
    optimizer, other = sgd(loop.parameters), nn.Linear(2, 2)
    elsewhere = sgd(other.parameters())
    other(torch.ones(2)).sum().backward()
    loop.watch(optimizer)
    for _ in range(3):
        elsewhere.step()
        elsewhere.step()
        loop.run(optimizer, updates=1)
    assert loop.kept() == [0, 1, 2, 3]


def test_an_inner_loop_is_told_and_not_counted(loop):
    loop.every = 100
    outer = sgd(loop.parameters, lr=0.5)
    loop.watch(outer)

    def rounds():
        for _ in range(4):
            before, inner = [p.detach().clone() for p in loop.parameters], sgd(loop.parameters)
            for _ in range(5):
                loop.backward()
                inner.step()
            with torch.no_grad():
                for parameter, old in zip(loop.parameters, before, strict=True):
                    parameter.grad = old - parameter
                    parameter.copy_(old)
            outer.step()
            loop.updated()

    with pytest.warns(RuntimeWarning) as caught:
        rounds()
    assert ["steps after all" in str(warning.message) for warning in caught] == [False, True]
    assert loop.recorder.steps == 4
    assert loop.kept() == [0, 4]


class Sharpness(torch.optim.Optimizer):
    """Perturbs the weights, and takes that back, exactly or but for rounding, before the one that it holds steps."""

    def __init__(self, parameters, exact, **settings):
        super().__init__(parameters, settings)
        self.base_optimizer = torch.optim.SGD(self.param_groups, **settings)
        self.param_groups, self.exact = self.base_optimizer.param_groups, exact

    @torch.no_grad()
    def first_step(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"old": parameter.data.clone(), "by": 0.3 * parameter.grad}
            parameter.add_(self.state[parameter]["by"])

    @torch.no_grad()
    def second_step(self):
        for parameter in self.param_groups[0]["params"]:
            if self.exact:
                parameter.data = self.state[parameter]["old"]
            else:
                parameter.sub_(self.state[parameter]["by"])
        self.base_optimizer.step()

    def step(self, closure):
        self.first_step()
        closure()
        self.second_step()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("which", ["whole", "base"])
@pytest.mark.parametrize("closure", [True, False])
def test_sharpness_aware_steps_are_one_update_each(loop, exact, which, closure):
    optimizer = Sharpness(loop.parameters, exact, lr=0.05)
    loop.watch(optimizer if which == "whole" else optimizer.base_optimizer)
    for _ in range(5):
        loop.backward()
        if closure:
            optimizer.step(loop.backward)
        else:
            optimizer.first_step()
            loop.backward()
            optimizer.second_step()
        loop.updated()
    assert loop.recorder.steps == 5
    assert loop.kept() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("maximize", [True, False])
def test_an_ascent_before_each_update_is_no_update(loop, maximize):
    optimizer, up = sgd(loop.parameters), sgd(loop.parameters, lr=0.2, maximize=maximize)
    loop.watch(optimizer)
    for _ in range(5):
        before = [p.detach().clone() for p in loop.parameters]
        loop.backward()
        up.step()
        loop.backward()
        with torch.no_grad():
            for parameter, old in zip(loop.parameters, before, strict=True):
                parameter.copy_(old)
        optimizer.step()
        loop.updated()
    assert loop.kept() == [0, 1, 2, 3, 4, 5]


def test_skipped_updates_of_a_successor_do_not_count(loop):
    scaler = torch.amp.GradScaler("cpu")
    optimizers = [torch.optim.AdamW(loop.parameters, fused=True) for _ in range(2)]
    loop.watch(optimizers[0])

    def train():
        for optimizer in optimizers:
            for factor in (float("inf"), 1.0, 1.0, float("inf"), 1.0):
                loop.training.model.zero_grad()
                loss = nn.functional.mse_loss(loop.training.model(loop.training.x), loop.training.y)
                scaler.scale(loss * factor).backward()
                scaler.step(optimizer)
                scaler.update()
                if factor == 1:
                    loop.updated()

    with pytest.warns(RuntimeWarning, match="another AdamW"):
        train()
    assert loop.kept() == [0, 1, 2, 3, 4, 5, 6]


def put_best_back(loop):
    loop.training.model.load_state_dict(loop.truth[3])


def put_average_in(loop):
    for parameter in loop.parameters:
        parameter.data.mul_(0.9)  # which no version counter notices


@pytest.mark.parametrize("change", [put_best_back, put_average_in])
@pytest.mark.parametrize("by_hand", [True, False])
def test_weights_put_in_after_the_last_update_are_not_kept_as_its_own(loop, change, by_hand):
    loop.every = 4
    optimizer = sgd(loop.parameters)
    loop.watch(None if by_hand else optimizer)
    for _ in range(6):
        loop.run(optimizer, updates=1)
        if by_hand:
            loop.recorder.step()
    change(loop)
    with pytest.warns(RuntimeWarning, match="after step 6 the weights changed without an update"):
        assert loop.kept() == [0, 4]


def test_the_same_weights_put_back_are_the_last_steps(loop):
    loop.every = 4
    optimizer = sgd(loop.parameters)
    loop.watch(optimizer)
    loop.run(optimizer, updates=6)
    best = copy.deepcopy(loop.training.model.state_dict())
    put_average_in(loop)
    loop.training.model.load_state_dict(best)
    for parameter in loop.parameters:
        parameter.data = parameter.data.clone()  # as when the model moves to another device
    assert loop.kept() == [0, 4, 6]


def test_weights_that_are_clamped_after_each_update_are_the_last_steps(loop):
    loop.every = 100
    optimizer = sgd(loop.parameters)
    loop.watch(optimizer)
    for _ in range(6):
        loop.backward()
        optimizer.step()
        with torch.no_grad():
            loop.parameters[0].clamp_(-0.1, 0.1)
        loop.updated()
    assert loop.kept() == [0, 6]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_updates_by_hand_beside_an_idle_optimizer_are_told_while_they_go_on(loop, monkeypatch):
    monkeypatch.setattr(writer_module, "QUEUE_SECONDS", 0.05)
    loop.watch(sgd(loop.parameters))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def told():
            put_average_in(loop)
            return bool(caught)

        wait_for(told)
        loop.recorder.close()
    assert [
        "the weights change, but no update is seen; give watch()" in str(warning.message) for warning in caught
    ] == [True]


def test_weights_that_come_back_are_no_updates(loop):
    told, moment = [], [0]
    probe = probe_module.WeightProbe(loop.parameters)
    dog = probe_module.Watchdog(probe, lambda: (moment[0], False), 0, lambda *words: told.append(words), False)
    before = loop.copy()
    for _ in range(200):  # an average that validates, and goes
        for weights in (put_average_in, lambda _: loop.training.model.load_state_dict(before)):
            weights(loop)
            dog.look()
    for step in range(200):  # clamped after each update
        moment[0] = step
        for _ in range(3):
            put_average_in(loop)
            dog.look()
    assert not told
    for _ in range(probe_module.LATE):
        put_average_in(loop)
        dog.look()
    assert [kind for kind, _ in told] == ["uncounted"]


def test_a_probe_follows_weights_to_other_memory(loop):
    probe = probe_module.WeightProbe(loop.parameters)
    before = probe.read()
    loop.parameters[0].data = loop.parameters[0].data.clone()
    assert not probe_module.differ(before, probe.read())
    loop.parameters[0].data = loop.parameters[0].data + 1
    assert probe_module.differ(before, probe.read())
    loop.parameters[0].data = torch.empty(0)
    assert probe.read() is None
    assert not probe_module.differ(before, None)
