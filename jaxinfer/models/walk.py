"""A walk through any model, one layer at a time in the memory of one layer.

What layers see of each other is the states between them, so that these are all that is kept: a
`LayerView` has what the layer made of them, and its attention on demand, some queries at a time.
With a policy each layer reads through a cache of its own, as decoding does.

Axis letter: Q texts.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxinfer.arguments import one_of, whole
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.presets import PolicyLike, full, resolve
from jaxinfer.cache.readback import Stored
from jaxinfer.config import ModelConfig
from jaxinfer.models.activations import Activations
from jaxinfer.models.layer_reader import CHUNK, LayerReader, valid_lengths
from jaxinfer.models.mixers import mixer_of, with_aux
from jaxinfer.models.stack import cache_geometry, check_cache, layer_policies
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params

Inputs: TypeAlias = Literal["own", "full"]


@runtime_checkable
class HasParameters(Protocol):
    """A model, such as `jaxinfer.lm.LM`."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def params(self) -> Params: ...


@dataclass(frozen=True, kw_only=True)
class LayerView(Activations):
    """What layer `index` made of the texts, in float32 on the host: the arrays of `Activations`
    with an axis of texts in front, [Q, T, ...]. Rows behind a text's length mean nothing."""

    index: int
    params: Params
    lengths: list[int]
    reader: LayerReader

    def attention(self, text: int = 0, block: int = 256) -> Iterator[Float[np.ndarray, "_ N T"]]:
        """Whom each token attends to: probabilities [queries, N, T] of one text by position, at
        most `block` queries at a time, in order, to the text's length.

        Without a policy rows sum to 1, less what a sink logit receives. With one they are of what
        the cache holds when the token is read: 0 where it was evicted; what a low-rank state of
        evicted tokens takes part in is left out.

        Args:
          text: which of the texts.
          block: how many queries' rows exist at a time; a multiple of what the policy reads at
            once.

        Raises:
          ValueError: the layer has no attention.
        """
        text = whole("text", text, least=0, most=len(self.lengths) - 1)
        block, length = whole("block", block), self.lengths[text]
        yield from self.reader.weights(self.index, self.params, self.before[text], length, block)

    def stored(self, text: int = 0) -> Stored:
        """What the cache gives back of one text when all of it was read: keys, rotated by their
        position, and values [K, T, H], and which tokens it holds [K, T]; zeros where it evicted.

        Raises:
          ValueError: the layer has no attention.
        """
        text = whole("text", text, least=0, most=len(self.lengths) - 1)
        before, length = self.before[text], self.lengths[text]
        found = self.reader.stored(self.index, self.params, before, length)
        return jax.tree.map(lambda x: np.asarray(x)[0], found)


def walk(
    model: HasParameters,
    tokens: Int[np.ndarray, "Q T"] | Sequence[Sequence[int]],
    policy: PolicyLike = None,
    inputs: Inputs = "own",
    *,
    lengths: Sequence[int] | None = None,
    chunk: int | None = None,
) -> Iterator[LayerView]:
    """The layers of a model as they read texts, one after the other.

    Args:
      model: an `LM`, or what else has a `config` and `params`.
      tokens: texts of equally many tokens.
      policy: None reads each text as a whole. With one, each layer reads it through its own cache:
        token by token where the policy reads prompts whole, as its state would not matter else.
      inputs: what layers read under a policy. "own": what the layers in front gave, so that errors
        add up. "full": what the model gives without the policy, so that each layer's is its own.
      lengths: how many tokens of each text count, the first ones; None: all.
      chunk: tokens that are read through a cache at once; None: as `policy` says.

    Yields:
      A view of each layer, which is all that is in memory beside the model and the states.

    Raises:
      ValueError: tokens are outside the vocabulary or too many, the policy does not suit the model,
        blocks are not dense, or numbers are not finite.

    Example:
      >>> from jaxinfer.models.walk import walk
      >>> from jaxinfer.testing import tiny_model
      >>> lm = tiny_model()
      >>> [view.k.shape for view in walk(lm, [[3, 1, 4, 1, 5]])]
      [(1, 5, 2, 8), (1, 5, 2, 8)]
    """
    one_of("inputs", inputs, ("own", "full"))
    cfg, params = model.config, model.params
    texts = _checked(cfg, tokens)
    counts = valid_lengths(texts, lengths)
    size = texts.shape[1]
    chosen = None if policy is None else resolve(policy).sized(_capacity(size))
    dtype = str(params["embed"]["tokens"].dtype)
    backend = Backend.of(getattr(model, "implementation", None))
    plain = _reader(cfg, size, None, CHUNK, dtype, backend)
    stored = _through(cfg, params, chosen or full(), size, chunk, dtype, backend)
    own = plain if chosen is None else stored
    hidden = plain.embed(params, texts)
    aux = None if chosen is None else chosen.feature_maps
    for index, layer in enumerate(params["layers"]):
        name, mixer = mixer_of(layer)
        layer = layer | {name: mixer.served(cfg, layer[name])}
        layer = with_aux(layer, None if aux is None else aux.layers[index])
        before = hidden.copy() if chosen is not None and inputs == "full" else hidden
        view = _view(own, stored, index, layer, before, counts)
        if before is not hidden:
            for _ in plain.each(index, layer, hidden, counts):
                pass
        yield view


