import sys

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset, IterableDataset

import groktrace
from groktrace.run import layout

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from groktrace.recording.transformers import GroktraceCallback  # noqa: E402

# The trainer's own warnings are not this project's.
pytestmark = pytest.mark.filterwarnings("ignore:(?!groktrace)")
FEW = {"chains": 1, "burn_in": 4, "draws": 8}


@pytest.fixture(autouse=True)
def program():
    """The real one, not the stand-in of the neighbouring tests."""


class Sentences(Dataset):
    def __init__(self):
        self.tokens = torch.randint(0, 9, (20, 6), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


class Streamed(IterableDataset):
    def __iter__(self):
        while True:
            yield from Sentences()


def train(folder, *callbacks, resume=False, kind=transformers.Trainer, dataset=Sentences, **settings):
    """Seven updates of a small GPT-2; returns the trainer."""
    transformers.set_seed(0)
    size = {"vocab_size": 9, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    collator = settings.pop("data_collator", None)
    settings = {"max_steps": 7, "save_strategy": "no", "per_device_train_batch_size": 5} | settings
    arguments = transformers.TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.01, **settings
    )
    data = {"train_dataset": dataset(), "eval_dataset": Sentences(), "data_collator": collator}
    trainer = kind(model, arguments, **data, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def own_loss(model, part=slice(None)):
    tokens = Sentences().tokens[part]
    logits = model.eval()(tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def test_the_trainers_own_data_and_loss(tmp_path):
    alone = train(tmp_path / "alone").model
    after = torch.get_rng_state()
    callback = GroktraceCallback(every=2)
    model = train(tmp_path / "here", callback, logging_steps=2).model
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.parameters(), strict=True))
    assert "closed: 7 steps, 5 snapshots" in repr(callback.recorder)
    run = groktrace.open_run(tmp_path / "here" / "snapshots")
    assert run.doubts == ()
    assert [snapshot.step for snapshot in run.snapshots] == [0, 2, 4, 6, 7]
    assert [snapshot.metrics().get("epoch") for snapshot in run.snapshots] == [None, 0.5, 1.0, 1.5, None]
    assert run.snapshots[1].metrics()["loss"] > 1
    trajectory = groktrace.analyze(run, **FEW)
    assert trajectory.points[-1].train_loss == pytest.approx(own_loss(model), rel=1e-5)


def test_a_stream(tmp_path):
    callback = GroktraceCallback(every=7, n=20)
    model = train(tmp_path / "run", callback, dataset=Streamed).model
    alone = train(tmp_path / "alone", dataset=Streamed).model
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.parameters(), strict=True))
    trajectory = groktrace.analyze(callback.recorder.out, **FEW)
    assert trajectory.n == 20
    assert trajectory.points[-1].train_loss == pytest.approx(own_loss(model), rel=1e-5)
    refused = r"trainer's own data and loss cannot be used \(train: the stream does not end .* give n="
    with pytest.warns(RuntimeWarning, match=refused):
        train(tmp_path / "weights", GroktraceCallback(every=2), dataset=Streamed)


def test_validation_data_that_the_user_gives(tmp_path):
    held_out = torch.utils.data.Subset(Sentences(), range(5))
    callback = GroktraceCallback(every=7, val=DataLoader(held_out, batch_size=2))
    model = train(tmp_path, callback).model
    points = groktrace.analyze(callback.recorder.out, **FEW).points
    assert points[-1].val_loss == pytest.approx(own_loss(model, slice(5)), rel=1e-5)


def test_a_validation_set_is_collated_as_the_training_set(tmp_path):
    class Named(Sentences):
        def __getitem__(self, i):
            return {"input_ids": self.tokens[i], "label_ids": self.tokens[i]}  # the trainer's collator renames them

    callback = GroktraceCallback(every=7, val=torch.utils.data.Subset(Named(), range(5)))
    settings = {"remove_unused_columns": False, "data_collator": transformers.default_data_collator}
    model = train(tmp_path, callback, dataset=Named, **settings).model
    points = groktrace.analyze(callback.recorder.out, **FEW).points
    assert points[-1].val_loss == pytest.approx(own_loss(model, slice(5)), rel=1e-5)


