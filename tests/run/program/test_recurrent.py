import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from groktrace.errors import TaskError
from groktrace.run.program.recurrent import recurrent_layer

LAYERS = {
    "lstm": (nn.LSTM, torch.ops.aten.lstm.input),
    "gru": (nn.GRU, torch.ops.aten.gru.input),
    "rnn_tanh": (nn.RNN, torch.ops.aten.rnn_tanh.input),
    "rnn_relu": (
        lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
        torch.ops.aten.rnn_relu.input,
    ),
}


def example(name, layers=1, **options):
    """A module and the arguments of the operation that it calls."""
    torch.manual_seed(0)
    module = LAYERS[name][0](3, 4, layers, **options)
    states = torch.randn(layers * (1 + module.bidirectional), 2, 4)
    states = [states, torch.randn_like(states)] if name == "lstm" else states
    flags = (module.bias, layers, 0.0, False, module.bidirectional, module.batch_first)
    return torch.randn(2, 5, 3) if module.batch_first else torch.randn(5, 2, 3), states, module._flat_weights, *flags


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"layers": 2, "bidirectional": True, "batch_first": True}, {"layers": 2, "bias": False}],
    ids=["plain", "two layers both ways", "without biases"],
)
def test_step_by_step_it_is_the_fused_layer(name, options):
    def unfused(*args):
        raise RuntimeError("fused kernels cannot be stacked")

    arguments = example(name, **options)
    expected = LAYERS[name][1](*arguments)
    got = recurrent_layer(name, unfused)(*arguments)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    twice = torch.stack([arguments[0], 2 * arguments[0]])
    stacked = torch.vmap(lambda x: recurrent_layer(name, LAYERS[name][1])(x, *arguments[1:]))(twice)
    torch.testing.assert_close(stacked[0][0], expected[0])


class FromAnotherThread(TorchDispatchMode):
    """At each operation, whether another thread may use fused kernels."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        thread = threading.Thread(target=lambda: self.seen.append(torch._C._get_mkldnn_enabled()))
        thread.start()
        thread.join()
        return operation(*args, **(kwargs or {}))


def test_other_threads_keep_the_fused_kernels():
    """A flag of the whole process changed rounding and speed of whatever other threads did, sometimes for good."""
    arguments = example("lstm")
    layer = recurrent_layer("lstm", LAYERS["lstm"][1])
    with FromAnotherThread() as watched:
        torch.vmap(lambda x: layer(x, *arguments[1:])[0])(torch.stack([arguments[0]] * 2))
    assert len(watched.seen) > 5
    assert set(watched.seen) == {torch._C._get_mkldnn_enabled()}


def test_weights_that_do_not_fit_are_refused():
    arguments = list(example("gru"))
    arguments[1] = torch.randn(1, 3, 4)
    with pytest.raises(TaskError, match="calls gru with states or weights that do not fit its input"):
        recurrent_layer("gru", LAYERS["gru"][1])(*arguments)
