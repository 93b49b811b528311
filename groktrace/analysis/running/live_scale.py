"""nβ and γ while a recording goes on: a function of the snapshots so far, whenever these are looked at."""

from groktrace.analysis.measurement.measure import SnapshotMetrics
from groktrace.analysis.measurement.pilot import choose_scale
from groktrace.analysis.running.session import Session
from groktrace.errors import SettingsError
from groktrace.sampling.calibration import Scale

# nβ or γ that the snapshots call for may differ by this factor from those in use, until all is measured anew.
RESCALE = 1.5


class LiveScale:
    """Chooses nβ and γ, and chooses again once the snapshots so far call for others.

    Args:
        session: an open analysis.
        step: of the last snapshot that an earlier choice rests on, by another process; None where there was none.
        scale: that choice.

    Attributes:
        metrics: of the snapshots so far, by step.
    """

    def __init__(self, session: Session, step: int | None = None, scale: Scale | None = None) -> None:
        self._session, self._chosen = session, (step, scale)
        self._among: dict[int, SnapshotMetrics] = {}
        self._typical: Scale | None = None
        self.metrics: dict[int, SnapshotMetrics] = {}

    @property
    def step(self) -> int | None:
        """Of the last snapshot that the choice rests on; None where there is none yet."""
        return next(reversed(self._among), None)

    def add(self, found: dict[int, SnapshotMetrics]) -> None:
        """Take more snapshots, one after another: where there were looks in between makes no difference.

        Args:
            found: metrics by step, ascending.
        """
        for step, known in found.items():
            self.metrics[step] = known
            try:
                wanted = choose_scale(self._session.objective, list(self.metrics.values()))
            except SettingsError:  # nothing finite, or no curvature yet
                continue
            if self._typical is None or _differ(wanted, self._typical):
                self._typical, self._among = wanted, dict(self.metrics)

    def choose(self) -> Scale | None:
        """nβ and γ to measure with now; None where the snapshots do not tell yet."""
        session = self._session
        kept, settings = session.kept_scale(), session.objective.settings
        if kept is not None:
            return kept
        given = settings.nbeta not in (None, "curvature") and settings.localization is not None
        # Of large sets, samples and batches are still to be chosen, in the end from the whole run.
        if (given or session.own_scale() is not None) and not session.objective.large_set:
            return session.fix_scale(self.metrics)
        if self._chosen[0] != self.step:
            self._chosen = self.step, session.scale_of(self._among)
        return self._chosen[1]


def _differ(one: Scale, other: Scale) -> bool:
    """Whether nβ or γ differ by half, or one nβ follows the curvature and the other does not.

    Both are for the same locality: which one suits the network has no part in it. Where nβ follows the curvature, it is
    nβh that snapshots are measured at, however much h, and nβ with it, has changed since.
    """
    if (one.curvature is None) != (other.curvature is None):
        return True
    wanted, used = ((scale.nbeta * (scale.curvature or 1.0), scale.localization) for scale in (one, other))
    return any(max(a / b, b / a) > RESCALE for a, b in zip(wanted, used, strict=True))
