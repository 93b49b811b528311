"""groktrace's own warnings on a terminal."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import click


@contextlib.contextmanager
def own_warnings_as_lines() -> Iterator[None]:
    """Show groktrace's own warnings as one line on stderr each, without the place in its code; others as ever."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", "groktrace: ", RuntimeWarning)
        show = warnings.showwarning

        def show_line(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if str(message).startswith("groktrace: "):
                click.echo(f"Warning: {str(message).removeprefix('groktrace: ')}", err=True)
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = show_line
        yield
