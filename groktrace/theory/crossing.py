"""λ of a loss in normal-crossing form, the shape that every analytic loss takes after resolving its singularities."""

from collections.abc import Iterable

from groktrace.errors import SettingsError
from groktrace.theory.arguments import whole
from groktrace.theory.result import ClosedForm


def normal_crossing_llc(exponents: Iterable[int]) -> ClosedForm:
    """λ = min_i 1/(2k_i) of the loss L(w) = Π_i w_i^{2k_i} at w = 0.

    Args:
        exponents: k_i, half the power of each weight; one or more, each at least 1.

    Returns:
        λ, with multiplicity the number of weights that attain it. Where that is more than 1, estimates differ from λ by
        terms in 1/log(nβ).

    Raises:
        SettingsError: no exponent, or one that is no whole number or below 1.

    Source: Watanabe 2009, Algebraic Geometry and Statistical Learning Theory, with a prior that is positive at 0.
    """
    given = list(exponents) if isinstance(exponents, Iterable) else []
    if not given:
        raise SettingsError(f"exponents: expected one or more whole numbers, got {exponents!r}.")
    powers = [whole(f"exponents[{index}]", exponent, 1) for index, exponent in enumerate(given)]
    top = max(powers)
    return ClosedForm(
        llc=1 / (2 * top),
        multiplicity=powers.count(top),
        formula=f"min_i 1/(2k_i) = 1/(2·{top})",
        conditions="L = Π w_i^{2k_i} near w = 0, prior positive there",
        source="Watanabe 2009, Algebraic Geometry and Statistical Learning Theory",
    )
