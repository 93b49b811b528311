"""A training that goes on, but is numbered from 0 again, is told of."""

import copy
import warnings

import pytest
import torch

from groktrace.recording.folder import LAST
from groktrace.recording.watch import watch
from groktrace.run import layout
from groktrace.run.store import open_run


def begun(training, root, **settings):
    """Begin a recording and end it; where it is, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder = watch(training.model, training.optimizer, **training.data, out=root, every=2, **settings)
    recorder.close()
    return recorder.out, [str(warning.message) for warning in caught]


def loaded(make_training, state, **settings):
    """A training that begins with weights that another has had."""
    training = make_training(**settings)
    training.model.load_state_dict(state)
    return training


@pytest.fixture
def recorded(make_training, root):
    """A training of five updates without a count of its own, recorded."""
    training = make_training()
    training.record(root, 5)
    return training


def test_the_weights_of_a_run_that_are_numbered_from_0_again_are_told(make_training, recorded, root):
    training = loaded(make_training, recorded.model.state_dict())
    out, (said,) = begun(training, root)
    assert out == root.with_name("run-2")
    assert said == (
        f"groktrace: watch: these are the weights of step 5 of the run in '{root}', but nothing tells how many updates "
        f"were made, so that this recording begins at 0, in '{out}'; pass start_step=5 to go on with that run."
    )
    (doubt,) = open_run(out).doubts  # which the analysis repeats
    assert doubt.startswith("step 0: watch: these are the weights of step 5")


def test_it_goes_on_as_the_warning_says(make_training, recorded, root):
    training = loaded(make_training, recorded.model.state_dict())
    recorder = training.record(root, 3, start_step=5)
    assert recorder.out == root
    assert layout.snapshot_steps(root) == [0, 2, 4, 5, 6, 8]
    assert open_run(root).doubts == ()


def test_an_earlier_step_and_a_later_run_are_found(make_training, recorded, root):
    fourth = open_run(root).snapshots[2].load()
    _, (said,) = begun(loaded(make_training, fourth), root)
    assert f"step 4 of the run in '{root}'" in said
    with pytest.warns(RuntimeWarning, match="these are the weights of step 5"):
        second = loaded(make_training, recorded.model.state_dict()).record(root, 3).out
    _, (said,) = begun(loaded(make_training, open_run(second).snapshots[-1].load()), root)
    assert f"step 3 of the run in '{second}'" in said


def test_only_the_last_steps_are_looked_at(make_training, root):
    make_training().record(root, 2 * LAST + 2)
    third, fourth = (open_run(root).snapshots[at].load() for at in (1, 2))
    assert begun(loaded(make_training, third), root)[1] == []
    assert len(begun(loaded(make_training, fourth), root)[1]) == 1


def test_weights_that_begin_anew_are_no_news(make_training, root):
    make_training().record(root, 5)
    assert begun(make_training(), root)[1] == []


def test_weights_that_had_not_moved_are_no_news(make_training, root):
    still = make_training(lr=0.0)  # as where the learning rate begins at 0
    still.record(root, 5)
    assert begun(make_training(), root)[1] == []


def test_who_says_the_number_is_told_nothing(make_training, recorded, root):
    out, said = begun(loaded(make_training, recorded.model.state_dict()), root, start_step=0)
    assert (out, said) == (root.with_name("run-2"), [])


def test_of_snapshots_that_cannot_be_read_nothing_is_said(make_training, recorded, root):
    for snapshot in (root / layout.WEIGHTS_FOLDER).iterdir():
        snapshot.write_bytes(b"no tensors")
    assert begun(loaded(make_training, recorded.model.state_dict()), root)[1] == []


def late(make_training, root, updates=2, make=torch.optim.Adam, **settings):
    """Load the optimizer's state after `watch`; the run, and what was warned of from then on."""
    before = make_training(make)
    before.update(3)
    training = loaded(make_training, before.model.state_dict(), make=make)
    recorder = watch(training.model, training.optimizer, **training.data, out=root, every=1, **settings)
    training.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.update(updates)
    recorder.close()
    return open_run(root), [str(warning.message) for warning in caught]


def test_a_state_that_is_loaded_after_watch_is_told_once(make_training, root):
    run, (said,) = late(make_training, root)
    assert "the optimizer has made 3 updates, and this recording counts 0: it was loaded after watch()" in said
    assert said.endswith("or pass start_step=3.")
    assert [snapshot.step for snapshot in run.snapshots] == [0, 1, 2]
    (doubt,) = run.doubts  # which the analysis repeats
    assert doubt.startswith("step 0: the optimizer has made 3 updates")


@pytest.mark.parametrize("start", [3, 1000])
def test_a_state_that_is_loaded_later_is_as_was_said(make_training, root, start):
    run, said = late(make_training, root, start_step=start)
    assert (said, run.doubts) == ([], ())
    assert [snapshot.step for snapshot in run.snapshots] == [start, start + 1, start + 2]


def test_a_state_without_a_count_says_nothing(make_training, root):
    run, said = late(make_training, root, make=torch.optim.SGD)
    assert (said, run.doubts) == ([], ())


def test_a_count_that_cannot_be_read_breaks_nothing(training, root):
    with watch(training.model, training.optimizer, out=root, every=1) as recorder:
        training.optimizer.state[training.model[0].weight]["step"] = torch.zeros(2)  # of no use as a number
        training.update(2)
        assert recorder.steps == 2


def test_one_that_was_attached_and_then_loaded_is_told(make_training, root):
    before, training = make_training(torch.optim.Adam), make_training(torch.optim.Adam)
    before.update(3)
    recorder = watch(training.model, out=root, every=1)
    recorder.attach(training.optimizer)
    training.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))
    with pytest.warns(RuntimeWarning, match="has made 3 updates, and this recording counts 0"):
        training.update(1)
    recorder.close()
