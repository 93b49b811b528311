import json

import pytest
import torch
from torch.utils.data import Dataset

import groktrace

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from groktrace.importing import huggingface, plan  # noqa: E402
from groktrace.recording.transformers import GroktraceCallback  # noqa: E402

# The trainer's own warnings are not this project's.
pytestmark = pytest.mark.filterwarnings("ignore:(?!groktrace)")


class Sentences(Dataset):
    def __init__(self):
        self.tokens = torch.randint(0, 9, (20, 6), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def network():
    size = {"vocab_size": 9, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0, use_cache=False)
    )


@pytest.fixture(scope="module")
def task():
    tokens = Sentences().tokens
    data = {"input_ids": tokens, "labels": tokens}
    return groktrace.Task.from_model(
        network(), train=data, val=data, batch_loss=lambda model, batch: model(**batch).loss
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training of six steps, recorded and saved every second, with the final model above."""
    folder = tmp_path_factory.mktemp("trainer")
    transformers.set_seed(0)
    arguments = transformers.TrainingArguments(
        str(folder / "saved"),
        **{"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.01, "logging_steps": 2},
        **{"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 5},
        weight_decay=0.1,
    )
    trainer = transformers.Trainer(
        network(),
        arguments,
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        callbacks=[GroktraceCallback(schedule=[2, 4, 6], out=folder / "hooked")],
    )
    trainer.train()
    trainer.save_model()
    (folder / "hooked" / "weights" / "000000000000.safetensors").unlink()  # which the trainer does not save
    return folder


def test_a_trainers_folder(folder, task, tmp_path, same_analysis):
    planned = plan.plan_import(folder / "saved", task)
    assert [each.source for each in planned.steps] == ["global_step"] * 3
    imported = planned.write(tmp_path / "run")
    assert imported.linked == 3, imported.copied
    same_analysis(folder / "hooked", tmp_path / "run")
    assert imported.run.snapshots[-1].metrics()["loss"] > 1
    assert "lm_head.weight" in imported.run.info["aliases"]


def test_one_folder_and_the_final_model(folder, task, tmp_path):
    run = groktrace.import_checkpoints(folder / "saved" / "checkpoint-4", task=task, out=tmp_path / "run")
    assert [snapshot.step for snapshot in run.snapshots] == [4]
    final = folder / "saved" / "model.safetensors"
    with pytest.raises(groktrace.GroktraceError, match=r"model.safetensors: expected a step in it or in its name"):
        groktrace.import_checkpoints(final, task=task, out=tmp_path / "other")


def test_weights_of_torch_save(folder, task, tmp_path):
    model = network()
    checkpoint = tmp_path / "checkpoint-8"
    checkpoint.mkdir()
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 9, "log_history": "none"}))
    (checkpoint / "optimizer.pt").write_bytes(b"damaged")
    run = groktrace.import_checkpoints(checkpoint, task=task, out=tmp_path / "run")
    assert [snapshot.step for snapshot in run.snapshots] == [9]
    assert torch.equal(run.snapshots[0].load()["transformer.wte.weight"], model.transformer.wte.weight)
    state = model.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, checkpoint / "pytorch_model.bin")
    with pytest.raises(
        groktrace.GroktraceError, match=r"holds two values of 'transformer.wte.weight', which is one tensor"
    ):
        groktrace.import_checkpoints(checkpoint, task=task, out=tmp_path / "other")


def test_what_a_trainer_noted_is_hostile_too(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    for state in (
        {"global_step": None},
        [],
        {"log_history": [3, {"step": 2, "loss": 1.0}, {"loss": "x"}], "global_step": 2},
    ):
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        opened = huggingface.open_folder(tmp_path)
    assert opened.metrics == {"loss": 1.0}
    (tmp_path / "trainer_state.json").write_text('{"global_step": NaN}')
    with pytest.raises(
        groktrace.GroktraceError, match=r"trainer_state.json: not valid JSON \(NaN is no finite number\)"
    ):
        huggingface.open_folder(tmp_path)
    with pytest.raises(groktrace.GroktraceError, match=r"expected one of model.safetensors"):
        huggingface.open_folder(tmp_path.parent)
