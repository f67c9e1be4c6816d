"""A small parser of XLA's optimised HLO text (`executable.as_text()`).

It reads what the structure checks need (types, opcodes, operands, called computations, aliasing)
and ignores the rest, so new attributes do not break it. A computation is a list of instructions in
schedule order; types keep dtype and dimensions and drop layouts.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_CALL_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ALIAS = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}")


@dataclass(frozen=True)
class ArrayType:
    """An element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @cached_property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits.group()) if digits else 0
        for dim in self.dims:
            bits *= dim
        return (bits + 7) // 8


@dataclass
class Instruction:
    """One line of a computation; `arrays` lists the leaves of its (possibly nested tuple) type."""

    name: str
    opcode: str
    type_text: str
    operands: tuple[str, ...]
    attributes: str
    literal: str  # what stands between the parentheses: the parameter number, a constant
    is_root: bool = False

    @cached_property
    def arrays(self) -> tuple[ArrayType, ...]:
        return parse_types(self.type_text)

    @cached_property
    def is_tuple(self) -> bool:
        return self.type_text.startswith("(")

    @cached_property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Called computations by attribute name; branches under "branches"."""
        found: dict[str, tuple[str, ...]] = {}
        branches: list[str] = []
        for kind, name in _CALLS.findall(self.attributes):
            if kind.endswith("_computation"):
                branches.append(name)
            else:
                found[kind] = (name,)
        for names in _CALL_LISTS.findall(self.attributes):
            branches += _NAME.findall(names)
        return found | ({"branches": tuple(branches)} if branches else {})

    def attribute(self, name: str) -> str | None:
        """The word after `name=`."""
        match = re.search(rf'\b{name}="?([\w.$\-]+)', self.attributes)
        return match.group(1) if match else None

    @property
    def source(self) -> str:
        """The JAX operation that it came from, when recorded."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""


@dataclass
class Computation:
    """Instructions in order, by name."""

    name: str
    is_entry: bool
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        for instruction in self.instructions.values():
            if instruction.is_root:
                return instruction
        return list(self.instructions.values())[-1]

    @cached_property
    def parameters(self) -> list[Instruction]:
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.literal))


@dataclass
class Module:
    """A parsed HLO module."""

    header: str
    computations: dict[str, Computation]

    @cached_property
    def entry(self) -> Computation:
        for computation in self.computations.values():
            if computation.is_entry:
                return computation
        raise ValueError("the HLO text has no ENTRY computation; give executable.as_text()")

    @cached_property
    def aliases(self) -> dict[int, tuple[int, ...]]:
        """Entry parameter number -> index of the output that reuses its buffer."""
        start = self.header.find("input_output_alias=")
        if start < 0:
            return {}
        text = _balanced(self.header, start + len("input_output_alias="))
        return {
            int(parameter): tuple(int(i) for i in output.split(",") if i.strip())
            for output, parameter, _ in _ALIAS.findall(text)
        }


def parse(text: str) -> Module:
    """The module; lines that are not understood are skipped."""
    header, computations, current = "", {}, None
    for line in text.splitlines():
        if line.startswith("HloModule"):
            header = line
        elif current is None:
            match = _HEADER.match(line)
            if match and "->" in line:
                current = Computation(match.group(2), bool(match.group(1)))
                computations[current.name] = current
        elif line.startswith("}"):
            current = None
        else:
            match = _INSTRUCTION.match(line)
            instruction = match and _instruction(match)
            if instruction:
                current.instructions[instruction.name] = instruction
    return Module(header, computations)


def parse_types(text: str) -> tuple[ArrayType, ...]:
    """The array types in a type, depth first."""
    return tuple(
        ArrayType(dtype, tuple(int(d.strip().lstrip("<=")) for d in dims.split(",") if d.strip()))
        for dtype, dims in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text))
    )


def _instruction(match: re.Match) -> Instruction | None:
    rest = match.group(3)
    type_text = _balanced(rest, 0) if rest.startswith("(") else rest.split(" ", 1)[0]
    rest = rest[len(type_text) :].lstrip()
    opcode = rest.split("(", 1)[0]
    if "(" not in rest or not re.fullmatch(r"[\w\-]+", opcode):
        return None
    inside = _balanced(rest, len(opcode))
    attributes = rest[len(opcode) + len(inside) :]
    inside = inside[1:-1]
    operands = tuple(_NAME.findall(inside)) if opcode not in ("constant", "parameter") else ()
    return Instruction(
        match.group(2), opcode, type_text, operands, attributes, inside, bool(match.group(1))
    )


def _balanced(text: str, start: int) -> str:
    """The bracketed text that opens at `start`, brackets included."""
    depth = 0
    quoted = False
    for index in range(start, len(text)):
        char = text[index]
        if char == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif char in "({":
            depth += 1
        elif char in ")}":
            depth -= 1
            if depth == 0:
                return text[start : index + 1]
    return text[start:]
