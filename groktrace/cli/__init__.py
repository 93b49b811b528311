"""The command line: parse, call, print; one module a command. What takes time to import is imported by the commands."""

from typing import Any

import click

from groktrace.cli import analyze, check, compare, follow, forecast, import_command, plot, show, temperature, theory
from groktrace.errors import GroktraceError
from groktrace.reporting.notices import own_warnings_as_lines

INTERRUPTED = 130
# In the order of the help.
_MODULES = (import_command, analyze, follow, forecast, temperature, show, plot, compare, check, theory)


class _Group(click.Group):
    """Turns groktrace's own errors into one line and an exit code, and lists the commands in the order of their use."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with own_warnings_as_lines():
                return super().invoke(ctx)
        except (GroktraceError, OSError) as failure:
            if isinstance(failure, BrokenPipeError):
                raise
            raise click.ClickException(str(failure)) from failure
        except KeyboardInterrupt:
            click.echo("\nInterrupted; what is finished is kept: the same command goes on from there.", err=True)
            ctx.exit(INTERRUPTED)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Group,
    commands=[module.command for module in _MODULES],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="groktrace")
def main() -> None:
    """See grokking as a phase transition: local learning coefficients along a training run."""
