"""Chains of many snapshots as one stack: burn-in, draws, restarts."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from groktrace.sampling.batches import GROUP, Minibatches, NoiseProfile
from groktrace.sampling.calibration import MAX_STEPS, more_draws, run_length, settle, step_size
from groktrace.sampling.curvature import difference_product, gaussian_start, lanczos, top_eigenvalue
from groktrace.sampling.kernels.base import ChainState, Dynamics
from groktrace.sampling.network import shuffled
from groktrace.sampling.noise import generator_for, normal_like
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import SamplingSettings
from groktrace.sampling.traces import (
    MOST_HEATING,
    SLACK,
    WANTED_HEATING,
    Looks,
    Traces,
    cooled,
    inner_products,
    most_virial,
)

MAX_RESTARTS, DEAR_RESTARTS = 16, 2
# Chains that fall by so many nats for each weight at once are not in a basin: training has hardly begun. They would be
# followed through ever steeper walls for as long as all other snapshots take together.
MAX_FALL = 0.1
FEW_RESTARTS = 3
# The same where data are sampled, at once and for good: no smaller step would help.
DEAR_FALL = 1.0
# There burn-in ends after so many steps where pull and spread are in equilibrium, within this fraction and some errors.
_LEAST_BURN_IN = 8
_SETTLED, _SETTLED_ERRORS = 0.03, 3.0
MAX_GROWTH, DEAR_GROWTH = 16, 4
# Stacks beyond the processor's cache gain nothing (measured); a GPU wants more at once.
WORKING_SET_BYTES = {"cpu": 12 * 2**20}
WORKING_SET_BYTES_ELSEWHERE = 2**31
_STATE_VECTORS = 8
# Where data are sampled: products with the Hessian where chains have gone, steps between two looks at whether they are
# still there, and single samples that are looked at.
_DEAR_ITERATIONS, _DEAR_CHECK = 3, 8
_DEAR_LOOKS = 16
# Samples whose noise is looked at.
_PROFILED = 512
# Products from which the share of minibatch noise is taken that goes into stiff directions.
_SHARE_ITERATIONS = 3
# What the gradients of all minibatches at w* may take, of the snapshots of a stack together.
CONTROL_BYTES = 2**28
_CHECK_EVERY = 64
# Set to have the chains of all threads give up what they are at.
interruption = threading.Event()
# A second batch tells at every so many steps how noisy the gradients are.
_HEATING_EVERY = 16
# A step is timed in so many at most.
_TIMED_STEPS = 80


def rows_per_stack(loss: StackedLoss, batch_size: int | None = None) -> int:
    """How many chains are advanced at once: as many as fit the working set.

    Args:
        loss: probed.
        batch_size: samples a gradient; None for all.
    """
    row = loss.gradient_bytes(batch_size) + _STATE_VECTORS * loss.layout.size * 4
    budget = WORKING_SET_BYTES.get(loss.device.type, WORKING_SET_BYTES_ELSEWHERE)
    return max(1, budget // row) if loss.vectorised else 1


def sample(
    loss: StackedLoss,
    anchors: Tensor,
    steps: Sequence[int],
    settings: SamplingSettings,
    nbeta: float,
    localization: float,
    step_sizes: Sequence[float],
    needed: Callable[[Traces], float],
    whole: StackedLoss | None = None,
) -> list[Traces]:
    """Run all chains of S snapshots.

    Args:
        loss: of S rows.
        anchors: w* of each snapshot, [S, D].
        steps: the key of each one's noise: its training step, or a number of its own.
        settings: chains, batch size, run length.
        nbeta: nβ.
        localization: γ.
        step_sizes: ε of each snapshot; halved where chains diverge, reduced where they find a larger curvature than at
            w* or where minibatch noise heats them: 16 times at most, or three where they fall far at once, and within
            the first three where the step heats them.
        needed: how many times as many draws a snapshot needs, at most 1 where they suffice; asked only where
            `settings.draws` is None.
        whole: the same loss without batches, for snapshots whose chains those throw out; None to reduce ε instead.

    Returns:
        Traces of each snapshot, those of the last attempt where its chains diverged at every step size tried.
    """
    settings = settle(settings, anchors.shape[1], stacked=True)
    results: dict[int, Traces] = {}
    pending = list(range(len(steps)))
    epsilon, halvings, falls, lost = list(step_sizes), [0] * len(steps), [0] * len(steps), [0] * len(steps)
    batched = [settings.batch_size is not None] * len(steps)
    dimension = anchors.shape[1]
    most_fall = MAX_FALL * dimension + SLACK
    dear = loss.sample_bytes is not None
    for attempt in range((DEAR_RESTARTS if dear else MAX_RESTARTS) + 1):
        again: list[int] = []
        for some in ([s for s in pending if batched[s]], [s for s in pending if not batched[s]]):
            if not some:
                continue
            rows = torch.tensor(some, device=anchors.device)
            group = _Group(
                (loss if batched[some[0]] or whole is None else whole).select(rows),
                anchors[rows],
                [steps[s] for s in some],
                settings if batched[some[0]] else replace(settings, batch_size=None),
                nbeta,
                localization,
                [epsilon[s] for s in some],
                [halvings[s] for s in some],
            )
            for s, traces, length in zip(some, group.run(needed), group.lengths, strict=True):
                traces = results[s] = replace(traces, halvings=halvings[s], lost=lost[s])
                lost[s] += min(group.made, sum(length))
                falls[s] += traces.fall > most_fall
                if falls[s] > FEW_RESTARTS or (dear and traces.fall > DEAR_FALL * dimension + SLACK):
                    continue
                if traces.diverged(dimension) or (attempt < FEW_RESTARTS and group.is_heated(traces)):
                    if batched[s] and whole is not None:
                        batched[s] = False
                        again.append(s)
                        continue
                    epsilon[s] /= 2
                    halvings[s] += 1
                elif group.is_too_large(traces):
                    epsilon[s] = step_size(nbeta, localization, traces.curvature)
                else:
                    most = MOST_HEATING if dear else WANTED_HEATING
                    epsilon[s] = cooled(traces, settings.kernel, localization, most)
                if epsilon[s] != traces.step_size:
                    again.append(s)
        pending = sorted(again)
        if not pending or settings.step_size is not None:
            break
    return [results[s] for s in range(len(steps))]


def time_steps(loss: StackedLoss, anchors: Tensor, settings: SamplingSettings, seconds: float) -> tuple[float, float]:
    """Time of a stack's steps, by the clock.

    Args:
        loss: of S rows.
        anchors: w* of each snapshot, [S, D].
        settings: as for `sample`.
        seconds: that the steps may take, but for the first few.

    Returns:
        Seconds that one step takes, and all that comes before the first.
    """
    settings, count = settle(settings, anchors.shape[1], stacked=True), len(anchors)

    def begin() -> _Group:
        return _Group(loss, anchors, range(count), settings, 1.0, 1e6, [1e-12] * count, [0] * count)

    begin()._advance([1] * count)  # records the gradient
    start = time.perf_counter()
    group = begin()
    begun = time.perf_counter()
    before, spent, made = begun - start, 0.0, 0
    # As many as there are from one look at the noise of minibatches to the next.
    while not made or (spent < seconds and made < _TIMED_STEPS):
        looks = Looks([(0, _HEATING_EVERY)] * count) if loss.separable else None
        group._advance([_HEATING_EVERY] * count, first=True, looks=looks)
        made += _HEATING_EVERY
        spent = time.perf_counter() - begun
    return spent / made, before


def profile_noise(
    loss: StackedLoss,
    anchor: Tensor,
    key: int,
    settings: SamplingSettings,
    nbeta: float,
    localization: float,
    epsilon: float,
) -> NoiseProfile:
    """How noisy gradients of samples are where a chain begins; of 512 of them at most.

    Args:
        loss: of one row.
        anchor: w*, [1, D].
        key: of the snapshot's noise.
        settings: of the sampling.
        nbeta: nβ.
        localization: γ.
        epsilon: ε.
    """
    batch = 4 * GROUP
    count = min(len(loss.tensors[0]), _PROFILED) // batch * batch
    loss = replace(loss, tensors=tuple(each[:count] for each in loss.tensors))
    groups = torch.arange(count, device=anchor.device).view(-1, 1, GROUP)
    settings = replace(settle(settings, anchor.shape[1], stacked=True), chains=1, batch_size=batch)
    group = _Group(loss, anchor, [key], settings, nbeta, localization, [epsilon], [0])
    displacement = group.state.displacement
    total, change, squares = torch.zeros_like(anchor), torch.zeros_like(anchor), 0.0
    for samples in groups:
        there = loss.gradients(anchor + displacement, samples)[1]
        total += there
        there -= loss.gradients(anchor, samples)[1]
        change += there
        squares += float(there.double().square().sum())
    total, change = total / len(groups), change / len(groups)
    variance = GROUP * (squares / len(groups) - float(change.double().square().sum()))
    stiff = change / change.norm().clamp(min=torch.finfo(change.dtype).tiny)  # H(w − w*)
    products = [difference_product(loss, anchor, loss.gradients(anchor, each)[1], stiff, each) for each in groups]
    curvatures = torch.stack([torch.linalg.vecdot(each, stiff)[0] for each in products]).double()
    bending = GROUP * float(curvatures.var(correction=0) / curvatures.mean().square())
    pull = nbeta * abs(float((displacement * total).sum()))
    gain = float(group.dynamics.noise_gain[0]) * nbeta**2 * float(group.noise_share[0])
    return NoiseProfile(gain * variance / max(pull, 1e-300), bending)


@dataclass(frozen=True)
class _Control:
    """What control variates need of the parts that batches are, at each snapshot (Baker et al. 2019).

    Attributes:
        losses: L_k(w*) of each batch, [S, K].
        shifts: ∇L(w*) − ∇L_k(w*), [S, K, D].
        gradients: ∇L(w*), the mean over the batches, [S, D].
        snapshot: of each row, [R].
    """

    losses: Tensor
    shifts: Tensor
    gradients: Tensor
    snapshot: Tensor

    @classmethod
    def of(cls, loss: StackedLoss, anchors: Tensor, parts: Tensor, snapshot: Tensor) -> "_Control":
        losses = anchors.new_empty(len(anchors), len(parts))
        shifts = anchors.new_empty(len(anchors), len(parts), anchors.shape[1])
        for k, batch in enumerate(parts):
            losses[:, k], shifts[:, k] = loss.gradients(anchors, batch.expand(len(anchors), -1).contiguous())
        gradients = shifts.mean(1)
        torch.sub(gradients[:, None], shifts, out=shifts)
        return cls(losses, shifts, gradients, snapshot)

    def mean(self) -> tuple[Tensor, Tensor]:
        """L(w*) and ∇L(w*) of each row, [R] and [R, D]."""
        return self.losses.mean(1)[self.snapshot], self.gradients[self.snapshot]

    def select(self, rows: Tensor) -> "_Control":
        """That of some of the rows."""
        return replace(self, snapshot=self.snapshot[rows])


class _Group:
    """The chains of some snapshots in flight."""

    def __init__(
        self,
        loss: StackedLoss,
        anchors: Tensor,
        steps: Sequence[int],
        settings: SamplingSettings,
        nbeta: float,
        localization: float,
        epsilons: Sequence[float],
        halvings: Sequence[int],
    ) -> None:
        self.settings = settings
        self.halvings = halvings
        self.epsilons = epsilons
        self.lengths = [
            run_length(settings, localization, epsilon, halvings=halved, dear=loss.sample_bytes is not None)
            for epsilon, halved in zip(epsilons, halvings, strict=True)
        ]
        device, chains = anchors.device, settings.chains
        each = torch.arange(len(anchors), device=device).repeat_interleave(chains)
        self.loss = loss.select(each)
        self.anchors = anchors[each]
        step_size = torch.tensor(epsilons, dtype=anchors.dtype, device=device)[each]
        halved = torch.tensor(halvings, device=device)[each]
        self.dynamics = Dynamics(settings.kernel, nbeta, localization, step_size, halved)
        keys = [(step, chain) for step in steps for chain in range(chains)]
        self.samples = len(loss.tensors[0])
        self.batches: Minibatches | None = None
        self.control: _Control | None = None
        if settings.batch_size is not None and settings.batch_size < self.samples:
            generators = [generator_for(settings.seed, step, chain, "batch", device) for step, chain in keys]
            kept = len(anchors) * (self.samples // settings.batch_size) * anchors[0].nbytes
            # Else some samples would never be seen.
            whole = self.samples % settings.batch_size == 0
            if whole and not settings.kernel.plain and kept <= CONTROL_BYTES:
                parts = shuffled(self.samples).to(device).view(-1, settings.batch_size)
                self.batches = Minibatches.of_parts(parts, self.samples, generators)
                self.control = _Control.of(loss, anchors, parts, each)
            else:
                self.batches = Minibatches.begin(self.samples, settings.batch_size, generators, device)
        if self.control is None:
            self.base, self.base_gradients = self.loss.gradients(self.anchors)
        else:
            self.base, self.base_gradients = self.control.mean()
        # The published method starts at w*.
        start = torch.zeros_like(self.anchors)
        if not settings.kernel.plain:
            start = normal_like(start, [generator_for(settings.seed, *key, "start", device) for key in keys])
            at_anchors = self.base, self.base_gradients
            if self.batches is not None:
                self.batches.draw()
                at_anchors = self.loss.gradients(self.anchors, self.index)
            start = gaussian_start(self.loss, self.anchors, at_anchors, start, nbeta, localization, self.index)
        self.noise_share = anchors.new_ones(len(anchors))
        if self.control is not None and loss.sample_bytes is not None:
            self.noise_share = self._noise_share(start)
        noise = [generator_for(settings.seed, *key, "noise", device) for key in keys]
        self.state = ChainState.begin(self.dynamics, start, noise)
        self.made = 0

    def _noise_share(self, start: Tensor) -> Tensor:
        """By how much less the noise of minibatches adds to λ̂ than if it all went into the stiffest directions, [S].

        In a direction of curvature h it adds nβh/(nβh + γ) of what it does there; the quadratic form of that function
        of the Hessian in a sample of the noise comes from the noise's Krylov space (Golub & Meurant 2010).
        """
        rows = torch.arange(0, len(start), self.settings.chains, device=start.device)
        loss, weights = self.loss.select(rows), self.anchors[rows] + start[rows]
        shifts, snapshots = self.control.shifts, self.control.snapshot[rows]
        noise, sign = torch.zeros_like(weights), 1.0
        for _ in range(2):
            self.batches.draw()
            index = self.index[rows].clone()
            gradients = loss.gradients(weights, index)[1]
            noise.add_(gradients, alpha=sign).add_(shifts[snapshots, self.batches.number[rows]], alpha=sign)
            sign = -1.0
        silent = noise.norm(dim=1) == 0  # twice the same batch, or a loss without any
        noise[silent] = start[rows][silent]
        product = partial(difference_product, loss, weights, gradients, index=index)
        tridiagonal, _ = lanczos(product, noise, _SHARE_ITERATIONS)
        values, vectors = torch.linalg.eigh(tridiagonal.nan_to_num())
        stiff = self.dynamics.nbeta * values.clamp(min=0)
        share = (vectors[:, 0].square() * stiff / (stiff + self.dynamics.localization)).sum(1)
        return torch.where(torch.isfinite(tridiagonal).all(dim=(1, 2)), share, 1.0).to(start.dtype)

    @property
    def index(self) -> Tensor | None:
        """[R, B] samples of the current minibatches; None without them."""
        return None if self.batches is None else self.batches.index

    def run(self, needed: Callable[[Traces], float]) -> list[Traces]:
        """Burn in, draw, and go on with those snapshots whose draws are not enough yet."""
        chains, dimension = self.settings.chains, self.anchors.shape[1]
        traces, active = self._begin()
        self._look_around(traces, active)
        while self.settings.draws is None:
            wanted = {
                i: times
                for i, s in enumerate(active)
                if not traces[s].diverged(dimension)
                and len(traces[s].excess) < self._limit(s)
                and not self.is_too_large(traces[s])
                and not self.is_heated(traces[s])
                and (times := needed(traces[s])) > 1
            }
            if not wanted:
                break
            self._keep(list(wanted))
            active = [active[i] for i in wanted]
            draws = [len(traces[s].excess) for s in active]
            counts = [more_draws(*each) for each in zip(draws, wanted.values(), strict=True)]
            record = self._advance(counts)
            for i, s in enumerate(active):
                more = record[: counts[i], :, i * chains : (i + 1) * chains]
                piece = self._traces(more, self.epsilons[s], traces[s].burn_in)
                joined = {
                    name: torch.cat([getattr(traces[s], name), getattr(piece, name)])
                    for name in ("excess", "pull", "spread", "paired")
                }
                traces[s] = replace(traces[s], **joined)
        return traces

    def _begin(self) -> tuple[list[Traces], list[int]]:
        """Burn in, and make the first draws; their traces, and the snapshots that are still in the stack."""
        chains, count = self.settings.chains, len(self.epsilons)
        early, burn_in = [self.anchors.new_empty(0, 5, chains).double()] * count, [each for each, _ in self.lengths]
        draws, active = [each for _, each in self.lengths], list(range(count))
        if self.loss.sample_bytes is not None and self.settings.burn_in is None:
            # Chains start near equilibrium: where they are in it, what is left of the burn-in would be for nothing.
            record = self._advance([_LEAST_BURN_IN] * count, first=True)
            early = [record[:, :, s * chains : (s + 1) * chains] for s in range(count)]
            burn_in = [
                _LEAST_BURN_IN if self._has_settled(piece) else max(each, _LEAST_BURN_IN)
                for piece, each in zip(early, burn_in, strict=True)
            ]
            active = [s for s in active if not self._has_left(early[s])]
            if active and len(active) < count:
                self._keep(active)
        looks, late = None, early[0][:0]
        counts = [burn_in[s] - len(early[s]) + draws[s] for s in active]
        if active:
            lengths = [(burn_in[s] - len(early[s]), draws[s]) for s in active]
            looks = Looks(lengths) if self.loss.separable else None
            late = self._advance(counts, first=True, looks=looks)
        traces = []
        for s, soon in enumerate(early):
            i = active.index(s) if s in active else None
            own = soon if i is None else torch.cat([soon, late[: counts[i], :, i * chains : (i + 1) * chains]])
            fall = max(0.0, -float(own[:_CHECK_EVERY, 0].nan_to_num(nan=math.inf).amin()))
            piece = own[burn_in[s] :] if i is not None else own
            traces.append(replace(self._traces(piece, self.epsilons[s], burn_in[s]), fall=fall))
            noise = own[:, 4].nanmean()  # NaN where a snapshot has too few draws for a single measurement, too
            if torch.isfinite(noise):
                heating = float(self.noise_share[s] * noise) / abs(float(traces[s].pull.mean()))
                traces[s] = replace(traces[s], heating=heating)
            if looks is not None and i is not None and (variance := looks.variance(i)) is not None:
                traces[s] = replace(traces[s], fluctuation=0.5 * self.dynamics.nbeta * variance)
        return traces, active

    def _has_settled(self, record: Tensor) -> bool:
        """Whether pull and spread add up to what they come to in equilibrium, in the second half of some steps."""
        dimension = self.anchors.shape[1]
        late = record[len(record) // 2 :]
        off = abs(float((late[:, 1] + late[:, 2]).mean()) - dimension)
        return off <= _SETTLED * dimension + _SETTLED_ERRORS * math.sqrt(2 * dimension / late.shape[2])

    def _has_left(self, record: Tensor) -> bool:
        """Whether a chain is on its way out, or the loss fell so far at once that there is no basin where it began."""
        fell = not float(record[:, 0].amin()) >= -(DEAR_FALL * self.anchors.shape[1] + SLACK)
        if fell:
            record[:, 1] = torch.nan
        return fell or not bool(torch.isfinite(record[:, 1]).all())

    def is_too_large(self, traces: Traces) -> bool:
        """Whether the step is too large for the curvature that the chains met."""
        if traces.curvature is None or self.settings.step_size is not None:
            return False
        return step_size(self.dynamics.nbeta, self.dynamics.localization, traces.curvature) < 0.7 * traces.step_size

    def is_heated(self, traces: Traces) -> bool:
        """Whether the discretisation fed energy to the chains, which more draws would not mend."""
        return traces.burst or traces.hot(self.settings.kernel, self.dynamics.localization, self.anchors.shape[1])

    def _look_around(self, traces: list[Traces], active: Sequence[int]) -> None:
        """Measure the curvature where the chains are now, of snapshots whose loss is not the bowl that it is at w*."""
        chains, dimension = self.settings.chains, self.anchors.shape[1]
        odd = [
            i
            for i, s in enumerate(active)
            if not traces[s].diverged(dimension)
            and (self.halvings[s] or (self.loss.sample_bytes is None and traces[s].anharmonic(dimension)))
        ]
        if not odd:
            return
        rows = self._rows(odd)
        positions = self.anchors[rows] + self.state.displacement[rows]
        start = self.state.displacement[rows] + torch.finfo(positions.dtype).tiny
        if self.loss.sample_bytes is None:
            top = top_eigenvalue(self.loss.select(rows), positions, start)
        else:
            index = None if self.batches is None else self.index[rows]
            top = top_eigenvalue(self.loss.select(rows), positions, start, _DEAR_ITERATIONS, index)
        top = top.view(-1, chains).amax(1)
        for i, curvature in zip(odd, top.tolist(), strict=True):
            traces[active[i]] = replace(traces[active[i]], curvature=curvature)

    def _limit(self, s: int) -> int:
        growth = MAX_GROWTH if self.loss.sample_bytes is None else DEAR_GROWTH
        return min(growth * self.lengths[s][1], MAX_STEPS)

    def _keep(self, snapshots: list[int]) -> None:
        """Drop all other snapshots from the stack."""
        rows = self._rows(snapshots)
        self.loss = self.loss.select(rows)
        self.anchors = self.anchors[rows]
        self.dynamics = self.dynamics.select(rows)
        self.state = self.state.select(rows)
        self.base, self.base_gradients = self.base[rows], self.base_gradients[rows]
        if self.batches is not None:
            self.batches = self.batches.select(rows)
        if self.control is not None:
            self.control = self.control.select(rows)

    def _advance(self, counts: Sequence[int], first: bool = False, looks: "Looks | None" = None) -> Tensor:
        """Make so many steps with each snapshot's chains; [steps, 5, R]: excess, pull, spread, paired, batch noise.

        The stack goes on until the last snapshot is done, or has lost a chain. The others are put back to where they
        were when they were done themselves, so that no result depends on what a snapshot was stacked with.

        Args:
            counts: of steps, for each snapshot.
            first: whether to measure the noise of minibatches now and then.
            looks: when to keep the losses of single samples; None for never.
        """
        rows, dimension = self.anchors.shape
        chains, nbeta = self.settings.chains, self.dynamics.nbeta
        count, check = max(counts), _CHECK_EVERY if self.loss.sample_bytes is None else _DEAR_CHECK
        record = torch.full((count, 5, rows), torch.nan, dtype=torch.float64, device=self.anchors.device)
        state: ChainState = self.state
        weights, gradients = self.anchors + state.displacement, torch.empty_like(self.anchors)
        evaluate = self._evaluator(weights, gradients)
        done: list[tuple[int, ChainState, Minibatches | None]] = []
        ends: dict[int, list[int]] = {}
        for s, length in enumerate(counts):
            if length < count:
                ends.setdefault(length, []).append(s)
        own = torch.tensor(counts, device=record.device).repeat_interleave(chains)
        # Beyond this a single draw makes the mean too large.
        most = most_virial(dimension) * own
        gone = torch.zeros_like(own, dtype=torch.bool)
        stacks = self.anchors, weights, gradients
        blocks = [(block, *(each[:, columns] for each in stacks)) for columns, block in state.blocks()]
        # Chains of minibatches look at two batches' samples: looks at all would cost more than the steps between them.
        seen = self.samples if self.index is None else 2 * self.index.shape[1]
        if self.loss.sample_bytes is not None:
            seen = _DEAR_LOOKS
        scale = record.new_tensor([[nbeta], [self.dynamics.localization], [0.25 * nbeta]])
        for t in range(count):
            if interruption.is_set():
                raise InterruptedError
            self.made += 1
            excess = evaluate()
            if first and t % _HEATING_EVERY == 0 and self._corrected:
                record[t, 4] = self._gradient_noise(evaluate, gradients)
            record[t, 0] = nbeta * excess
            for s in looks.due(t) if looks is not None else ():
                rows_of = self._rows([s])
                looks.keep(s, self.loss.select(rows_of).sample_losses(weights[rows_of], seen))
            products = []
            for block, anchors, positions, slopes in blocks:
                products.append(inner_products(block.displacement, slopes, chains))
                self.dynamics.step(block, slopes)
                torch.add(anchors, block.displacement, out=positions)
            torch.mul(sum(products[1:], products[0]), scale, out=record[t, 1:4])
            if t % check == check - 1:
                gone |= (t < own) & ~(record[t, 1] + record[t, 2] <= most)
                if ((t >= own) | gone).view(-1, chains).any(1).all():
                    break
            done += [(s, *self._saved(s)) for s in ends.get(t + 1, ())]
        for s, saved, batches in done:
            self._restore(s, saved, batches)
        record[:, 1, gone] = torch.nan  # whether or not the stack went on
        return record

    def _rows(self, snapshots: Sequence[int]) -> Tensor:
        chains = self.settings.chains
        return torch.tensor([s * chains + c for s in snapshots for c in range(chains)], device=self.anchors.device)

    def _saved(self, s: int) -> tuple[ChainState, Minibatches | None]:
        """A copy of one snapshot's chains as they are, and the state of what draws their batches."""
        rows = self._rows([s])
        saved = self.state.select(rows)
        copies = [torch.Generator(each.device).set_state(each.get_state()) for each in saved.generators]
        return replace(saved, generators=copies), None if self.batches is None else self.batches.saved(rows)

    def _restore(self, s: int, saved: ChainState, batches: Minibatches | None) -> None:
        rows = self._rows([s])
        self.state.displacement[rows], self.state.momentum[rows] = saved.displacement, saved.momentum
        for r, generator in zip(rows.tolist(), saved.generators, strict=True):
            self.state.generators[r] = generator
        if batches is not None:
            self.batches.restore(rows, batches)

    def _evaluator(self, weights: Tensor, gradients: Tensor) -> Callable[[], Tensor]:
        """L(w) − L(w*) of each row, [R], of what `weights` holds; ∇L(w) goes into `gradients`, [R, D]."""
        here = self.loss.bound(weights, gradients, self.index)
        at_anchors, blocks = (lambda: self.base), []
        if self.control is not None:
            return self._with_kept_control(here, gradients)
        if self._corrected:
            # Control variate at w* and paired losses (Baker et al. 2019): both errors shrink with ‖w − w*‖.
            control = torch.empty_like(gradients)
            at_anchors = self.loss.bound(self.anchors, control, self.index)
            stacks = gradients, control, self.base_gradients
            blocks = [[each[:, columns] for each in stacks] for columns, _ in self.state.blocks()]

        def evaluate() -> Tensor:
            if self.batches is not None:
                self.batches.draw()
            excess = here() - at_anchors()
            for slopes, there, base in blocks:
                slopes.sub_(there).add_(base)
            return excess

        return evaluate

    def _with_kept_control(self, here: Callable[[], Tensor], gradients: Tensor) -> Callable[[], Tensor]:
        """The same where the batches' gradients at w* are kept."""
        batches, control = self.batches, self.control
        rows = list(zip(gradients, control.snapshot.tolist(), strict=True))

        def evaluate() -> Tensor:
            batches.draw()
            excess = here() - control.losses[control.snapshot, batches.number]
            for (row, s), number in zip(rows, batches.number.tolist(), strict=True):
                row.add_(control.shifts[s, number])
            return excess

        return evaluate

    @property
    def _corrected(self) -> bool:
        """Whether gradients are of minibatches, with a control variate; the published method has none."""
        return self.batches is not None and not self.settings.kernel.plain

    def _gradient_noise(self, evaluate: Callable[[], Tensor], gradients: Tensor) -> Tensor:
        """What the noise of minibatches adds to 2λ̂ at most, of each row, from a second batch, [R].

        The step may as well follow that one: its gradient is left in `gradients`.
        """
        first = gradients.clone()
        evaluate()
        noise = 0.5 * first.sub_(gradients).square_().sum(1)
        return self.dynamics.noise_gain * self.dynamics.nbeta**2 * noise

    def _traces(self, piece: Tensor, epsilon: float, burn_in: int) -> Traces:
        piece = piece.cpu()
        pairs = {1: 0, 2: 1}.get(self.settings.chains, self.settings.chains)
        return Traces(piece[:, 0], piece[:, 1], piece[:, 2], piece[:, 3, :pairs], epsilon, burn_in)
