"""Finds the instructions of a compiled program that copy a cache.

A decode step may read a cache leaf and write single slots of it; whatever else produces at least
half a leaf from it (copy, convert, slice, transpose, select, a loop fusion over it, ...) costs a
pass over memory per token. The search follows each cache parameter through tuples, loops, calls and
the inside of fusions up to the first contraction or reduction, whose result is attention, not
cache.

What is not a copy: the blocks that a loop cuts out of a leaf which it hands on unchanged (a read
in blocks; what the loop puts together elsewhere is counted), `dynamic-update-slice` and `scatter`
of little data onto the buffer they were given, alone or as the root of a fusion (XLA makes them in
place, and where it cannot, its copy insertion leaves an explicit `copy`, which is counted), and
everything inside a fusion, where only the output is stored.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from jaxinfer.inspection.hlo_text import ArrayType, Computation, Instruction, Module
from jaxinfer.inspection.sources import (
    NOTHING,
    Source,
    Taint,
    handed_on,
    join,
    keeping,
    peak,
)

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("while", "conditional", "call", "after-all", "copy-done"),
    *("async-start", "async-update", "async-done"),
}
_CONTRACTING = {
    *("dot", "convolution", "reduce", "reduce-window", "reduce-scatter", "constant", "iota")
}
_WRITING = {"dynamic-update-slice", "scatter"}
_FILLING = {"broadcast", "pad", "concatenate"}
_MATRIX_CALLS = ("gemm", "dot", "matmul", "cublas", "cudnn", "onednn", "Eigen")


class CopySearch:
    """One search; `found` maps "computation/instruction" to a line about each copy."""

    def __init__(self, module: Module, leaves: Iterable[Any], fraction: float = 0.5):
        self.module = module
        self.fraction = fraction
        self.found: dict[str, str] = {}
        self.sizes, self.types = _describe(leaves)
        self._memo: dict[tuple, Taint] = {}
        self._values: dict[str, dict[str, Taint]] = {}  # of the latest walk through a computation

    def run(self) -> dict[str, str]:
        entry = self.module.entry
        taints = [self._source(p) for p in entry.parameters]
        if all(taint == NOTHING for taint in taints):
            raise ValueError(
                "no argument of the program looks like a cache leaf: expected one of "
                f"{sorted(map(str, self.types)) or sorted(self.sizes)}"
            )
        self._walk(entry, taints, stored=True)
        return self.found

    def is_leaf(self, array: ArrayType) -> bool:
        return array.bytes in self.sizes or (array.dtype, array.dims) in self.types

    def _source(self, parameter: Instruction) -> Source:
        (array, *rest) = parameter.arrays or (ArrayType("token", ()),)
        if rest or not self.is_leaf(array):
            return NOTHING
        return Source(bytes=array.bytes, name=parameter.source or f"argument {parameter.literal}")

    def _walk(self, computation: Computation, taints: list[Taint], stored: bool) -> Taint:
        """The taint of the root; counts copies when the computation's values are stored."""
        key = (computation.name, repr(taints), stored)
        if key in self._memo:
            return self._memo[key]
        values: dict[str, Taint] = {}
        for name, instruction in computation.instructions.items():
            if instruction.opcode == "parameter":
                index = int(instruction.literal)
                values[name] = taints[index] if index < len(taints) else NOTHING
                continue
            inputs = [values.get(operand, NOTHING) for operand in instruction.operands]
            values[name] = self._transfer(instruction, inputs, stored)
            if stored:
                self._count(computation, instruction, values)
        self._values[computation.name] = values
        self._memo[key] = values.get(computation.root.name, NOTHING)
        return self._memo[key]

    def _transfer(self, instruction: Instruction, inputs: list[Taint], stored: bool) -> Taint:
        opcode, called = instruction.opcode, instruction.called
        if opcode == "tuple":
            return inputs
        if opcode == "get-tuple-element":
            index = int(instruction.attribute("index") or 0)
            value = inputs[0]
            return value[index] if isinstance(value, list) and index < len(value) else peak(value)
        if opcode in ("bitcast", "opt-barrier", "copy", "copy-done"):
            value = inputs[0]
            done = opcode == "copy-done" and isinstance(value, list)
            return value[0] if done else value
        if opcode == "copy-start":
            return [inputs[0], inputs[0], NOTHING]
        if opcode == "while":
            return self._loop(instruction, inputs[0], stored)
        if opcode in ("fusion", "call"):
            (name,) = called.get("calls") or called.get("to_apply") or ("",)
            inner = self.module.computations.get(name)
            if inner is not None:
                return self._walk(inner, inputs, stored and opcode == "call")
        if opcode == "conditional" and "branches" in called:
            results = [
                self._walk(self.module.computations[name], [value], stored)
                for name, value in zip(called["branches"], inputs[1:], strict=False)
            ]
            joined: Taint = NOTHING
            for result in results:
                joined = join(joined, result)
            return joined
        if opcode == "async-start" and "calls" in called:
            inner = self.module.computations[called["calls"][0]]
            return [inputs, self._walk(inner, inputs, stored), NOTHING]
        if opcode == "async-done" and isinstance(inputs[0], list) and len(inputs[0]) > 1:
            return inputs[0][1]
        if opcode in _WRITING and not instruction.is_tuple:
            return peak(inputs[0])  # the buffer stays what it was; see _moves for the update
        if opcode in _CONTRACTING or _is_matrix_call(instruction):
            return NOTHING
        strongest = max(map(peak, inputs), default=NOTHING)
        if opcode == "dynamic-slice" and strongest.is_kept:
            strongest = replace(strongest, is_whole=False)
        return [strongest] * len(instruction.arrays) if instruction.is_tuple else strongest

    def _loop(self, instruction: Instruction, state: Taint, stored: bool) -> Taint:
        (body,) = (self.module.computations[name] for name in instruction.called["body"])
        (condition,) = instruction.called["condition"]
        kept = handed_on(body)
        for _ in range(16):  # a taint can move one tuple place per turn; real loops settle in two
            after = join(state, self._walk(body, [keeping(state, kept)], False))
            if after == state:
                break
            state = after
        if stored:
            self._walk(body, [keeping(state, kept)], True)
            self._walk(self.module.computations[condition], [state], True)
        return state

    def _count(
        self, computation: Computation, instruction: Instruction, values: dict[str, Taint]
    ) -> None:
        if instruction.opcode in _FREE:
            return
        fused = None
        if instruction.opcode == "fusion":
            fused = self.module.computations.get(instruction.called.get("calls", ("",))[0])
        taint = values[instruction.name]
        taints = taint if isinstance(taint, list) else [taint] * len(instruction.arrays)
        for place, (array, source) in enumerate(zip(instruction.arrays, taints, strict=False)):
            writers = _writers(computation, instruction, fused, place)
            if writers or _is_aliased_call(instruction, place):
                inside = values if fused is None else self._values.get(fused.name, {})
                copied = any(self._moves(fused or computation, w, inside) for w in writers)
            else:
                copied = self._is_large(array, peak(source))
                copied |= self._fills(instruction, fused, array)
            if copied:
                where = f"{computation.name}/{instruction.name}"
                dims = ",".join(map(str, array.dims))
                self.found[where] = (
                    f"{instruction.opcode} {array.dtype}[{dims}] {where} {instruction.source}"
                ).rstrip()
                leaf = peak([values.get(name, NOTHING) for name in instruction.operands]).name
                self.found[where] += f" of {leaf}" if leaf else ""

    def _is_large(self, array: ArrayType, source: Source) -> bool:
        return source.is_whole and self._covers(array, source)

    def _covers(self, array: ArrayType, source: Source) -> bool:
        return source.bytes > 0 and array.bytes >= self.fraction * source.bytes

    def _moves(
        self, computation: Computation, writer: Instruction, values: dict[str, Taint]
    ) -> bool:
        """Whether an in-place write moves much of a cache: at once, or bit by bit elsewhere."""
        update = writer.operands[2 if writer.opcode == "scatter" else 1]
        source = peak(values.get(update, NOTHING))
        whole = self._is_large(computation.instructions[update].arrays[0], source)
        into_new = not peak(values.get(writer.operands[0], NOTHING)).bytes
        return whole or (into_new and self._covers(writer.arrays[0], source))

    def _fills(self, instruction: Instruction, fused: Computation | None, array: ArrayType) -> bool:
        """Whether a buffer of a leaf's shape is made from scratch (a hidden second cache)."""
        if fused is not None:
            root = _through_bitcasts(fused, fused.root)
            return root.opcode in _FILLING and (array.dtype, array.dims) in self.types
        return instruction.opcode in _FILLING and (array.dtype, array.dims) in self.types