def reread(
    model: HasParameters, view: LayerView, policy: PolicyLike, *, chunk: int | None = None
) -> LayerView:
    """A layer of a walk once more, on the same states, through the cache of another policy.

    What differs from `view` is the error of that layer alone, as with `inputs="full"`.

    Args:
      model: the one that was walked.
      view: of `walk`, one of its layers.
      policy: what the layer reads through.
      chunk: tokens that are read at once; None: as `policy` says.

    Raises:
      ValueError: the policy does not suit the model.

    Example:
      >>> import jaxinfer as ji
      >>> from jaxinfer.models.walk import reread, walk
      >>> from jaxinfer.testing import tiny_model
      >>> lm = tiny_model()
      >>> view = next(walk(lm, [[3, 1, 4, 1, 5]]))
      >>> reread(lm, view, ji.streaming(1, 2)).stored().kept[0].tolist()
      [True, False, False, True, True]
    """
    cfg, size = model.config, view.before.shape[1]
    chosen = resolve(policy).sized(_capacity(size))
    dtype = str(model.params["embed"]["tokens"].dtype)
    backend = Backend.of(getattr(model, "implementation", None))
    reader = _through(cfg, model.params, chosen, size, chunk, dtype, backend)
    aux = chosen.feature_maps
    layer = with_aux(view.params, None if aux is None else aux.layers[view.index])
    return _view(reader, reader, view.index, layer, view.before.copy(), view.lengths)


def _view(
    reads: LayerReader, stores: LayerReader, index: int, layer: Params, before: np.ndarray,
    lengths: list[int],
) -> LayerView:  # fmt: skip
    """What the layer makes of the states `before`, which become those behind it."""
    found = [
        jax.tree.map(np.asarray, one["all"]) for one in reads.each(index, layer, before, lengths)
    ]
    stacked = {
        name: _stacked([getattr(one, name) for one in found])
        for name in Activations.__dataclass_fields__
    }
    return LayerView(**stacked, index=index, params=layer, lengths=lengths, reader=stores)


def _everything(index: int, layer: Params, found: Activations) -> dict[str, Activations]:
    return {"all": found}


def _stacked(arrays: list[np.ndarray | None]) -> np.ndarray | None:
    kept = [np.asarray(x, np.float32) for x in arrays if x is not None]
    return np.stack(kept) if kept else None


@functools.lru_cache(maxsize=16)  # of programs: neither parameters nor texts are in it
def _reader(
    cfg: ModelConfig, size: int, policies: tuple[Policy, ...] | None, chunk: int, dtype: str,
    backend: Backend,
) -> LayerReader:  # fmt: skip
    return LayerReader(
        cfg, size, _everything, policies=policies, chunk=chunk, dtype=dtype, backend=backend
    )


def _through(
    cfg: ModelConfig, params: Params, policy: Policy, size: int, chunk: int | None, dtype: str,
    backend: Backend,
) -> LayerReader:  # fmt: skip
    check_cache(cfg, policy, cache_geometry(cfg, _capacity(size), dtype, backend), params)
    if chunk is None:
        chunk = 1 if policy.prompt == "whole" else CHUNK
    policies = layer_policies(cfg, policy, params)
    return _reader(cfg, size, policies, whole("chunk", chunk), dtype, backend)


def _capacity(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _checked(cfg: ModelConfig, tokens: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
    try:
        texts = np.asarray(tokens)
    except ValueError:
        texts = np.zeros(0)  # rows of unequal lengths
    if texts.ndim != 2 or texts.size == 0 or not np.issubdtype(texts.dtype, np.integer):
        raise ValueError(
            "expected texts of equally many tokens, whole numbers [Q, T] and at least one, got "
            f"{texts.dtype} {list(texts.shape)}; pad shorter ones and give their lengths"
        )
    if texts.min() < 0 or texts.max() >= cfg.vocab_size:
        raise ValueError(
            f"tokens from {texts.min()} to {texts.max()} are not all in the vocabulary of "
            f"{cfg.vocab_size}; encode the texts with the model's tokenizer"
        )
    return texts.astype(np.int32)
