"""`Topology`: the shape of a token tree, a static argument of the compiled step.

A tree is the parent of each of its M nodes. Node 0 is the root: the last emitted token, whose keys
are not committed yet; the other nodes are drafts. Nodes are numbered breadth first and siblings in
rank order (rank 0 is drawn first), so a level is a range of nodes and so are the children of a
node. All else is derived, as read-only NumPy arrays, once per tree. Nothing here imports jax.

The optimal shapes come from Sequoia (arXiv 2402.12374, section 3.1); see `dynamic_program`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32
from numpy.typing import ArrayLike

from jaxinfer.arguments import path_text, shown, whole
from jaxinfer.files import parse_json, read_text, write_text
from jaxinfer.speculative.acceptance import Ranks, as_table
from jaxinfer.speculative.dynamic_program import solve

MOST_NODES = 4096
"""Far more than pays anywhere; the ancestor table of such a tree has 16 MiB."""

MOST_STEPS = 2**33
"""Of the search for a tree, some seconds."""

FORMAT, VERSION = "jaxinfer-tree", 1


@dataclass(frozen=True)
class Topology:
    """A tree shape. Equal parents make equal, equally hashed trees.

    Example:
        >>> from jaxinfer.speculative import Topology
        >>> Topology.k_chains(2, 3).parent
        (-1, 0, 0, 1, 2, 3, 4)
    """

    parent: tuple[int, ...]
    """[M], -1 for the root; parents never decrease, which is what breadth first means."""

    def __post_init__(self):
        parent = _integers(self.parent, "parent")
        if not 1 <= len(parent) <= MOST_NODES:
            raise ValueError(f"expected 1 to {MOST_NODES} nodes, got {len(parent)}")
        if parent[0] != -1:
            raise ValueError(f"node 0 is the root and has parent -1, got {parent[0]}")
        for node in range(1, len(parent)):
            if not 0 <= parent[node] < node:
                raise ValueError(
                    f"node {node} has parent {parent[node]}, expected 0 to {node - 1}: parents "
                    "come before their children (Topology.from_parents renumbers)"
                )
            if parent[node] < parent[node - 1]:
                raise ValueError(
                    f"node {node} has parent {parent[node]}, after a node with parent "
                    f"{parent[node - 1]}: nodes are numbered breadth first, children of one node "
                    "side by side (Topology.from_parents renumbers)"
                )
        object.__setattr__(self, "parent", parent)

    # ---------------------------------------------------------------- making trees

    @classmethod
    def optimal(
        cls,
        acceptance: Ranks,
        nodes: int,
        levels: int | None = None,
        branching: int | None = None,
    ) -> "Topology":
        """The tree of at most `nodes` nodes with the largest expected number of tokens.

        Args:
            acceptance: p_k, the probability that the k-th child of an accepted node is the one
                accepted (not given that earlier ones were rejected); [B], or [depth, B] with the
                root's children in row 0, or an `Acceptance`. The order of the ranks is kept.
            nodes: the root included. Fewer are used where the limits below leave no room, or where
                more gain nothing (less than 1e-12 tokens).
            levels: of nodes, the root's included; None is no limit, or one more than the rows.
            branching: most children of a node; None is no limit but the ranks measured.

        Returns:
            The tree; F itself is `expected_tokens(tree, acceptance)`.

        Raises:
            ValueError: for values that are not such probabilities, or limits below 1.

        Example:
            >>> from jaxinfer.speculative import Topology
            >>> Topology.optimal([0.6, 0.2, 0.1], nodes=5).widths
            (1, 2, 1, 1)
        """
        table = as_table(acceptance)
        nodes = whole("nodes", nodes, most=MOST_NODES)
        if levels is not None and whole("levels", levels) >= nodes and table.ndim == 1:
            levels = None  # no tree is deeper than its size, and this is the faster way
        if branching is not None:
            whole("branching", branching)
        _check_work(table, nodes, levels, branching)
        trees = solve(table, nodes, levels, branching)
        return cls(trees.parents(nodes, levels or MOST_NODES))

    @classmethod
    def chain(cls, n: int) -> "Topology":
        """One sequence of `n` nodes, the root included: n - 1 drafted tokens."""
        n = whole("n", n, most=MOST_NODES)
        return cls(tuple(range(-1, n - 1)))

    @classmethod
    def k_chains(cls, k: int, n: int) -> "Topology":
        """`k` sequences of `n` drafted tokens that share only the root: 1 + k * n nodes."""
        k, n = whole("k", k, most=MOST_NODES), whole("n", n, most=MOST_NODES)
        whole("1 + k * n", 1 + k * n, most=MOST_NODES)
        return cls((-1, *[0] * k, *range(1, 1 + k * (n - 1))))

    @classmethod
    def from_parents(cls, parents: Sequence[int] | np.ndarray) -> "Topology":
        """A tree from the parent of each node, numbered in any order; -1 marks the root.

        Siblings keep the order in which they are listed, which becomes their rank.
        """
        given = _integers(parents, "parents")
        if not 1 <= len(given) <= MOST_NODES:
            raise ValueError(f"expected 1 to {MOST_NODES} nodes, got {len(given)}")
        children: dict[int, list[int]] = {node: [] for node in range(-1, len(given))}
        for node, above in enumerate(given):
            if above not in children:
                raise ValueError(f"node {node} has parent {above}, expected -1 to {len(given) - 1}")
            children[above].append(node)
        if len(children[-1]) != 1:
            raise ValueError(f"expected one root (parent -1), got {len(children[-1])}")
        order, renumbered = children[-1][:], [-1]
        for place, node in enumerate(order):  # grows while it is read: a queue
            order += children[node]
            renumbered += [place] * len(children[node])
        if len(order) < len(given):
            lost = min(set(range(len(given))) - set(order))
            raise ValueError(f"node {lost} does not descend from the root: its parents form a ring")
        return cls(tuple(renumbered))

    @classmethod
    def from_children(cls, root: Sequence[object]) -> "Topology":
        """A tree from nested lists: a node is the list of its children, `[]` a leaf.

        Example:
            >>> from jaxinfer.speculative import Topology
            >>> Topology.from_children([[[]], []]).parent
            (-1, 0, 0, 1)
        """
        parents: list[int] = [-1]
        pending: list[object] = [root]
        for node, children in enumerate(pending):  # grows while it is read: a queue
            if not isinstance(children, (list, tuple)):
                raise ValueError(f"a node is a list of its children, got {shown(children)}")
            pending += children
            parents += [node] * len(children)
            if len(parents) > MOST_NODES:
                raise ValueError(f"expected at most {MOST_NODES} nodes, got more")
        return cls(tuple(parents))

    # ---------------------------------------------------------------- files

    def to_json(self) -> str:
        """The tree as a JSON object: format, version, and the parent of each node."""
        return json.dumps({"format": FORMAT, "version": VERSION, "parent": self.parent}) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, what: object = "the tree") -> "Topology":
        """The tree in such an object; `what` names the source in errors.

        Raises:
            ValueError: if the text is not JSON of this format and version, or not a tree.
        """
        data = parse_json(text, what)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'{what} is not a tree file: expected an object, "format": "{FORMAT}"')
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise ValueError(f"{what} has version {shown(data.get('version'))}, expected {VERSION}")
        if not isinstance(data.get("parent"), list):
            raise ValueError(f'{what} has no list "parent"')
        try:
            return cls(_integers(data["parent"], "parent"))
        except ValueError as error:
            raise ValueError(f"{what} holds no tree: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes `to_json` to a file in one step."""
        write_text(path_text("path", path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Topology":
        """The tree of a file that `save` wrote."""
        return cls.from_json(read_text(Path(path_text("path", path))), path)

    def __str__(self) -> str:
        nodes, levels = f"{self.nodes} node{'s'[: self.nodes > 1]}", self.levels
        widths = ",".join(map(str, self.widths))
        return f"{nodes}, {levels} level{'s'[: levels > 1]}, widths {widths}"

    # ---------------------------------------------------------------- what follows from the parents

    @property
    def nodes(self) -> int:
        """M, the root included."""
        return len(self.parent)

    @cached_property
    def levels(self) -> int:
        """Levels of nodes, the root's included; the longest accepted path has one token less."""
        return int(self.depth[-1]) + 1

    @cached_property
    def branching(self) -> int:
        """The most children of any node; 0 for a root alone."""
        return int(self.child_count.max())

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Nodes of each level."""
        return tuple(int(width) for width in np.diff(self.level_bounds))

    @cached_property
    def depth(self) -> Int32[np.ndarray, "M"]:
        """Edges from the root: what a node's position lies beyond the root's."""
        depth = [0]
        for above in self.parent[1:]:
            depth.append(depth[above] + 1)
        return frozen(depth)

    @cached_property
    def child_count(self) -> Int32[np.ndarray, "M"]:
        """How many children each node has."""
        return frozen(np.bincount(np.asarray(self.parent) + 1, minlength=self.nodes + 1)[1:])

    @cached_property
    def first_child(self) -> Int32[np.ndarray, "M"]:
        """The child of rank 0; 0 for a leaf, so that an index stays in range."""
        starts = 1 + np.cumsum(self.child_count) - self.child_count
        return frozen(np.where(self.child_count > 0, starts, 0))

    @cached_property
    def rank(self) -> Int32[np.ndarray, "M"]:
        """Which child of its parent each node is, from 0; 0 for the root."""
        parent = np.asarray(self.parent)
        return frozen(np.arange(self.nodes) - np.where(parent < 0, 0, self.first_child[parent]))

    @cached_property
    def level_bounds(self) -> Int32[np.ndarray, " bounds"]:
        """Level l (the root's is 0) has the nodes from `level_bounds[l]` to before the next."""
        return frozen(np.searchsorted(self.depth, np.arange(self.levels + 1)))

    @cached_property
    def ancestors(self) -> Bool[np.ndarray, "M M"]:
        """Whether the second node is the first or above it: what a node may attend to."""
        table = np.eye(self.nodes, dtype=bool)
        for node, above in enumerate(self.parent[1:], start=1):
            table[node] |= table[above]
        table.setflags(write=False)
        return table


def _integers(values: object, name: str) -> tuple[int, ...]:
    """A tuple of Python integers, from any sequence; NumPy's integers are accepted."""
    given = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(given, (list, tuple, range)):
        raise ValueError(f"{name} must be a list of whole numbers, got {shown(values)}")
    for value in given:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"{name} holds {shown(value)}, expected whole numbers")
    return tuple(map(int, given))


def _check_work(table: np.ndarray, nodes: int, levels: int | None, branching: int | None) -> None:
    """Refuses a search that would take minutes."""
    ranks = min(table.shape[-1], branching or nodes, nodes)
    depth = 1 if levels is None and table.ndim == 1 else min(levels or nodes, nodes)
    if table.ndim == 2:
        depth = min(depth, len(table) + 1)
    steps = nodes**2 * ranks * depth
    if steps > MOST_STEPS:
        raise ValueError(
            f"the best tree of {nodes} nodes with {depth} levels and {ranks} ranks takes "
            f"{steps:.1g} steps, more than {MOST_STEPS:.1g}; ask for fewer nodes, levels or ranks"
        )


def frozen(values: ArrayLike) -> np.ndarray:
    """A read-only int32 array: it is shared by everyone who holds the tree."""
    array = np.array(values, np.int32)
    array.setflags(write=False)
    return array
