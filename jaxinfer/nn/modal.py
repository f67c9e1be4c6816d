"""`ModalFilter`: causal filters as sums of decaying modes, which a recurrence of K numbers applies.

A filter has the impulse response (Laughing Hyena, arXiv 2310.18780, section 3)

    h_0 = h0,   h_t = taps_(t-1) for 1 <= t <= P,   h_(P+t) = Re sum_k R_k lambda_k^(t-1) for t >= 1

with poles lambda = exp(-exp(nu)) exp(i theta), inside the unit circle whatever nu is, and residues
R = a + i b. The state is read before it is updated (the paper's delayed form). Taking the real part
of K free modes is a real system of order 2K whose conjugates are implied; S4-style code takes twice
the real part. StripedHyena's undelayed form updates first: `h_t = D [t = 0] + Re sum_k R'_k
lambda_k^t`, see `from_undelayed` and `undelayed`.

Leaves are float32 and real. Poles in bfloat16 move a filter by 10 % at a radius of 0.99 and leave
the unit circle at 0.999, so no cast may touch them.

Axis letters: F filters, K modes of each, P taps, T lags.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex128, Float, Float64, Int

from jaxinfer.arguments import whole
from jaxinfer.arrays import check_finite
from jaxinfer.typing import Leaf

STABLE = 1 - 2.0**-24
"""The largest radius of a pole; the nearest float32 below 1."""

SMALLEST_POLE = 1e-3
"""Of the undelayed form, whose residues are divided by the poles."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ModalFilter:
    """F filters of K modes; see the top of the file. `modal_filter` makes one from poles."""

    nu: Leaf  # f32[F, K], log of the decay per step
    theta: Leaf  # f32[F, K], radians per step
    a: Leaf  # f32[F, K], real parts of the residues
    b: Leaf  # f32[F, K], imaginary parts
    h0: Leaf  # f32[F]
    taps: Leaf = None  # f32[F, P] or None: lags 1 to P

    @property
    def modes(self) -> int:
        """K."""
        return self.nu.shape[1]

    @property
    def order(self) -> int:
        """States of the real system: two for each mode, and one for each tap."""
        return 2 * self.modes + self.delay

    @property
    def delay(self) -> int:
        """P, the steps by which the modes come later than those of a filter without taps."""
        return 0 if self.taps is None else self.taps.shape[1]

    def poles(self) -> Complex128[np.ndarray, "F K"]:
        """On the host, exact for these leaves."""
        nu, theta = (np.asarray(x, np.float64) for x in (self.nu, self.theta))
        return np.exp(-np.exp(nu) + 1j * theta)

    def residues(self) -> Complex128[np.ndarray, "F K"]:
        """On the host, of the delayed form."""
        return np.asarray(self.a, np.float64) + 1j * np.asarray(self.b, np.float64)

    def check(self, what: str = "modal filters") -> None:
        """Raises ValueError unless leaves are float32, finite, of one shape, and poles stable."""
        leaves = {"nu": self.nu, "theta": self.theta, "a": self.a, "b": self.b, "h0": self.h0}
        if self.taps is not None:
            leaves["taps"] = self.taps
        if getattr(self.nu, "ndim", 0) != 2:
            raise ValueError(f"{what}: nu must be [filters, modes], got {np.shape(self.nu)}")
        for name, leaf in leaves.items():
            shape = self.nu.shape
            if name in ("h0", "taps"):
                shape = (self.nu.shape[0],) if name == "h0" else (self.nu.shape[0], self.delay)
            if np.shape(leaf) != shape:
                raise ValueError(
                    f"{what}: {name} must be {list(shape)}, got {list(np.shape(leaf))}"
                )
            if leaf.dtype != np.float32:
                raise ValueError(
                    f"{what}: {name} must be float32, got {leaf.dtype}; keep filters out of casts"
                )
            check_finite(np.asarray(leaf), f"{what}: {name}")
        check_stable(np.abs(self.poles()), what)


