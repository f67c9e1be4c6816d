"""Axis letters and array aliases used in every annotation.

B batch row, T fresh tokens, S stored slots, L layers, N query heads, K key/value heads, G = N / K,
H head size, D model width, F mlp width, V vocabulary, P positions or pages, R rank, M tree nodes,
A accepted tokens. Layouts: activations [B, T, D]; queries [B, N, T, H]; keys, values [B, K, T, H].

State pytrees (dataclasses that hold arrays) annotate their fields as `Leaf`, with the shape in a
comment: a pytree is also built with shapes, shardings or `None` in place of arrays.
"""

from typing import Any, TypeAlias

Leaf: TypeAlias = Any
"""An array, or whatever a tree transformation puts in its place."""

Json: TypeAlias = dict[str, Any]
"""A parsed JSON object; what it holds is checked where it is read."""

Params: TypeAlias = dict[str, Any]
"""Nested dictionaries of arrays; see `jaxinfer.models.params.abstract_params` for the layout."""
