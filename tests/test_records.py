import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groktrace.records import Record, at_most, between, read_record


class Interval(NamedTuple):
    low: float
    high: float | None = None


@dataclass(frozen=True)
class Entry:
    name: Annotated[str, at_most(5)]
    number: float | Literal["all"]
    count: Annotated[int, between(1, 10)] | None = None
    kind: Literal["a", "b"] = "a"
    done: bool = False
    dtype: torch.dtype = torch.float32
    intervals: tuple[Interval, ...] = ()
    shares: dict[str, float | None] | None = None
    rest: Any = None


def test_what_fits_the_annotations_is_read():
    value = {"name": "x\x1b", "number": 3, "count": 2, "kind": "b", "done": True, "dtype": "int64"}
    value |= {"intervals": [{"low": 1.5}, {"low": 1, "high": 2.0}], "shares": {"a\n\r": 0.5, "b": None}, "rest": [{}]}
    expected = Entry("x\N{REPLACEMENT CHARACTER}", 3, 2, "b", True, torch.int64, (Interval(1.5), Interval(1, 2.0)))
    found = read_record(Entry, value)
    assert found == Entry(
        **{**vars(expected), "shares": {"a\n\N{REPLACEMENT CHARACTER}": 0.5, "b": None}, "rest": [{}]}
    )
    assert type(found.number) is int  # numbers stay as they were written
    assert read_record(Entry, {"name": "", "number": "all"}) == Entry("", "all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "^name: expected str, got 3$"),
        ({"name": "abcdef"}, "^name: expected at most 5 letters or entries, got 6$"),
        ({"number": "some"}, r"^number: expected Literal\['all'\], got 'some'$"),
        ({"number": math.nan}, "^number: "),
        ({"number": 10**400}, "^number: "),
        ({"number": True}, "^number: "),
        ({"count": 0}, "^count: expected a number from 1 to 10, got 0$"),
        ({"count": 2.0}, r"^count: expected int, got 2\.0$"),
        ({"count": True}, "^count: expected int, got True$"),
        ({"kind": "c"}, "^kind: "),
        ({"done": 1}, "^done: expected bool, got 1$"),
        ({"done": None}, "^done: expected bool, got None$"),
        ({"dtype": "nn"}, "^dtype: expected dtype, got 'nn'$"),
        ({"intervals": {"low": 1.0}}, "^intervals: "),
        ({"intervals": [{"high": 1.0}]}, "^'low' is missing among low, high$"),
        ({"intervals": [3]}, "^expected an object with low, high, got int$"),
        ({"shares": {"a": "b"}}, "^shares: expected float, got 'b'$"),
        ({"more": 1}, "^'more' is unknown among name, number, "),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        read_record(Entry, {"name": "x", "number": 1.0} | change)


def test_fields_without_a_default_are_required():
    with pytest.raises(ValueError, match="'number' is missing among name, number, count"):
        read_record(Entry, {"name": "x"})
    for value in ([], None, "x"):
        with pytest.raises(ValueError, match=r"expected an object with name, number, .* got (list|NoneType|str)$"):
            read_record(Entry, value)


@dataclass(frozen=True)
class Leaf(Record):
    value: float | None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tree(Record):
    leaves: tuple[Leaf, ...]
    best: Leaf | None = None
    shares: dict[str, float | None] | None = None


@given(st.lists(st.builds(Leaf, st.none() | st.floats(allow_nan=False, allow_infinity=False), st.just(("a", "b")))))
def test_records_come_back_as_they_were(leaves):
    tree = Tree(tuple(leaves), leaves[0] if leaves else None, {"a": 1.0, "b": None})
    assert Tree.from_dict(json.loads(json.dumps(tree.to_dict(), allow_nan=False))) == tree


def test_what_is_not_finite_is_unknown_in_json():
    tree = Tree((Leaf(math.inf, ("a",)),), Leaf(math.nan), {"a": -math.inf})
    unknown = {"value": None, "names": []}
    assert tree.to_dict() == {"leaves": [{**unknown, "names": ["a"]}], "best": unknown, "shares": {"a": None}}
    with pytest.raises(ValueError, match="'value' is missing"):
        Tree.from_dict({"leaves": [{}]})
