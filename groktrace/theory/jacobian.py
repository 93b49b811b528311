"""The numerical rank of a network's Jacobian: twice λ wherever the zero set is a manifold, in a bowl across it."""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from groktrace.errors import SettingsError

_EPSILON = torch.finfo(torch.float64).eps
# A row computed on its own holds about this many copies of its gradient at once: the network's, flattened, centred.
_COPIES = 4
# Rows differentiated at once where they are not held: enough to keep the machine busy.
_PIECE = 256


@dataclass(frozen=True)
class JacobianRank:
    """Rank of the Jacobian of all outputs on all samples with respect to all trainable weights.

    Attributes:
        rank: how many singular values exceed `tolerance`.
        rows: samples × outputs.
        parameters: D, number of trainable weights; tied weights count once.
        tolerance: the smallest singular value that counts, relative to the largest.
        smallest_kept: smallest singular value that counts, relative to the largest; 0 where none does.
        largest_dropped: largest one that does not, relative to the largest; 0 where none is dropped.
    """

    rank: int
    rows: int
    parameters: int
    tolerance: float
    smallest_kept: float
    largest_dropped: float

    @property
    def llc(self) -> float:
        """λ = rank/2."""
        return self.rank / 2

    @property
    def gap(self) -> float:
        """Smallest kept over largest dropped singular value; near 1 the spectrum has no gap and the rank no meaning."""
        return self.smallest_kept / self.largest_dropped if self.largest_dropped > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with λ."""
        return {**asdict(self), "llc": self.llc}


def jacobian_rank(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...] | list[Tensor] | Mapping[str, Tensor],
    *,
    centred: bool = False,
    tolerance: float | None = None,
    memory: float = 2e9,
) -> JacobianRank:
    """Rank of J = ∂outputs/∂weights over a batch, from the eigenvalues of its Gram matrix in float64.

    The smaller of JJᵀ and JᵀJ is summed over blocks of rows. Its eigenvalues are the squares of J's singular values and
    carry a rounding error of about 2e-16·size relative to the largest, so that a singular value can be told from zero
    only above √(2e-16·size) times the largest: 5e-7 for a Gram matrix of 1000 rows, 1.5e-6 for one of 10 000. That is
    the default tolerance. Smaller singular values than this count as zero, and `gap` says how far apart the two kinds
    lie. Half of the rank is λ under squared error wherever the zero set is locally a manifold and the Hessian does not
    vanish across it.

    The model runs as a copy, in float64 and evaluation mode, on one sample at a time.

    Args:
        model: the network; it is not changed. Its output, or the output's `logits`, is one real tensor.
        inputs: samples along the first axis: a tensor for model(x), a tuple or list for model(*x), a dict for
            model(**x).
        centred: remove each output's mean over the samples, for losses that ignore a constant per output.
        tolerance: smallest singular value that counts, relative to the largest; None for the default above.
        memory: bytes that the Gram matrix and the blocks of rows may take together, activations not counted.

    Returns:
        The rank, its tolerance, and the singular values on both sides of it.

    Raises:
        SettingsError: a setting is outside its range, or the model has no trainable weights, does not take the inputs,
            returns no real tensor, has derivatives that are not finite, or needs more memory.

    Source: Watanabe 2009, regular case: λ is half the codimension of the zero set.
    """
    least = math.sqrt(_EPSILON)
    if tolerance is not None and not (_is_number(tolerance) and least <= tolerance < 1):
        raise SettingsError(
            f"tolerance: expected a number from {least:.2g}, below which nothing can be told from zero, to 1, "
            f"got {tolerance!r}."
        )
    if not (_is_number(memory) and 0 < memory < math.inf):
        raise SettingsError(f"memory: expected a positive number of bytes, got {memory!r}.")
    tensors, keys = _leaves(inputs)
    rows = _Rows(model, tensors, keys)
    size = min(len(rows), rows.parameters)
    # The Gram matrix, the solver's copy of it, and the means; what is left is for rows.
    fixed = 2 * 8 * size**2 + (8 * rows.outputs * rows.parameters if centred else 0)
    row_bytes = _COPIES * 8 * rows.parameters
    block = int((memory - fixed) // row_bytes)
    if block < 2:
        raise SettingsError(
            f"memory: {len(rows)} rows (samples × outputs) of {rows.parameters} weights need at least "
            f"{_readable(fixed + 2 * row_bytes)}, got {_readable(memory)}; take fewer samples, freeze weights, or "
            "allow more."
        )
    if tolerance is None:
        tolerance = math.sqrt(_EPSILON * size)
    rounding = rows.centre(min(block, _PIECE)) if centred else 0.0
    gram = _row_gram(rows, block) if len(rows) <= rows.parameters else _weight_gram(rows, min(block, _PIECE))
    if not bool(gram.isfinite().all()):
        raise SettingsError("model: expected finite derivatives on the inputs, got NaN or infinite values.")
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    largest = singular[-1].item()
    if largest > 0:
        singular, tolerance = singular / largest, max(tolerance, rounding / largest)
    kept, dropped = singular[singular > tolerance], singular[singular <= tolerance]
    return JacobianRank(
        rank=len(kept),
        rows=len(rows),
        parameters=rows.parameters,
        tolerance=tolerance,
        smallest_kept=kept[0].item() if len(kept) else 0.0,
        largest_dropped=dropped[-1].item() if len(dropped) else 0.0,
    )


class _Rows:
    """The rows of J, computed when asked for; row i·outputs + k is the gradient of output k of sample i.

    Args:
        model: the network, copied.
        tensors: the inputs, samples first.
        keys: names of keyword inputs; None for positional ones.
    """

    def __init__(self, model: nn.Module, tensors: list[Tensor], keys: list[str] | None) -> None:
        # A compiled model cannot be stacked; what it wraps can. Apple's GPUs have no float64.
        self.model = copy.deepcopy(getattr(model, "_orig_mod", model)).eval()
        if any(weight.device.type == "mps" for weight in self.model.parameters()):
            self.model.cpu()
        self.model.double()
        self.weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        if not self.weights:
            raise SettingsError("model: expected trainable weights, got none; set requires_grad on some.")
        if any(weight.is_complex() for weight in self.weights.values()):
            raise SettingsError("model: expected real weights, got complex ones.")
        device = next(iter(self.weights.values())).device
        self.inputs = [tensor.detach().to(device) for tensor in tensors]
        self.inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in self.inputs]
        self.keys = keys
        self.parameters = sum(weight.numel() for weight in self.weights.values())
        self.means: Tensor | None = None
        self.vectorised = True
        try:
            first = self._outputs(self.weights, [tensor[0] for tensor in self.inputs])
        except SettingsError:
            raise
        except Exception as failure:  # a model may fail in any way on inputs that it does not take
            raise SettingsError(
                f"inputs: the model, in float64, fails on the first sample ({type(failure).__name__}: {failure}); give "
                "a tensor for model(x), a tuple for model(*x), a dict for model(**x)."
            ) from failure
        self.outputs = first.numel()
        if self.outputs == 0:
            raise SettingsError("model: expected at least one output a sample, got none.")

    def __len__(self) -> int:
        return len(self.inputs[0]) * self.outputs

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, as [stop − start, D]."""
        index = torch.arange(start, stop, device=self.inputs[0].device)
        outputs = index % self.outputs
        samples = [tensor[index // self.outputs] for tensor in self.inputs]
        # The fused attention kernels cannot be stacked.
        with sdpa_kernel(SDPBackend.MATH):
            rows = self._stacked(samples, outputs) if self.vectorised else self._one_by_one(samples, outputs)
        return rows if self.means is None else rows - self.means[outputs]

    def centre(self, piece: int) -> float:
        """Let every later row lack its output's mean over the samples.

        Subtracted here and not from the Gram matrix, where it would cost half of the digits.

        Args:
            piece: rows differentiated at once.

        Returns:
            The size that a singular value can have by the rounding of the subtraction alone.
        """
        means = torch.zeros(self.outputs, self.parameters, dtype=torch.float64, device=self.inputs[0].device)
        for start in range(0, len(self), piece):
            stop = min(start + piece, len(self))
            means.index_add_(0, torch.arange(start, stop, device=means.device) % self.outputs, self(start, stop))
        self.means = means / len(self.inputs[0])
        return 8 * _EPSILON * math.sqrt(len(self.inputs[0])) * self.means.norm().item()

    def _outputs(self, weights: dict[str, Tensor], sample: list[Tensor]) -> Tensor:
        """All outputs of one sample, as a vector."""
        batch = [tensor.unsqueeze(0) for tensor in sample]
        arguments, named = (batch, {}) if self.keys is None else ([], dict(zip(self.keys, batch, strict=True)))
        found = torch.func.functional_call(self.model, weights, tuple(arguments), named)
        found = getattr(found, "logits", found)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            got = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
            raise SettingsError(f"model: expected one real tensor as its output, got {got}; wrap it to return one.")
        return found.reshape(-1)

    def _stacked(self, samples: list[Tensor], outputs: Tensor) -> Tensor:
        """The rows in one vectorised gradient; falls back to one by one for good where the model cannot be stacked."""

        def one(weights: dict[str, Tensor], sample: list[Tensor], output: Tensor) -> Tensor:
            return self._outputs(weights, sample).gather(0, output.unsqueeze(0)).squeeze(0)

        detached = {name: weight.detach() for name, weight in self.weights.items()}
        try:
            found = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(detached, samples, outputs)
        except (RuntimeError, ValueError):
            self.vectorised = False
            return self._one_by_one(samples, outputs)
        return torch.cat([gradient.flatten(1) for gradient in found.values()], dim=1)

    def _one_by_one(self, samples: list[Tensor], outputs: Tensor) -> Tensor:
        """The rows by one backward pass each, which every differentiable model allows."""
        rows = []
        with torch.enable_grad():
            for row, output in enumerate(outputs.tolist()):
                value = self._outputs(self.weights, [sample[row] for sample in samples])[output]
                if not value.requires_grad:
                    rows.append(torch.zeros(self.parameters, dtype=torch.float64, device=value.device))
                    continue
                found = torch.autograd.grad(value, list(self.weights.values()), materialize_grads=True)
                rows.append(torch.cat([gradient.reshape(-1) for gradient in found]))
        return torch.stack(rows)


def _row_gram(rows: _Rows, block: int) -> Tensor:
    """The lower triangle of JJᵀ: a block of rows is held while the later ones pass by, computed anew."""
    size = len(rows)
    gram = torch.zeros(size, size, dtype=torch.float64, device=rows.inputs[0].device)
    # Of what a block may take, the rows held need one copy each, the passing piece all of them.
    piece = min(_PIECE, max(block // 2, 1))
    step = (block - piece) * _COPIES
    for start in range(0, size, step):
        stop = min(start + step, size)
        held = torch.empty(stop - start, rows.parameters, dtype=torch.float64, device=gram.device)
        for low in range(start, size, piece):
            high = min(low + piece, size)
            passing = rows(low, high)
            if low < stop:
                held[low - start : min(high, stop) - start] = passing[: stop - low]
            # Columns of the block that are not filled yet lie above the diagonal.
            known = min(high, stop)
            gram[low:high, start:known] = passing @ held[: known - start].T
    return gram


def _weight_gram(rows: _Rows, piece: int) -> Tensor:
    """JᵀJ."""
    gram = torch.zeros(rows.parameters, rows.parameters, dtype=torch.float64, device=rows.inputs[0].device)
    for start in range(0, len(rows), piece):
        found = rows(start, min(start + piece, len(rows)))
        gram.addmm_(found.T, found)
    return gram


def _leaves(inputs: Any) -> tuple[list[Tensor], list[str] | None]:
    """The tensors of the inputs, and their names where they have any."""
    if isinstance(inputs, Mapping):
        leaves, keys = list(inputs.values()), list(inputs)
    else:
        leaves, keys = list(inputs) if isinstance(inputs, tuple | list) else [inputs], None
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise SettingsError(f"inputs: expected a tensor, or a tuple or dict of tensors, got {type(leaf).__name__}.")
    lengths = [len(leaf) if leaf.ndim else 0 for leaf in leaves]
    if not lengths or len(set(lengths)) > 1 or lengths[0] == 0:
        raise SettingsError(
            "inputs: expected samples along the first axis of every tensor, equally many and at least one, got "
            f"{lengths}."
        )
    return leaves, keys


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _readable(count: float) -> str:
    """Bytes in the largest fitting unit."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
