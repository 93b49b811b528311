import pytest
import torch
from torch import nn

from groktrace.run.views import OverlapError, find_view, find_views


def parameters(**tensors):
    return {name: nn.Parameter(tensor) for name, tensor in tensors.items()}


def memory(*shape):
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


CASES = {
    "itself": (memory(3, 4), lambda w: w),
    "transposed": (memory(3, 4), lambda w: w.t()),
    "other order of three": (memory(2, 3, 4), lambda w: w.permute(2, 0, 1)),
    "first rows": (memory(5, 3), lambda w: w[:2]),
    "last rows, as a vector": (memory(5, 3), lambda w: w[2:].view(-1)),
    "columns": (memory(5, 4), lambda w: w[:, 1:3]),
    "columns, transposed": (memory(5, 4), lambda w: w[:, 1:3].t()),
    "every second": (memory(8), lambda w: w[::2]),
    "one number": (memory(3, 4), lambda w: w[1, 2]),
    "of a base that is transposed": (memory(4, 6).t(), lambda w: w[:, 1:3]),
    "of a base with gaps": (memory(6, 8)[:, ::2], lambda w: w[2:5, 1:3]),
    "diagonal": (memory(4, 4), lambda w: w.diagonal()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_view_follows_from_its_base_at_any_values(case):
    base, cut = CASES[case]
    tensors = parameters(base=base, part=cut(base))
    (name,) = views = find_views(tensors)
    assert (name, views[name].base) == ("part", "base")
    other = torch.randn(base.shape)
    assert torch.equal(views["part"].of(other), cut(other))
    rows = torch.func.vmap(views["part"].of)(torch.stack([other, 2 * other]))
    assert torch.equal(rows[1], cut(2 * other))


def test_the_gradient_of_a_view_reaches_its_base():
    w = nn.Parameter(memory(4, 4))
    (view,) = find_views({"a": w, "b": nn.Parameter(w.detach()[:, 1::2])}).values()
    view.of(w).square().sum().backward()
    expected = torch.zeros(4, 4)
    expected[:, 1::2] = 2 * w.detach()[:, 1::2]
    assert torch.equal(w.grad, expected)


def test_the_largest_is_the_base_and_of_equals_the_first():
    whole = memory(6, 2)
    views = find_views(parameters(top=whole[:3], bottom=whole[3:], whole=whole))
    assert {name: view.base for name, view in views.items()} == {"top": "whole", "bottom": "whole"}
    square = memory(3, 3)
    views = find_views({"kept": square.t(), "b": nn.Parameter(square), "c": nn.Parameter(square.t())}, ["b", "c"])
    assert {name: view.base for name, view in views.items()} == {"kept": "b", "c": "b"}


def test_neighbours_in_one_memory_are_apart():
    flat = memory(24)
    woven = memory(4, 6)
    assert not find_views(parameters(a=flat[:12].view(3, 4), b=flat[12:]))
    assert not find_views(parameters(a=woven[:, ::2], b=woven[:, 1::2]))
    assert not find_views(parameters(a=torch.ones(3), nothing=torch.empty(0, 3), b=torch.ones(3)))
    assert not find_views({"meta": torch.ones(3, device="meta"), "sparse": torch.eye(2).to_sparse()})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": memory(12)[:8], "b": memory(12)[4:]}, None),
        (dict.fromkeys("ab"), "'b' and 'a' share some of their memory, and neither is a part of the other"),
        ({"a": memory(1).expand(5)}, r"elements of 'a' share their memory with one another"),
    ],
)
def test_overlaps_that_nothing_covers_are_refused_where_they_train(tensors, message):
    if None in tensors.values():
        flat = memory(12)
        tensors = {"a": flat[:8], "b": flat[4:]}
    if message is None:  # of memories of their own
        assert not find_views(parameters(**tensors))
        return
    with pytest.raises(OverlapError, match=message):
        find_views(parameters(**tensors))
    assert not find_views(tensors)  # what does not train may overlap as it likes


def test_a_part_that_trains_of_a_whole_that_does_not_is_refused():
    whole = memory(4, 3)
    with pytest.raises(OverlapError, match="'part', which trains, is a part of 'whole', which does not"):
        find_views({"whole": nn.Parameter(whole, requires_grad=False), "part": nn.Parameter(whole[:2])})
    found = find_views({"whole": nn.Parameter(whole, requires_grad=False), "turned": nn.Parameter(whole.t())})
    assert found["turned"].base == "whole"


def test_numbers_of_two_types_in_one_memory_are_refused():
    waves = torch.randn(3, dtype=torch.complex64)
    with pytest.raises(OverlapError, match="share some of their memory"):
        find_views(parameters(waves=waves, pairs=torch.view_as_real(waves)))


def test_a_tensor_that_somebody_holds_is_found_among_bases():
    w = memory(4, 3)
    view = find_view(w[1:3].t(), {"other": torch.ones(4, 3), "w": w})
    assert view.base == "w"
    assert torch.equal(view.of(2 * w), 2 * w[1:3].t())
    assert find_view(torch.ones(3), {"w": w}) is None