def test_a_training_that_is_resumed_goes_on_counting(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, GroktraceCallback(every=2), max_steps=4, **settings)
    with pytest.raises(groktrace.GroktraceError, match=r"holds a recording up to step 4\. To continue"):
        train(tmp_path, GroktraceCallback(every=2, if_exists="error"), **settings)
    train(tmp_path, GroktraceCallback(every=2), resume=True, **settings)
    assert layout.snapshot_steps(tmp_path / "snapshots") == [0, 2, 4, 6, 7]


def test_the_last_step_is_kept_and_not_the_best(tmp_path):
    best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 4}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    after_steps = {}

    class Noting(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            after_steps[state.global_step] = [value.clone() for _, value in model.named_parameters()]

    trainer = train(tmp_path, Noting(), GroktraceCallback(every=3), **best)
    assert trainer.state.best_global_step == 2
    weights = groktrace.open_run(tmp_path / "snapshots").snapshots[-1].load()
    kept = [weights[name] for name, _ in trainer.model.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(kept, after_steps[4], strict=True))
    assert not torch.equal(kept[0], after_steps[2][0])


def test_accumulated_gradients_and_ends_of_epochs(tmp_path):
    callback = GroktraceCallback(every=1, out=tmp_path / "run")
    train(tmp_path / "trainer", callback, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=2)
    assert layout.snapshot_steps(tmp_path / "run") == [0, 1, 2, 3, 4]


def test_a_loss_that_the_model_does_not_compute(tmp_path):
    class Unlabelled(Sentences):
        def __getitem__(self, i):
            return {"input_ids": self.tokens[i]}

    given = {"train": Unlabelled()}
    with pytest.raises(groktrace.GroktraceError, match="expected one number"):
        train(tmp_path / "a", GroktraceCallback(**given))

    def loss(model, batch):
        return own_logits_loss(model(**batch).logits, batch["input_ids"])

    def own_logits_loss(logits, tokens):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    model = train(tmp_path / "b", GroktraceCallback(batch_loss=loss, every=7, **given)).model
    trajectory = groktrace.analyze(tmp_path / "b" / "snapshots", **FEW)
    assert trajectory.points[-1].train_loss == pytest.approx(own_loss(model), rel=1e-5)


def analysed_loss(folder, trainer):
    """The last loss on training and validation data as analysed, and live."""
    point = groktrace.analyze(folder / "snapshots", **FEW).points[-1]
    tokens = Sentences().tokens
    trainer.model.eval()
    with torch.no_grad():
        live = trainer.compute_loss(trainer.model, {"input_ids": tokens, "labels": tokens})
    return point.train_loss, point.val_loss, float(live)


def tripled(outputs, labels, num_items_in_batch=None):
    return 3 * F.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class OwnLoss(transformers.Trainer):
    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls = self.calls + 1
        outputs = model(**inputs)
        self.log({"size": 1.0})
        loss = outputs.loss + 0.1 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    "trained",
    [
        {"label_smoothing_factor": 0.2},
        {"kind": lambda *given, **named: transformers.Trainer(*given, compute_loss_func=tripled, **named)},
        {"kind": OwnLoss},
    ],
    ids=["label smoothing", "compute_loss_func", "compute_loss"],
)
def test_the_loss_that_the_trainer_computes(tmp_path, trained):
    trainer = train(tmp_path, GroktraceCallback(every=4), **trained)
    if isinstance(trainer, OwnLoss):
        assert trainer.calls == 7
        assert sum("size" in entry for entry in trainer.state.log_history) == 7
    on_train, on_val, live = analysed_loss(tmp_path, trainer)
    assert on_train == pytest.approx(live, rel=1e-5)
    assert on_val == pytest.approx(live, rel=1e-5)
    assert live != pytest.approx(own_loss(trainer.model), rel=1e-4)


def test_without_transformers_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "groktrace.recording.transformers")
    with pytest.raises(ImportError, match=r"pip install 'groktrace\[transformers\]'"):
        import groktrace.recording.transformers  # noqa: F401
