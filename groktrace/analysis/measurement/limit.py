"""The learning coefficient itself: λ̂ where nβ is so large that it no longer depends on it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from groktrace.analysis.measurement.measure import stack_weights
from groktrace.errors import SettingsError
from groktrace.records import Record
from groktrace.run.task import failures_in_words
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import ResolvedSettings


@dataclass(frozen=True)
class LadderPoint(Record):
    """λ̂ at one nβ.

    Attributes:
        nbeta: nβ.
        llc: λ̂.
        stderr: its standard error, from populations of particles that share nothing, or from chains.
    """

    nbeta: float
    llc: float
    stderr: float


@dataclass(frozen=True)
class LearningCoefficient(Record):
    """The learning coefficient λ of a basin: the limit of λ̂ at large nβ.

    Attributes:
        llc: λ; None where λ̂ still depends on nβ where the ladder ends.
        low, high: its 95 % interval; None with it.
        reached: whether there is a limit.
        reasons: why there is none, in words.
        plateau: least and largest nβ between which λ̂ nears the limit as theory says, by (m − 1)/log nβ and a
            power of 1/nβ: at the least of them it may be far from it still.
        multiplicity: the probability that λ has multiplicity 1, 2, ..., as λ̂ approaches it like λ − (m − 1)/log nβ
            (Watanabe 2009); empty where there is no limit, or chains found it.
        ladder: λ̂ at each nβ, ascending.
        localization: γ, strength of the pull towards w*.
        loss: L(w*).
        minimum: L*, the loss at the posterior's mode at the largest nβ.
        distance: of the mode from w*, relative to ‖w*‖; None where that is 0.
        gradients: how often the gradients of all particles were taken, or those of chains and of the descent before.
    """

    llc: float | None
    low: float | None
    high: float | None
    reached: bool
    reasons: tuple[str, ...]
    plateau: tuple[float, float] | None
    multiplicity: tuple[float, ...]
    ladder: tuple[LadderPoint, ...]
    localization: float
    loss: float
    minimum: float
    distance: float | None
    gradients: int


def refuse_scale(settings: ResolvedSettings) -> None:
    """Refuse what chooses one nβ.

    Args:
        settings: as they were asked for.

    Raises:
        SettingsError: one of these is given.
    """
    if used := [name for name in ("nbeta", "resolution", "step_size") if getattr(settings, name) is not None]:
        raise SettingsError(f"{used[0]}: a limit has none; of the settings give localization, locality, rtol or seed.")


def in_double(loss: StackedLoss, weights: Mapping[str, Tensor]) -> tuple[StackedLoss, Tensor]:
    """The loss of one row in float64, and w*, [D].

    Args:
        loss: of any rows.
        weights: tensors by name.

    Raises:
        TaskError: it cannot be computed in double precision.
    """
    with failures_in_words("loss: cannot be computed in double precision", "a limit needs it."):
        double = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        tensors = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in loss.tensors)
        loss, _ = stack_weights(replace(loss, tensors=tensors, plans={}), [double])
        anchor = loss.layout.flatten(double).double()
        loss.gradients(anchor[None])
    return loss, anchor
