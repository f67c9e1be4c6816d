"""The command line: `jaxinfer VERB ...`, one file per verb.

Modules of this package import only typer and the standard library at the top; what a verb needs is
imported when it runs, so `--help` and wrong flags answer at once.
"""

from jaxinfer.cli.app import main

__all__ = ["main"]
