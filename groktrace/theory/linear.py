"""λ of linear networks, and of models that are linear in the weights that move."""

from collections.abc import Iterable
from fractions import Fraction
from itertools import combinations

from groktrace.errors import SettingsError
from groktrace.theory.arguments import whole
from groktrace.theory.result import ClosedForm


def linearised_llc(fisher_rank: int) -> ClosedForm:
    """λ = ½·rank(F) of a model linear in its weights, such as a network in the NTK regime.

    Args:
        fisher_rank: rank of the Fisher matrix F = mean JᵀJ, which is the rank of the Jacobian J of the outputs:
            `jacobian_rank(model, inputs).rank`.

    Returns:
        λ, of multiplicity 1.

    Raises:
        SettingsError: the rank is no whole number or negative.

    Source: arXiv 2603.01192, linearised networks; the regular case of Watanabe 2009 in the weights that matter.
    """
    rank = whole("fisher_rank", fisher_rank, 0)
    return ClosedForm(
        llc=rank / 2,
        multiplicity=1,
        formula=f"½·rank(F) = ½·{rank}",
        conditions="frozen Jacobian J: outputs linear in the weights; F = mean JᵀJ",
        source="Cullen, Estan-Ruiz, Danait & Li 2026 (arXiv 2603.01192); Watanabe 2009, regular models",
    )


def lazy_feature_llc(output_dim: int, feature_rank: int, width: int) -> ClosedForm:
    """λ = ½·p·min(l, K) of a network whose first layer is frozen and whose last layer, without bias, is trained.

    Args:
        output_dim: p, number of outputs.
        feature_rank: l, rank of the feature matrix over the training samples; of the centred one where the loss ignores
            a constant per output.
        width: K, number of features.

    Returns:
        λ, of multiplicity 1.

    Raises:
        SettingsError: an argument is no whole number or outside its range.

    Source: arXiv 2603.01192, lazy features.
    """
    p, K = whole("output_dim", output_dim, 1), whole("width", width, 1)
    rank = whole("feature_rank", feature_rank, 0)
    return ClosedForm(
        llc=p * min(rank, K) / 2,
        multiplicity=1,
        formula=f"½·p·min(l, K) = ½·{p}·min({rank}, {K})",
        conditions="first layer frozen, last layer trained; l = rank of the (centred) features",
        source="Cullen, Estan-Ruiz, Danait & Li 2026 (arXiv 2603.01192)",
    )


def reduced_rank_llc(m: int, h: int, n: int, rank: int) -> ClosedForm:
    """λ of reduced-rank regression: y = A·B·x with A (m × h), B (h × n) and a true map AB of rank r.

    Args:
        m: M, number of outputs.
        h: H, number of hidden units.
        n: N, number of inputs.
        rank: r, rank of the true map, at most each of the three.

    Returns:
        λ and its multiplicity, at the most singular point of the zero set.

    Raises:
        SettingsError: an argument is no whole number or outside its range.

    Source: Aoyagi & Watanabe 2005, Stochastic complexities of reduced rank regression in Bayesian estimation, Neural
    Networks 18(7), main theorem.
    """
    M, H, N = whole("m", m, 1), whole("h", h, 1), whole("n", n, 1)
    r = whole("rank", rank, 0, min(M, H, N), "the least of m, h and n")
    multiplicity = 1
    if N + r > M + H:
        value, formula = Fraction(H * M - H * r + N * r, 2), "½(HM − Hr + Nr), as N + r > M + H"
    elif M + r > N + H:
        value, formula = Fraction(H * N - H * r + M * r, 2), "½(HN − Hr + Mr), as M + r > N + H"
    elif H + r > M + N:
        value, formula = Fraction(M * N, 2), "½MN, as H + r > M + N"
    else:
        odd = (M + H + N + r) % 2
        multiplicity = 1 + odd
        value = Fraction(-((H + r) ** 2) - M**2 - N**2 + 2 * (H + r) * (M + N) + 2 * M * N + odd, 8)
        formula = "⅛(2(H + r)(M + N) + 2MN − (H + r)² − M² − N²" + (" + 1)" if odd else ")")
        formula += f", as no side exceeds the others and M + H + N + r is {'odd' if odd else 'even'}"
    return ClosedForm(
        llc=float(value),
        multiplicity=multiplicity,
        formula=f"{formula}: M = {M}, H = {H}, N = {N}, r = {r}",
        conditions="inputs span R^N; the most singular point of the zero set, where the true map has rank r",
        source="Aoyagi & Watanabe 2005, Neural Networks 18(7), main theorem",
    )


