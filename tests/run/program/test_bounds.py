import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groktrace.errors import TaskError
from groktrace.run.program import Program, bounds

W, X = {"ref": 0}, {"ref": 1}


def node(target, *args):
    return {"target": target, "args": list(args), "kwargs": {}}


def last(nodes):
    return {"ref": 1 + len(nodes)}


def doubled(target, times):
    """A tensor joined with itself, again and again."""
    nodes = [node(target, [X, X])]
    for _ in range(times):
        nodes.append(node(target, [last(nodes), last(nodes)]))
    return nodes


def evaluate(nodes, samples=4):
    nodes = [*nodes, node("aten.sum.default", last(nodes))]
    inputs = [{"weight": "w", "dtype": "float32"}, {"data": 0}]
    document = {"format": 1, "static_batch": None, "data": 1, "inputs": inputs, "nodes": nodes}
    program = Program.from_json({**document, "outputs": [1 + len(nodes), None]}, {}, "program.json")
    return program.forward({"w": torch.ones(3)}, [torch.ones(samples, 3)])[0]


@pytest.mark.parametrize("target", ["aten.cat.default", "aten.stack.default"])
def test_doubling_a_hundred_times_is_refused_before_it_is_done(target):
    resource = pytest.importorskip("resource")
    assert evaluate(doubled(target, 5)) == 12 * 64
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TaskError, match=rf"asks for .* GiB at {target}.* this machine's memory"):
        evaluate(doubled(target, 60))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB, PyTorch's own modules among them


def test_what_is_inside_of_an_operation_counts(monkeypatch):
    monkeypatch.setattr(bounds, "memory_limit", lambda device: 10**6)
    few = [node("aten.unsqueeze.default", X, 0)]
    attention = [*few, node("aten.scaled_dot_product_attention.default", last(few), last(few), last(few))]
    assert evaluate(attention) == 12
    with pytest.raises(TaskError, match=r"asks for .* at aten.scaled_dot_product_attention.default"):
        evaluate(attention, samples=1000)  # whose result is small, but not the million pairs that it looks at


def test_values_that_are_dead_count_no_more(monkeypatch):
    monkeypatch.setattr(bounds, "memory_limit", lambda device: 3 * 4 * 12_000)
    nodes = [node("aten.tanh.default", X)]
    for _ in range(20):
        nodes.append(node("aten.tanh.default", last(nodes)))
    assert evaluate(nodes, samples=4000).isfinite()


def test_work_without_memory_is_refused(monkeypatch):
    monkeypatch.setitem(bounds.MAX_WORK, "cpu", 10**7)
    with pytest.raises(TaskError, match=r"takes more than 1e\+07 operations, at aten.sum.default"):
        evaluate([node("aten.expand.default", W, [2**10, 2**10, 3])])
    product = [node("aten.mm.default", {"ref": 2}, X)]
    with pytest.raises(TaskError, match=r"takes more than 1e\+07 operations, at aten.mm.default"):
        evaluate([node("aten.t.default", X), *product], samples=2 * 10**6)


def test_factories_count_and_make_nothing(monkeypatch):
    monkeypatch.setattr(bounds, "memory_limit", lambda device: 10**6)
    with pytest.raises(TaskError, match=r"asks for .* at aten.zeros.default"):
        evaluate([node("aten.zeros.default", [2**20])])


def test_a_limit_of_the_process_is_a_limit_of_the_memory(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**24, -1))
    assert bounds.memory_limit(torch.device("cpu")) == 2**23


@pytest.mark.parametrize("target", ["aten.tanh.default", "aten.argmax.default"])
def test_a_loss_that_is_no_real_number_is_refused(target):
    inputs = [{"weight": "w", "dtype": "float32"}, {"data": 0}]
    document = {"format": 1, "static_batch": None, "data": 1, "inputs": inputs, "nodes": [node(target, X)]}
    program = Program.from_json({**document, "outputs": [2, None]}, {}, "program.json")
    with pytest.raises(TaskError, match="gives no loss: expected one real number, got a torch"):
        program.forward({"w": torch.ones(3)}, [torch.ones(4, 3)])


def test_what_depends_on_values_is_counted_as_it_goes(monkeypatch):
    monkeypatch.setattr(bounds, "memory_limit", lambda device: 10**6)
    mask = [node("aten.gt.Scalar", X, 0), node("aten.index.Tensor", X, [{"ref": 2}])]
    assert evaluate(mask) == 12
    grown = list(mask)
    for _ in range(20):
        grown.append(node("aten.cat.default", [last(grown), last(grown)]))
    with pytest.raises(TaskError, match=r"asks for .* at aten.cat.default"):
        evaluate(grown)


@pytest.mark.parametrize(
    ("target", "count"),
    [("aten.bincount.default", 1), ("aten.repeat_interleave.self_Tensor", 2)],
)
def test_values_that_are_sizes_are_looked_at(target, count):
    nodes = [node("aten.full.default", [2], 2**40), node("aten.to.dtype", {"ref": 2}, {"dtype": "int64"})]
    nodes.append(node(target, *([{"ref": 3}] * count)))
    with pytest.raises(TaskError, match=rf"calls {target} for an absurd size"):
        evaluate(nodes)


def test_small_programs_do_not_wait_for_the_compiler():
    code = (
        "import sys, torch; sys.path.insert(0, 'tests/run/program'); import test_bounds as t; "
        "t.evaluate(t.doubled('aten.cat.default', 5)); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
