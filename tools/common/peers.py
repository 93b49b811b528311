"""What groktrace is timed against: a kernel written by hand for one network, devinterp, a training step."""

import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groktrace.sampling.kernels.baoab import BAOAB

PEER = "devinterp"


class FusedKernel:
    """Langevin steps for f(x) = V (Wᵀx)² and the centred squared loss, by hand, into buffers made once.

    It does what groktrace does for this network and nothing more: gradient, noise, update, L(w) − L(w*).

    Args:
        anchors: w* of each row, W then V, [R, D].
        data: inputs [n, 2p] and targets [n, p].
        width: K.
        method: "baoab", with a control variate where there are minibatches, or "sgld".
        nbeta, localization, step_size: of all rows.
        batch_size: samples a gradient; None for all.
    """

    def __init__(
        self,
        anchors: Tensor,
        data: tuple[Tensor, Tensor],
        width: int,
        *,
        method: str,
        nbeta: float,
        localization: float,
        step_size: float,
        batch_size: int | None = None,
    ) -> None:
        self.anchors, self.data, self.width, self.method = anchors, data, width, method
        self.nbeta, self.localization, self.step_size = nbeta, localization, step_size
        self.batch_size = batch_size
        rows, samples = len(anchors), len(data[0]) if batch_size is None else batch_size
        outputs = data[1].shape[1]
        self.hidden, self.squares, self.back = (torch.empty(rows, samples, width) for _ in range(3))
        self.outputs, self.mean = torch.empty(rows, samples, outputs), torch.empty(rows, 1, outputs)
        if batch_size is not None:
            self.picked = tuple(torch.empty(rows * samples, tensor.shape[1]) for tensor in data)

    def run(self, steps: int) -> Tensor:
        """nβ(L(w) − L(w*)) after each of some steps from the anchors, [steps, R]."""
        generator = torch.Generator().manual_seed(0)
        rows = len(self.anchors)
        displacement = torch.zeros_like(self.anchors)
        weights, gradients, control = (torch.empty_like(self.anchors) for _ in range(3))
        momentum, fresh = torch.empty_like(self.anchors).normal_(generator=generator), torch.empty_like(self.anchors)
        root = math.sqrt(self.step_size)
        kept = BAOAB().persistence(self.step_size, self.localization)
        record = torch.empty(steps, rows)
        full = tuple(tensor.expand(rows, -1, -1) for tensor in self.data)
        whole = torch.empty_like(self.anchors)
        base = self._at_anchors(full, whole)
        for t in range(steps):
            batch = full if self.batch_size is None else self._pick(generator)
            torch.add(self.anchors, displacement, out=weights)
            losses = self._gradient(weights, batch, gradients)
            if self.batch_size is not None and self.method == "baoab":
                base = self._gradient(self.anchors, batch, control)
                gradients.sub_(control).add_(whole)
            record[t] = self.nbeta * (losses - base)
            fresh.normal_(generator=generator)
            if self.method == "baoab":
                momentum.add_(gradients, alpha=-root * self.nbeta).add_(displacement, alpha=-root * self.localization)
                displacement.add_(momentum, alpha=0.5 * root)
                momentum.mul_(kept).add_(fresh, alpha=math.sqrt(1 - kept**2))
                displacement.add_(momentum, alpha=0.5 * root)
            else:
                displacement.mul_(1 - 0.5 * self.step_size * self.localization)
                displacement.add_(gradients, alpha=-0.5 * self.step_size * self.nbeta)
                displacement.add_(fresh, alpha=root)
        return record

    def check(self, expected: Tensor) -> None:
        """Compare the gradient at the anchors on all samples, [R, D].

        Raises:
            RuntimeError: it is another.
        """
        found = torch.empty_like(self.anchors)
        self._at_anchors(tuple(tensor.expand(len(found), -1, -1) for tensor in self.data), found)
        error = float((found - expected).norm() / expected.norm())
        if not error < 1e-4:
            raise RuntimeError(
                f"the kernel by hand is off: expected the same gradient, got a difference of {error:.1e}."
            )

    def _pick(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = len(self.anchors)
        index = torch.randint(len(self.data[0]), (rows * self.batch_size,), generator=generator)
        for tensor, out in zip(self.data, self.picked, strict=True):
            torch.index_select(tensor, 0, index, out=out)
        inputs, targets = (out.view(rows, self.batch_size, -1) for out in self.picked)
        return inputs, targets

    def _at_anchors(self, full: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        """Loss and gradient at w* on all samples, with buffers of its own where there are minibatches."""
        if self.batch_size is None:
            return self._gradient(self.anchors, full, out)
        scale = {"nbeta": self.nbeta, "localization": self.localization, "step_size": self.step_size}
        whole = FusedKernel(self.anchors, self.data, self.width, method=self.method, **scale)
        return whole._gradient(self.anchors, full, out)

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        rows, inputs, outputs = len(flat), self.data[0].shape[1], self.data[1].shape[1]
        border = inputs * self.width
        return flat[:, :border].view(rows, inputs, self.width), flat[:, border:].view(rows, outputs, self.width)

    def _gradient(self, flat: Tensor, batch: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        """L of each row, [R]; ∇L goes into `out`."""
        inputs, targets = batch
        W, V = self._split(flat)
        to_W, to_V = self._split(out)
        samples = inputs.shape[1]
        torch.bmm(inputs, W, out=self.hidden)
        torch.mul(self.hidden, self.hidden, out=self.squares)
        torch.bmm(self.squares, V.mT, out=self.outputs)
        residuals = torch.sub(self.outputs, targets, out=self.outputs)
        torch.mean(residuals, 1, keepdim=True, out=self.mean)
        residuals.sub_(self.mean)
        losses = torch.linalg.vector_norm(residuals, dim=(1, 2)).square_().mul_(0.5 / samples)
        residuals.mul_(1 / samples)
        torch.bmm(residuals.mT, self.squares, out=to_V)
        torch.bmm(residuals, V, out=self.back)
        self.back.mul_(self.hidden)
        torch.bmm(inputs.mT, self.back, out=to_W)
        to_W.mul_(2)
        return losses


def has_devinterp() -> bool:
    """Whether the peer is installed."""
    return importlib.util.find_spec(PEER) is not None


def devinterp_version() -> str | None:
    """Its version; None where it is not installed."""
    return importlib.metadata.version(PEER) if has_devinterp() else None


class _GatheredPairs(TensorDataset):
    """Pairs that are fetched a batch at once instead of one by one."""

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


def _as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch


def _centred_evaluation(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """½‖(Y − Ŷ)P⊥‖²/n, as the example's loss."""
    inputs, targets = batch
    residuals = targets - model(inputs)
    return 0.5 * (residuals - residuals.mean(0)).square().sum() / len(residuals)


@dataclass(frozen=True)
class Devinterp:
    """λ̂ by devinterp's SGLD, called as its documentation says.

    Attributes:
        data: inputs and targets.
        nbeta: nβ.
        localization: γ.
        lr: ε.
        batch_size: samples a gradient; None for all.
        gathered: whether its DataLoader fetches a batch at once; the documented one fetches samples one by one.
    """

    data: tuple[Tensor, Tensor]
    nbeta: float
    localization: float
    lr: float
    batch_size: int | None
    gathered: bool = False

    def llc(self, model: nn.Module, chains: int, burn_in: int, draws: int, seed: int) -> float:
        """nβ·(mean loss − loss at w* on all samples); NaN where a chain diverged."""
        batch_size = self.batch_size or len(self.data[0])
        generator = torch.Generator().manual_seed(seed)
        if self.gathered:
            pairs = _GatheredPairs(*self.data)
            loader = DataLoader(pairs, batch_size, shuffle=True, collate_fn=_as_it_is, generator=generator)
        else:
            loader = DataLoader(TensorDataset(*self.data), batch_size, shuffle=True, generator=generator)
        with torch.no_grad():
            init_loss = _centred_evaluation(model, self.data).item()
        scale = {"lr": self.lr, "nbeta": self.nbeta, "localization": self.localization}
        return devinterp_llc(model, loader, _centred_evaluation, scale, init_loss, (chains, burn_in, draws), seed)


def devinterp_llc(
    model: nn.Module,
    loader: DataLoader[Any],
    evaluate: Callable[..., Tensor],
    scale: dict[str, float],
    init_loss: float,
    lengths: tuple[int, int, int],
    seed: int,
) -> float:
    """λ̂ by devinterp's SGLD; NaN where a chain diverged.

    Args:
        model: at w*.
        loader: gives the batches.
        evaluate: (model, batch) → mean loss.
        scale: step size (`lr`), nβ (`nbeta`) and γ (`localization`).
        init_loss: L(w*).
        lengths: chains, steps of burn-in, draws.
        seed: of the noise.
    """
    from devinterp.optim.sgmcmc import SGMCMC
    from devinterp.slt.sampler import estimate_learning_coeff

    chains, burn_in, draws = lengths
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            return estimate_learning_coeff(
                model,
                loader,
                evaluate=evaluate,
                sampling_method=SGMCMC.sgld,
                optimizer_kwargs=scale,
                num_draws=draws,
                num_chains=chains,
                num_burnin_steps=burn_in,
                init_loss=init_loss,
                seed=seed,
                device="cpu",
                verbose=False,
            )
        except RuntimeError as failure:
            if "NaN" not in str(failure):
                raise
            return math.nan


def training_steps(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor]
) -> Callable[[int], None]:
    """Plain training on one batch: forward, backward, AdamW over all tensors at once.

    Returns:
        A function that makes a number of steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model(batch[0]), batch[1]).backward()
            optimizer.step()

    return run
