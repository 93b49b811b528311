"""The traced model and loss: `Program` traces them, keeps them as JSON, checks that as hostile input, and runs it."""

from groktrace.run.program.allow_list import draws_random_numbers as draws_random_numbers
from groktrace.run.program.program import Program as Program
