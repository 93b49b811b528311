import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groktrace.errors import TaskError
from groktrace.run.batch import Batch, check_lengths, flatten, unflatten

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)

nestings = st.recursive(
    st.integers(0, 9).map(lambda value: torch.full((2,), value)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | st.sampled_from(["tuple", "list", "dict", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["tuple", "list", "dict"]), inner),
    max_leaves=8,
)


def same(left, right):
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if type(left) is not type(right) or len(left) != len(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return all(same(a, b) for a, b in zip(left, right, strict=True))


@given(nestings)
def test_flatten_and_unflatten_are_inverse(data):
    tensors, structure = flatten(data)
    assert same(unflatten(structure, tensors), data)


@given(json_values)
def test_a_random_structure_is_refused_or_is_one_that_flatten_makes(structure):
    tensors = [torch.full((1,), i) for i in range(3)]
    with contextlib.suppress(TaskError):
        data = unflatten(structure, tensors)
        assert all(any(leaf is tensor for tensor in tensors) for leaf in flatten(data)[0])


@pytest.mark.parametrize(
    "structure",
    [
        2,
        -1,
        True,
        0.0,
        "0",
        None,
        [0, 1],
        {},
        {"tuple": 0},
        {"tuple": {"0": 0}},
        {"tuple": [0], "list": [1]},
        {"dict": [0]},
        {"dict": {"a": 2}},
        {"set": [0]},
        {"list": [0, {"tuple": [None]}]},
    ],
)
def test_damaged_structures_are_refused(structure):
    with pytest.raises(TaskError, match="data: the recorded nesting is damaged; it does not fit"):
        unflatten(structure, [X, Y])


@pytest.mark.parametrize(
    ("data", "named"), [(3, "int"), ((X, None), "NoneType"), ({"a": X.numpy()}, "ndarray"), ({1: X}, "dict")]
)
def test_flatten_refuses_what_is_no_tensor(data, named):
    with pytest.raises(TaskError, match=f"data: expected tensors in tuples, lists or dicts, got {named}"):
        flatten(data)


def test_a_batch_takes_and_moves_all_its_tensors():
    batch = Batch((X, Y), {"dict": {"x": 0, "y": 1}})
    assert len(batch) == 10
    assert same(batch.take(torch.tensor([3, 1])).nested(), {"x": X[[3, 1]], "y": Y[[3, 1]]})
    assert same(batch.take(slice(0, 2)).nested(), {"x": X[:2], "y": Y[:2]})
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in moved.tensors} == {"meta"}
    assert moved.structure == batch.structure


def test_check_lengths_counts():
    assert check_lengths([X, Y], "train") == 10
