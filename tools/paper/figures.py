"""The figures of the reproduced paper, drawn from rows of CSVs."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tools.common.measurements import Row, number

# Okabe & Ito.
BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#333333"
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY)


def _panels(columns: int, rows: int = 1, height: float = 3.4) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(9, height * rows), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", lw=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def _column(rows: Iterable[Row], name: str) -> np.ndarray:
    return np.array([number(row[name]) for row in rows])


def _legend(axes: Axes, **options: object) -> None:
    axes.legend(frameon=False, fontsize=8, **options)


def scaling(series: Mapping[str, Sequence[Row]], path: Path) -> None:
    """λ̂ against p and against K, with straight lines."""
    figure, panels = _panels(2)
    for axes, (name, rows) in zip(panels.flat, series.items(), strict=True):
        for column, colour in (("λ̂", BLUE), ("λ̂ by dials", GREEN), ("λ̂ published sampler", RED)):
            x, y = _column(rows, name), _column(rows, column)
            at = np.unique(x)
            means = np.array([y[x == value].mean() for value in at])
            line = np.polyfit(at, means, 1)
            r2 = 1 - (means - np.polyval(line, at)).var() / means.var()
            axes.plot(x, y, "o", color=colour, ms=4, alpha=0.7, label=f"{column}, R² of means {r2:.3f}")
            axes.plot(at, np.polyval(line, at), color=colour, lw=1)
        axes.set_xlabel({"p": "modulus p (K = 128)", "K": "width K (p = 23)"}[name])
        axes.set_ylabel(r"final $\hat\lambda$")
        _legend(axes)
    figure.savefig(path)


def absolute(rows: Sequence[Row], ranks: Sequence[Row], path: Path) -> None:
    """λ̂ against the closed form; exact ranks against both counts."""
    figure, (upper,) = _panels(3)
    exact, found, error = (_column(rows, name) for name in ("closed form", "λ̂", "stderr"))
    upper[0].plot([0, exact.max()], [0, exact.max()], color="0.6", lw=1, label="slope 1")
    upper[0].errorbar(exact, found, 1.96 * error, fmt="o", color=BLUE, ms=4, label=r"$\hat\lambda$, 95 %")
    upper[0].set_xlabel(r"closed form $\frac{1}{2}\min(K(3p-2),\, p(n-1))$")
    upper[0].set_ylabel(r"$\hat\lambda$ at generic teachers")
    _legend(upper[0])
    for axes, p in zip(upper[1:], ("5", "7"), strict=True):
        own = [row for row in ranks if row["p"] == p]
        for kind, colour, marker in (("Gaussian", ORANGE, "s"), ("pairs", BLUE, "o"), ("part", SKY, "^")):
            full = str(int(p) ** 2)
            chosen = [
                row
                for row in own
                if (row["inputs"] == kind and (kind == "Gaussian" or row["n"] == full))
                or (kind == "part" and row["inputs"] == "pairs" and row["n"] != full)
            ]
            if chosen:
                label = {"Gaussian": "Gaussian inputs", "pairs": "all pairs", "part": f"{chosen[0]['n']} pairs"}[kind]
                width, rank = _column(chosen, "K"), _column(chosen, "rank") / 2
                axes.plot(width, rank, marker, color=colour, ms=5, label=label)
                axes.plot(width, _column(chosen, "closed form"), color=colour, lw=1)
        axes.set_xlabel(f"width K (p = {p})")
        axes.set_ylabel("rank/2 (points), closed form (lines)")
        _legend(axes)
    figure.savefig(path)


def endpoints(rows: Sequence[Row], spectra: Mapping[str, np.ndarray], path: Path) -> None:
    """λ̂ against the resolution for each network, and the spectra that explain it."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, (panels,) = _panels(len(names) + 1)
    for axes, name in zip(panels, names, strict=False):
        own = [row for row in rows if row["network"] == name]
        x = _column(own, "resolution")
        axes.axhline(number(own[0]["closed form"]), color=BLACK, ls="-.", lw=1, label="closed form, generic")
        axes.axhline(number(own[0]["rank/2"]), color=ORANGE, ls=":", lw=2, label="rank/2")
        if own[0]["soft rank"]:
            axes.plot(x, _column(own, "soft rank"), color=GREEN, lw=1.5, label="soft rank of the exact spectrum")
        axes.plot(x, _column(own, "λ̂"), "o", color=BLUE, ms=4, label=r"$\hat\lambda$")
        axes.plot(x, _column(own, "λ_c"), "o", color=BLUE, ms=6, mfc="none", label=r"$\lambda_c$")
        axes.set_xscale("log")
        axes.set_ylim(0, 1.1 * number(own[0]["closed form"]))
        axes.set_xlabel(r"resolution $n\beta\, h_{max}/\gamma$")
        axes.set_title(name, fontsize=9)
    _legend(panels[0])
    for (name, spectrum), colour in zip(spectra.items(), COLOURS, strict=False):
        panels[-1].plot(
            np.arange(1, len(spectrum) + 1) / len(spectrum), spectrum / spectrum[0], color=colour, label=name
        )
    panels[-1].set_yscale("log")
    panels[-1].set_xlabel("share of the directions")
    panels[-1].set_title(r"curvature $h/h_{max}$", fontsize=9)
    _legend(panels[-1])
    figure.savefig(path)


