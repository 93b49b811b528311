"""`python -m groktrace.cli`."""

from groktrace.cli import main

if __name__ == "__main__":
    main()
