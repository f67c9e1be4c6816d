"""The verbs together, and how every run of the command ends.

Exit codes: 0 done; 2 bad input, with one line `error: ...` on standard error; 130 Ctrl-C; 141 when
the reader of a pipe went away. Anything else is a defect of ours and shows its traceback.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from jaxinfer.cli.bench import bench
from jaxinfer.cli.chaos import chaos
from jaxinfer.cli.chat import chat
from jaxinfer.cli.convert import convert
from jaxinfer.cli.diagnose import diagnose
from jaxinfer.cli.distill import distill
from jaxinfer.cli.dynamics import dynamics
from jaxinfer.cli.env import env
from jaxinfer.cli.eval import evaluate
from jaxinfer.cli.generate import generate
from jaxinfer.cli.info import info
from jaxinfer.cli.interrupts import INTERRUPTED, handled
from jaxinfer.cli.notices import error_text, note, warnings_as_lines, work_begins
from jaxinfer.cli.plan import plan
from jaxinfer.cli.probe import probe
from jaxinfer.cli.score import score
from jaxinfer.cli.serve import serve
from jaxinfer.cli.simulate import simulate
from jaxinfer.cli.train import train
from jaxinfer.cli.transport import transport
from jaxinfer.cli.tree import tree

BAD_INPUT, BROKEN_PIPE = 2, 141
VERBS = (
    generate, chat, serve, score, convert, info, tree, plan, simulate, probe, chaos, bench,
    distill, dynamics, transport, diagnose, env,
)  # fmt: skip

app = typer.Typer(
    name="jaxinfer",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        import jaxinfer

        print(f"jaxinfer {jaxinfer.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def together(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Language models in JAX: generate, chat, serve, score, convert and inspect.

    `jaxinfer env` prints the versions of the packages below it, devices and folders.
    """


for _verb in VERBS:
    app.command()(_verb)
app.command("eval")(evaluate)  # the name of a builtin
app.add_typer(train)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; `argv` is without the program's name.

    Without `argv` it is what its process is for, and decides how the process answers Ctrl-C.
    """
    _open_streams()
    try:
        with handled() if argv is None else contextlib.nullcontext():
            return _answer(argv)
    except KeyboardInterrupt:
        return INTERRUPTED


def _open_streams() -> None:
    """Gives a process that was started with closed standard streams (`<&-`) empty ones.

    Python has None in their place. Their numbers are taken too, or what a library prints would go
    into the next file that is opened.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _answer(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    _quiet_libraries()
    with warnings_as_lines():
        code = _run(arguments)
        if code == 0:
            work_begins()  # says what nothing else gave the occasion for
    return code


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="jaxinfer", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        return _leave_pipe()
    except SystemExit as end:  # typer's own answer to a broken pipe
        if isinstance(end.__context__, BrokenPipeError):
            return _leave_pipe()
        raise
    except (OSError, ValueError) as error:
        return _refuse(error_text(error))
    except Exception as error:
        # typer's usage errors; the class that they share has moved between its releases
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        context = getattr(error, "ctx", None)
        if context is not None and type(error).__name__ == "NoArgsIsHelpError":
            print(context.get_help())
            return 0
        path = context.command_path if context is not None else "jaxinfer"
        message = format_message().rstrip(".").replace(". Did you", "; did you")
        return _refuse(f"{message}{'' if message.endswith('?') else ';'} see {path} --help")


def _leave_pipe() -> int:
    # The interpreter flushes standard output once more at exit; give it somewhere to go.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _refuse(message: str) -> int:
    note(f"error: {message}")
    return BAD_INPUT


def _quiet_libraries() -> None:
    """Silences what libraries print about hardware that is not there.

    An installed CUDA plugin logs a traceback on a machine without a GPU, where it only serves as a
    compiler. Nothing is silenced where a driver is present, and no device is hidden.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character gets an escape
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not any(Path("/dev").glob("nvidia*")) and not Path("/dev/dxg").exists():
        for name in ("jax._src.xla_bridge", "jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
