"""`jaxinfer probe`: what this machine reaches, as a file for `jaxinfer plan`."""

from pathlib import Path
from typing import Annotated

import typer

from jaxinfer.cli import options as o


def probe(
    save: Annotated[Path | None, typer.Option("--save", help="Write the cluster as JSON.")] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The machine's name; default: its host name.")
    ] = None,
    region: Annotated[str, typer.Option("--region", help="Where it stands.")] = "here",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of products: float32, bfloat16, float16.")
    ] = "float32",
    seconds: Annotated[float, typer.Option("--seconds", help="For each measurement.")] = 1.0,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Measure this machine: products, memory, and connections between processes.

    What it prints is a cluster of one machine. Put the machines of several files into one, and say
    which links join them, to plan with all.

    Example: jaxinfer probe --save here.json
    """
    from jaxinfer.arguments import one_of
    from jaxinfer.files import check_new_file, write_json
    from jaxinfer.parallel import hexgen
    from jaxinfer.progress import bars

    one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    if save is not None:
        check_new_file(save, overwrite=force)
    with bars() as report:
        found = hexgen.probe(dtype=dtype, seconds=seconds, name=name, region=region, report=report)
    data = found.to_dict()
    if save is not None:
        write_json(save, data)
    if as_json:
        o.print_json(data)
        return
    (machine,) = found.machines
    gpu, link = machine.gpu, machine.link
    print(
        f"{machine.name}: {machine.count} x {gpu.name}, {gpu.flops_per_s / 1e9:.4g} GFLOP/s, "
        f"{gpu.bytes_per_s / 1e9:.4g} GB/s, {gpu.memory_bytes / 2**30:.1f} GiB; messages "
        f"{link.latency_s * 1e6:.4g} us, {link.bytes_per_s / 1e9:.4g} GB/s"
    )
