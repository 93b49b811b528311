"""What the chains of a snapshot drew, kept on request beside the results: losses, and those of single samples."""

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from groktrace.analysis.measurement.llc import LLCEstimate
from groktrace.analysis.measurement.measure import Objective
from groktrace.analysis.results.store import latest_file
from groktrace.analysis.results.trajectory import Point
from groktrace.errors import GroktraceError, RunError, SettingsError
from groktrace.records import Record, read_record
from groktrace.run import layout
from groktrace.run.files import parse_json, read_metadata, read_tensors, sync_folder, write_tensors
from groktrace.run.layout import Step
from groktrace.run.store import Run
from groktrace.sampling.network import shuffled
from groktrace.sampling.traces import Traces

if TYPE_CHECKING:
    from arviz import InferenceData

Keep = Literal["draws", "losses"]
_ABOUT = "draws"  # among a file's metadata
_TENSORS = ("delta_loss", "distance", "centred")
_SETTINGS = ("step", "nbeta", "localization", "step_size", "burn_in", "loss", "excess")
_LOSSES = ("sample_losses", "sample_losses_at_snapshot", "samples")


@dataclass(frozen=True, eq=False)
class Draws:
    """What the chains of one snapshot drew after their burn-in: C chains, T draws a chain, N samples.

    Attributes:
        step: of the snapshot.
        nbeta: nβ.
        localization: γ.
        step_size: ε.
        burn_in: discarded steps a chain.
        loss: L(w*), the training loss at the snapshot.
        delta_loss: L(w) − L(w*), [C, T]; nβ times its mean, less `excess`, is λ̂.
        distance: ‖w − w*‖, [C, T].
        centred: what λ_c is the mean of, less `excess`, [C, T]; of large networks, [pairs of chains, T]: see
            `Traces.centred_draws`, all moved by what their mean is off that; of a single chain there are none.
        sample_losses: ℓ_i(w), the loss of sample i alone, [C, T, N]; None where these were not kept.
        sample_losses_at_snapshot: ℓ_i(w*), [N].
        samples: which of the stored training samples they are, [N].
        excess: what the noise of minibatches adds to λ̂ and λ_c, as far as it was taken off.
    """

    step: int
    nbeta: float
    localization: float
    step_size: float
    burn_in: int
    loss: float
    delta_loss: np.ndarray
    distance: np.ndarray
    centred: np.ndarray
    sample_losses: np.ndarray | None = None
    sample_losses_at_snapshot: np.ndarray | None = None
    samples: np.ndarray | None = None
    excess: float = 0.0

    @classmethod
    def of(cls, objective: Objective, step: int, estimate: LLCEstimate, traces: Traces | None) -> "Draws | None":
        """The draws behind an estimate; None where it rests on none.

        Args:
            objective: that was measured.
            step: of the snapshot.
            estimate: of its λ.
            traces: its chains.
        """
        if traces is None or estimate.llc is None or estimate.step_size is None or estimate.loss is None:
            return None
        losses: dict[str, np.ndarray] = {}
        centred = traces.centred_draws.double()
        if traces.sample_losses is not None and traces.anchor_sample_losses is not None:
            count = traces.sample_losses.shape[2]
            order = shuffled(len(objective.loss.tensors[0])) if objective.large_set else torch.arange(count)
            found = traces.sample_losses.transpose(0, 1), traces.anchor_sample_losses, order[:count]
            losses = {name: tensor.numpy() for name, tensor in zip(_LOSSES, found, strict=True)}
        return cls(
            step,
            estimate.nbeta,
            estimate.localization,
            estimate.step_size,
            estimate.burn_in,
            estimate.loss,
            traces.delta_loss.double().T.numpy() / estimate.nbeta,
            (traces.restraint.double() / estimate.localization).sqrt().T.numpy(),
            (centred + (traces.centred - centred.mean())).T.numpy(),
            **losses,
            excess=float(traces.delta_loss.mean()) - estimate.llc,
        )

    @property
    def llc(self) -> float:
        """λ̂, from the draws."""
        return self.nbeta * float(self.delta_loss.mean()) - self.excess

    @property
    def llc_centred(self) -> float | None:
        """λ_c, from the draws; None of a single chain."""
        return float(self.centred.mean()) - self.excess if self.centred.size else None

    def to_inference_data(self) -> "InferenceData":
        """The same for ArviZ: `llc`, `distance`, and `sample_loss` if kept.

        The first is nβ(L(w) − L(w*)), whose mean, less `excess` among the attributes, is λ̂.

        Raises:
            GroktraceError: ArviZ is not installed.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # version 0.23 announces version 1
                import arviz
        except ImportError as failure:
            raise GroktraceError("to_inference_data needs ArviZ: pip install 'groktrace[arviz]'") from failure
        groups: dict[str, dict[str, np.ndarray]] = {
            "posterior": {"llc": self.nbeta * self.delta_loss, "distance": self.distance}
        }
        named: dict[str, Any] = {}
        if self.sample_losses is not None and self.sample_losses_at_snapshot is not None:
            groups["posterior"]["sample_loss"] = self.sample_losses
            groups["constant_data"] = {"sample_loss_at_snapshot": self.sample_losses_at_snapshot}
            dims = {"sample_loss": ["obs_id"], "sample_loss_at_snapshot": ["obs_id"]}
            named = {"coords": {"obs_id": self.samples}, "dims": dims}
        make: Any = arviz.from_dict  # of version 1 and later it takes the groups as one
        data = make(**groups, **named) if hasattr(arviz, "InferenceData") else make(groups, **named)
        data["posterior"].attrs.update({name: getattr(self, name) for name in _SETTINGS})
        return data


@dataclass(frozen=True)
class _About(Record):
    """What a file of draws says of itself: see `Draws`, and which snapshot and λ̂ it is of."""

    snapshot: str
    llc: float
    step: Step
    nbeta: float
    localization: float
    step_size: float
    burn_in: int
    loss: float
    sampled: bool
    excess: float = 0.0

    @classmethod
    def read(cls, path: Path, metadata: dict[str, str]) -> "_About":
        try:
            return read_record(cls, parse_json(metadata.get(_ABOUT, "null").encode()))
        except (ValueError, RecursionError) as failure:
            raise RunError(f"{path}: damaged ({failure}); remove it and analyse again.") from failure


@dataclass(frozen=True)
class KeptDraws:
    """The draws that an analysis keeps.

    Attributes:
        run: analysed.
        folder: of the results.
        what: draws alone, or also the losses of single samples.
    """

    run: Run
    folder: Path
    what: Keep

    @classmethod
    def for_request(cls, run: Run, folder: Path, what: Keep | None, objective: Objective) -> "KeptDraws | None":
        """What was asked for; None for nothing.

        Raises:
            SettingsError: there is no such thing to keep.
        """
        if what not in (None, "draws", "losses"):
            raise SettingsError(f"keep: expected 'draws' or 'losses', got {what!r}.")
        if what == "losses" and not objective.loss.is_sample_mean:
            raise SettingsError(
                "keep: the loss is no mean over samples of losses of their own (padding that is left out, statistics "
                "of the batch), or cannot be evaluated on one sample; 'draws' keeps the rest."
            )
        return None if what is None else cls(run, folder, what)

    def behind(self, points: dict[str, Point], wanted: Iterable[str]) -> dict[str, Point]:
        """Those of some known points whose draws are kept, or that have none.

        Args:
            points: by the fingerprints of their snapshots.
            wanted: the fingerprints to look at.
        """
        return {name: points[name] for name in wanted if name in points and not self._lacks(points[name], name)}

    def _lacks(self, point: Point, fingerprint: str) -> bool:
        path = draws_path(self.folder, point.step)
        if point.llc is None:  # there are none
            return False
        try:
            about = _About.read(path, _fetched(self.run, path, read_metadata))
        except RunError:
            return True
        lacking = self.what == "losses" and not about.sampled
        return lacking or about.snapshot != fingerprint or about.llc != point.llc

    def take(self, point: Point, draws: Draws | None, fingerprint: str) -> Point:
        """Keep the draws behind a point, whole or not at all; returns the point.

        Args:
            point: measured.
            draws: behind it; None where there are none.
            fingerprint: of its snapshot.
        """
        if draws is not None and point.llc is not None:
            path = draws_path(self.folder, point.step)
            path.parent.mkdir(exist_ok=True)
            named = {name: getattr(draws, name) for name in (*_TENSORS, *_LOSSES)}
            tensors = {name: torch.from_numpy(array.copy()) for name, array in named.items() if array is not None}
            plain = {name: value for name, value in vars(draws).items() if name not in named}
            about = _About(fingerprint, point.llc, **plain, sampled=draws.samples is not None)
            said = {"groktrace": str(layout.FORMAT_VERSION), _ABOUT: json.dumps(about.to_dict())}
            write_tensors(path, tensors, said)
            sync_folder(path.parent)
            self.run.publish(path)
        return point


def draws_path(folder: Path, step: int) -> Path:
    """Where the draws of a snapshot lie.

    Args:
        folder: of the results.
        step: of the snapshot.
    """
    return folder / layout.DRAWS_FOLDER / layout.snapshot_path(Path(), step).name


def load_draws(run: Run, step: int) -> Draws:
    """What the chains drew at a snapshot, in the analysis that was finished last.

    Args:
        run: opened.
        step: of the snapshot.

    Raises:
        RunError: they were not kept, are of another snapshot than is there now, or damaged.
    """
    path = draws_path(latest_file(run).parent, step)
    if not path.exists():
        kept = sorted(int(file.stem) for file in path.parent.glob("*.safetensors") if file.stem.isdecimal())
        have = f"those of steps {kept[0]} to {kept[-1]} are" if kept else "none are"
        raise RunError(
            f"{run.name}: the draws of step {step} were not kept; {have}. To keep them: "
            f"groktrace analyze {run.name} --keep draws (or losses), with the options of that analysis."
        )
    tensors, metadata = _fetched(run, path, read_tensors)
    about = _About.read(path, metadata)
    there = {snapshot.fingerprint() for snapshot in run.snapshots if snapshot.step == step}
    if about.step != step or about.snapshot not in there:
        raise RunError(f"{path}: is of another snapshot than is there now; analyse again.")
    expected = (*_TENSORS, *_LOSSES) if about.sampled else _TENSORS
    arrays = {name: tensors[name].numpy() for name in expected if name in tensors}
    count = arrays["samples"].shape if "samples" in arrays else ()
    shape = arrays["delta_loss"].shape if "delta_loss" in arrays else ()
    shapes = [shape, shape, (*arrays["centred"].shape[:1], *shape[1:]) if "centred" in arrays else ()]
    shapes += [(*shape, *count), count, count]
    if len(shape) != 2 or any(arrays[name].shape != wanted for name, wanted in zip(arrays, shapes, strict=False)):
        raise RunError(f"{path}: damaged (its tensors do not fit together); remove it and analyse again.")
    named = {name: getattr(about, name) for name in _SETTINGS}
    return Draws(**named, **arrays)


def _fetched(run: Run, path: Path, read: Any) -> Any:
    """What a reader finds in a file, which may have to be fetched."""
    if run.remote is not None:
        try:
            run.remote.fetch(path)
        except OSError as failure:
            raise RunError(f"{run.name}: draws cannot be fetched ({failure}).") from failure
    return read(path)
