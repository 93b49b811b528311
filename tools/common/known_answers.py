"""Models whose local learning coefficient λ is known exactly."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from groktrace import theory
from groktrace.sampling.tuning import CALIBRATION

Loss = Callable[[Tensor, Tensor], Tensor]
# Generic manifolds: nβ is such that the exact Hessian's soft rank is within this fraction of λ; γ by the locality rule.
FINITE_CORRECTION = 0.01


@dataclass(frozen=True)
class KnownModel:
    """A network at a true solution, with its data and its λ.

    Attributes:
        name: what it is called in tables.
        family: "bowl", "teacher", "modular", "reduced rank", "deep linear" or "crossing".
        model: the network at w*.
        loss: mean loss of (outputs, targets).
        train: inputs and targets.
        nbeta: nβ at which λ̂ is measured.
        localization: γ.
        exact: λ; of a bowl, its value at this nβ and γ.
    """

    name: str
    family: str
    model: nn.Module
    loss: Loss
    train: tuple[Tensor, Tensor]
    nbeta: float
    localization: float
    exact: float


class Quadratic(nn.Module):
    """f(x) = V (Wᵀx)², all weights standard normal."""

    def __init__(self, inputs: int, width: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(inputs, width, generator=generator))
        self.V = nn.Parameter(torch.randn(outputs, width, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, p] for inputs [n, d]."""
        return (x @ self.W).square() @ self.V.T


class ReducedRank(nn.Module):
    """f(x) = A B x at A = [A_r, 0], B = [B_r; 0]: of the true rank r, standard deviation 2, all other weights zero."""

    def __init__(self, outputs: int, width: int, inputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        a, b = torch.zeros(outputs, width), torch.zeros(width, inputs)
        a[:, :rank] = 2 * torch.randn(outputs, rank, generator=generator)
        b[:rank] = 2 * torch.randn(rank, inputs, generator=generator)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, M] for inputs [n, N]."""
        return x @ (self.A @ self.B).T


class DeepLinear(nn.Module):
    """f(x) = W_N ··· W_1 x of the true rank r: r×r blocks near 1.5, all other weights zero, the most singular point."""

    def __init__(self, widths: Sequence[int], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ParameterList()
        for inputs, outputs in itertools.pairwise(widths):
            weight = torch.zeros(outputs, inputs)
            weight[:rank, :rank] = 1.5 * torch.eye(rank) + 0.3 * torch.randn(rank, rank, generator=generator)
            self.layers.append(nn.Parameter(weight))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, H_N] for inputs [n, H_0]."""
        for weight in self.layers:
            x = x @ weight.T
        return x


class NormalCrossing(nn.Module):
    """f = Π w_i^{k_i} at w = 0, so that its square is a normal crossing."""

    def __init__(self, exponents: Sequence[int]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(exponents)))
        self.exponents = tuple(exponents)

    def forward(self, x: Tensor) -> Tensor:
        """The product, for each of x [n]."""
        factors = [weight**k for weight, k in zip(self.w, self.exponents, strict=True)]
        return torch.stack(factors).prod() * x


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """½‖Y − Ŷ‖²/n."""
    return 0.5 * (targets - outputs).square().sum() / len(outputs)


def centred_half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """½‖(Y − Ŷ)P⊥‖²/n: squared error after removing the residuals' mean over the batch."""
    residuals = targets - outputs
    return 0.5 * (residuals - residuals.mean(0)).square().sum() / len(residuals)


def soft_rank(spectrum: Tensor, cutoff: float) -> float:
    """½Σ h/(h + τ): λ̂ of a quadratic loss with curvatures h at τ = γ/nβ."""
    return float(0.5 * (spectrum / (spectrum + cutoff)).sum())


def exact_hessian(model: nn.Module, loss: Loss, train: tuple[Tensor, Tensor]) -> Tensor:
    """∇²L_n at the model's weights, [D, D], in float64."""
    flat, run = _double(model, train)
    gradient = torch.func.grad(lambda w: loss(run(w), train[1].double()))

    def product(direction: Tensor) -> Tensor:
        return torch.func.jvp(gradient, (flat,), (direction,))[1]

    return torch.func.vmap(product, chunk_size=256)(torch.eye(len(flat), dtype=flat.dtype))


def gauss_newton(model: nn.Module, train: tuple[Tensor, Tensor], *, centred: bool) -> Tensor:
    """JᵀJ/n of a half-square loss, [D, D], in float64; `centred` where the loss removes the residuals' mean."""
    flat, run = _double(model, train)
    jacobian = torch.func.jacrev(run, chunk_size=256)(flat)
    if centred:
        jacobian = jacobian - jacobian.mean(0)
    jacobian = jacobian.flatten(0, 1)
    return jacobian.T @ jacobian / len(train[0])