def modal_filter(
    poles: Complex128[np.ndarray, "F K"],
    residues: Complex128[np.ndarray, "F K"],
    h0: Float[np.ndarray, " F"],
    taps: Float[np.ndarray, "F P"] | None = None,
) -> ModalFilter:
    """The filter with these poles and residues of the delayed form, rounded to float32.

    Raises:
      ValueError: something is not finite, or a pole is on the unit circle or outside.
    """
    for name, x in {"poles": poles, "residues": residues, "h0": h0, "taps": taps}.items():
        if x is not None:
            check_finite(x, name)
    check_stable(np.abs(poles), "poles")
    radius = np.clip(np.abs(poles), np.finfo(np.float32).tiny, STABLE)
    made = ModalFilter(
        nu=_rounded(np.log(-np.log(radius))),
        theta=_rounded(np.angle(poles)),
        a=_rounded(np.real(residues)),
        b=_rounded(np.imag(residues)),
        h0=_rounded(h0),
        taps=None if taps is None else _rounded(taps),
    )
    made.check()
    return made


def from_undelayed(
    poles: Complex128[np.ndarray, "F K"],
    residues: Complex128[np.ndarray, "F K"],
    skip: Float[np.ndarray, " F"],
) -> ModalFilter:
    """The filter whose state is updated before it is read: `h_t = skip [t = 0] + Re sum R p^t`."""
    return modal_filter(poles, residues * poles, skip + np.real(residues).sum(axis=1))


class Undelayed(NamedTuple):
    """What StripedHyena's layout stores."""

    poles: Complex128[np.ndarray, "F K"]
    residues: Complex128[np.ndarray, "F K"]
    skip: Float64[np.ndarray, " F"]


def undelayed(filters: ModalFilter) -> Undelayed:
    """The form that is updated before it is read.

    Raises:
      ValueError: there are taps, or a live pole so near zero that dividing by it loses the residue.
    """
    if filters.delay:
        raise ValueError(
            f"the undelayed form has no taps, and these filters have {filters.delay}; fit without"
        )
    poles, residues = filters.poles(), filters.residues()
    live = residues != 0
    smallest = np.abs(poles[live]).min(initial=1.0)
    if smallest < SMALLEST_POLE:
        raise ValueError(
            f"a pole has radius {smallest:.2g}; the undelayed form divides by it and takes none "
            f"below {SMALLEST_POLE:g}"
        )
    found = np.divide(residues, poles, out=np.zeros_like(residues), where=live)
    skip = np.asarray(filters.h0, np.float64) - np.real(found).sum(axis=1)
    return Undelayed(poles, found, skip)


def check_stable(radius: np.ndarray, what: str) -> None:
    """Refuses poles on the unit circle or outside, which no recurrence survives."""
    if radius.size and not radius.max() < 1:
        raise ValueError(
            f"{what}: {int((radius >= 1).sum())} of {radius.size} poles are not inside the unit "
            f"circle (largest radius {radius.max():.6g})"
        )


def impulse_response(filters: ModalFilter, length: int) -> Float[Array, "F T"]:
    """h_0 to h_(length - 1), differentiable, under `jax.jit` or not; in the dtype of the leaves.

    The error of a mode is that of a few roundings at every lag (`powers`).
    """
    length = whole("length", length)
    (far_re, far_im), (near_re, near_im) = lag_tables(filters, max(length - 1 - filters.delay, 1))

    def product(x: Array, y: Array) -> Array:
        return jnp.einsum("fki,fkj->fij", x, y, precision="highest")

    tail = product(far_re, near_re) - product(far_im, near_im)
    tail = tail.reshape(len(filters.h0), -1)
    head = [filters.h0[:, None]] + ([] if filters.taps is None else [filters.taps])
    return jnp.concatenate([*head, tail], axis=1)[:, :length]


Complex = tuple[Array, Array]
"""Real and imaginary parts."""


