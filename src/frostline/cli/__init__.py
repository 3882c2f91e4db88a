"""The command line, ``frostline COMMAND``: one module per command, called with parsed values.

A command reads files, calls the library, prints, and returns the exit code: 0 clean, 1 a gap or
findings. It raises `FrostlineError` when it could not run (exit code 2).
"""

from frostline.cli.application import app as app, main as main, run as run