def _double(model: nn.Module, train: tuple[Tensor, Tensor]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The weights as one float64 vector [D], and the outputs as a function of it."""
    named = {name: weight.detach().double() for name, weight in model.named_parameters()}
    sizes = [weight.numel() for weight in named.values()]
    inputs = train[0].double()

    def run(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        return torch.func.functional_call(model, {name: w.view_as(like) for (name, like), w in parts}, (inputs,))

    return torch.cat([weight.reshape(-1) for weight in named.values()]), run


def bowl(name: str, spectrum: Tensor, nbeta: float, localization: float, seed: int = 0) -> KnownModel:
    """Linear regression whose Hessian has this spectrum, in a random orthonormal basis: exact at every nβ and γ."""
    dimension = len(spectrum)
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))
    inputs = (left * (dimension * spectrum.double()).sqrt()) @ right.T
    model = nn.Linear(dimension, 1, bias=False)
    with torch.no_grad():
        model.weight.normal_(generator=generator)
    train = (inputs.float(), model(inputs.float()).detach())
    exact = soft_rank(spectrum.double(), localization / nbeta)
    return KnownModel(name, "bowl", model, half_square, train, nbeta, localization, exact)


def geometric(count: int, condition: float, flat: int = 0, top: float = 1.0) -> Tensor:
    """`count` curvatures from `top` down to top/condition, and `flat` zeros."""
    curvatures = top * torch.logspace(0, -math.log10(condition), count, dtype=torch.float64)
    return torch.cat([curvatures, torch.zeros(flat, dtype=torch.float64)])


def teacher(d: int, p: int, k: int, nbeta: float, localization: float, seed: int = 0, n: int = 512) -> KnownModel:
    """A generic quadratic network on Gaussian inputs: λ = ½·min(K(d + p − 1), p·d(d + 1)/2)."""
    generator = torch.Generator().manual_seed(seed)
    model = Quadratic(d, k, p, generator)
    inputs = torch.randn(n, d, generator=generator)
    exact = 0.5 * min(k * (d + p - 1), p * d * (d + 1) // 2)
    train = (inputs, model(inputs).detach())
    return KnownModel(f"d={d} p={p} K={k}", "teacher", model, half_square, train, nbeta, localization, exact)


def modular(p: int, k: int, nbeta: float, localization: float, pairs: int | None = None, seed: int = 0) -> KnownModel:
    """A generic quadratic network on one-hot pairs, residuals centred: λ = ½·min(K(3p − 2), p(n − 1))."""
    generator = torch.Generator().manual_seed(seed)
    model = Quadratic(2 * p, k, p, generator)
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    inputs = torch.cat([one_hot(a, p), one_hot(b, p)], dim=1).float()
    inputs = inputs[torch.randperm(p * p, generator=generator)[:pairs]]
    n = len(inputs)
    exact = 0.5 * min(k * (3 * p - 2), p * (n - 1))
    train = (inputs, model(inputs).detach())
    name = f"p={p} K={k}" + (f" n={n}" if pairs else "")
    return KnownModel(name, "modular", model, centred_half_square, train, nbeta, localization, exact)


def reduced_rank(m: int, h: int, n: int, r: int, nbeta: float, localization: float, seed: int = 0) -> KnownModel:
    """Reduced-rank regression A (m×h)·B (h×n) at a truth of rank r, with white inputs."""
    generator = torch.Generator().manual_seed(seed)
    model = ReducedRank(m, h, n, r, generator)
    inputs = n**0.5 * torch.eye(n)
    known = theory.reduced_rank_llc(m, h, n, r)
    train = (inputs, model(inputs).detach())
    name = f"M={m} H={h} N={n} r={r}"
    return KnownModel(name, "reduced rank", model, half_square, train, nbeta, localization, known.llc)


def deep_linear(widths: Sequence[int], rank: int, nbeta: float, localization: float, seed: int = 0) -> KnownModel:
    """A deep linear network at its most singular point, with white inputs."""
    model = DeepLinear(widths, rank, torch.Generator().manual_seed(seed))
    inputs = widths[0] ** 0.5 * torch.eye(widths[0])
    exact = theory.deep_linear_llc(widths, rank).llc
    name = f"{'-'.join(map(str, widths))} r={rank}"
    train = (inputs, model(inputs).detach())
    return KnownModel(name, "deep linear", model, half_square, train, nbeta, localization, exact)


def normal_crossing(exponents: Sequence[int], nbeta: float, localization: float) -> KnownModel:
    """L = ½Π w_i^{2k_i} at w = 0."""
    inputs = torch.ones(1)
    exact = theory.normal_crossing_llc(exponents).llc
    name = f"k={','.join(map(str, exponents))}"
    train = (inputs, torch.zeros(1))
    return KnownModel(name, "crossing", NormalCrossing(exponents), half_square, train, nbeta, localization, exact)


def spectrum_at(known: KnownModel) -> Tensor:
    """The exact curvatures at a true solution, where the Hessian is the Gauss-Newton matrix."""
    matrix = gauss_newton(known.model, known.train, centred=known.loss is centred_half_square)
    return torch.linalg.eigvalsh(matrix).clamp_min(0)


def resolved(make: Callable[..., KnownModel]) -> KnownModel:
    """A generic manifold at the scale the rule gives: γ = D/(ρ²‖w*‖²), nβ for a finite correction of 1 %.

    Args:
        make: makes the model, given nbeta= and localization=.
    """
    known = make(nbeta=1.0, localization=1.0)
    weights = torch.cat([weight.detach().reshape(-1) for weight in known.model.parameters()])
    localization = len(weights) / (CALIBRATION.locality**2 * float(weights.square().sum()))
    spectrum = spectrum_at(known)
    low, high = 1e-12, 1e6
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        enough = soft_rank(spectrum, middle) >= (1 - FINITE_CORRECTION) * known.exact
        low, high = (middle, high) if enough else (low, middle)
    return make(nbeta=float(f"{localization / low:.3g}"), localization=float(f"{localization:.3g}"))
