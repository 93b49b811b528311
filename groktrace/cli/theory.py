"""`groktrace theory`: closed forms of λ."""

import json
import textwrap
from typing import TYPE_CHECKING

import click

from groktrace.cli.options import JSON, Command

if TYPE_CHECKING:
    from groktrace.theory import ClosedForm


LABEL_WIDTH = 14
TEXT_WIDTH = 100


def _widths(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        return [int(width) for width in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected whole numbers such as 8,3,9, got '{value}'") from None


@click.group("theory")
def command() -> None:
    """Print the learning coefficient λ where it is known in closed form."""


@command.command("modular-addition", cls=Command)
@click.option("--p", type=int, required=True, help="Modulus.")
@click.option("--width", type=int, required=True, help="Number of neurons.")
@click.option("--n-train", type=int, help="Number of training pairs [p²].")
@click.option("--published", is_flag=True, help="The published value, for inputs that span all of R^{2p}.")
@JSON
def modular_addition(p: int, width: int, n_train: int | None, published: bool, as_json: bool) -> None:
    """λ of a quadratic network on one-hot pairs."""
    from groktrace.theory import modular_addition_llc, published_modular_addition_llc

    if published and n_train is not None:
        raise click.UsageError("--published: the published value knows no --n-train; give one of the two.")
    _print(published_modular_addition_llc(p, width) if published else modular_addition_llc(p, width, n_train), as_json)


@command.command("quadratic", cls=Command)
@click.option("--input-dim", type=int, required=True, help="Dimension that the inputs span.")
@click.option("--output-dim", type=int, required=True, help="Number of outputs.")
@click.option("--width", type=int, required=True, help="Number of neurons.")
@click.option("--n-train", type=int, help="Number of training samples [enough not to matter].")
@click.option("--effective-width", type=int, help="Number of non-zero, distinct neurons [all].")
@JSON
def quadratic(
    input_dim: int, output_dim: int, width: int, n_train: int | None, effective_width: int | None, as_json: bool
) -> None:
    """λ of a generic quadratic network."""
    from groktrace.theory import quadratic_llc

    _print(quadratic_llc(input_dim, output_dim, width, n_train, effective_width=effective_width), as_json)


@command.command("deep-linear", cls=Command)
@click.option("--widths", callback=_widths, required=True, metavar="N,N,...", help="Layer sizes, inputs first.")
@click.option("--rank", type=int, required=True, help="Rank of the true map.")
@JSON
def deep_linear(widths: list[int], rank: int, as_json: bool) -> None:
    """λ of a deep linear network, at its most singular point."""
    from groktrace.theory import deep_linear_llc

    _print(deep_linear_llc(widths, rank), as_json)


@command.command("reduced-rank", cls=Command)
@click.option("--m", type=int, required=True, help="Number of outputs.")
@click.option("--h", type=int, required=True, help="Number of hidden units.")
@click.option("--n", type=int, required=True, help="Number of inputs.")
@click.option("--rank", type=int, required=True, help="Rank of the true map.")
@JSON
def reduced_rank(m: int, h: int, n: int, rank: int, as_json: bool) -> None:
    """λ of reduced-rank regression, at its most singular point."""
    from groktrace.theory import reduced_rank_llc

    _print(reduced_rank_llc(m, h, n, rank), as_json)


def _print(found: "ClosedForm", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found.to_dict(), allow_nan=False))
        return
    lines = {
        "λ": f"{found.llc:.15g}",
        "multiplicity": "not known" if found.multiplicity is None else str(found.multiplicity),
        "formula": found.formula,
        "conditions": found.conditions,
        "source": found.source,
    }
    for label, text in lines.items():
        indent = " " * LABEL_WIDTH
        click.echo(textwrap.fill(text, TEXT_WIDTH, initial_indent=label.ljust(LABEL_WIDTH), subsequent_indent=indent))