def _writers(
    computation: Computation, instruction: Instruction, fused: Computation | None, place: int
) -> list[Instruction]:
    """The writes of slots that make an output out of its own buffer; empty if it is made anew."""
    if fused is None:
        return [instruction] if instruction.opcode in _WRITING else []
    root = _through_bitcasts(fused, fused.root)
    if root.opcode == "tuple":
        root = _through_bitcasts(fused, fused.instructions[root.operands[place]])
    writers = []
    while root.opcode in _WRITING:  # several slots written by one fusion
        writers.append(root)
        root = _through_bitcasts(fused, fused.instructions[root.operands[0]])
    return writers if root.opcode == "parameter" else []


def _is_aliased_call(instruction: Instruction, place: int) -> bool:
    output = f"{{{place}}}: (" if instruction.is_tuple else "{}: ("
    _, found, aliases = instruction.attributes.partition("output_to_operand_aliasing=")
    return bool(found) and output in aliases


def _through_bitcasts(computation: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _is_matrix_call(instruction: Instruction) -> bool:
    if instruction.opcode != "custom-call":
        return False
    target = instruction.attribute("custom_call_target") or ""
    return any(word in target for word in _MATRIX_CALLS)


_NAMES = {"bool": "pred", "int": "s", "uint": "u", "float": "f", "bfloat": "bf", "complex": "c"}


def hlo_dtype(dtype: Any) -> str:
    """The HLO name of a numpy or JAX dtype."""
    name = np.dtype(dtype).name
    if name.startswith("float8"):
        return "f8" + name.removeprefix("float8_")
    stem = name.rstrip("0123456789")
    return _NAMES.get(stem, stem) + name[len(stem) :]


def _describe(leaves: Iterable[Any]) -> tuple[set[int], set[tuple[str, tuple[int, ...]]]]:
    sizes, types = set(), set()
    for leaf in leaves:
        if isinstance(leaf, (int, np.integer)):
            sizes.add(int(leaf))
        else:
            types.add((hlo_dtype(leaf.dtype), tuple(leaf.shape)))
    return sizes, types
