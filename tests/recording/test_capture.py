import pytest
import torch
from torch import nn

from groktrace.errors import SettingsError
from groktrace.recording.capture import Capture, describe_weights, find_aliases
from groktrace.run import files
from groktrace.run.live_model import plain_model


class Awkward(nn.Module):
    """Tied, half-precision, 0-d, complex, transposed, empty and frozen tensors, and buffers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.short = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.waves = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.turned = nn.Parameter(torch.randn(3, 7).t())
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("passing", torch.arange(3.0), persistent=False)


class Holding(nn.Module):
    """A module with one buffer."""

    def __init__(self, tensor):
        super().__init__()
        self.register_buffer("tensor", tensor)


def test_awkward_tensors_come_back_through_a_file(tmp_path):
    model = Awkward()
    model.norm(torch.randn(8, 3))
    specs = describe_weights(model)
    files.write_tensors(tmp_path / "w", Capture(model, specs).copy(), {})
    tensors, _ = files.read_tensors(tmp_path / "w")
    other = Awkward()
    state = {k: v for k, v in tensors.items() if k != "passing"}
    state |= {alias: tensors[name] for alias, name in find_aliases(model).items()}
    other.load_state_dict(state, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert tensors["norm.num_batches_tracked"] == 1
    assert torch.equal(tensors["passing"], model.passing)


def test_describes_each_tensor_once():
    specs = describe_weights(Awkward())
    assert "head.weight" not in specs
    assert find_aliases(Awkward()) == {"head.weight": "embedding.weight"}
    assert {name for name, spec in specs.items() if spec.trainable} == {
        *("embedding.weight", "short", "scalar", "waves", "turned", "nothing", "norm.weight", "norm.bias")
    }
    assert specs["scalar"].shape == ()
    assert specs["short"].dtype == torch.bfloat16


def test_compiled_and_parallel_models_keep_the_plain_names():
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert plain_model(compiled) is model
    assert plain_model(nn.DataParallel(model)) is model
    assert plain_model(nn.DataParallel(compiled)) is model
    assert [name for name, _ in compiled.named_parameters()] != list(describe_weights(model))


def test_buffers_are_reused_and_do_not_follow_the_model():
    model = nn.Linear(2, 2)
    capture = Capture(model, describe_weights(model))
    first = capture.copy()["weight"]
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(7)
    assert torch.equal(first, before)
    assert capture.moved()
    assert capture.copy()["weight"] is first
    assert torch.equal(first, model.weight)
    assert not capture.moved()


def test_works_whatever_modes_the_script_is_in():
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        capture = Capture(model, describe_weights(model))
    with torch.device("meta"):
        inner = Capture(model, describe_weights(model))
        assert torch.equal(inner.copy()["weight"].cpu(), model.weight)
    assert torch.equal(capture.copy()["weight"], model.weight)


def test_parameters_may_be_replaced_but_not_reshaped():
    model = nn.Linear(2, 2)
    capture = Capture(model, describe_weights(model))
    model.weight = nn.Parameter(torch.ones(2, 2))
    assert torch.equal(capture.copy()["weight"], torch.ones(2, 2))
    model.weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(SettingsError, match=r"'weight' was torch.float32\[2, 2\] at watch\(\) and is now"):
        capture.copy()
    model.extra = nn.Linear(1, 1)
    with pytest.raises(SettingsError, match=r"not those it had at watch\(\): extra.bias, extra.weight"):
        capture.copy()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyLinear(2), "has no shape yet"),
        (nn.Linear(2, 2, device="meta"), "sparse or on 'meta'"),
        (Holding(torch.zeros(2, dtype=torch.float8_e4m3fnuz)), "which safetensors files cannot hold"),
    ],
    ids=["lazy", "meta", "float8 of other chips"],
)
def test_refuses_what_cannot_be_kept(model, message):
    with pytest.raises(SettingsError, match=message):
        describe_weights(model)


class Copies(nn.Module):
    """A layer, and a copy that a script writes to by hand."""

    def __init__(self):
        super().__init__()
        self.online, self.target = nn.Linear(3, 2), nn.Linear(3, 2)
        self.target.requires_grad_(False)


def test_only_what_the_optimizer_holds_trains():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters())
    wrapper = type("Wrapper", (), {"optimizer": optimizer})()
    for given in (optimizer, wrapper):
        assert [name for name, spec in describe_weights(model, given).items() if spec.trainable] == ["1.weight"]
    specs = describe_weights(model)
    assert [name for name, spec in specs.items() if spec.trainable] == ["0.weight", "0.bias", "1.weight"]


def test_numbers_in_one_memory_train_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.t())
    for held in (model, model[0], model[1]):
        specs = describe_weights(model, torch.optim.SGD(held.parameters()))
        assert [name for name, spec in specs.items() if spec.trainable] == ["0.weight"]
    model[1] = nn.Linear(3, 2, bias=False)
    model[1].weight = nn.Parameter(model[0].weight[:2])
    with pytest.raises(SettingsError, match=r"'1.weight', which the optimizer holds, is a part of '0.weight'"):
        describe_weights(model, torch.optim.SGD(model[1].parameters()))


def test_a_layer_that_is_unfrozen_trains_from_then_on():
    model = Copies()
    optimizer = torch.optim.SGD(model.online.parameters())
    specs = describe_weights(model, optimizer)
    capture = Capture(model, specs, ["target.weight", "target.bias"], optimizer=optimizer)
    capture.look(10)
    assert capture.copy().keys() == {"online.weight", "online.bias"}
    model.target.requires_grad_(True)
    capture.look(20)
    assert not capture.begun  # the optimizer does not hold it
    optimizer.add_param_group({"params": [model.target.bias]})
    capture.look(30)
    assert capture.begun == {"target.bias": 30}
    assert capture.copy().keys() == {"online.weight", "online.bias", "target.bias"}
    with torch.no_grad():
        model.target.weight.add_(1)  # another optimizer
    capture.look(40)
    assert capture.begun == {"target.bias": 30, "target.weight": 40}
    assert torch.equal(capture.copy()["target.weight"], model.target.weight)


def test_a_copy_that_is_written_to_by_hand_is_in_every_snapshot_and_does_not_train():
    model = Copies()
    optimizer = torch.optim.SGD(model.online.parameters())
    capture = Capture(model, describe_weights(model, optimizer), ["target.weight", "target.bias"], optimizer=optimizer)
    model.target.weight.data.mul_(0.5)
    capture.look(1)
    assert torch.equal(capture.copy()["target.weight"], model.target.weight)
    model.target.weight.data.mul_(0.5)
    capture.look(2)
    assert torch.equal(capture.copy()["target.weight"], model.target.weight)
    assert not capture.begun
    assert not capture.late


@pytest.mark.parametrize("unreached", [[], ["target.weight", "target.bias"]])
def test_what_moves_and_gets_a_gradient_trains(unreached):
    model = Copies()
    model.target.requires_grad_(True)
    optimizer = torch.optim.SGD(model.online.parameters())
    specs = describe_weights(model, optimizer)
    capture = Capture(model, specs, optimizer=optimizer, unreached=unreached)
    for step in (1, 2):
        capture.look(step)
        capture.copy()
        model.target.weight.data.add_(1)
    capture.look(3)
    capture.copy()
    assert capture.begun == ({} if unreached else {"target.weight": 2})
