"""Parts of tensors: how they are written, cut out and put back."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groktrace.errors import SettingsError
from groktrace.sampling.network import LargeNetwork, _activation_bytes
from groktrace.sampling.parts import Part, cut, parse_part, part_name, part_shape
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.weights import WeightLayout


@st.composite
def written(draw):
    """A shape, a part of it as a person may write it, and what Python makes of the same brackets."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    texts, slices = [], []
    for size in shape[: draw(st.integers(1, len(shape)))]:
        begin = draw(st.integers(0, size - 1))
        end = draw(st.integers(begin + 1, size))
        left, right = ("" if begin == 0 and draw(st.booleans()) else begin), ("" if end == size else end)
        text, found = draw(st.sampled_from([(f"{left}:{right}", slice(begin, end)), (f"{begin}", begin)]))
        pad = " " * draw(st.integers(0, 2))
        texts.append(f"{pad}{text}{pad}")
        slices.append(found if isinstance(found, slice) else slice(found, found + 1))
    return shape, f"a.b[{','.join(texts)}]", tuple(slices)


@given(written())
def test_a_part_is_what_python_takes(case):
    shape, text, slices = case
    name, ranges = parse_part(text)
    part = cut(name, shape, ranges)
    whole = torch.arange(math.prod(shape)).view(shape)
    assert torch.equal(part.of(whole), whole[slices])
    assert part_shape(part, shape) == whole[slices].shape
    put = part.put(whole, -1 - part.of(whole))
    expected = whole.clone()
    expected[slices] = -1 - whole[slices]
    assert torch.equal(put, expected)
    again = part_name(part, shape)
    if part.ranges:
        assert cut(*(lambda found: (found[0], shape, found[1]))(parse_part(again))) == part
    else:
        assert again == "a.b"


@given(st.text(alphabet="W.[]0123456789:, -x", max_size=14))
def test_no_text_is_read_as_anything_else(text):
    found = parse_part(text)
    if found is None:
        return
    name, ranges = found
    inside = [axis.replace(" ", "") for axis in text[len(name) + 1 : -1].split(",")]
    assert name
    assert text.startswith(f"{name}[")
    spelled = [f"{'' if begin is None else begin}:{'' if end is None else end}" for begin, end in ranges]
    bare = [axis if ":" in axis else f"{int(axis)}:{int(axis) + 1}" for axis in inside]
    assert spelled == [re.sub(r"\d+", lambda number: str(int(number[0])), axis) for axis in bare]


@pytest.mark.parametrize(
    "text", ["W", "W[]", "W[-1]", "W[0:4:2]", "W[...]", "W[a]", "[0]", "W[0]x", "W[1.0]", "W[0,]", "W[٣]", "W[0 1]"]
)
def test_what_is_no_part(text):
    assert parse_part(text) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("W[0:5]", "'W' has no 0:5 on axis 0, whose length is 4"),
        ("W[4]", "'W' has no 4:5 on axis 0"),
        ("W[2:2]", "'W' has no 2:2 on axis 0"),
        ("W[3:1]", "'W' has no 3:1 on axis 0"),
        ("W[:, 7]", "'W' has no 7:8 on axis 1, whose length is 6"),
        ("W[0, 0, 0]", r"'W' has 2 axes \(shape \[4, 6\]\), but 3 are given"),
    ],
)
def test_parts_that_a_tensor_does_not_have(text, said):
    name, ranges = parse_part(text)
    with pytest.raises(SettingsError, match=said):
        cut(name, (4, 6), ranges)


@given(st.data())
def test_overlap_is_an_element_in_common(data):
    shape = (5, 4)

    def block():
        begins = [data.draw(st.integers(0, size - 1)) for size in shape]
        ends = [data.draw(st.integers(begin + 1, size)) for begin, size in zip(begins, shape, strict=True)]
        return cut("W", shape, list(zip(begins, ends, strict=True)))

    one, other = block(), block()
    marks = [part.put(torch.zeros(shape), torch.ones(part_shape(part, shape))) for part in (one, other)]
    assert one.overlaps(other) == other.overlaps(one) == bool((marks[0] * marks[1]).any())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_gradients_are_those_of_the_block_alone_stacked_or_large(kind):
    generator = torch.Generator().manual_seed(0)
    part = Part("W", ((1, 3), (0, 2)))
    real = torch.float64 if kind == torch.float64 else torch.float32
    weights = {
        "W": torch.randn(4, 5, generator=generator, dtype=real).to(kind),
        "b": torch.randn(4, generator=generator, dtype=real),
    }
    x, y = torch.randn(7, 5, generator=generator, dtype=real), torch.randn(7, 4, generator=generator, dtype=real)

    def forward(named, tensors):
        matrix = named["W"]
        outputs = tensors[0].to(matrix.dtype) @ matrix.T + named["b"]
        return ((outputs.tanh() - tensors[1]).abs() ** 2).mean(), outputs

    names = ("W[1:3, 0:2]",)
    layout = WeightLayout(names, ((2, 2),), names if kind.is_complex else (), ((names[0], part),))
    split = layout.split(weights)
    assert split["W"] is weights["W"]
    assert torch.equal(split[names[0]], weights["W"][1:3, :2])
    leaves = {name: (tensor.float() if kind == torch.bfloat16 else tensor) for name, tensor in weights.items()}
    leaves["W"] = leaves["W"].clone().requires_grad_()
    expected = torch.autograd.grad(forward(leaves, (x, y))[0], leaves["W"])[0][1:3, :2]
    expected = torch.view_as_real(expected).flatten() if kind.is_complex else expected.flatten()

    fixed = {name: leaves[name].detach()[None] for name in ("W", "b")}
    loss = StackedLoss(layout.joined(forward), layout, (x, y), fixed)
    flat = layout.flatten(split)
    assert flat.shape == (layout.size,) == expected.shape
    assert torch.allclose(loss.gradients(flat[None])[1][0], expected)

    network = LargeNetwork(StackedLoss(layout.joined(forward), layout, (x, y), {}, micro_batch=7), split)
    gradient = torch.zeros_like(flat)
    network.add_gradient(gradient)
    assert torch.allclose(gradient, expected)
    gradient.zero_()
    network.add_gradient(gradient, network.vector())
    assert torch.allclose(gradient, expected)


def test_a_whole_with_its_part_is_no_activation():
    weights = {"W": torch.randn(30, 50)}
    x = torch.randn(7, 50)

    def forward(named, tensors):
        outputs = (tensors[0] @ named["W"].T).tanh() @ named["W"]  # whose gradient needs W
        return outputs.square().mean(), outputs

    part = cut("W", (30, 50), ((1, 3), (0, 2)))
    layouts = [
        WeightLayout(("W[1:3, 0:2]",), ((2, 2),), parts=(("W[1:3, 0:2]", part),)),
        WeightLayout(("W",), ((30, 50),)),
    ]
    found = [
        _activation_bytes(
            LargeNetwork(StackedLoss(layout.joined(forward), layout, (x,), {}, micro_batch=7), layout.split(weights))
        )
        for layout in layouts
    ]
    assert found[0] == found[1] < 30 * 50 * 4
