"""λ of quadratic networks f(x) = V·(Wᵀx)², W ∈ R^{d×K}, V ∈ R^{p×K}, under squared error.

Each neuron contributes the atom v ⊗ wwᵀ, a p-tuple of quadratic forms, so the network is a sum of K such atoms and λ is
half the dimension of the set of functions that K atoms reach: half the rank of the Jacobian at a generic network.
"""

from groktrace.theory.arguments import whole
from groktrace.theory.result import Bracket, ClosedForm

_PAPER = "Cullen, Estan-Ruiz, Danait & Li 2026, Grokking as a phase transition (arXiv 2603.01192)"
_SECANT = "Abo & Brambilla 2009, Secant varieties of Segre-Veronese varieties P^m × P^n embedded by O(1,2)"


def quadratic_llc(
    input_dim: int,
    output_dim: int,
    width: int,
    n_train: int | None = None,
    *,
    effective_width: int | None = None,
    centred: bool = True,
) -> ClosedForm:
    """λ = ½·min(K(d + p − 1), p·d(d + 1)/2) of a generic quadratic network whose inputs span R^d.

    Each neuron has d + p weights and one symmetry (its scale, moved between w and v); all quadratic maps together have
    p·d(d + 1)/2 coefficients. Architectures in which K generic atoms are known to reach less than this count (one
    output; very many outputs; two sporadic families) get the dimension that they do reach.

    Args:
        input_dim: d, the dimension that the inputs span.
        output_dim: p, number of outputs.
        width: K, number of neurons.
        n_train: n, number of training samples in general position, which leave at most p(n − 1) directions; None for
            enough of them not to matter.
        effective_width: K_eff, how many of the K atoms are non-zero and distinct, where that is fewer than `width`; the
            value is then a lower reference.
        centred: whether the loss ignores a constant per output, so that n samples count for n − 1.

    Returns:
        λ, of multiplicity 1 (left open with `effective_width`).

    Raises:
        SettingsError: an argument is no whole number or outside its range.

    Source: arXiv 2603.01192, generic under- and over-parameterised quadratic networks; defective architectures after
    Abo & Brambilla 2009, Secant varieties of Segre-Veronese varieties P^m × P^n embedded by O(1,2), Experimental
    Mathematics 18(3), who conjecture that their list is complete.
    """
    d, p = whole("input_dim", input_dim, 1), whole("output_dim", output_dim, 1)
    K = whole("width", width, 1)
    if effective_width is not None:
        K = whole("effective_width", effective_width, 1, K, "the width")
    coefficients = d * (d + 1) // 2
    terms = {f"{'K' if effective_width is None else 'K_eff'}(d + p − 1)": K * (d + p - 1)}
    terms["p·d(d + 1)/2"] = p * coefficients
    features = coefficients
    if n_train is not None:
        n = whole("n_train", n_train, 1)
        features = min(coefficients, n - 1 if centred else n)
        terms["p(n − 1)" if centred else "pn"] = p * (n - 1 if centred else n)
    dimension = _reached(d, p, K, features)
    conditions = "true network generic: all K atoms v ⊗ wwᵀ non-zero and in general position; inputs span R^d"
    if n_train is not None:
        conditions += "; training samples in general position, an upper bound where the terms nearly tie"
    if effective_width is not None:
        conditions += (
            f"; {K} of {width} atoms non-zero and distinct: a lower reference, as dead atoms sit on a singular stratum "
            "and may add to it"
        )
    if dimension < min(terms.values()):
        conditions += "; K atoms of this shape reach less than the count of weights (a defective architecture)"
    return ClosedForm(
        llc=dimension / 2,
        multiplicity=1 if effective_width is None else None,
        formula=_formula(terms, dimension),
        conditions=conditions,
        source=f"{_PAPER}; {_SECANT}" if dimension < min(terms.values()) else _PAPER,
    )


