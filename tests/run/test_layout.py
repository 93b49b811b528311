import pytest
from hypothesis import given
from hypothesis import strategies as st

from groktrace.run import layout

steps = st.integers(0, layout.MAX_STEP)


@given(steps, steps)
def test_names_stand_for_their_step_and_sort_as_steps_do(tmp_path_factory, a, b):
    root = tmp_path_factory.getbasetemp()
    first, second = (layout.snapshot_path(root, step) for step in (a, b))
    assert layout.snapshot_step(first.name) == a
    assert first.parent == root / "weights"
    assert (first.name < second.name) == (a < b)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "1.safetensors",
        "00000000001.safetensors",
        "0000000000001.safetensors",
        "-00000000001.safetensors",
        "+00000000001.safetensors",
        "00000000000a.safetensors",
        "٠٠٠٠٠٠٠٠٠٠٠١.safetensors",
        "000000000001.safetensors\n",
        "000000000001.SAFETENSORS",
        "000000000001.safetensors.bak",
        "000000000001safetensors",
        ".tmp-000000000001.safetensors-1a2b3c4d",
    ],
)
def test_other_names_are_no_snapshots(tmp_path, name):
    assert layout.snapshot_step(name) is None


@pytest.mark.parametrize("step", [-1, layout.MAX_STEP + 1])
def test_steps_out_of_range_have_no_readable_name(tmp_path, step):
    assert layout.snapshot_step(layout.snapshot_path(tmp_path, step).name) is None


def test_steps_come_in_order_and_strangers_are_passed_over(tmp_path):
    assert layout.snapshot_steps(tmp_path) == []
    folder = tmp_path / "weights"
    folder.mkdir()
    assert layout.snapshot_steps(tmp_path) == []
    for step in (1200, 0, layout.MAX_STEP, 30):
        layout.snapshot_path(tmp_path, step).touch()
    for name in ("notes.txt", "7.safetensors", ".tmp-000000000040.safetensors-1a2b3c4d"):
        (folder / name).touch()
    assert layout.snapshot_steps(tmp_path) == [0, 30, 1200, layout.MAX_STEP]


def test_a_file_called_weights_holds_no_snapshots(tmp_path):
    (tmp_path / "weights").touch()
    assert layout.snapshot_steps(tmp_path) == []
