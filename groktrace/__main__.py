"""`python -m groktrace`: the command line, where its script is not on the path."""

from groktrace.cli import main

main(prog_name="groktrace")
