import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groktrace.errors import SettingsError
from groktrace.importing.contents import flatten
from groktrace.importing.steps import Recorded, choose_steps, named_step, recorded_step
from groktrace.run.layout import MAX_STEP


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("runs/model_500.pt", 500),
        ("epoch=9-step=1000.ckpt", 1000),
        ("step_00020000-epoch_00000008-loss_0.05.pt", 20000),
        ("iter0300_of_9.pth.tar", 300),
        ("global_step700", 700),
        ("checkpoint-500", 500),
        ("checkpoint-500/model.safetensors", 500),
        ("step7/pytorch_model.bin.index.json", 7),
        ("v2/final.pt", 2),
        ("weights.0042.safetensors", 42),
        ("Steps 12.pt", 12),
        ("epoch3_loss0.532.pt", 3),
        ("step_1,500,000-of-2.pt", 2),
        ("7_at_1e3.pt", 7),
        ("run3.2/w-0.50.pt", None),
        ("run6/ckpt_10k.pt", None),
        ("run6/step_2M.pt", None),
        ("run6/at_1e3.pt", None),
        ("run6/final.pt", 6),
        ("12kept.pt", 12),
    ],
)
def test_the_step_in_a_name(path, step):
    assert named_step(Path(path)) == step


def test_names_without_a_number(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert named_step(Path("final.pt")) is None
    with pytest.raises(
        SettingsError, match=r"final.pt: expected a step in it or in its name, found none; say by --step-from"
    ):
        choose_steps([Recorded(Path("final.pt"), None, "")], None)


@given(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=40), st.integers(0, MAX_STEP))
def test_any_name_with_a_step(text, step):
    assert named_step(Path("folder", f"{text}step={step}.pt")) == step


@pytest.mark.parametrize(
    ("content", "step", "source"),
    [
        ({"global_step": 7, "step": 3}, 7, "global_step"),
        ({"iter_num": torch.tensor(8)}, 8, "iter_num"),
        ({"step": 5.0, "model": {"step": torch.tensor(1)}}, 5.0, "step"),
        ({"step": "five", "iteration": 4}, 4, "iteration"),
        ({"step": True}, None, ""),
        ({"model": {"step": torch.ones(2)}}, None, ""),
        (
            {"opt": {"state": {0: {"step": torch.tensor(3.0)}, 1: {"step": 9}}, "param_groups": [{"lr": 1}]}},
            9,
            "optimizer state",
        ),
        ({"state": {0: {"step": 3}}}, 3, "optimizer state"),
        ({"opt": {"state": {}, "param_groups": [{"lr": 1}]}}, None, "optimizer without state"),
        ({"opt": {"state": {0: {"momentum_buffer": torch.ones(1)}}, "param_groups": [{"lr": 1}]}}, None, ""),
    ],
)
def test_what_a_checkpoint_says(content, step, source):
    found = recorded_step(Path("a.pt"), flatten(content, Path("a.pt")))
    assert (found.step, found.source) == (step, source)


def test_one_rule_for_all():
    a, b = Path("m_1.pt"), Path("m_2.pt")
    steps, remark = choose_steps([Recorded(b, 20, "step"), Recorded(a, 10.0, "step")], None)
    assert [(each.path, each.step) for each in steps] == [(a, 10), (b, 20)]
    assert remark is None
    steps, remark = choose_steps([Recorded(b, 20, "step"), Recorded(a, None, "")], None)
    assert [(each.path, each.step) for each in steps] == [(a, 1), (b, 2)]
    assert remark == "m_1.pt says nothing of its step, so all are taken from the names."
    steps, _ = choose_steps([Recorded(b, 20, "optimizer state"), Recorded(a, None, "optimizer without state")], None)
    assert [each.step for each in steps] == [0, 20]
    steps, _ = choose_steps([Recorded(b, None, "optimizer without state")], None)
    assert [each.step for each in steps] == [2]


@pytest.mark.parametrize("step", [math.nan, math.inf, -math.inf, -1, -3.0, 2.5, MAX_STEP + 1, 1e300, 10**400])
def test_steps_that_are_none(step):
    with pytest.raises(SettingsError, match=r"a.pt: its step is .* by step, expected a whole number from 0 to"):
        choose_steps([Recorded(Path("a.pt"), step, "step")], None)
    found = recorded_step(Path("a.pt"), flatten({"state": {0: {"step": step}, 1: {"step": 4.0}}}, Path("a.pt")))
    if step > 4 or math.isnan(step):
        with pytest.raises(SettingsError, match=r"by optimizer state, expected a whole number"):
            choose_steps([found], None)


def test_duplicates_are_named():
    found = [Recorded(Path(name), 1000, "global_step") for name in ("last.ckpt", "step=1000.ckpt")]
    with pytest.raises(
        SettingsError, match=r"step=1000.ckpt: is of step 1000 by global_step, and so is last.ckpt; leave one"
    ):
        choose_steps(found, None)


def test_step_from():
    found = [Recorded(Path(f"runs/e{i}/s{10 * i}.pt"), math.nan, "step") for i in (2, 1)]
    for pattern, expected in ((r"s(\d+)", [10, 20]), (r"(?<=/e)\d+", [1, 2]), (r"(?P<step>\d+)\.", [10, 20])):
        assert [each.step for each in choose_steps(found, pattern)[0]] == expected
    for pattern, message in (
        (r"x(\d+)", r"runs/e2/s20.pt: --step-from 'x\(\\d\+\)' finds nothing in it"),
        (r"/e\d", r"finds '/e2', expected a whole number; put \(...\) around the digits"),
        (r"(x)?pt", r"finds 'None|finds '', expected a whole number"),
        (r"(", r"--step-from: no regular expression"),
    ):
        with pytest.raises(SettingsError, match=message):
            choose_steps(found, pattern)
    with pytest.raises(SettingsError, match="its step is -5 by --step-from"):
        choose_steps([Recorded(Path("m_-5.pt"), None, "")], r"_(-\d+)")
