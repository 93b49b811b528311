"""One snapshot, or a stack of them: losses and curvature without sampling, and λ̂ by sampling."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from groktrace.analysis.measurement.chance import chance_losses
from groktrace.analysis.measurement.gradient_check import wrong_gradient
from groktrace.analysis.measurement.llc import LLCEstimate, summarise, unusable
from groktrace.analysis.measurement.predictions import batch_effect, count_targets, measure_losses
from groktrace.analysis.measurement.stopping import needed_centred, needed_of_large_sets, needed_plain
from groktrace.analysis.tuning import MEASUREMENT
from groktrace.errors import SettingsError
from groktrace.records import Record, between, read_record
from groktrace.run.batch import Batch
from groktrace.run.layout import Step
from groktrace.run.task import Task, failures_in_words
from groktrace.sampling.batches import spread_ranks
from groktrace.sampling.calibration import Scale, resolve, step_size
from groktrace.sampling.chains import rows_per_stack, sample
from groktrace.sampling.curvature import top_eigenvalue
from groktrace.sampling.large import sample_large, top_eigenvalue_large
from groktrace.sampling.network import LargeNetwork, as_float, shuffled, with_micro_batch
from groktrace.sampling.noise import generator_for, normal_like
from groktrace.sampling.posterior import FACTOR, StackedLoss
from groktrace.sampling.settings import ResolvedSettings, SamplingSettings
from groktrace.sampling.traces import Traces
from groktrace.sampling.tuning import MEMORY
from groktrace.sampling.weights import WeightLayout

Accuracy = Annotated[float, between(0, 1)]
Positive = Annotated[float, between(0)]


@dataclass(frozen=True)
class SnapshotMetrics(Record):
    """One snapshot without sampling; what is not known is None, and NaN or infinite where the network is not finite.

    Attributes:
        step: training step.
        train_loss, val_loss: mean loss over the stored samples.
        train_accuracy, val_accuracy: fraction of right predictions, for classification.
        norm_squared: ‖w*‖² over the sampled weights.
        top_curvature: h_max, the largest |eigenvalue| of the Hessian of the training loss.
        train_loss_stderr, val_loss_stderr: standard errors, where the losses are those of a random subset.
    """

    step: Step
    train_loss: float
    train_accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    norm_squared: Positive
    top_curvature: Positive
    train_loss_stderr: float | None = None
    val_loss_stderr: float | None = None

    @property
    def finite(self) -> bool:
        """Whether loss and curvature are."""
        return math.isfinite(self.train_loss) and math.isfinite(self.top_curvature)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "SnapshotMetrics":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is missing, unknown, or of the wrong kind.
        """
        never = [name for name in ("train_loss", "norm_squared", "top_curvature") if value.get(name, 0.0) is None]
        found = read_record(cls, {**value, **dict.fromkeys(never, 0.0)})
        return replace(found, **dict.fromkeys(never, math.nan))


