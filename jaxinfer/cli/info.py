"""`jaxinfer info`: a model's architecture and what decoding it costs, from the compiled program."""

from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.typing import Json

if TYPE_CHECKING:
    from rich.table import Table


def info(
    model: Annotated[str | None, typer.Argument(help=o.DEFAULT_MODEL)] = None,
    policy: o.PolicyOption = "full",
    policy_args: o.PolicyArgsOption = "",
    capacity: Annotated[
        int, typer.Option("--capacity", "-c", min=1, max=2**26, help="Tokens the cache can hold.")
    ] = 1024,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, max=2**16, help="Rows.")] = 1,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Compile for this absent GPU instead, such as h200."),
    ] = None,
    dtype: o.DtypeOption = None,
    weights: o.WeightsOption = None,
    sparsity: o.SparsityOption = None,
    sparsity_args: o.SparsityArgsOption = "",
    as_json: o.JsonOption = False,
) -> None:
    """Print architecture, sizes, and what a decode step costs.

    The step is compiled: its copies and temporaries are counted, and its time is shown beside the
    floor that memory bandwidth sets. With --sparsity: what each layer is expected to read.
    """
    chosen = o.make_policy(policy, policy_args).sized(capacity)
    method = o.make_sparsity(sparsity, sparsity_args, model)

    from jaxinfer.inspection import gpu_target

    if target is not None and target not in gpu_target.target_names():
        raise ValueError(
            f"unknown target {target!r}; described are {', '.join(gpu_target.target_names())}"
        )

    from jaxinfer.cli.models import open_model
    from jaxinfer.decode.capacity import check_fits
    from jaxinfer.inspection.break_even import break_even
    from jaxinfer.inspection.decode_step import inspect_decode
    from jaxinfer.inspection.sparse_blocks import block_facts
    from jaxinfer.runtime.backend import Backend

    if target is not None and weights is not None:  # in the form that the GPU's kernels read
        lm = open_model(model, dtype or "bfloat16", weights, "triton", method)
    else:
        lm = open_model(model, dtype, weights, None, method)
    if target is None:
        check_fits(lm, chosen, batch, capacity, 1)
    facts = inspect_decode(lm.config, lm.params, chosen, capacity, batch, target)
    config = lm.config.to_dict()
    record = {"model": lm.name, "policy": chosen.name, "capacity": capacity, "batch": batch}
    record |= {"target": target, "config": config} | facts
    if method is not None:
        backend = Backend.of(platform=None if target is None else "gpu")
        here = None if target is not None else break_even(lm.config, lm.params, batch, backend)
        record["sparsity"] = {"name": method.name, "measured_pays_below": here}
        record["sparsity"]["layers"] = block_facts(lm.params, batch, backend)
    if as_json:
        o.print_json(record)
    else:
        _tables(record)


def _tables(record: Json) -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxinfer.runtime.memory import readable

    def table(title: str, rows: Json) -> None:
        out = Table("name", "value", title=title, title_justify="left", show_header=False)
        for name, value in rows.items():
            if value is None or value is False:
                continue
            byte_count = name.endswith("bytes") or name == "cache_bytes_per_token"
            if byte_count:
                text = f"{value:,} ({readable(value)})"
            elif isinstance(value, float):
                text = f"{value:.4g}"
            else:
                text = f"{value:,}" if type(value) is int else str(value)
            out.add_row(name, text)
        console.print(out)

    console = Console()
    table("architecture", record["config"])
    outer = {k: v for k, v in record.items() if k not in ("config", "decode", "sparsity")}
    table("sizes", outer)
    decode = dict(record["decode"])
    copies = decode.pop("copies")
    table("decode step", decode)
    if "sparsity" in record:
        console.print(_layers_table(record["sparsity"]))
        console.print(_choice(record["sparsity"]), soft_wrap=True)
    for line in copies:
        console.print(f"copy: {line}", markup=False, soft_wrap=True)


def _choice(sparsity: Json) -> str:
    """By which density layers choose between a list and all blocks, and what was measured."""
    shares = sorted({x["pays_below"] for x in sparsity["layers"] if x["blocks"] is not None})
    by = " or ".join(f"{share:.2g}" for share in shares) or "none"
    text = f"layers read a list below a density of {by} in a step"
    here = sparsity["measured_pays_below"]
    return text if here is None else f"{text}; timed now, it pays below {here:.2g}"


def _layers_table(sparsity: Json) -> "Table":
    """A row per layer: the blocks of neurons, the share that a token uses, and bytes per step; the
    share of heads."""
    from rich.table import Table

    from jaxinfer.runtime.memory import readable

    out = Table(title=f"sparsity {sparsity['name']}", title_justify="left")
    for column in ("layer", "blocks", "density", "in a step", "read as", "bytes", "heads"):
        out.add_column(column, justify="right")
    for layer in sparsity["layers"]:
        if layer["blocks"] is None:
            cells = ("none" if layer["density"] is None else "dense", "", "", "")
        else:
            cells = (
                f"{layer['blocks']} of {layer['block_size']}",
                f"{layer['density']:.3g}",
                f"{layer['step_density']:.3g}",
                "a list" if layer["listed"] else "all, masked",
            )
        read = readable(layer["read_bytes"])
        out.add_row(str(layer["layer"]), *cells, read, f"{layer['head_density']:.3g}")
    return out
