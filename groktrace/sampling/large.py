"""Chains of one large network: one gradient at a time, and everything else in place.

Beside w* there are the chains' positions and one gradient, and with minibatches ∇L(w*) of all samples: for C chains
1 + C or 2 + C vectors. Noise is not kept: where it is the momentum, that of the last step is drawn a second time, by a
generator one step behind. Kernels with momenta of their own, which need fewer steps, take C vectors more, and none is
chosen here unless asked for. Chains
start at w*, as products with the Hessian would need several vectors more, and burn in for longer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from groktrace.sampling.calibration import run_length, slowdown
from groktrace.sampling.engine import Attempt, Target, sample_with_restarts
from groktrace.sampling.interruption import check_interruption
from groktrace.sampling.kernels.base import Dynamics
from groktrace.sampling.network import LargeNetwork
from groktrace.sampling.noise import NormalNoise, generator_for
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.sample_losses import DrawnSampleLosses, network_sample_losses
from groktrace.sampling.settings import ResolvedSettings
from groktrace.sampling.traces import Traces, pairs
from groktrace.sampling.tuning import CURVATURE, MINIBATCH_NOISE

# Of the weights' norm: a classifier with large margins bends within a thousandth of it.


def sample_large(
    loss: StackedLoss,
    weights: Mapping[str, Tensor],
    step: int,
    settings: ResolvedSettings,
    nbeta: float,
    localization: float,
    step_size: float,
    needed: Callable[[Traces], float],
    sample_losses: bool = False,
    fitting: float | None = None,
) -> Traces:
    """Run all chains of one snapshot, see `chains.sample`.

    Args:
        loss: with its `micro_batch`.
        weights: all tensors of the network by name.
        step: the key of its noise: the training step, or a number of its own.
        settings: kernel, chains, batch size, run length.
        nbeta: nβ.
        localization: γ.
        step_size: ε; halved where chains diverge, reduced where minibatch noise heats them.
        needed: how many times as many draws, see `chains.sample`.
        sample_losses: see `chains.sample`.
        fitting: the ε that the curvature at w* calls for; None where that is `step_size`.

    Returns:
        Traces; not finite where the chains diverged at every step size tried.
    """
    network = LargeNetwork(loss, weights)
    target = Target(settings, nbeta, localization, network.layout.size, False, sample_losses)

    def begin(attempt: Attempt) -> LargeChains:
        return LargeChains(network, step, target, attempt.step_sizes[0], attempt.halvings[0], attempt.fitting[0])

    return sample_with_restarts(begin, [step_size], target, needed, fitting=[fitting or step_size])[0]


@dataclass
class _Chain:
    """One chain.

    Attributes:
        position: w, [D].
        noise: gives ξ_{t+1}.
        before: gives the noise of the last step, of kernels whose momentum that is; else None.
        momentum: p, [D]; None where it can be drawn again.
        batches: gives the samples of minibatches.
    """

    position: Tensor
    noise: torch.Generator
    before: torch.Generator | None
    momentum: Tensor | None
    batches: torch.Generator


class LargeChains:
    """The chains of one snapshot in flight, which take turns; see `engine.Chains`.

    Args:
        network: the loss around w*.
        step: the key of its noise.
        target: what is sampled.
        step_size: ε.
        halvings: how often it was halved.
        fitting: the ε that the curvature at w* calls for.
    """

    def __init__(
        self, network: LargeNetwork, step: int, target: Target, step_size: float, halvings: int, fitting: float
    ) -> None:
        self.network, self.settings, self.target = network, target.settings, target
        self.nbeta, self.localization, self.step_size = target.nbeta, target.localization, step_size
        settings, nbeta, localization = target.settings, target.nbeta, target.localization
        self.lengths = [run_length(settings, localization, step_size, cold=True, halvings=halvings)]
        self.slow, self.halvings = slowdown(settings.kernel, step_size, fitting, halvings), halvings
        self.kernel = settings.kernel
        row = torch.tensor([step_size], dtype=network.dtype, device=network.device), torch.tensor([halvings])
        dynamics = Dynamics(self.kernel, nbeta, localization, *row)
        self.coefficients = dynamics.coefficients
        self.heats = float(dynamics.noise_gain) * nbeta**2
        self.batched = settings.batch_size is not None and settings.batch_size < network.samples
        self.corrected = self.batched and not self.kernel.vanilla
        self.gradient = torch.zeros(network.layout.size, dtype=network.dtype, device=network.device)
        self.normal = NormalNoise((1, network.longest_piece), network.dtype, network.device)
        self.fresh = torch.empty(1, network.longest_piece, dtype=network.dtype, device=network.device)
        self.last = torch.empty_like(self.fresh)
        self.control: Tensor | None = None
        if self.corrected:
            self.base = network.add_gradient(self.gradient)
            # Read once a step, in pieces: it need not lie where memory is scarce.
            self.control = self.gradient.clone() if network.device.type == "cpu" else self.gradient.cpu()
        else:
            self.base = network.mean_loss()
        self.chains = [self._chain(step, number) for number in range(settings.chains)]
        self.heating: list[float] = []
        self.made = 0

    def _chain(self, step: int, number: int) -> _Chain:
        def generator(purpose: str) -> torch.Generator:
            return generator_for(self.settings.seed, step, number, purpose, self.network.device)

        noise, before, momentum = generator("noise"), None, None
        if not self.kernel.momentum_is_noise:
            momentum = torch.empty_like(self.gradient)
            for place, _ in self.network.pieces():
                self.normal.fill(momentum[None, place], [noise])
        elif not self.kernel.vanilla:
            before = generator("noise")
            for _, anchor in self.network.pieces():
                self.normal.fill(anchor[None], [noise])
        return _Chain(self.network.vector(), noise, before, momentum, generator("batch"))

    def begin(self) -> list[Traces]:
        """Burn in, and make the first draws."""
        ((burn_in, draws),) = self.lengths
        self._advance(burn_in)
        traces = self._draw(draws, burn_in, measured=True)
        if self.target.sample_losses:
            traces = replace(traces, anchor_sample_losses=network_sample_losses(self.network).cpu())
        if self.heating:
            heating = sum(self.heating) / len(self.heating) / abs(float(traces.virial.mean()))
            traces = replace(traces, heating=heating)
        return [traces]

    def extend(self, counts: Mapping[int, int]) -> dict[int, Traces]:
        """More draws."""
        return {0: self._draw(counts[0], 0)}

    def has_left(self, traces: Traces) -> bool:
        """Whether a chain is or was on its way out: there is no look at the curvature that it met."""
        return self.target.has_climbed(traces) or traces.diverged(self.target.dimension)

    def _draw(self, count: int, burn_in: int, measured: bool = False) -> Traces:
        """So many draws of every chain, after a burn-in of so many steps."""
        drawn = DrawnSampleLosses([(0, count)]) if self.target.sample_losses else None
        delta_loss, virial, restraint, paired = self._advance(count, measured, drawn).unbind(1)
        paired = paired[:, : pairs(self.settings.chains)]
        losses = None if drawn is None else drawn.of(0)
        chains = delta_loss, virial, restraint, paired
        return Traces(*chains, self.step_size, burn_in, self.halvings, sample_losses=losses, slow=self.slow)

    def _advance(self, count: int, measured: bool = False, drawn: DrawnSampleLosses | None = None) -> Tensor:
        """Make `count` steps of every chain; [count, 4, C]: delta_loss, virial, restraint, paired.

        Chains take turns, so that one gradient after another is all there is. A pair's product w_a·g_b then takes w_a
        one step later than g_b for one of the two; the chains are independent, so that its expectation is the same.
        """
        chains = len(self.chains)
        record = torch.full((count, 4, chains), math.nan, dtype=torch.float64)
        for t in range(count):
            self.made += 1
            products = torch.zeros(chains, chains, dtype=torch.float64)  # displacement of one, gradient of another
            if drawn is not None:
                drawn.keep([0], torch.stack([network_sample_losses(self.network, c.position) for c in self.chains]))
            for c, chain in enumerate(self.chains):
                check_interruption()
                if measured and self.corrected and t % MINIBATCH_NOISE.every_large == 0:
                    self.heating.append(self._gradient_noise(chain))
                record[t, 0, c] = self.nbeta * self._evaluate(chain)
                products[:, c], record[t, 2, c] = self._move(c)
            if not torch.isfinite(record[t, 0]).all():
                break
            products *= self.nbeta
            record[t, 1] = products.diagonal()
            if chains > 1:
                after = torch.arange(chains).roll(-1)
                here = torch.arange(chains)
                own = record[t, 1] + record[t, 1, after]
                record[t, 3] = 0.25 * (own - products[after, here] - products[here, after])
        return record

    def _evaluate(self, chain: _Chain) -> float:
        """L(w) − L(w*); ∇L(w) goes into the gradient."""
        network = self.network
        if not self.batched:
            self.gradient.zero_()
            return network.add_gradient(self.gradient, chain.position) - self.base
        index = self._batch(chain)
        if self.control is None:
            self.gradient.zero_()
            return network.add_gradient(self.gradient, chain.position, index) - self.base
        # Control variate at w* and paired losses, as in `chains`.
        self.gradient.copy_(self.control)
        base = network.add_gradient(self.gradient, None, index, -1.0)
        return network.add_gradient(self.gradient, chain.position, index) - base

    def _batch(self, chain: _Chain) -> Tensor:
        device, size = self.network.device, self.settings.batch_size
        return torch.randperm(self.network.samples, generator=chain.batches, device=device)[:size]

    def _gradient_noise(self, chain: _Chain) -> float:
        """What the noise of minibatches adds to 2λ̂ at most, from two batches."""
        self.gradient.zero_()
        for sign in (1.0, -1.0):
            index = self._batch(chain)
            self.network.add_gradient(self.gradient, chain.position, index, sign)
            self.network.add_gradient(self.gradient, None, index, -sign)
        return self.heats * 0.5 * float(self.gradient.norm()) ** 2

    def _move(self, c: int) -> tuple[Tensor, float]:
        """One step of chain c, with ∇L there in the gradient.

        Returns:
            Before the step, displacements times gradient for every chain, [C], and γ‖w − w*‖² of this one.
        """
        products = torch.zeros(len(self.chains), dtype=torch.float64, device=self.network.device)
        length = torch.zeros((), dtype=torch.float64, device=self.network.device)
        for place, anchor in self.network.pieces():
            for a, other in enumerate(self.chains):
                displacement = other.position[place] - anchor
                products[a] += torch.dot(displacement, self.gradient[place])
                if a == c:
                    length += torch.dot(displacement, displacement)
                    own = displacement
            self._move_piece(self.chains[c], place, own, anchor)
        return products.cpu(), self.localization * float(length)

    def _move_piece(self, chain: _Chain, place: slice, displacement: Tensor, anchor: Tensor) -> None:
        """One step of some of a chain's weights."""
        fresh = self.fresh[:, : len(displacement)]
        if chain.momentum is not None:
            momentum = chain.momentum[None, place]
        else:
            momentum = self.last[:, : len(displacement)]
            if chain.before is not None:
                self.normal.fill(momentum, [chain.before])
        self.normal.fill(fresh, [chain.noise])
        self.kernel.step(displacement[None], momentum, self.gradient[None, place], fresh, self.coefficients)
        torch.add(anchor, displacement, out=chain.position[place])


