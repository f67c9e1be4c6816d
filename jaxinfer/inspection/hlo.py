"""Facts about a compiled program, read from its optimised HLO and its memory analysis.

The decode loop promises (and `tests/inspection` checks) that no instruction copies half a cache
leaf, that every cache leaf is updated in its own buffer, and that temporaries stay small.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxinfer.inspection.copies import CopySearch, hlo_dtype
from jaxinfer.inspection.hlo_text import Instruction, Module, parse

BOOKKEEPING = {
    *(
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
    ),
    *("while", "conditional", "call", "copy-done", "async-done"),
}


@dataclass(frozen=True)
class Memory:
    """Bytes that one run of an executable needs; aliased outputs live in their arguments."""

    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int


def cache_sized_copies(program: Any, leaves: Iterable[Any], fraction: float = 0.5) -> list[str]:
    """One line per instruction that stores at least `fraction` of a cache leaf it derives from.

    Args:
      program: an executable, its HLO text or a parsed module.
      leaves: the large cache leaves, as arrays or `ShapeDtypeStruct` (or their sizes in bytes).
        A leaf is recognised among the program's arguments by dtype and shape.
    """
    return list(CopySearch(module_of(program), leaves, fraction).run().values())


def aliased_leaves(program: Any) -> dict[int, tuple[int, ...]]:
    """Argument number -> output index, for every argument whose buffer an output reuses.

    Numbers count the executable's own arguments: leaves that the program does not use are dropped.
    """
    return module_of(program).aliases


def unaliased_leaves(program: Any, leaves: Iterable[Any]) -> list[str]:
    """The arguments with the dtype and shape of a cache leaf that no output reuses."""
    module = module_of(program)
    types = {(hlo_dtype(leaf.dtype), tuple(leaf.shape)) for leaf in leaves}
    return [
        f"argument {p.literal} {p.type_text} {p.source}".rstrip()
        for p in module.entry.parameters
        if len(p.arrays) == 1
        and (p.arrays[0].dtype, p.arrays[0].dims) in types
        and int(p.literal) not in module.aliases
    ]


def fusion_count(program: Any) -> int:
    """Number of fusion instructions outside other fusions."""
    return sum(instruction.opcode == "fusion" for instruction in _outside_fusions(program))


def launch_count(program: Any) -> int:
    """Instructions that a GPU launches something for: fusions, library and kernel calls, copies.

    A loop's body counts once; what is only bookkeeping, such as tuples and bitcasts, does not."""
    return sum(i.opcode not in BOOKKEEPING for i in _outside_fusions(program))


def _outside_fusions(program: Any) -> list[Instruction]:
    """The instructions of all computations that no fusion or reduction is made of."""
    module = module_of(program)
    every = [i for c in module.computations.values() for i in c.instructions.values()]
    inside = {
        name
        for instruction in every
        if instruction.opcode not in ("while", "conditional", "call")
        for names in instruction.called.values()
        for name in names
    }
    return [
        instruction
        for computation in module.computations.values()
        if computation.name not in inside
        for instruction in computation.instructions.values()
    ]


def memory(executable: Any) -> Memory:
    """What XLA's memory analysis says; zeros where the backend gives none."""
    stats = executable.memory_analysis()

    def read(name: str) -> int:
        return int(getattr(stats, f"{name}_size_in_bytes", 0) or 0)

    return Memory(read("argument"), read("output"), read("temp"), read("alias"))


def module_of(program: Any) -> Module:
    """The parsed module of an executable, of HLO text, or itself."""
    if isinstance(program, Module):
        return program
    return parse(program if isinstance(program, str) else program.as_text())
