"""`PrefixCache`: what has been read before, found by its tokens.

A radix tree over tokens, in which every edge carries as many tokens as its nodes have in common. A
node may hold a snapshot: the cache of one row that has read the tokens from the root to there.
Snapshots share a budget of bytes; the least recently used one goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Held = TypeVar("Held")


@dataclass(eq=False)
class _Node(Generic[Held]):
    """`tokens` are those of the edge that leads here."""

    tokens: tuple[int, ...] = ()
    parent: "_Node[Held] | None" = None
    children: "dict[int, _Node[Held]]" = field(default_factory=dict)
    held: Held | None = None
    depth: int = 0  # tokens from the root


@dataclass(frozen=True)
class Found(Generic[Held]):
    """A snapshot, whose first `length` tokens are those that were looked for."""

    held: Held
    length: int


class PrefixCache(Generic[Held]):
    """Snapshots of read texts under a budget of bytes.

    Args:
      budget: bytes of all snapshots together.
      truncates: a snapshot serves for any beginning of its tokens, as one of the cache policy
        `full` does; otherwise for exactly its tokens.
    """

    def __init__(self, budget: int, *, truncates: bool):
        self.budget, self.truncates = budget, truncates
        self.bytes = 0
        self._roots: dict[str, _Node[Held]] = {}
        self._used: OrderedDict[_Node[Held], int] = OrderedDict()  # and their bytes, oldest first

    def __len__(self) -> int:
        """Snapshots that are held."""
        return len(self._used)

    def find(self, scope: str, tokens: Sequence[int]) -> Found[Held] | None:
        """The snapshot of a scope that has read most of `tokens`; it counts as used."""
        holder, length = self._best(scope, tokens)
        if holder is None:
            return None
        self._used.move_to_end(holder)
        return Found(_held(holder), length)

    def covers(self, scope: str, tokens: Sequence[int]) -> bool:
        """Whether a snapshot serves for all of `tokens`; it counts as used then."""
        holder, length = self._best(scope, tokens)
        if holder is None or length < len(tokens):
            return False
        self._used.move_to_end(holder)
        return True

    def put(self, scope: str, tokens: Sequence[int], held: Held, size: int) -> None:
        """Keeps a snapshot of `size` bytes that has read `tokens`; one that exceeds the budget, or
        that another one covers, is not kept."""
        if not tokens or size > self.budget or self.covers(scope, tokens):
            return
        root = self._roots.setdefault(scope, _Node())
        node, common, _ = self._walk(root, tokens)
        leaf = self._grown(node, common, tuple(tokens))
        leaf.held = held
        self._used[leaf] = size
        self.bytes += size
        above = leaf.parent
        while self.truncates and above is not None:  # which the new one covers
            above, parent = above.parent, above
            if parent.held is not None:
                self._drop(parent)
        while self.bytes > self.budget:
            self._drop(next(iter(self._used)))

    def clear(self) -> None:
        """Forgets all."""
        self._roots.clear()
        self._used.clear()
        self.bytes = 0

    def _best(self, scope: str, tokens: Sequence[int]) -> tuple[_Node[Held] | None, int]:
        """The node that holds what `find` gives, and how many of `tokens` it serves for."""
        if scope not in self._roots:
            return None, 0
        node, common, below = self._walk(self._roots[scope], tokens)
        if self.truncates and common:
            # All below the point where the ways part has read the common tokens.
            holder = self._newest(below)
            if holder is not None:
                return holder, common
        while node.held is None and node.parent is not None:
            node = node.parent
        return (None, 0) if node.held is None or not node.depth else (node, node.depth)

    def _walk(
        self, root: _Node[Held], tokens: Sequence[int]
    ) -> tuple[_Node[Held], int, _Node[Held]]:
        """The deepest node on the way of `tokens`, how many of them are in the tree, and the node
        at whose edge that ends."""
        node, common = root, 0
        while common < len(tokens):
            child = node.children.get(tokens[common])
            if child is None:
                return node, common, node
            same = _common(child.tokens, tokens[common : common + len(child.tokens)])
            common += same
            if same < len(child.tokens):
                return node, common, child
            node = child
        return node, common, node

    def _grown(self, node: _Node[Held], common: int, tokens: tuple[int, ...]) -> _Node[Held]:
        """The node of `tokens`, of which `common` are in the tree and `node` is the deepest."""
        if common > node.depth:  # the ways part inside an edge
            child = node.children[tokens[node.depth]]
            shared = common - node.depth
            middle = _Node(child.tokens[:shared], node, depth=common)
            node.children[middle.tokens[0]] = middle
            child.tokens, child.parent = child.tokens[shared:], middle
            middle.children[child.tokens[0]] = child
            node = middle
        if common < len(tokens):
            leaf = _Node(tokens[common:], node, depth=len(tokens))
            node.children[leaf.tokens[0]] = leaf
            node = leaf
        return node

    def _newest(self, node: _Node[Held]) -> _Node[Held] | None:
        """The most recently used holder at or below a node."""
        below, holders = [node], set()
        while below:
            one = below.pop()
            below += one.children.values()
            if one.held is not None:
                holders.add(one)
        return next((one for one in reversed(self._used) if one in holders), None)

    def _drop(self, node: _Node[Held]) -> None:
        """Forgets a snapshot, and the part of the tree that leads to no other."""
        self.bytes -= self._used.pop(node)
        node.held = None
        while node.parent is not None and node.held is None and not node.children:
            del node.parent.children[node.tokens[0]]
            node = node.parent
        if node.parent is None and not node.children:
            self._roots = {scope: root for scope, root in self._roots.items() if root is not node}


def _held(node: _Node[Held]) -> Held:
    assert node.held is not None
    return node.held


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