def top_eigenvalue_large(network: LargeNetwork, generator: torch.Generator) -> float:
    """Largest |eigenvalue| of the Hessian at w*, from below; zero where it is no more than rounding.

    Power iteration, which needs one vector beside the gradient; the last two iterates span the plane from which the
    value is taken (Rayleigh-Ritz). Products are central differences, and exact ones where these disagree with smaller
    ones, see `curvature`.

    Args:
        network: the loss around w*.
        generator: of the direction to start from.

    Returns:
        NaN where the loss is not finite.
    """
    start = torch.empty(network.layout.size, dtype=network.dtype, device=network.device)
    for place, _ in network.pieces():
        start[place].normal_(generator=generator)
    start /= start.norm()
    size, direction, loss = _power_iteration(partial(_hessian_product, network), start)
    if not (math.isfinite(size) and size > 0):
        return size
    if not _is_smooth(network, direction, size):
        try:
            size, direction, loss = _power_iteration(partial(_exact_product, network), direction)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return size  # an operation has no second derivative: what differences tell is all there is
        if not (math.isfinite(size) and size > 0):
            return size
    if size * network.norm_squared() < CURVATURE.flat * abs(loss):
        product = torch.empty_like(direction)
        _hessian_product(network, direction, product, CURVATURE.far_step)
        if not abs(float(product.norm()) - size) <= CURVATURE.far_agreement * size:
            return 0.0
    return size


