"""Recurrent layers of recorded programs: as PyTorch fuses them, or step by step where that kernel fails."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from groktrace.errors import TaskError

# Rows of weights for each hidden unit.
RECURRENT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class _Arguments(NamedTuple):
    """What a recurrent operation is called with, in its order.

    Attributes:
        tensor: [length, batch, inputs], or [batch, length, inputs].
        states: at first, [layers × ways, batch, hidden]; of an LSTM hidden and cell.
        weights: of each layer and way in turn: for the input, for the state, and their biases.
        biases: whether there are any.
        layers: how many.
        dropout: probability between layers.
        train: whether it drops.
        both_ways: whether sequences are read backwards, too.
        batch_first: the order of the axes.
    """

    tensor: Tensor
    states: Any
    weights: Sequence[Tensor]
    biases: bool
    layers: int
    dropout: float
    train: bool
    both_ways: bool
    batch_first: bool


def recurrent_layer(name: str, op: Any) -> Callable[..., Any]:
    """The fused layer, as the live model has it; step by step where it can be neither stacked nor differentiated.

    Args:
        name: of the operation, one of `RECURRENT`.
        op: it itself.
    """
    cell = _lstm_cell if name == "lstm" else getattr(torch.ops.aten, f"{name}_cell")

    def layer(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 9 or not _weights_fit(RECURRENT[name], _Arguments(*args)):
            raise TaskError(f"the recorded program calls {name} with states or weights that do not fit its input.")
        try:
            return op(*args, **kwargs)
        except RuntimeError:
            # PyTorch's own way to unfuse it is a flag of the whole process, which other threads would see.
            return _step_by_step(cell, _Arguments(*args))

    return layer


def _lstm_cell(
    tensor: Tensor,
    state: tuple[Tensor, Tensor],
    input_weight: Tensor,
    hidden_weight: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's own, which cannot be stacked."""
    hidden, memory = state
    gates = functional.linear(tensor, input_weight, input_bias) + functional.linear(hidden, hidden_weight, hidden_bias)
    write, keep, new, read = gates.chunk(4, -1)
    memory = keep.sigmoid() * memory + write.sigmoid() * new.tanh()
    return read.sigmoid() * memory.tanh(), memory


def _step_by_step(cell: Callable[..., Any], given: "_Arguments") -> tuple[Tensor, ...]:
    """The layer's outputs and last states from its cells."""
    both = isinstance(given.states, list | tuple)  # an LSTM's: hidden and cell
    first = list(zip(*given.states, strict=True)) if both else list(given.states)
    ways, count = 1 + given.both_ways, 2 + 2 * given.biases
    sequence = given.tensor.transpose(0, 1) if given.batch_first else given.tensor
    last: list[Any] = []
    for number in range(given.layers):
        passes = []
        for way in range(ways):
            state = first[number * ways + way]
            own = given.weights[(number * ways + way) * count :][:count]
            steps = sequence.unbind(0)
            seen = []
            for step in reversed(steps) if way else steps:
                state = cell(step, state, *own)
                seen.append(state[0] if both else state)
            passes.append(torch.stack(seen[::-1] if way else seen))
            last.append(state)
        sequence = torch.cat(passes, -1)
        if number < given.layers - 1:
            sequence = torch.dropout(sequence, given.dropout, given.train)
    ends = [torch.stack(part) for part in zip(*last, strict=True)] if both else [torch.stack(last)]
    return sequence.transpose(0, 1) if given.batch_first else sequence, *ends


def _weights_fit(gates: int, given: "_Arguments") -> bool:
    """Whether a recurrent layer's arguments have the shapes that its kernel takes on trust."""
    states = list(given.states) if isinstance(given.states, list | tuple) else [given.states]
    tensor = given.tensor
    if tensor.ndim != 3 or not tensor.numel() or given.layers < 1 or len(states) != (2 if gates == 4 else 1):
        return False
    ways, hidden = 1 + given.both_ways, states[0].shape[-1] if states[0].ndim else 0
    batch = tensor.shape[0 if given.batch_first else 1]
    wanted: list[tuple[int, ...]] = []
    for i in range(given.layers * ways):
        rows, inputs = gates * hidden, tensor.shape[2] if i < ways else ways * hidden
        wanted += [(rows, inputs), (rows, hidden), *([(rows,), (rows,)] if given.biases else [])]
    shapes = [tuple(state.shape) for state in states]
    return (
        hidden > 0
        and shapes == [(given.layers * ways, batch, hidden)] * len(shapes)
        and ([tuple(weight.shape) for weight in given.weights] == wanted)
    )
