"""What a closed form returns."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ClosedForm:
    """A learning coefficient known exactly, with what it rests on.

    Attributes:
        llc: λ; dimensionless, half a count of directions where the zero set is a manifold.
        multiplicity: m, the order of λ's pole: the free energy is n·L + λ·log n − (m − 1)·log log n; None where the
            source leaves it open.
        formula: the formula in symbols, then with the numbers put in.
        conditions: what has to hold for the value to hold.
        source: the publication, or how the formula was checked.
    """

    llc: float
    multiplicity: int | None
    formula: str
    conditions: str
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Bracket:
    """Two values that a learning coefficient lies between.

    Attributes:
        lower: least λ.
        upper: greatest λ.
        formula: the bounds in symbols, then with the numbers put in.
        conditions: what has to hold for the bounds to hold.
        source: the publication.
    """

    lower: float
    upper: float
    formula: str
    conditions: str
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