def deep_linear_llc(widths: Iterable[int], rank: int) -> ClosedForm:
    """λ of a deep linear network y = W_N ⋯ W_1·x whose true map has rank r.

    With Δ_s = H_s − r and Σ the set of ℓ + 1 layers such that max Δ_Σ < min Δ of the rest, S = Σ_{s∈Σ} Δ_s ≥ ℓ·max Δ_Σ
    and S < ℓ·min Δ of the rest; M = ⌈S/ℓ⌉ and a = S − (M − 1)ℓ:
    λ = ½(r(H_0 + H_N) − r²) + a(ℓ − a)/(4ℓ) − (ℓ − 1)S²/(4ℓ) + ½·Σ_{i<j∈Σ} Δ_iΔ_j, multiplicity a(ℓ − a) + 1.

    Args:
        widths: H_0 … H_N, layer sizes from the inputs to the outputs; two or more.
        rank: r, rank of the true map, at most each of the widths.

    Returns:
        λ and its multiplicity, at the most singular point of the zero set. With three or more narrow layers, estimates
        approach this value very slowly in nβ.

    Raises:
        SettingsError: fewer than two widths, or a number is no whole number or outside its range.

    Source: Aoyagi 2024, Consideration on the learning efficiency of multiple-layered neural networks with linear units,
    Neural Networks 172, main theorem.
    """
    H = _sizes(widths)
    r = whole("rank", rank, 0, min(H), "the narrowest layer")
    sigma = _singular_layers([width - r for width in H])
    ell, S = len(sigma) - 1, sum(sigma)
    a = S - (-(-S // ell) - 1) * ell
    value = (
        Fraction(r * (H[0] + H[-1]) - r * r, 2)
        + Fraction(a * (ell - a) - (ell - 1) * S * S, 4 * ell)
        + Fraction(sum(one * other for one, other in combinations(sigma, 2)), 2)
    )
    return ClosedForm(
        llc=float(value),
        multiplicity=a * (ell - a) + 1,
        formula=(
            "½(r(H_0 + H_N) − r²) + a(ℓ − a)/(4ℓ) − (ℓ − 1)S²/(4ℓ) + ½·Σ_{i<j} Δ_iΔ_j: "
            f"r = {r}, H_0 = {H[0]}, H_N = {H[-1]}, Δ = {sigma}, ℓ = {ell}, S = {S}, a = {a}"
        ),
        conditions="inputs span R^{H_0}; the most singular point of the zero set, where the true map has rank r",
        source="Aoyagi 2024, Neural Networks 172, main theorem",
    )


def _sizes(widths: Iterable[int]) -> list[int]:
    """The widths as ints."""
    sizes = list(widths) if isinstance(widths, Iterable) else []
    if len(sizes) < 2:
        raise SettingsError(f"widths: expected two or more layer sizes, inputs first, got {widths!r}.")
    return [whole(f"widths[{index}]", size, 1) for index, size in enumerate(sizes)]


def _singular_layers(excess: list[int]) -> list[int]:
    """Δ of the layers in Σ, ascending.

    All of Σ is narrower than all of the rest, so it is a prefix of the sorted layers. S − ℓ·max Δ_Σ never grows with
    the prefix, and S < ℓ·min Δ of the rest says that it turns negative with the next layer: Σ is the longest prefix
    where it is not.
    """
    ordered = sorted(excess)
    return max(
        (
            ordered[:size]
            for size in range(2, len(ordered) + 1)
            if sum(ordered[:size]) >= (size - 1) * ordered[size - 1]
        ),
        key=len,
    )