def modular_addition_llc(p: int, width: int, n_train: int | None = None) -> ClosedForm:
    """λ = ½·min(K(3p − 2), p(n − 1)) of a generic quadratic network on one-hot pairs.

    Pairs [e_a ; e_b] do not span R^{2p}: both halves sum to 1, so the span has dimension 2p − 1 and each neuron has one
    more symmetry, w_a → w_a + s, w_b → w_b − s. On n training pairs with centred residuals the outputs have at most
    p(n − 1) directions.

    Args:
        p: the modulus; inputs are 2p wide, outputs p.
        width: K, number of neurons.
        n_train: n, number of distinct training pairs; all p² where not given.

    Returns:
        λ, of multiplicity 1.

    Raises:
        SettingsError: an argument is no whole number or outside its range.

    Source: the count of arXiv 2603.01192 with the span of the data in place of 2p; checked by exact Jacobian ranks.
    """
    p, K = whole("p", p, 2), whole("width", width, 1)
    n = p * p if n_train is None else whole("n_train", n_train, 1, p * p, "all pairs")
    terms = {"K(3p − 2)": K * (3 * p - 2), "p(n − 1)": p * (n - 1)}
    dimension = _reached(2 * p - 1, p, K, n - 1)
    return ClosedForm(
        llc=dimension / 2,
        multiplicity=1,
        formula=_formula(terms, dimension),
        conditions=(
            "one-hot pairs in which every symbol occurs, residuals centred over the batch, generic neurons; an upper "
            "bound where the terms nearly tie, and for trained networks, which need not be generic"
        ),
        source=f"{_PAPER}, with the span of the data (2p − 1) for 2p; checked by exact Jacobian ranks",
    )


def published_modular_addition_llc(p: int, width: int) -> ClosedForm:
    """λ = ½·K(3p − 1), the value published for modular addition: that of inputs spanning all of R^{2p}.

    Beyond K(3p − 1) = p²(2p + 1) the over-parameterised value ½·p²(2p + 1) takes its place.

    Args:
        p: the modulus.
        width: K, number of neurons.

    Returns:
        λ, of multiplicity 1.

    Raises:
        SettingsError: an argument is no whole number or outside its range.

    Source: arXiv 2603.01192, feature learning on modular addition.
    """
    p, K = whole("p", p, 2), whole("width", width, 1)
    terms = {"K(3p − 1)": K * (3 * p - 1), "p²(2p + 1)": p * p * (2 * p + 1)}
    dimension = min(terms.values())
    return ClosedForm(
        llc=dimension / 2,
        multiplicity=1,
        formula=_formula(terms, dimension),
        conditions="inputs span R^{2p}, which one-hot pairs do not: modular_addition_llc has the value on the pairs",
        source=_PAPER,
    )


def memorisation_bracket(p: int, width: int) -> Bracket:
    """Bounds ½·p(2p − 1) and ½·pK on λ of a network that memorises modular addition with its first layer at random.

    Args:
        p: the modulus.
        width: K, number of neurons, above 2p − 1 and below p².

    Returns:
        The bounds.

    Raises:
        SettingsError: an argument is no whole number or outside its range.

    Source: arXiv 2603.01192, memorisation on modular addition.
    """
    # Below p = 3 no width lies above 2p − 1 and below p².
    p = whole("p", p, 3)
    K = whole("width", width, 2 * p, p * p - 1, "2p − 1 < K < p²")
    lower, upper = p * (2 * p - 1), p * K
    return Bracket(
        lower=lower / 2,
        upper=upper / 2,
        formula=f"½·p(2p − 1) ≤ λ ≤ ½·pK: ½·{lower} ≤ λ ≤ ½·{upper}",
        conditions="2p − 1 < K ≪ p²; first layer as at random, second layer fitted",
        source=_PAPER,
    )


def _reached(d: int, p: int, K: int, features: int) -> int:
    """Dimension that K generic atoms v ⊗ wwᵀ reach, w of size d, v of size p, seen through `features` quadratics.

    Terms after the first two: a p × features matrix of rank K, quadratic forms in only K of d directions, and the two
    sporadic families; without the data's limit these are all the exceptions that Abo & Brambilla 2009 list.
    """
    dimension = K * (d + p - 1)
    if d > K:
        dimension = min(dimension, K * (d - K) + p * K * (K + 1) // 2)
    if (p == 3 and d >= 4 and 3 * d - 2 == 2 * K) or (p, d, K) == (5, 4, 6):
        dimension = min(dimension, p * d * (d + 1) // 2) - 1
    if min(p, features) > K:
        dimension = min(dimension, K * (p + features - K))
    return min(dimension, p * features)


def _formula(terms: dict[str, int], dimension: int) -> str:
    """The terms as symbols and as numbers, with the dimension where none of them is it."""
    numbers = f"½·min({', '.join(str(number) for number in terms.values())})"
    if dimension == min(terms.values()):
        return f"½·min({', '.join(terms)}) = {numbers}"
    return f"½·dim, below ½·min({', '.join(terms)}) = {numbers}; dim = {dimension}"
