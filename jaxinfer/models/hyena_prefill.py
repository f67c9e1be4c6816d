"""What many tokens at once make of the modes' states: `x = sum_(j<A) lambda^(A-1-j) u_j`.

In five ways (laughing_hyena.md 2.11); none holds an array of filters by modes by tokens:

- chunked: a product with a table of powers for each chunk, and a recurrence over chunks;
- scan: the same with an associative scan within a chunk;
- recurrence: token after token, least memory;
- vandermonde: for each mode a product with the powers of all lags;
- fft: for each mode a convolution of all tokens, of which the last output counts (StripedHyena's
  way).

Tokens stand at the end, behind zeros, so that rows of unequal lengths share all tables.

Axis letters: F filters, E entries under each, K modes, I inputs of the convolutions a token, A
tokens, C tokens of a chunk.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.config import ModelConfig
from jaxinfer.models.hyena_params import config_of
from jaxinfer.nn.modal import ModalFilter, powers

CHUNK = 128  # tokens whose effect on the state is one product

Complex = tuple[Array, Array]
"""Real and imaginary parts f32[B, F, E, K]."""

Effect = Callable[[ModalFilter, Array], Complex]
"""What the entries [B, C, F, E] of a chunk make of an empty state."""


def entries(cfg: ModelConfig, inputs: Float[Array, "B A I"]) -> Float[Array, "B A F E"]:
    """What the filters convolve: the outer products of keys and values, or the inputs."""
    own = config_of(cfg)
    if own.head_size == 1:
        return inputs[..., None]
    split = (*inputs.shape[:2], 2, -1, own.head_size)
    k, v = (x[:, :, 0] for x in jnp.split(inputs.reshape(split), 2, axis=2))
    return (k[..., None] * v[..., None, :]).reshape(*k.shape[:-1], -1)


def state_of(cfg: ModelConfig, modal: ModalFilter, inputs: Float[Array, "B A I"]) -> Complex:
    """The state behind these tokens alone, in the way that the configuration names."""
    way = config_of(cfg).prefill
    if way == "vandermonde":
        return _of_each_mode(modal, entries(cfg, inputs), _product)
    if way == "fft":
        return _of_each_mode(modal, entries(cfg, inputs), _last_of_convolution)
    if way == "recurrence" or inputs.shape[1] == 1:
        return _by_chunks(cfg, modal, inputs, 1, _of_token)
    effect = _of_scan if way == "scan" else _of_table
    return _by_chunks(cfg, modal, inputs, min(inputs.shape[1], CHUNK), effect)


def _by_chunks(
    cfg: ModelConfig, modal: ModalFilter, inputs: Array, chunk: int, effect: Effect
) -> Complex:
    """`x <- lambda^C x + effect(chunk)` over all chunks."""
    batch, size, _ = inputs.shape
    count = -(-size // chunk)
    if count == 1:
        return effect(modal, entries(cfg, inputs))
    inputs = jnp.pad(inputs, [(0, 0), (count * chunk - size, 0), (0, 0)])
    decay_re, decay_im = (
        x[:, None, :, 0] for x in powers(modal.nu, modal.theta, jnp.array([chunk]))
    )

    def add(state: Complex, part: Array) -> tuple[Complex, None]:
        (re, im), (new_re, new_im) = state, effect(modal, entries(cfg, part))
        re, im = decay_re * re - decay_im * im + new_re, decay_im * re + decay_re * im + new_im
        return (re, im), None

    parts = inputs.reshape(batch, count, chunk, -1).swapaxes(0, 1)
    shapes = jax.eval_shape(lambda part: effect(modal, entries(cfg, part)), parts[0])
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    found, _ = jax.lax.scan(add, empty, parts)
    return found


def _of_token(modal: ModalFilter, u: Float[Array, "B 1 F E"]) -> Complex:
    re = jnp.broadcast_to(u[:, 0, ..., None], (*u[:, 0].shape, modal.modes))
    return re, jnp.zeros_like(re)


def _of_table(modal: ModalFilter, u: Float[Array, "B C F E"]) -> Complex:
    tables = powers(modal.nu, modal.theta, jnp.arange(u.shape[1])[::-1])
    re, im = (jnp.einsum("fkj,bjfe->bfek", x, u, precision="highest") for x in tables)
    return re, im


def _of_scan(modal: ModalFilter, u: Float[Array, "B C F E"]) -> Complex:
    """Every token is the map `x <- lambda x + u`, and such maps compose."""
    pole = [x[None, :, None, :, 0] for x in powers(modal.nu, modal.theta, jnp.array([1]))]
    ones = jnp.ones((u.shape[1], *pole[0].shape), u.dtype)
    start = (*(ones * x for x in pole), *_of_token_each(modal, u))

    def composed(first: tuple[Array, ...], then: tuple[Array, ...]) -> tuple[Array, ...]:
        (a_re, a_im, x_re, x_im), (b_re, b_im, y_re, y_im) = first, then
        return (
            a_re * b_re - a_im * b_im,
            a_re * b_im + a_im * b_re,
            b_re * x_re - b_im * x_im + y_re,
            b_im * x_re + b_re * x_im + y_im,
        )

    _, _, re, im = jax.lax.associative_scan(composed, start)
    return re[-1], im[-1]


def _of_token_each(modal: ModalFilter, u: Array) -> Complex:
    """Of every token alone, tokens first."""
    re = jnp.moveaxis(u, 1, 0)[..., None]
    re = jnp.broadcast_to(re, (*re.shape[:-1], modal.modes))
    return re, jnp.zeros_like(re)


def _of_each_mode(
    modal: ModalFilter, u: Float[Array, "B A F E"], effect: Callable[[Array, Array], Array]
) -> Complex:
    """`effect(powers f32[F, A], u)` of the real and the imaginary parts, a mode at a time."""
    lags = jnp.arange(u.shape[1])

    def of_mode(mode: tuple[Array, Array]) -> Complex:
        re, im = (effect(x, u) for x in powers(*mode, lags))
        return re, im

    found = jax.lax.map(of_mode, (modal.nu.T[..., None], modal.theta.T[..., None]))
    re, im = (jnp.moveaxis(x, 0, -1) for x in found)
    return re, im


def _product(lag: Float[Array, "F 1 A"], u: Float[Array, "B A F E"]) -> Float[Array, "B F E"]:
    return jnp.einsum("fj,bjfe->bfe", lag[:, 0, ::-1], u, precision="highest")


def _last_of_convolution(
    lag: Float[Array, "F 1 A"], u: Float[Array, "B A F E"]
) -> Float[Array, "B F E"]:
    size = u.shape[1]
    points = 1 << (2 * size - 2).bit_length()
    spectrum = jnp.fft.rfft(jnp.moveaxis(u, 1, -1), points) * jnp.fft.rfft(lag, points)
    return jnp.fft.irfft(spectrum, points)[..., size - 1]
