"""Runs routines for the command line: progress to standard error, a line or JSON per record."""

import dataclasses
import sys

from bench.harness import RESULTS
from bench.options import Options
from bench.report import headline, report, write_report
from bench.routines import ROUTINES, run
from bench.worker import PeerError
from jaxinfer.records import Record, append


def execute(name: str, options: Options, as_json: bool = False, write: bool = False) -> None:
    """Runs the routine `name`, or "all" of them, or prints the "report" of what is there.

    With `write` the report goes into the folder of the results instead, with its plots.
    Results of the quick preset go to a folder of their own, so that they never reach the report.
    """
    folder = options.results
    if options.preset == "quick" and folder == RESULTS:
        folder = RESULTS / "quick"
    if name == "report":
        if as_json:
            raise ValueError("a report is Markdown; leave --json out")
        print(f"wrote {write_report(folder)}" if write else report(folder))
        return
    if write:
        raise ValueError(f"--write is for the report, not for {name}, which adds to its results")
    for routine in ROUTINES if name == "all" else [name]:
        say = progress(routine)
        try:
            records = run(routine, dataclasses.replace(options, say=say))
        except PeerError as error:
            raise ValueError(f"{routine}: {error}") from error
        for record in records:
            say(f"added to {append(record, folder)}")
            show(record, as_json)


def progress(routine: str):
    """A function that prints where a routine is."""

    def say(text: str) -> None:
        print(f"[{routine}] {text}", file=sys.stderr, flush=True)

    return say


def show(record: Record, as_json: bool) -> None:
    print(record.to_json() if as_json else headline(record), flush=True)
