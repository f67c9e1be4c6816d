"""`python -m bench NAME`: see `jaxinfer bench --help`."""

import sys

import typer

from jaxinfer.cli.bench import bench

if __name__ == "__main__":
    try:
        typer.run(bench)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
