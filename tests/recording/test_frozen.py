import pytest
import torch

from groktrace.recording import frozen as module
from groktrace.recording.frozen import FrozenTensors

LARGE = module.WHOLE_BYTES // 4 + 17


def tensors(**more):
    generator = torch.Generator().manual_seed(0)
    return {
        "small": torch.randn(3, 4, generator=generator),
        "scalar": torch.tensor(2.0),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "turned": torch.randn(4, 3, generator=generator).t(),
        "nothing": torch.empty(0, 2),
        "large": torch.randn(LARGE, generator=generator),
        "grid": torch.randn(256, 256, generator=generator).t()[::2],
        **more,
    }


def test_what_nobody_writes_to_stays():
    kept = tensors(nan=torch.full((3,), float("nan")))
    frozen = FrozenTensors(kept, 0)
    for step in range(1, 6):
        assert not frozen.compare(kept, step)
        copies = {name: tensor.clone() for name, tensor in kept.items()}  # elsewhere, but the same
        assert not frozen.compare(copies, step)
    assert not frozen.compare(kept, 6, whole=True)
    assert frozen.names == kept.keys()


@pytest.mark.parametrize("name", ["small", "scalar", "half", "turned", "large", "grid"])
@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.mul_(0.99),
        lambda t: t.data.mul_(0.99),
        lambda t: t.data.copy_(t * 1.01),
        lambda t: t.detach().numpy().__imul__(2) if t.dtype == torch.float32 else t.data.mul_(2),
    ],
    ids=["in place", "data", "copied", "numpy"],
)
def test_a_write_by_any_route_is_seen_at_once(name, write):
    kept = tensors()
    frozen = FrozenTensors(kept, 0)
    assert not frozen.compare(kept, 1)
    write(kept[name])
    assert frozen.compare(kept, 2) == {name: 2}
    assert frozen.names == kept.keys() - {name}
    assert not frozen.compare(kept, 3)


def test_one_element_of_a_large_tensor_is_found_in_turn_with_the_steps_it_may_have_been_wrong_in():
    kept = tensors()
    frozen = FrozenTensors(kept, 0)
    place = 1  # not among those that are looked at each time
    kept["large"].data[place] += 1
    kept["grid"].data[1, 1] += 1
    found = frozen.compare(kept, 1) | frozen.compare(kept, 2)
    assert found == {"large": 0, "grid": 0}


def test_at_the_end_everything_is_compared():
    kept = {f"large{i}": torch.randn(LARGE) for i in range(4)}
    frozen = FrozenTensors(kept, 0)
    assert not frozen.compare(kept, 5)  # the first is known until here
    kept["large0"].data[1] += 1
    kept["large3"].data[1] += 1
    assert frozen.compare(kept, 9, whole=True) == {"large0": 5, "large3": 0}


def test_a_write_that_leaves_a_mark_is_looked_into():
    kept = {"a": torch.randn(LARGE), "b": torch.randn(LARGE)}
    frozen = FrozenTensors(kept, 0)
    kept["b"].mul_(1.0)
    assert not frozen.compare(kept, 1)
    kept["b"][1] += 1
    assert frozen.compare(kept, 2) == {"b": 2}


def test_large_tensors_are_looked_at_in_few_places():
    assert all(module._probe(tensors()[name]).numel() <= 8 * module.SAMPLE for name in ("large", "grid"))
    assert all(module._probe(tensors()[name]).numel() >= module.SAMPLE for name in ("large", "grid"))
    # With a power of two a row, more than one column is met with.
    grid = torch.arange(2.0**17).view(256, 512)
    assert len((module._spread(grid) % 512).unique()) > 100
