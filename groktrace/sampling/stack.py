"""Chains of many snapshots as one stack, all of which make each step together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from groktrace.sampling.batches import Minibatches
from groktrace.sampling.burn_in import judge_early_steps, least_falls
from groktrace.sampling.calibration import run_length, slowdown
from groktrace.sampling.control import begin_batches, stiff_share, with_kept_control
from groktrace.sampling.curvature import gaussian_start, top_eigenvalue
from groktrace.sampling.engine import Target
from groktrace.sampling.interruption import check_interruption
from groktrace.sampling.kernels.base import ChainState, Dynamics
from groktrace.sampling.noise import generator_for, normal_like
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.sample_losses import DrawnSampleLosses, stacked_sample_losses
from groktrace.sampling.traces import (
    SampleLossRecorder,
    Traces,
    inner_products,
    most_total_virial,
    products_with_others,
)
from groktrace.sampling.tuning import CURVATURE, EQUILIBRIUM, MINIBATCH_NOISE

# Steps within which a loss that falls tells of no basin.
_FALL_STEPS = 64


class StackedChains:
    """The chains of some snapshots in flight, all of which make each step together; see `engine.Chains`.

    Args:
        loss: of S rows.
        anchors: w* of each snapshot, [S, D].
        steps: the key of each one's noise.
        target: what is sampled.
        epsilons: ε of each snapshot.
        halvings: how often each was halved.
        fitting: the ε that the curvature at w* calls for.
    """

    def __init__(
        self,
        loss: StackedLoss,
        anchors: Tensor,
        steps: Sequence[int],
        target: Target,
        epsilons: Sequence[float],
        halvings: Sequence[int],
        fitting: Sequence[float],
    ) -> None:
        self.target, self.settings = target, target.settings
        settings, nbeta, localization = target.settings, target.nbeta, target.localization
        self.epsilons, self.halvings = epsilons, halvings
        scales = list(zip(epsilons, fitting, halvings, strict=True))
        self.slow = [slowdown(settings.kernel, *scale) for scale in scales]
        self.active = list(range(len(epsilons)))
        device, chains = anchors.device, settings.chains
        snapshot = torch.arange(len(anchors), device=device).repeat_interleave(chains)
        self.loss = loss.select(snapshot)
        self.anchors = anchors[snapshot]
        step_size = torch.tensor(epsilons, dtype=anchors.dtype, device=device)[snapshot]
        halved = torch.tensor(halvings, device=device)[snapshot]
        self.dynamics = Dynamics(settings.kernel, nbeta, localization, step_size, halved)
        keys = [(step, chain) for step in steps for chain in range(chains)]
        self.samples = len(loss.tensors[0])
        self.batches, self.control = begin_batches(loss, anchors, snapshot, keys, settings)
        if self.control is None:
            self.base, self.base_gradients = self.loss.gradients(self.anchors)
        else:
            self.base, self.base_gradients = self.control.mean()
        self.falls = [0.0] * len(anchors)
        if target.subsampled and not settings.kernel.vanilla:
            self.falls = least_falls(self.base[::chains], self.base_gradients[::chains], nbeta, fitting)
        self.basins = [s for s in self.active if not target.has_fallen(self.falls[s], EQUILIBRIUM.fall_for_good)]
        # The published method starts at w*.
        start = torch.zeros_like(self.anchors)
        nearer = torch.zeros(len(start), dtype=torch.bool, device=device)
        if self.batches is not None and not settings.kernel.vanilla:
            self.batches.draw()
        if self.basins and not settings.kernel.vanilla:
            start = normal_like(start, [generator_for(settings.seed, *key, "start", device) for key in keys])
            rows = self._rows(self.basins)
            some, places = self.loss.select(rows), self.anchors[rows]
            index = None if self.index is None else self.index[rows]
            at_anchors = self.base[rows], self.base_gradients[rows]
            if index is not None:
                at_anchors = some.gradients(places, index)
            start[rows], nearer[rows] = gaussian_start(
                some, places, at_anchors, start[rows], nbeta, localization, index
            )
        # Flat directions are not filled where the start was drawn nearer.
        cold = nearer.view(-1, chains).any(1).tolist()
        self.lengths = [
            run_length(settings, localization, epsilon, far, halved, target.effort, slow)
            for (epsilon, _, halved), slow, far in zip(scales, self.slow, cold, strict=True)
        ]
        noise = [generator_for(settings.seed, *key, "noise", device) for key in keys]
        self.state = ChainState.begin(self.dynamics, start, noise)
        # Sums of displacements and gradients over all draws, which centre λ_c.
        self.sums = [torch.zeros_like(start) for _ in range(2 if chains > 1 else 0)]
        self.drawn = [0] * len(anchors)
        self.made = 0

    @property
    def index(self) -> Tensor | None:
        """[R, B] samples of the current minibatches; None without them."""
        return None if self.batches is None else self.batches.index

    def begin(self) -> list[Traces]:
        """Burn in, and make the first draws."""
        chains, count = self.settings.chains, len(self.epsilons)
        keeps = self.target.sample_losses
        at_anchors = stacked_sample_losses(self.loss, self.anchors)[::chains].cpu() if keeps else None
        met: dict[int, float] = {}
        early, burn_in = [self.anchors.new_empty(0, 5, chains).double()] * count, [length for length, _ in self.lengths]
        for s in set(self.active) - set(self.basins):
            early[s] = self.anchors.new_full((1, 5, chains), torch.nan, dtype=torch.float64)
            early[s][:, 0] = -self.falls[s]
        self._keep(self.basins)
        least = [math.ceil(slow * EQUILIBRIUM.min_burn_in) for slow in self.slow]
        given = self.settings.burn_in
        if self.target.subsampled and (given is None or given >= max(least)):
            start = self.state.displacement.clone()
            for s, piece in self._pieces([(least[s], 0) for s in self.active]).items():
                told, early[s] = judge_early_steps(piece, self.target), piece
                # Chains start near equilibrium: where they are in it, what is left would be for nothing.
                if given is None:
                    burn_in[s] = least[s] if told.settled else max(least[s], burn_in[s])
                # Where they have too much energy, their step may not suit the curvature that they came from.
                if told.too_high and not told.fallen:
                    met |= self._curvatures([s], start)
                if told.fallen or self.target.curved_step(met.get(s), self.epsilons[s]) is not None:
                    early[s][:, 1] = torch.nan  # by which it is known from then on
            self._keep([s for s in self.active if torch.isfinite(early[s][:, 1]).all()])
        rest = [(burn_in[s] - len(early[s]), self.lengths[s][1]) for s in self.active]
        recorder = SampleLossRecorder(rest) if rest and self.loss.is_sample_mean else None
        drawn = DrawnSampleLosses(rest) if keeps else None
        late = self._pieces(rest, True, recorder, drawn)
        noise_share = self._noise_share()
        traces = []
        for s, soon in enumerate(early):
            own = torch.cat([soon, late[s]]) if s in late else soon
            fall = max(0.0, -float(own[:_FALL_STEPS, 0].nan_to_num(nan=math.inf).amin()))
            found = self._traces(own[burn_in[s] :] if s in late else own, s, burn_in[s], drawn if s in late else None)
            noise = own[:, 4].nanmean()  # NaN where a snapshot has too few draws for a single measurement, too
            heating, excess, fluctuation = 0.0, 0.0, None
            if torch.isfinite(noise):
                share = noise_share.get(s, 1.0)
                heating = share * float(noise) / abs(float(found.virial.mean()))
                excess = 0.5 * share * float(noise) if s in noise_share else 0.0
            if recorder is not None and s in late and (variance := recorder.variance(self.active.index(s))) is not None:
                fluctuation = 0.5 * self.target.nbeta * variance
            if at_anchors is not None:
                found = replace(found, anchor_sample_losses=at_anchors[s])
            traces.append(replace(found, fall=fall, heating=heating, excess=excess, fluctuation=fluctuation))
        met |= self._curvatures([s for s in self.active if self._is_anharmonic(s, traces[s])])
        return [replace(drawn, curvature=met.get(s)) for s, drawn in enumerate(traces)]

    def extend(self, counts: Mapping[int, int]) -> dict[int, Traces]:
        """More draws of some snapshots; the others are dropped."""
        self._keep(list(counts))
        drawn = DrawnSampleLosses([(0, more) for more in counts.values()]) if self.target.sample_losses else None
        pieces = self._pieces([(0, more) for more in counts.values()], drawn=drawn)
        return {s: self._traces(piece, s, 0, drawn) for s, piece in pieces.items()}

    def has_left(self, traces: Traces) -> bool:
        """Whether a chain is or was on its way out, or a look at the curvature ended it."""
        return traces.diverged(self.target.dimension) or (self.target.subsampled and self.target.has_climbed(traces))

    def _noise_share(self) -> dict[int, float]:
        """Of each snapshot in the stack, see `control.share_of_stiff`; none where it is not measured."""
        if not self.active or self.batches is None or self.control is None or not self.target.subsampled:
            return {}
        displacement = self.state.displacement
        rows = torch.arange(0, len(displacement), self.settings.chains, device=displacement.device)
        of_rows = self.loss, self.anchors + displacement, self.batches, self.control, displacement, rows, self.dynamics
        return {s: share for s, share in zip(self.active, stiff_share(*of_rows).tolist(), strict=True) if share >= 0}

    def _is_anharmonic(self, s: int, traces: Traces) -> bool:
        """Whether a snapshot's loss is perhaps not the bowl, where its chains are, that it is at w*."""
        if self.has_left(traces):
            return False
        return self.halvings[s] > 0 or (not self.target.subsampled and traces.anharmonic(self.target.dimension))

    def _curvatures(self, snapshots: Sequence[int], displacement: Tensor | None = None) -> dict[int, float]:
        """h_max where the chains of some snapshots are now, or where all are displaced so far, [R, D]."""
        if not snapshots:
            return {}
        rows = self._rows([self.active.index(s) for s in snapshots])
        displacement = (self.state.displacement if displacement is None else displacement)[rows]
        positions = self.anchors[rows] + displacement
        start = displacement + torch.finfo(positions.dtype).tiny
        index = None if self.index is None or not self.target.subsampled else self.index[rows]
        if self.target.subsampled and index is None:
            index = torch.arange(min(self.samples, CURVATURE.start_samples), device=rows.device).expand(len(rows), -1)
        top = top_eigenvalue(self.loss.select(rows), positions, start, self.target.effort.curvature_products, index)
        return dict(zip(snapshots, top.view(-1, self.settings.chains).amax(1).tolist(), strict=True))

    def _keep(self, snapshots: list[int]) -> None:
        """Drop all other snapshots from the stack, which is left as it is where none would remain."""
        if snapshots and snapshots != self.active:
            rows = self._rows([self.active.index(s) for s in snapshots])
            self.loss = self.loss.select(rows)
            self.anchors = self.anchors[rows]
            self.dynamics = self.dynamics.select(rows)
            self.state = self.state.select(rows)
            self.base, self.base_gradients = self.base[rows], self.base_gradients[rows]
            self.sums = [total[rows] for total in self.sums]
            if self.batches is not None:
                self.batches = self.batches.select(rows)
            if self.control is not None:
                self.control = self.control.select(rows)
        self.active = snapshots

    def _pieces(
        self,
        lengths: Sequence[tuple[int, int]],
        first: bool = False,
        recorder: SampleLossRecorder | None = None,
        drawn: DrawnSampleLosses | None = None,
    ) -> dict[int, Tensor]:
        """What `advance` records of each snapshot in the stack, [its steps, 5, C]."""
        if not self.active:
            return {}
        record, chains = self.advance(lengths, first, recorder, drawn), self.settings.chains
        parts = zip(self.active, lengths, torch.split(record, chains, 2), strict=True)
        return {s: part[: sum(length)] for s, length, part in parts}

    def advance(
        self,
        lengths: Sequence[tuple[int, int]],
        first: bool = False,
        recorder: SampleLossRecorder | None = None,
        drawn: DrawnSampleLosses | None = None,
    ) -> Tensor:
        """Make so many steps with each snapshot's chains; [steps, 5, R].

        They are delta_loss, virial, restraint and centred_draws of `Traces`, and the noise of batches.

        The stack goes on until the last snapshot is done, or has lost a chain. The others are put back to where they
        were when they were done themselves, so that no result depends on what a snapshot was stacked with.

        Args:
            lengths: steps to burn in and draws after them, of each snapshot.
            first: whether to measure the noise of minibatches now and then.
            recorder: when to keep the losses of single samples; None for never.
            drawn: keeps those of all samples at each draw; None for never.
        """
        rows, dimension = self.anchors.shape
        chains, nbeta = self.settings.chains, self.target.nbeta
        counts = [sum(length) for length in lengths]
        count, check = max(counts), self.target.effort.check_every
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
        most = most_total_virial(dimension) * own
        gone = torch.zeros_like(own, dtype=torch.bool)
        blocks = [
            (block, self.anchors[:, at], weights[:, at], gradients[:, at], [total[:, at] for total in self.sums])
            for at, block in state.blocks()
        ]
        seen = self.samples if self.index is None else 2 * self.index.shape[1]
        seen = self.target.effort.sample_losses or seen
        counted: Tensor | None = None
        # Not at the first steps, which tell of where chains start. (The settings decide, not how long others go on.)
        half = MINIBATCH_NOISE.every // 2
        few = self.settings.draws is not None and self.settings.draws + (self.settings.burn_in or 0) <= half
        looked_at = 0 if few else half
        changes = {0, *counts, *(before for before, _ in lengths)}
        scale = record.new_tensor([[nbeta], [self.target.localization]])
        for t in range(count):
            check_interruption()
            self.made += 1
            delta_loss = evaluate()
            if first and self._corrected and t % MINIBATCH_NOISE.every == looked_at:
                record[t, 4] = self._gradient_noise(evaluate, gradients)
            record[t, 0] = nbeta * delta_loss
            if recorder is not None:
                for s in recorder.due(t):
                    rows_of = self._rows([s])
                    recorder.keep(s, self.loss.select(rows_of).sample_losses(weights[rows_of], seen))
            if drawn is not None and (due := drawn.due(t)):
                of_due = self._rows(due)
                drawn.keep(due, stacked_sample_losses(self.loss.select(of_due), weights[of_due]))
            products, others = [], []
            if t in changes:
                draws = [before <= t < before + some for before, some in lengths]
                counted = weights.new_tensor(draws).repeat_interleave(chains)[:, None] if any(draws) else None
            for block, anchors, positions, slopes, sums in blocks:
                products.append(inner_products(block.displacement, slopes))
                if counted is not None and sums:
                    for total, values in zip(sums, (block.displacement, slopes), strict=True):
                        total.addcmul_(values, counted)
                    others.append(products_with_others(sums[0], slopes, chains))
                self.dynamics.step(block, slopes)
                torch.add(anchors, block.displacement, out=positions)
            torch.mul(sum(products[1:], products[0]), scale, out=record[t, 1:3])
            if others:
                record[t, 3] = sum(others[1:], others[0])
            if t % check == check - 1:
                gone |= (t < own) & ~(record[t, 1] + record[t, 2] <= most)
                if ((t >= own) | gone).view(-1, chains).any(1).all():
                    break
            done += [(s, *self._saved(s)) for s in ends.get(t + 1, ())]
        if self.sums:
            # From sums over the draws so far to what they mean for λ_c.
            begins = torch.tensor([before - self.drawn[s] for s, (before, _) in zip(self.active, lengths, strict=True)])
            so_far = (torch.arange(1, count + 1)[:, None] - begins).clamp(min=1).to(record.device)
            means = record[:, 3] / ((chains - 1) * so_far.repeat_interleave(chains, 1))
            record[:, 3] = 0.5 * (record[:, 1] - nbeta * means)
        for s, saved, batches in done:
            self._restore(s, saved, batches)
        for s, (_, some) in zip(self.active, lengths, strict=True):
            self.drawn[s] += some
        record[:, 1, gone] = torch.nan  # whether or not the stack went on
        return record

    def _rows(self, snapshots: Sequence[int]) -> Tensor:
        chains = self.settings.chains
        return torch.tensor([s * chains + c for s in snapshots for c in range(chains)], device=self.anchors.device)

    def _saved(self, s: int) -> tuple[ChainState, Minibatches | None]:
        """A copy of one snapshot's chains as they are, and the state of what draws their batches."""
        rows = self._rows([s])
        return self.state.saved(rows), None if self.batches is None else self.batches.saved(rows)

    def _restore(self, s: int, saved: ChainState, batches: Minibatches | None) -> None:
        rows = self._rows([s])
        self.state.restore(rows, saved)
        if self.batches is not None and batches is not None:
            self.batches.restore(rows, batches)

    def _evaluator(self, weights: Tensor, gradients: Tensor) -> Callable[[], Tensor]:
        """L(w) − L(w*) of each row, [R], of what `weights` holds; ∇L(w) goes into `gradients`, [R, D]."""
        here = self.loss.bound(weights, gradients, self.index)
        if self.batches is not None and self.control is not None:
            return with_kept_control(here, gradients, self.batches, self.control)
        at_anchors: Callable[[], Tensor] | None = None
        blocks: list[list[Tensor]] = []
        if self._corrected:
            # Control variate at w* and paired losses (Baker et al. 2019): both errors shrink with ‖w − w*‖.
            control = torch.empty_like(gradients)
            at_anchors = self.loss.bound(self.anchors, control, self.index)
            stacks = gradients, control, self.base_gradients
            blocks = [[stack[:, columns] for stack in stacks] for columns, _ in self.state.blocks()]

        def evaluate() -> Tensor:
            if self.batches is not None:
                self.batches.draw()
            delta_loss = here() - (self.base if at_anchors is None else at_anchors())
            for slopes, there, base in blocks:
                slopes.sub_(there).add_(base)
            return delta_loss

        return evaluate

    @property
    def _corrected(self) -> bool:
        """Whether gradients are of minibatches, with a control variate; the published method has none."""
        return self.batches is not None and not self.settings.kernel.vanilla

    def _gradient_noise(self, evaluate: Callable[[], Tensor], gradients: Tensor) -> Tensor:
        """What the noise of minibatches adds to 2λ̂ at most, of each row, from a second batch, [R].

        The step may as well follow that one: its gradient is left in `gradients`.
        """
        first = gradients.clone()
        evaluate()
        noise = 0.5 * first.sub_(gradients).square_().sum(1)
        return self.dynamics.noise_gain * self.target.nbeta**2 * noise

    def _traces(self, record: Tensor, s: int, burn_in: int, drawn: DrawnSampleLosses | None) -> Traces:
        delta_loss, virial, restraint, centred = record[:, :4].cpu().unbind(1)
        centred = centred if self.sums else centred[:, :0]
        losses = None if drawn is None else drawn.of(self.active.index(s))
        chains = delta_loss, virial, restraint, centred
        kept = Traces(*chains, self.epsilons[s], burn_in, self.halvings[s], sample_losses=losses)
        kept = replace(kept, slow=self.slow[s])
        if not (self.sums and self.drawn[s]):
            return kept
        rows, nbeta = self._rows([self.active.index(s)]), self.target.nbeta
        displacement, gradient = (total[rows].double() / self.drawn[s] for total in self.sums)
        slope = -0.5 * nbeta * float(torch.linalg.vecdot(displacement, self.base_gradients[rows].double()).mean())
        return replace(kept, means=(nbeta * displacement @ gradient.T).cpu(), slope=slope)