def _power_iteration(
    multiply: Callable[[Tensor, Tensor], tuple[float, float]], direction: Tensor
) -> tuple[float, Tensor, float]:
    """The largest |eigenvalue|, its direction and the loss.

    Args:
        multiply: puts ∇²L·v into its second argument, and may overwrite v; v·∇²L·v and the loss.
        direction: to start from; overwritten.
    """
    product = torch.empty_like(direction)
    quotients, norms, loss = [], [], math.nan
    for _ in range(CURVATURE.power_iterations):
        quotient, loss = multiply(direction, product)
        quotients.append(quotient)
        norms.append(float(product.norm()))
        if not (math.isfinite(norms[-1]) and norms[-1] > 0):
            return (math.nan if not math.isfinite(norms[-1]) else max(map(abs, quotients))), direction, loss
        direction, product = product.div_(norms[-1]), direction
    return _from_plane(quotients, norms), direction, loss


def _is_smooth(network: LargeNetwork, direction: Tensor, size: float) -> bool:
    """Whether differences along the direction of a value, which is kept, give that again, and smaller ones do, too."""
    product = torch.zeros_like(direction)
    _add_hessian_product(network, direction.clone(), product, CURVATURE.large_step / 8)
    same = float(product.norm()) >= CURVATURE.repeated * size
    _add_hessian_product(network, direction.clone(), product, CURVATURE.large_step, -1.0)
    return same and float(product.norm()) <= CURVATURE.agreement * size