def lag_tables(filters: ModalFilter, count: int) -> tuple[Complex, Complex]:
    """`R lambda^(i C)` [F, K, I] and `lambda^j` [F, K, C], whose products are what the modes give
    at lags i C + j, the first `count` of them at least: no array has K and all lags."""
    columns = 1 << (max(count - 1, 1).bit_length() + 1) // 2
    rows = -(-count // columns)
    re, im = powers(filters.nu, filters.theta, jnp.arange(rows) * columns)
    a, b = filters.a[..., None], filters.b[..., None]
    near = powers(filters.nu, filters.theta, jnp.arange(columns))
    return (a * re - b * im, a * im + b * re), near


def exact_response(filters: ModalFilter, length: int) -> Float64[np.ndarray, "F T"]:
    """`impulse_response` in float64 on the host: what errors are measured against."""
    whole("length", length)
    poles, residues = filters.poles(), filters.residues()
    h = np.zeros((len(poles), length))
    head = [np.asarray(filters.h0, np.float64)[:, None]]
    head += [] if filters.taps is None else [np.asarray(filters.taps, np.float64)]
    start = np.concatenate(head, axis=1)[:, :length]
    h[:, : start.shape[1]] = start
    lags = np.arange(max(length - start.shape[1], 0))
    for log_pole, residue in zip(np.log(poles).T, residues.T, strict=True):  # [F, T] at a time
        h[:, start.shape[1] :] += (residue[:, None] * np.exp(log_pole[:, None] * lags)).real
    return h


def powers(
    nu: Float[Array, "*F K"], theta: Float[Array, "*F K"], lags: Int[Array, " T"]
) -> tuple[Float[Array, "*F K T"], Float[Array, "*F K T"]]:
    """Real and imaginary parts of lambda^t for the lags t, differentiable in nu and theta.

    The float32 product of a lag and an angle is wrong by 1e-4 radian at lag 2,000. Here turns are
    counted in integers, which wrap, so that the error stays below 1e-5 up to lag 10,000.
    """
    steps = lags.astype(nu.dtype)
    radius = jnp.exp(-jnp.exp(nu)[..., None] * steps)
    if nu.dtype == jnp.float32:
        phase = _turns(theta)[..., None] * lags.astype(jnp.uint32)
        signed = jax.lax.bitcast_convert_type(phase, jnp.int32)
        angle = signed.astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32)
        # Integers have no gradient: that of t * theta is added, times zero.
        angle = angle + (theta - jax.lax.stop_gradient(theta))[..., None] * steps
    else:
        angle = theta[..., None] * steps
    return radius * jnp.cos(angle), radius * jnp.sin(angle)


def _turns(theta: Float[Array, "..."]) -> Array:
    """theta / 2 pi in units of 2^-32, modulo one turn, right to two units: u32[...].

    Angle and factor are cut into pieces of 12 bits, whose products are exact in float32.
    """
    theta = jax.lax.stop_gradient(theta)
    upper = _upper_bits(theta)
    total = jnp.zeros(theta.shape, jnp.uint32)
    for part, factors in ((upper, _FACTORS), (theta - upper, _FACTORS[:2])):
        for factor in factors:
            units = part * factor
            coarse = jnp.floor(units * np.float32(2.0**-16))
            fine = jnp.round(units - coarse * np.float32(2.0**16))
            whole_units = coarse.astype(jnp.int32) * (1 << 16) + fine.astype(jnp.int32)
            total = total + jax.lax.bitcast_convert_type(whole_units, jnp.uint32)
    return total


def _upper_bits(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFFF000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _pieces(value: float) -> tuple[np.float32, ...]:
    """Three floats of 12 bits each whose sum is `value` to 36 bits."""
    found = []
    for _ in range(3):
        mantissa, exponent = np.frexp(value)
        piece = np.ldexp(np.trunc(mantissa * 4096), exponent - 12)
        found.append(np.float32(piece))
        value -= piece
    return tuple(found)


_FACTORS = _pieces(2.0**32 / (2 * np.pi))


def _rounded(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float32)
