import pytest
import torch
from torch import nn

import groktrace
from groktrace.importing.contents import CheckpointError, flatten
from groktrace.importing.names import Wanted, match_names
from groktrace.importing.network import prepare_network
from groktrace.run.info import WeightSpec

MODEL = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "2.weight": torch.ones(1, 3)}


def wanted(aliases=None, optional=(), known=(), ignored=()):
    specs = {name: WeightSpec(tuple(tensor.shape), tensor.dtype, True) for name, tensor in MODEL.items()}
    return Wanted(specs, aliases or {}, frozenset(optional), frozenset(known), tuple(ignored))


def match(content, key=None, **more):
    return match_names(flatten(content, "file"), wanted(**more), key, "file")


def named(prefix, tensors=MODEL):
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("content", "prefix", "beside"),
    [
        (MODEL, "", 0),
        ({"model": MODEL, "optimizer": {"state": {0: {"exp_avg": torch.ones(3, 2)}}}, "step": 2}, "model.", 0),
        ({"state": {"net": named("module.")}}, "state.net.module.", 0),
        (named("module._orig_mod.model."), "module._orig_mod.model.", 0),
        ({"state_dict": {**named("net."), "accuracy.tp": torch.ones(3)}}, "state_dict.net.", 1),
        (named("a.b."), "a.b.", 0),
        ({"n_averaged": torch.ones(()), **named("module.")}, "module.", 1),
        ([MODEL, 3], "0.", 0),
    ],
)
def test_what_names_begin_with_is_found(content, prefix, beside):
    found = match(content)
    assert (found.prefix, found.beside) == (prefix, beside)
    assert {name: each[0].shape for name, each in found.tensors.items()} == {
        n: tuple(t.shape) for n, t in MODEL.items()
    }
    assert found.exact == (content is MODEL)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_within_names(wrapper):
    content = {name.replace(".", f".{wrapper}.", 1): tensor for name, tensor in MODEL.items()}
    found = match({"model": content})
    assert set(found.tensors) == set(MODEL)
    assert not found.exact


def test_several_places():
    content = {"model": MODEL, "ema": MODEL}
    with pytest.raises(
        CheckpointError, match="file: has weights of the model under 'model' and 'ema'; say by --key which"
    ):
        match(content)
    assert match(content, key="ema").prefix == "ema."
    with pytest.raises(CheckpointError, match=r"under 'best'; it holds 'model.0.weight', .*, the model has '0.weight'"):
        match(content, key="best")


def test_the_whole_of_a_dict_comes_before_a_part():
    part = {**named("encoder."), "head": torch.ones(2)}
    assert match({"whole": MODEL, "wrapped": part}).prefix == "whole."


def test_what_does_not_fit_is_named():
    lacking = {name: tensor for name, tensor in MODEL.items() if name != "0.bias"}
    with pytest.raises(
        CheckpointError, match=r"file: does not fit the model \(names after 'net.'\): it lacks '0.bias'\."
    ):
        match({"net": lacking})
    with pytest.raises(CheckpointError, match=r"the model lacks '4.weight', '4.bias'\. Have the task make the network"):
        match({**MODEL, "4.weight": torch.ones(2), "4.bias": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"'0.bias' is float32\[3\] in the model, float32\[4\] in the checkpoint"):
        match({**MODEL, "0.bias": torch.ones(4)})
    with pytest.raises(
        CheckpointError, match=r"'0.bias' is float32\[3\] in the model, complex64\[3\] in the checkpoint"
    ):
        match({**MODEL, "0.bias": torch.ones(3, dtype=torch.complex64)})
    with pytest.raises(CheckpointError, match=r"it lacks '0.bias'"):
        match({**MODEL, "0.bias": torch.ones(3).to_sparse()})
    with pytest.raises(CheckpointError, match=r"it holds no tensors, the model has '0.weight'"):
        match({"step": 3})
    many = {f"x{i}": torch.ones(1) for i in range(9)}
    with pytest.raises(CheckpointError, match=r"it holds 'x0', 'x1', 'x2', 'x3', 'x4' and 4 more, the model has"):
        match(many)


def test_what_need_not_fit():
    assert set(match({k: v for k, v in MODEL.items() if k != "0.bias"}, optional=["0.bias"]).tensors) == {
        "0.weight",
        "2.weight",
    }
    assert match({**MODEL, "metric.tp": torch.ones(1)}, known=["metric.tp"]).prefix == ""
    assert match({**MODEL, "attn.masked_bias": torch.ones(1)}, ignored=[r"attn\.masked_bias"]).prefix == ""
    assert not match({n: t.half() for n, t in MODEL.items()}).exact


def test_tied_tensors_by_either_name():
    for content in (
        {**MODEL, "tied": MODEL["2.weight"]},
        {"0.weight": MODEL["0.weight"], "0.bias": MODEL["0.bias"], "tied": MODEL["2.weight"]},
    ):
        found = match(content, aliases={"tied": "2.weight"})
        assert len(found.tensors["2.weight"]) == ("2.weight" in content) + 1


class Tables(nn.Module):
    """A network with a buffer that no state dict has, and a layer that does not train."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)
        self.first.requires_grad_(False)
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)

    def forward(self, x):
        return self.second(self.scale * self.first(x))


def test_a_network_as_the_hook_describes_it(tmp_path):
    x, y = torch.randn(8, 2), torch.randn(8, 2)
    network = prepare_network(groktrace.Task.from_model(nn.DataParallel(Tables()), train=(x, y), loss="mse"))
    assert network.wanted.optional == {"scale"}
    assert network.frozen == {"first.weight", "first.bias"}
    trained = Tables().half()
    contents = flatten(trained.state_dict(), tmp_path)
    tensors = network.read(match_names(contents, network.wanted, None, "file"), "file")
    assert tensors["scale"].tolist() == [2, 2, 2]
    assert torch.equal(tensors["first.weight"], trained.first.weight.float())
    assert tensors["first.weight"].dtype == torch.float32


def test_a_task_needs_a_model_and_data():
    task = groktrace.Task.from_model(nn.Linear(2, 2), loss="mse")
    with pytest.raises(groktrace.GroktraceError, match="no checkpoint holds; got one without data"):
        prepare_network(task)
    task = groktrace.Task.from_model(nn.Linear(2, 2), train=(torch.randn(3, 2), torch.randn(3, 2)), loss="mse")
    own = groktrace.Task(task.forward, task.train, None, 3, False)
    with pytest.raises(groktrace.GroktraceError, match="no checkpoint holds; got one without a model"):
        prepare_network(own)