@dataclass(frozen=True)
class Objective:
    """What the snapshots of one network are measured by.

    Attributes:
        task: loss and data.
        loss: the task's training loss, as it is stacked and differentiated.
        settings: of the sampling.
        chance: training losses of networks that know nothing, see `chance_losses`.
        targets: predictions that the loss compares with targets, a sample.
        batch_effect: what it changes that samples are evaluated together; see `predictions.batch_effect`.
        wrong_gradient: what is wrong with its gradient; empty where nothing is.
    """

    task: Task
    loss: StackedLoss
    settings: ResolvedSettings
    chance: tuple[float, ...] = ()
    targets: float = 1.0
    batch_effect: float = 0.0
    wrong_gradient: str = ""

    @classmethod
    def of(
        cls,
        task: Task,
        layout: WeightLayout,
        settings: SamplingSettings,
        weights: Mapping[str, Tensor],
        device: torch.device,
        untrained: bool = True,
    ) -> "Objective":
        """Prepare and try the training loss at one snapshot, the same whichever process does so.

        Args:
            task: loss and data.
            layout: the sampled weights.
            settings: as they were asked for.
            weights: tensors by name, of any snapshot.
            device: where to compute.
            untrained: whether that snapshot is a run's first, which knows nothing yet.

        Raises:
            TaskError: the loss cannot be evaluated or differentiated there.
            SettingsError: batches are asked for of a loss that is no mean over samples.
        """
        some = ", ".join(layout.names[:5]) + (", ..." if len(layout.names) > 5 else "")
        advice = f"it has to be a function of the sampled weights: {some}."
        with failures_in_words("loss: cannot be differentiated on the training samples", advice):
            loss = with_micro_batch(StackedLoss(task.forward, layout, task.train.to(device).tensors, {}), weights)
            if loss.micro_batch is None:
                loss, anchor = stack_weights(loss, [weights])
                loss = loss.probe(anchor)
        chance = chance_losses(task, weights, device, loss.micro_batch, untrained)
        resolved = resolve(settings, layout.size, loss.micro_batch is None, loss.vectorised)
        where = task, weights, device, loss.micro_batch
        if resolved.batch_size is not None and loss.sample_bytes is None:  # of large sets it has to be one roughly
            # At a perfect fit all losses are zero, and so are those of batches.
            moved = {name: 1.1 * weights[name] + 0.01 for name in layout.names}
            effect = batch_effect(task, {**weights, **moved}, *where[2:])
            if effect > MEASUREMENT.batch_effect:
                raise SettingsError(
                    f"batch_size: expected none, got {resolved.batch_size}: the loss is no mean over samples (that of "
                    f"some together is off the mean over their quarters by {100 * effect:.2g} %), so that gradients of "
                    "batches are not the loss's."
                )
        wrong = wrong_gradient(task, layout, weights, device)
        return cls(task, loss, resolved, chance, count_targets(*where), batch_effect(*where), wrong)

    @property
    def layout(self) -> WeightLayout:
        """The sampled weights."""
        return self.loss.layout

    @property
    def large_set(self) -> bool:
        """Whether the data are so many that they are sampled."""
        return self.loss.sample_bytes is not None

    @property
    def metrics_stack(self) -> int:
        """How many snapshots without chains make a stack."""
        return rows_per_stack(self._curvature_loss())

    def llc_stack(self, scale: Scale | None = None) -> int:
        """How many snapshots are sampled as one stack.

        Args:
            scale: samples and batches; None where these are not chosen yet.
        """
        loss, batch_size = self.loss, self.settings.batch_size
        if scale is not None and self.large_set:
            loss, batch_size = loss.subset(scale.samples, scale.batch_size), scale.batch_size
        return max(1, rows_per_stack(loss, batch_size) // self.settings.chains)

    def fork(self) -> "Objective":
        """The same for another thread: recorded gradients have buffers that one thread at a time can use."""
        return replace(self, loss=replace(self.loss, plans={}))

    def metrics(
        self, weights: Sequence[Mapping[str, Tensor]], steps: Sequence[int], keys: Sequence[int] | None = None
    ) -> list[SnapshotMetrics]:
        """Losses, accuracies and curvature of several snapshots.

        Args:
            weights: tensors by name, of each snapshot.
            steps: the training step of each.
            keys: what the start of each power iteration is keyed by beside the seed; by default its step.
        """
        keys = steps if keys is None else keys
        looks = [self.look(tensors, step) for tensors, step in zip(weights, steps, strict=True)]
        if self.loss.micro_batch is not None:
            sizes = [self._large_size(tensors, key) for tensors, key in zip(weights, keys, strict=True)]
        else:
            loss, anchors = stack_weights(self._curvature_loss(), weights)
            index = None
            if loss.heavy:
                orders = loss.ranks(anchors)
                index = torch.stack([spread_ranks(order, loss.heavy, self._curvature_samples()) for order in orders])
            generators = [generator_for(self.settings.seed, key, 0, "curvature", loss.device) for key in keys]
            products = MEASUREMENT.large_set_products if self.large_set else MEASUREMENT.products
            more = (MEASUREMENT.eigenvalue_rtol, MEASUREMENT.max_products) if self.large_set else ()
            tops = top_eigenvalue(loss, anchors, normal_like(anchors, generators), products, index, *more).tolist()
            sizes = list(zip(anchors.square().sum(1).tolist(), tops, strict=True))
        return [
            replace(look, norm_squared=norm, top_curvature=top) for look, (norm, top) in zip(looks, sizes, strict=True)
        ]

    def look(self, weights: Mapping[str, Tensor], step: int) -> SnapshotMetrics:
        """Losses and accuracies of one snapshot, without its norm and curvature, which are NaN.

        Args:
            weights: tensors by name.
            step: the training step.
        """
        found = {**dict.fromkeys(("val_loss", "val_accuracy")), **self._losses(weights)}
        return SnapshotMetrics(step, norm_squared=math.nan, top_curvature=math.nan, **found)

    def estimate(
        self,
        weights: Sequence[Mapping[str, Tensor]],
        metrics: Sequence[SnapshotMetrics],
        scale: Scale,
        keys: Sequence[int] | None = None,
    ) -> list[LLCEstimate]:
        """λ̂ of several snapshots at once, see `sample`."""
        return [estimate for estimate, _ in self.sample(weights, metrics, scale, keys)]

    def sample(
        self,
        weights: Sequence[Mapping[str, Tensor]],
        metrics: Sequence[SnapshotMetrics],
        scale: Scale,
        keys: Sequence[int] | None = None,
        sample_losses: bool = False,
    ) -> list[tuple[LLCEstimate, Traces | None]]:
        """λ̂ of several snapshots at once, and the draws behind it; None where a snapshot was not sampled.

        Args:
            weights: tensors by name, of each snapshot.
            metrics: of the same snapshots.
            scale: nβ and γ.
            keys: what the noise of each is keyed by beside the seed; by default its step.
            sample_losses: whether the traces have the losses of single samples.
        """
        found: dict[int, tuple[LLCEstimate, Traces | None]] = {}
        usable = []
        for s, known in enumerate(metrics):
            reason = None
            if not known.finite:
                reason = "the weights, the loss or its curvature at the snapshot are not finite"
            elif scale.curvature is not None and not known.top_curvature > 0:
                reason = "the loss has no curvature at the snapshot, which nβ could follow"
            if reason is None:
                usable.append(s)
            else:
                found[s] = unusable(reason, self.settings, scale.nbeta, scale.localization), None
        if usable:
            keys = [metrics[s].step if keys is None else keys[s] for s in usable]
            some = [weights[s] for s in usable], [metrics[s] for s in usable]
            found |= zip(usable, self._sample(*some, scale, keys, sample_losses), strict=True)
        return [found[s] for s in range(len(weights))]

    def _sample(
        self,
        weights: Sequence[Mapping[str, Tensor]],
        metrics: Sequence[SnapshotMetrics],
        scale: Scale,
        keys: Sequence[int],
        sample_losses: bool,
    ) -> list[tuple[LLCEstimate, Traces]]:
        """λ̂ of snapshots whose loss and curvature are finite."""
        loss, settings, nbeta, localization = self.loss, self.settings, scale.nbeta, scale.localization
        whole: StackedLoss | None = None
        if self.large_set:
            if settings.batch_size is None and scale.batch_size is not None:
                whole = loss.subset(scale.samples)
            loss = loss.subset(scale.samples, scale.batch_size)
            settings = replace(settings, batch_size=scale.batch_size)
        tops = [known.top_curvature for known in metrics]
        factors = [1.0] * len(tops)
        if scale.curvature is not None:
            # λ̂ = nβ·(E[L] − L*) stays what it is when the loss is multiplied and nβ divided by the same factor.
            factors = [scale.curvature / top for top in tops]
            weights = [{**tensors, FACTOR: torch.tensor(f)} for tensors, f in zip(weights, factors, strict=True)]
            tops = [scale.curvature] * len(tops)
        fitting = [step_size(nbeta, localization, top) for top in tops]
        sizes = [settings.step_size or size for size in fitting]

        # Off a minimum, where snapshots of large sets trained on minibatches nearly always are, λ_c is the measure too.
        centred = scale.curvature is not None or self.large_set
        needed = partial(needed_centred if centred and settings.chains > 1 else needed_plain, rtol=settings.rtol)
        if self.large_set:
            relaxation = partial(settings.kernel.relaxation, localization=localization)
            needed = partial(needed_of_large_sets, needed=needed, relaxation=relaxation)
        if loss.micro_batch is None:
            stacked, anchors = stack_weights(loss, weights)
            if whole is not None:
                whole = replace(whole, fixed=stacked.fixed)
            of_snapshots = stacked, anchors, keys, settings, nbeta, localization, sizes
            traces = sample(*of_snapshots, needed, whole, sample_losses, fitting)
        else:
            traces = [
                sample_large(loss, tensors, key, settings, nbeta, localization, size, needed, sample_losses, fits)
                for tensors, key, size, fits in zip(weights, keys, sizes, fitting, strict=True)
            ]
        estimates = [
            summarise(
                # ½nβ·Var ℓ is quadratic in the loss, but linear in nβ.
                trace if trace.fluctuation is None else replace(trace, fluctuation=trace.fluctuation / factor),
                settings,
                n=self.task.n,
                loss=known.train_loss,
                norm=math.sqrt(known.norm_squared),
                dimension=loss.layout.size,
                nbeta=nbeta * factor,
                localization=localization,
                chance=self.chance,
                by_centred=centred,
                unseen_per_nat=self._unseen_per_nat(scale),
                batch_effect=self.batch_effect,
                wrong_gradient=self.wrong_gradient,
            )
            for known, trace, factor in zip(metrics, traces, factors, strict=True)
        ]
        return list(zip(estimates, traces, strict=True))

    def _unseen_per_nat(self, scale: Scale) -> float:
        """By how much λ is lower on the samples that are used than on all n, relative to it, over λ itself.

        About λ/(S·m) on S samples of m targets each; see `tuning.Pilot`.
        """
        stored = len(self.loss.tensors[0])
        used = min(scale.samples or stored, stored)
        return max(0.0, 1 - used / self.task.n) / (used * self.targets)

    def _losses(self, weights: Mapping[str, Tensor]) -> dict[str, float | None]:
        """Losses and accuracies of one snapshot; of large sets on a fixed random subset, with standard errors."""
        loss, task = self.loss, self.task
        if not self.large_set:
            whole = loss.micro_batch is None or loss.micro_batch >= len(loss.tensors[0])
            return measure_losses(task, weights, loss.device, None if whole else loss.micro_batch)
        most = self._evaluated_samples()
        train = Batch(tuple(tensor[:most] for tensor in loss.tensors), task.train.structure)
        val = None if task.val is None else task.val.take(shuffled(len(task.val))[:most])
        parts = max(MEASUREMENT.parts, math.ceil(len(train) * loss.sample_bytes / MEMORY.part_bytes))
        few = replace(task, train=train, val=val)
        return measure_losses(few, weights, loss.device, max(1, len(train) // parts), with_errors=True)

    def _large_size(self, weights: Mapping[str, Tensor], key: int) -> tuple[float, float]:
        """‖w*‖² and top curvature of one large network."""
        loss = self.loss.subset(self._curvature_samples()) if self.large_set else self.loss
        network = LargeNetwork(loss, weights)
        generator = generator_for(self.settings.seed, key, 0, "curvature", loss.device)
        return network.norm_squared(), top_eigenvalue_large(network, generator)

    def _curvature_loss(self) -> StackedLoss:
        """The loss from which the curvature is taken, without the choice among its samples."""
        if not self.large_set:
            return self.loss
        size, available = self._curvature_samples(), self._evaluated_samples()
        if not self.loss.is_sample_mean or size >= available:
            return self.loss.subset(size)
        return self.loss.subset(available, size, size // MEASUREMENT.heavy_share)

    def _curvature_samples(self) -> int:
        """How many samples of a large set the curvature is measured on."""
        return min(
            max(MEASUREMENT.curvature_samples, MEASUREMENT.curvature_bytes // self.loss.sample_bytes),
            MEASUREMENT.max_curvature_samples,
        )

    def _evaluated_samples(self) -> int:
        """How many samples of a large set losses and accuracies are measured on."""
        return min(
            max(MEASUREMENT.evaluated_samples, MEASUREMENT.evaluated_bytes // self.loss.sample_bytes),
            len(self.loss.tensors[0]),
        )


def stack_weights(loss: StackedLoss, weights: Sequence[Mapping[str, Tensor]]) -> tuple[StackedLoss, Tensor]:
    """The loss of several snapshots, and their flat weights [S, D].

    Args:
        loss: of the same network, of whatever snapshots.
        weights: tensors by name, of each snapshot.
    """
    flat = torch.stack([loss.layout.flatten(tensors) for tensors in weights]).to(loss.device)
    names = [name for name in weights[0] if name not in loss.layout.names]
    fixed = {name: torch.stack([as_float(tensors[name]) for tensors in weights]).to(loss.device) for name in names}
    return replace(loss, fixed=fixed), flat
