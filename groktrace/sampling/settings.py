"""What can be chosen about the sampling, checked once, here."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypedDict

from groktrace.errors import SettingsError
from groktrace.sampling.kernels import find_kernel
from groktrace.sampling.kernels.base import Kernel

NAMED_NBETA = ("wbic", "curvature")


@dataclass(frozen=True)
class SamplingSettings:
    """How the posterior around a snapshot is sampled.

    Attributes:
        method: "baoab" or "leimkuhler_matthews" (Langevin dynamics with momenta, or with averaged noise in their
            place: Leimkuhler & Matthews 2013, arXiv 1203.5428), "sgld" (Welling & Teh 2011, as published), or a kernel
            of your own (`groktrace.sampling.kernels.base.Kernel`); None for "baoab", but "leimkuhler_matthews" in
            large networks, where momenta would take another vector a chain.
        nbeta: nβ, inverse temperature times sample count; "wbic" for n/log n; "curvature" to derive it from
            `resolution` at each snapshot anew; None to derive it once for all, or at each snapshot where the top
            curvature falls away after the training set is fitted, as under cross-entropy.
        localization: γ, the pull towards w*; None to derive it from `locality`.
        locality: wanted distance of the chains from w*, relative to ‖w*‖. None for 0.22, or less where the chains would
            leave the basin.
        resolution: κ = nβ·h_max/γ; curvatures down to h_max/κ count. None for 10, or 100 where nβ follows each
            snapshot's curvature: there transitions show at flatter directions.
        chains: independent chains a snapshot; the centred estimate needs two. None for two, and up to 16 where the
            network is so small that they cost little more than one.
        draws: draws a chain after burn-in; None to grow until `rtol` is met.
        burn_in: discarded steps a chain; None for a relaxation time of the flat directions, or for 2.5 in large
            networks, whose chains start at w*.
        step_size: ε; None to derive it from each snapshot's curvature.
        samples: of the stored ones, how many the posterior is of; None for all, or of large sets for as many as the
            snapshots need.
        batch_size: samples a gradient; None for all, or of large sets for as many as keep their noise below 2 %.
        rtol: wanted standard error relative to the estimate, where `draws` is None.
        parameters: names, or patterns such as "blocks.0.*", of the weights that move, for a refined LLC; or parts of
            them, such as "blocks.0.attn.qkv[0:64]" or "head.weight[:, 3]", beside which the rest of the tensor stays
            fixed. None for all that train at some time of the run, at every snapshot, so that snapshots stay
            comparable.
        seed: of every random number drawn.

    Raises:
        SettingsError: a value is outside what it may be.
    """

    method: str | Kernel | None = None
    nbeta: float | Literal["wbic", "curvature"] | None = None
    localization: float | None = None
    locality: float | None = None
    resolution: float | None = None
    chains: int | None = None
    draws: int | None = None
    burn_in: int | None = None
    step_size: float | None = None
    samples: int | None = None
    batch_size: int | None = None
    rtol: float = 0.02
    parameters: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        kernel = None if self.method is None else find_kernel(self.method)
        if self.nbeta not in NAMED_NBETA:
            _positive("nbeta", self.nbeta, " or 'wbic' or 'curvature'")
        for name in ("localization", "locality", "resolution", "step_size", "rtol"):
            _positive(name, getattr(self, name))
        for name, least in (
            ("chains", 1),
            ("draws", 2),
            ("burn_in", 0),
            ("samples", 2),
            ("batch_size", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise SettingsError(f"{name}: expected a whole number of at least {least}, got {value!r}.")
        if isinstance(self.parameters, str):
            object.__setattr__(self, "parameters", (self.parameters,))
        if self.parameters is not None:
            names = tuple(self.parameters)
            if not names or not all(isinstance(name, str) for name in names):
                raise SettingsError(f"parameters: expected names or patterns of weights, got {self.parameters!r}.")
            object.__setattr__(self, "parameters", names)
        if kernel is not None and kernel.vanilla and None in (self.step_size, self.draws, self.burn_in):
            raise SettingsError(
                f"method: '{kernel.name}' takes its settings as given; set step_size, draws and burn_in (and nbeta and "
                "localization), or use method='baoab', which finds them."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(replace(self, method=None))
        return {**values, "method": None if self.method is None else find_kernel(self.method).name}


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(SamplingSettings):
    """Settings whose kernel and number of chains are known; what else is None is found at each snapshot.

    Attributes:
        method: of the steps.
        chains: a snapshot.
    """

    method: str | Kernel = field()  # required here
    chains: int = field()

    @property
    def kernel(self) -> Kernel:
        """The one that `method` names."""
        return find_kernel(self.method)


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingSettings`, as keywords."""

    method: str | Kernel | None
    nbeta: float | Literal["wbic", "curvature"] | None
    localization: float | None
    locality: float | None
    resolution: float | None
    chains: int | None
    draws: int | None
    burn_in: int | None
    step_size: float | None
    samples: int | None
    batch_size: int | None
    rtol: float
    parameters: Sequence[str] | str | None
    seed: int


def _positive(name: str, value: Any, more: str = "") -> None:
    """Refuse anything but None and finite positive numbers."""
    if value is None and name != "rtol":
        return
    number = None if isinstance(value, bool) or not isinstance(value, int | float) else value
    if number is None or not (math.isfinite(number) and number > 0):
        raise SettingsError(f"{name}: expected a positive number{more}, got {value!r}.")


# arXiv 2603.01192, as published.
PAPER = SamplingSettings(
    method="sgld",
    nbeta=30.0,
    localization=5.0,
    step_size=1e-4,
    chains=3,
    burn_in=100,
    draws=600,
    batch_size=128,
)