def _from_plane(quotients: Sequence[float], norms: Sequence[float]) -> float:
    """The largest |eigenvalue| that the last two iterates tell of."""
    overlap = quotients[-2] / norms[-2]
    best = max(abs(quotient) for quotient in quotients[-2:])
    if 1 - overlap**2 < 1e-3:
        return best
    # Of the iterates u and w, in the orthonormal basis of u and what of w is not along u.
    s = math.sqrt(1 - overlap**2)
    corner = (norms[-2] - overlap * quotients[-2]) / s
    rest = (quotients[-1] - 2 * overlap * norms[-2] + overlap**2 * quotients[-2]) / s**2
    plane = torch.tensor([[quotients[-2], corner], [corner, rest]], dtype=torch.float64)
    return max(best, float(torch.linalg.eigvalsh(plane).abs().max()))


def hessian_trace_large(network: LargeNetwork, generator: torch.Generator, vectors: int) -> tuple[float, float]:
    """The Hessian's trace at w* and its standard error, see `hutchinson.hessian_trace`.

    Args:
        network: the loss around w*.
        generator: of the random signs.
        vectors: at least 2; each costs two gradients.
    """
    size = network.layout.size
    direction = torch.empty(size, dtype=network.dtype, device=network.device)
    product = torch.empty_like(direction)
    found = []
    for _ in range(vectors):
        direction.bernoulli_(0.5, generator=generator).mul_(2).sub_(1).div_(math.sqrt(size))
        found.append(size * _hessian_product(network, direction, product)[0])
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std()) / math.sqrt(vectors)


def _exact_product(network: LargeNetwork, direction: Tensor, out: Tensor) -> tuple[float, float]:
    """∇²L(w*)·v into `out`; returns v·∇²L(w*)·v and the loss."""
    check_interruption()
    loss = network.add_hessian_product(out.zero_(), direction)
    return float(torch.dot(direction, out)), loss


def _hessian_product(
    network: LargeNetwork, direction: Tensor, out: Tensor, relative_step: float = CURVATURE.large_step
) -> tuple[float, float]:
    """∇²L(w*)·v into `out`; returns v·∇²L(w*)·v and a loss nearby. The place of v becomes that of the positions."""
    delta, loss = _add_hessian_product(network, direction, out.zero_(), relative_step)
    along = sum(float(torch.dot(anchor - direction[place], out[place])) for place, anchor in network.pieces())
    return along / delta, loss


def _add_hessian_product(
    network: LargeNetwork, direction: Tensor, out: Tensor, relative_step: float, factor: float = 1.0
) -> tuple[float, float]:
    """Add ∇²L(w*)·v, times a factor, to `out`; the place of v becomes that of w* − δv. Returns δ and the loss there."""
    check_interruption()
    norm = math.sqrt(network.norm_squared())
    delta = relative_step * norm if norm > 0 else relative_step
    for place, anchor in network.pieces():
        direction[place].mul_(delta).add_(anchor)
    network.add_gradient(out, direction, scale=0.5 * factor / delta)
    for place, anchor in network.pieces():
        direction[place].neg_().add_(anchor, alpha=2)  # as far on the other side
    return delta, network.add_gradient(out, direction, scale=-0.5 * factor / delta)