def trajectory(rows: Sequence[Row], large: Sequence[Row], steps_an_epoch: int, path: Path) -> None:
    """λ, trace, accuracies and losses: mean ± sd over seeds, and the published size."""
    figure, panels = _panels(2 if large else 1, 3, 2.3)
    shown = [_stacked(rows)]
    if large:
        epochs, several = _stacked([row for row in large if row["seed"].startswith("Adam-")])
        shown.append((epochs / steps_an_epoch, several))
    for column, (x, data) in enumerate(shown):
        lam, curves, losses = panels[:, column]
        _band(lam, x, data["λ"], BLUE, "λ")
        lam.set_ylabel("λ", color=BLUE)
        other = lam.twinx()
        _band(other, x, data["trace"], RED, "trace")
        other.set_ylabel("Hessian's trace", color=RED)
        for name, colour in (("train", BLACK), ("val", PINK)):
            label = {"train": "training", "val": "validation"}[name]
            _band(curves, x, data[f"{name} accuracy"], colour, label)
            _band(losses, x, data[f"{name} loss"], colour, label)
        curves.set_ylabel("accuracy")
        _legend(curves)
        losses.set_yscale("log")
        losses.set_ylabel("loss")
    panels[0, 0].set_title(f"p = 23, K = 128: mean ± sd of {len(shown[0][1]['λ'])} seeds", fontsize=9)
    panels[-1, 0].set_xlabel("step (full batch)")
    if large:
        _add_published(panels[:, 1], large, steps_an_epoch, len(several["λ"]))
    figure.savefig(path)


def _add_published(panels: np.ndarray, large: Sequence[Row], steps_an_epoch: int, count: int) -> None:
    """What the column of the published size has besides: the run with AdamW, and an axis that shows early epochs."""
    plain = [row for row in large if row["seed"].startswith("AdamW")]
    other_epochs = _column(plain, "step") / steps_an_epoch
    label = "the same with AdamW"
    panels[0].plot(other_epochs, _column(plain, "λ"), color=SKY, lw=1.2, ls="--", label=label)
    panels[1].plot(other_epochs, _column(plain, "val accuracy"), color=PINK, lw=1.2, ls="--", label=label)
    panels[2].plot(other_epochs, _column(plain, "val loss"), color=PINK, lw=1.2, ls="--", label=label)
    _legend(panels[1])
    panels[0].set_title(f"p = 53, K = 1024, published settings (Adam): {count} seeds", fontsize=9)
    panels[-1].set_xlabel("epoch")
    for axes in panels:
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(left=0)


