"""One decode step of a distilled long convolution (Laughing Hyena, arXiv 2310.18780, section 3).

A filter is h_0 at lag 0 and `Re sum_k R_k lambda_k^(t-1)` from lag 1 on: K complex modes, which is
a real system of order 2K whose conjugates are implied. The output is read from the state before it
is updated (the paper's delayed form; StripedHyena's undelayed form has residues R = R' lambda and
h_0 = D + Re sum R'). Real arithmetic throughout: complex numbers do not lower to Triton.

    y = h_0 u + sum_k (Re R_k Re x_k - Im R_k Im x_k),     x_k <- lambda_k x_k + u

Axis letters: B rows, D channels, K modes of each, S taps of a short filter.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.modal_step import reference
from pallas_kernels.modal_step.configs import Config, heuristic
from pallas_kernels.shapes import expect
from pallas_kernels.tuned import choose


def modal_step(
    state_re: Array,
    state_im: Array,
    u: Array,
    pole_re: Array,
    pole_im: Array,
    residue_re: Array,
    residue_im: Array,
    h0: Array,
    *,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B D K"], Float[Array, "B D K"]]:
    """`(y, state_re, state_im)` after one more input; y has the type of `u`, sums are float32.

    The states take over the buffers of those given: donate them, or XLA copies first. Moves
    `16 B D K` bytes of state, `16 D K` of coefficients, u and y.

    Args:
      state_re, state_im: f32[B, D, K].
      u: [B, D] of any float type.
      pole_re, pole_im, residue_re, residue_im: f32[D, K]. Poles rounded to bfloat16 move a filter
        by 10 % and leave the unit circle, so no other type is taken.
      h0: f32[D].
      config: the tiling; None takes what `pallas_kernels.tuned.choose` gives.
      implementation: see `pallas_kernels.dispatch.dispatch`.
    """
    expect("u", u, (None, None))
    filters = (pole_re, pole_im, residue_re, residue_im, h0)
    _check(state_re, state_im, filters, *u.shape)
    config = config or choose("modal_step", heuristic, *state_re.shape)
    return dispatch(
        implementation,
        reference.modal_step,
        functools.partial(_modal_step, config=config),
        state_re, state_im, u, *filters,
    )  # fmt: skip


def hyena_step(
    p: Array,
    past: Array,
    taps: Array,
    bias: Array,
    state_re: Array,
    state_im: Array,
    pole_re: Array,
    pole_im: Array,
    residue_re: Array,
    residue_im: Array,
    h0: Array,
    *,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, Array, Array, Array]:
    """`(y, past, state_re, state_im)` of a Hyena operator between its projections, in one launch.

    The short filter runs over the three projections `p` (arXiv 2302.10866, section 3), which are a
    gate, x and v; then `y = gate * modal_step(x * v)`. `past` and the states are updated in place;
    over `modal_step` this moves `3 D B` inputs and `2 * 3 D B (S - 1)` past ones.

    Args:
      p: [B, 3D], of any float type, biases of the projection added.
      past: [B, 3D, S - 1], the inputs before `p`, the oldest first; S >= 2.
      taps, bias: f32[3D, S], the last tap for the current token, and f32[3D].
      state_re, ..., implementation: as in `modal_step`; h0 includes the skip connection.
    """
    expect("p", p, (None, None))
    batch, triple = p.shape
    if triple % 3:
        raise ValueError(f"p must have a gate, x and v in its last axis of 3D, got {list(p.shape)}")
    expect("taps", taps, (triple, None))
    if taps.shape[1] < 2:
        raise ValueError(f"a short filter needs at least 2 taps, got {taps.shape[1]}")
    expect("past", past, (batch, triple, taps.shape[1] - 1))
    expect("bias", bias, (triple,))
    filters = (pole_re, pole_im, residue_re, residue_im, h0)
    _check(state_re, state_im, filters, batch, triple // 3)
    config = config or choose("hyena_step", heuristic, *state_re.shape)
    return dispatch(
        implementation,
        reference.hyena_step,
        functools.partial(_hyena_step, config=config),
        p, past, taps, bias, state_re, state_im, *filters,
    )  # fmt: skip


def _check(state_re: Array, state_im: Array, filters: tuple, batch: int, channels: int) -> None:
    expect("state_re", state_re, (batch, channels, None))
    expect("state_im", state_im, state_re.shape)
    names = ("pole_re", "pole_im", "residue_re", "residue_im", "h0")
    named = dict(zip(names, filters, strict=True))
    for name, x in named.items():
        expect(name, x, (channels,) if name == "h0" else state_re.shape[1:])
    for name, x in {"state_re": state_re, "state_im": state_im, **named}.items():
        if x.dtype != jnp.float32:
            raise ValueError(
                f"{name} must be float32, got {x.dtype}; keep modal filters and their state out of "
                "any cast"
            )


def _hyena_step(*args, **options):
    from pallas_kernels.modal_step import triton  # a CPU never pays for Pallas

    return triton.hyena_step(*args, **options)


def _modal_step(*args, **options):
    from pallas_kernels.modal_step import triton  # a CPU never pays for Pallas

    return triton.modal_step(*args, **options)
