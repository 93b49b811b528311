import json

import pytest
import torch
from torch import nn

import groktrace
from groktrace.errors import SettingsError
from groktrace.recording.watch import watch
from groktrace.run import layout
from groktrace.run.store import open_run


@pytest.fixture(autouse=True)
def program():
    """The real one, not the stand-in of the neighbouring tests."""


def kept(folder):
    return {snapshot.step: snapshot.load() for snapshot in open_run(folder).snapshots}


class Trainer:
    """A loop that makes its own optimizer, and tells of it."""

    def __init__(self, training, only=None):
        self.training, self.only = training, only

    def run(self, updates, made=lambda optimizer: None):
        parameters = self.training.model.parameters() if self.only is None else self.only.parameters()
        self.training.optimizer = torch.optim.Adam(parameters, lr=0.01)
        made(self.training.optimizer)
        self.training.update(updates)


def test_an_optimizer_made_later_is_recorded_as_one_given(make_training, tmp_path):
    late, given, alone = (
        make_training(torch.optim.Adam, lr=0.01),
        make_training(torch.optim.Adam, lr=0.01),
        make_training(),
    )
    with watch(late.model, **late.data, out=tmp_path / "late", every=2) as recorder:
        Trainer(late).run(5, made=recorder.attach)
        assert recorder.steps == 5
    with watch(given.model, given.optimizer, **given.data, out=tmp_path / "given", every=2):
        given.update(5)
    Trainer(alone).run(5)
    assert all(torch.equal(a, b) for a, b in zip(late.model.parameters(), alone.model.parameters(), strict=True))
    a, b = kept(tmp_path / "late"), kept(tmp_path / "given")
    assert list(a) == list(b) == [0, 2, 4, 5]
    assert all(torch.equal(a[step][name], b[step][name]) for step in a for name in a[step])
    infos = [json.loads((tmp_path / name / layout.RUN_FILE).read_text()) for name in ("late", "given")]
    assert infos[0]["optimizer"] == infos[1]["optimizer"] is not None
    few = {"chains": 1, "burn_in": 4, "draws": 8}
    one, other = (groktrace.analyze(tmp_path / name, **few) for name in ("late", "given"))
    assert [point.train_loss for point in one.points] == [point.train_loss for point in other.points]
    assert not late.optimizer._optimizer_step_post_hooks


def test_what_it_does_not_hold_does_not_train(training, tmp_path):
    head = training.model[2]
    with watch(training.model, **training.data, out=tmp_path / "run", every=1) as recorder:
        Trainer(training, head).run(2, made=recorder.attach)
    specs = open_run(tmp_path / "run").specs
    assert {name for name, spec in specs.items() if spec.trainable} == {"2.weight", "2.bias"}
    assert {point.weights for point in [groktrace.forecast(tmp_path / "run")]} == {10}
    assert all("0.weight" in tensors for tensors in kept(tmp_path / "run").values())


def test_another_one_goes_on_counting(training, tmp_path):
    with watch(training.model, training.optimizer, **training.data, out=tmp_path / "run", every=2) as recorder:
        first = training.optimizer
        training.update(3)
        trainer = Trainer(training, training.model[2])
        trainer.run(3, made=recorder.attach)
        recorder.attach(training.optimizer)  # again: no more than once
        assert recorder.steps == 6
        assert not first._optimizer_step_post_hooks
        assert len(training.optimizer._optimizer_step_post_hooks) == 1
    assert list(kept(tmp_path / "run")) == [0, 2, 4, 6]
    assert all(spec.trainable for spec in open_run(tmp_path / "run").specs.values())


def test_steps_counted_by_hand_go_before(training, tmp_path):
    with watch(training.model, out=tmp_path / "run", every=2) as recorder:
        training.update()
        recorder.step()
        training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
        recorder.attach(training.optimizer)
        training.update(2)
        with pytest.warns(RuntimeWarning, match=r"recorder.step\(\) does nothing where an optimizer's updates are"):
            recorder.step()
    assert list(kept(tmp_path / "run")) == [0, 2, 3]


def test_none_attached_is_told(training, tmp_path):
    recorder = watch(training.model, out=tmp_path / "run", every=1)
    Trainer(training).run(3)
    with pytest.warns(
        RuntimeWarning, match=r"no update was seen; give watch\(\) .* or recorder.attach\(\) one that is"
    ):
        recorder.close()
    assert list(kept(tmp_path / "run")) == [0]


def test_one_that_was_attached_too_late_is_told(make_training, tmp_path):
    training = make_training(torch.optim.Adam)
    with watch(training.model, out=tmp_path / "stepped", every=1) as recorder:
        training.update(3)
        with pytest.warns(RuntimeWarning, match="has made 3 updates already, and 0 are counted; .* start_step=3"):
            recorder.attach(training.optimizer)
    with watch(training.model, out=tmp_path / "changed", every=1, start_step=3) as recorder:
        nn.init.zeros_(training.model[0].weight)
        with pytest.warns(RuntimeWarning, match="the weights have changed since watch"):
            recorder.attach(training.optimizer)
        training.update()
    assert list(kept(tmp_path / "changed")) == [3, 4]


def test_what_cannot_be_attached(training, tmp_path):
    other = nn.Linear(2, 2)
    with watch(training.model, out=tmp_path / "run") as recorder:
        with pytest.raises(SettingsError, match=r"optimizer: expected a torch.optim.Optimizer"):
            recorder.attach("adam")
        with pytest.raises(SettingsError, match="optimizer: holds none of the model's parameters"):
            recorder.attach(torch.optim.SGD(other.parameters()))
    with pytest.warns(RuntimeWarning, match=r"recorder.attach\(\) does nothing after the recording was closed"):
        recorder.attach(training.optimizer)