def _stacked(rows: Sequence[Row]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The steps that all seeds have, and the columns at these, [seeds, steps] each."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    steps = [{row["step"]: row for row in rows if row["seed"] == seed} for seed in seeds]
    common = [step for step in steps[0] if all(step in curve for curve in steps)]
    names = ("λ", "trace", "train accuracy", "val accuracy", "train loss", "val loss")
    columns = {name: np.array([_column([curve[step] for step in common], name) for curve in steps]) for name in names}
    return np.array(common, dtype=float), columns


def _band(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    mean = y.mean(0)
    axes.plot(x, mean, color=colour, lw=1.5, marker="o" if len(y) == 1 else None, ms=2.5, label=label)
    if len(y) > 1:
        spread = y.std(0, ddof=1)
        axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)


def sensitivity(rows: Sequence[Row], path: Path) -> None:
    """|λ̂| against γ, a line a step size."""
    nbetas = sorted({number(row["nβ"]) for row in rows})
    figure, (panels,) = _panels(len(nbetas))
    for axes, nbeta in zip(panels, nbetas, strict=True):
        for method, style in (("published", "--"), ("ours", "-")):
            own = [row for row in rows if row["method"] == method and number(row["nβ"]) == nbeta]
            steps = list(dict.fromkeys(row["step"] for row in own))
            for step, colour in zip(
                steps, (RED, ORANGE, PINK, SKY) if method == "published" else (BLUE,) * 3, strict=False
            ):
                line = [row for row in own if row["step"] == step]
                label = f"SGLD, ε = {step}" if method == "published" else f"ours, {step} × its step"
                marker = {"published": "o", "ours": {"0.2": "v", "1": "s", "1.8": "^"}.get(step)}[method]
                filled = [row["reliable"] == "True" for row in line]
                x, y = _column(line, "γ"), np.abs(_column(line, "λ̂"))
                axes.plot(x, y, ls=style, color=colour, lw=1.2, marker=marker, ms=5, mfc="none", label=label)
                axes.plot(x[filled], y[filled], ls="", color=colour, marker=marker, ms=5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(r"localisation $\gamma$")
        axes.set_ylabel(r"$|\hat\lambda|$ (filled: reliable)")
        axes.set_title(f"nβ = {nbeta:g}", fontsize=9)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path)


def severity(rows: Sequence[Row], path: Path) -> None:
    """Severity and peak λ against the learning rate, and against each other."""
    figure, (panels,) = _panels(3)
    rate = _column(rows, "learning rate")
    for axes, name, colour in ((panels[0], "severity", PINK), (panels[1], "peak λ", BLUE)):
        y = _column(rows, name)
        axes.plot(rate, y, "o", color=colour, ms=4, alpha=0.6)
        at = np.unique(rate)
        axes.plot(at, [y[rate == value].mean() for value in at], color=colour, lw=1.2)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel({"severity": "grokking severity"}.get(name, name))
    grokked = [row for row in rows if number(row["severity"]) > 0]
    panels[2].plot(_column(grokked, "severity"), _column(grokked, "peak λ"), "o", color=BLACK, ms=4)
    panels[2].set_xlabel("grokking severity")
    panels[2].set_ylabel("peak λ")
    figure.savefig(path)


def memorisation(rows: Sequence[Row], p: int, path: Path) -> None:
    """λ̂ and rank/2 of frozen features against the width."""
    figure, (panels,) = _panels(1)
    axes, width = panels[0], _column(rows, "K")
    within = [row for row in rows if row["bracket low"]]
    low, high = _column(within, "bracket low"), _column(within, "bracket high")
    axes.fill_between(_column(within, "K"), low, high, color="0.9", label="bracket ½p(2p − 1) to ½pK")
    axes.plot(width, _column(rows, "½·p·min(l, K)"), color=ORANGE, lw=1.5, label="½p·min(l, K)")
    axes.plot(width, _column(rows, "rank/2"), "s", mfc="none", color=BLACK, ms=8, label="rank/2")
    axes.errorbar(
        width,
        _column(rows, "λ̂"),
        1.96 * _column(rows, "stderr"),
        fmt="o",
        color=BLUE,
        ms=4,
        label=r"$\hat\lambda$, 95 %",
    )
    axes.set_xlabel(f"width K (p = {p}, n = {rows[0]['n']})")
    axes.set_ylabel("λ of the second layer")
    _legend(axes)
    figure.savefig(path)
