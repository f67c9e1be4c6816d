"""`jaxinfer tree`: which token tree speculation should draft, measured on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.notices import note
from jaxinfer.typing import Json

if TYPE_CHECKING:
    from jaxinfer.speculative.optimizer import Candidate, Choice
    from jaxinfer.speculative.tuning import Tuned


def tree(
    target: Annotated[
        str | None, typer.Option("--target", help=f"Model whose text is wanted: {o.DEFAULT_MODEL}")
    ] = None,
    draft: Annotated[str, typer.Option("--draft", help=o.DRAFTS)] = "prompt-lookup",
    temperature: o.TemperatureOption = 0.0,
    top_p: o.TopPOption = 1.0,
    policy: o.PolicyOption = "full",
    policy_args: o.PolicyArgsOption = "",
    levels: Annotated[int, typer.Option("--levels", min=2, max=32, help="Deepest tree.")] = 10,
    sizes: Annotated[
        str, typer.Option("--sizes", help="Nodes of the trees that are timed.")
    ] = "2,3,4,6,8,12,16",
    new_tokens: Annotated[
        int, typer.Option("--tokens", min=8, max=1024, help="Measured tokens per prompt.")
    ] = 64,
    device: Annotated[
        str | None,
        typer.Option("--roofline", help="Also predict for h200, h100, a100 or l40-offload."),
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the tree as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the tree.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again.")] = False,
    dtype: o.DtypeOption = None,
    weights: o.WeightsOption = None,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Choose the token tree of speculation.

    Acceptance and times are measured on this machine, and the tree with the most tokens per second
    is taken.

    Example: jaxinfer tree --target tiny-llama --draft tiny-draft --save tree.json --plot tree.png
    """
    from jaxinfer.decode.sampling import Sampler
    from jaxinfer.files import check_new_file

    for path in filter(None, (save, plot)):  # before minutes of work
        check_new_file(path, overwrite=force)
    chosen = o.make_policy(policy, policy_args)
    sampler = Sampler(temperature=temperature, top_p=top_p)
    try:
        nodes = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        raise ValueError(f"--sizes expects numbers such as 2,4,8, got {sizes!r}") from None

    from jaxinfer.speculative.tuning import check_device

    if device is not None:
        check_device(device)
    if save is not None and save.is_dir() or plot is not None and plot.is_dir():
        raise ValueError("--save and --plot name files, got a folder")
    from jaxinfer.cli.models import open_draft, open_model
    from jaxinfer.progress import bars
    from jaxinfer.speculative.tuning import roofline, tune

    lm = open_model(target, dtype, weights)
    model = open_draft(lm, draft, dtype, weights)
    note("measuring acceptance and times; about a minute the first time")
    with bars() as report:
        tuned = tune(
            lm, None if isinstance(model, str) else model, sampler, policy=chosen, sizes=nodes,
            new_tokens=new_tokens, fresh=fresh, report=report,
        )  # fmt: skip
    found = {"this machine": tuned}
    if device is not None:
        found[device] = roofline(tuned, lm, None if isinstance(model, str) else model, device)
    choices = {place: one.choice(levels) for place, one in found.items()}
    best = choices["this machine"].topology
    if save is not None:
        best.save(save)
        if best.nodes == 1:
            note(f"{save} has one node: no speculation, decoding with it is plain")
    if plot is not None:
        from jaxinfer.speculative.plot import plot_tree

        plot_tree(best, plot, tuned.acceptance)
    if as_json:
        o.print_json(
            {"target": lm.name, "draft": draft, "acceptance": tuned.acceptance.to_dict()}
            | {place: _record(found[place], choices[place]) for place in found}
        )
        return
    for place, choice in choices.items():
        _show(place, found[place], choice)


def _record(tuned: "Tuned", choice: "Choice") -> Json:
    return {
        "parent": list(choice.topology.parent),
        "expected_tokens": choice.expected,
        "step_ms": choice.step_cost,
        "speedup": choice.speedup,
        "verify_ms": {str(n): ms for n, ms in tuned.verify_ms.items()},
        "draft_ms": tuned.draft_ms,
    }


def _show(place: str, tuned: "Tuned", choice: "Choice") -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxinfer.speculative.tuning import WORTH

    out = Table("nodes", "levels", "tokens/step", "ms/step", "speed-up", title=place)
    best: dict[int, Candidate] = {}
    for one in choice.candidates:
        if one.nodes not in best or one.speedup > best[one.nodes].speedup:
            best[one.nodes] = one
    for one in best.values():
        out.add_row(
            str(one.nodes), str(one.levels), f"{one.expected:.2f}", f"{one.step_cost:.3g}",
            f"{one.speedup:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(out)
    console.print(f"one draft pass: {tuned.draft_ms:.3g} ms")
    if choice.topology.nodes == 1:
        console.print(
            f"speculation does not pay here: no tree promises {WORTH:.2f}x plain decoding"
        )
    else:
        console.print(f"best tree: {choice.topology} ({choice.speedup:.2f}x)")
