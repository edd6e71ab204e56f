"""Convolutions along a sequence: short causal ones, long ones by FFT, and the kernels of diagonal state spaces.

    short_convolution  y_t = sum_{c < C} w[:, C-1-c] x_{t-c} + b, for a few taps, packed and carried over calls
    long_convolution   y_t = sum_{s <= t} kernel[:, t-s] u_s, in O(T log T)
    diagonal_kernel    the kernel of a state space; diagonal_step is the same as a recurrence

All accumulate in float32 (float64 for float64 inputs) and are differentiable in every array of floats.
Letters: here C is the number of taps of a short convolution, L that of a long one. A, B, C of a state space are the
matrices of its papers; its D complex numbers per channel are its state.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Complex, Float, Int32

from longattn import shapes
from longattn.ops import dispatch
from longattn.ops.explicit import on_explicit_axes
from longattn.shapes import Given, statistics_dtype, suggest

ACTIVATIONS = {None: lambda y: y, "silu": jax.nn.silu}


def _channels(name: str, x: Given) -> tuple[int, int, int]:
    """Returns B, T, E of an input. Raises ValueError unless it is a float array of that rank."""
    shapes.check_rank(name, x, "B T E")
    shapes.check_dtype(name, x, shapes.FLOATS)
    return tuple(x.shape)


@functools.partial(jax.jit, static_argnames="activation")
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(5,))  # else every tap keeps its product
def _short(
    x: Array, weight: Array, bias: Array | None, segment_ids: Array | None, tail: Array,
    activation: Literal["silu"] | None,
) -> tuple[Array, Array]:  # fmt: skip
    x, weight, bias, segment_ids, tail = dispatch.vary_together((x, weight, bias, segment_ids, tail))
    (T, C), wide = (x.shape[1], weight.shape[1]), statistics_dtype(x.dtype)
    extended = jnp.concatenate([tail, x], 1)  # [B C-1+T E]
    segment = None
    if segment_ids is not None and T:  # index of the segment within the call; the tail belongs to segment 0
        starts = segment_ids[:, 1:] != segment_ids[:, :-1]
        segment = jnp.pad(jnp.cumsum(starts, 1, dtype=jnp.int32), ((0, 0), (C, 0)))  # [B C-1+T]
    y = 0.0 if bias is None else bias.astype(wide)[None, None]
    inputs = extended.astype(wide)  # before the taps are cut, so that their gradients are summed in `wide`
    for c in range(C):
        tap = inputs[:, C - 1 - c :][:, :T]
        if segment is not None and c:
            tap = jnp.where((segment[:, C - 1 - c :][:, :T] == segment[:, C - 1 :])[..., None], tap, 0)
        y = y + weight[:, C - 1 - c].astype(wide)[None, None] * tap
    tail = extended[:, T:]
    if segment is not None:
        tail = jnp.where((segment[:, T:] == segment[:, -1:])[..., None], tail, 0)
    return ACTIVATIONS[activation](y).astype(x.dtype), tail


def validate_short(
    x: Given, weight: Given, bias: Given, *, segment_ids: Given, tail: Given, activation: Given
) -> Float[Array, "B C-1 E"]:
    """Raises every ValueError of a call of `short_convolution`. Returns its tail, zeros for None."""
    B, T, E = _channels("x", x)
    shapes.check_rank("weight", weight, "E C")
    C = weight.shape[1]
    if C == 0:
        raise ValueError(f"weight.shape={tuple(weight.shape)} must have at least one tap: [E C]")
    shapes.check_shape("weight", weight, (E, C), "E C")
    shapes.check_dtype("weight", weight, shapes.FLOATS)
    if bias is not None:
        shapes.check_shape("bias", bias, (E,), "E")
        shapes.check_dtype("bias", bias, shapes.FLOATS)
    if segment_ids is not None:
        shapes.check_shape("segment_ids", segment_ids, (B, T), "B T")
        shapes.check_dtype("segment_ids", segment_ids, ("int32",))
    if tail is None:
        tail = jnp.zeros((B, C - 1, E), x.dtype)
    shapes.check_shape("tail", tail, (B, C - 1, E), "B C-1 E")
    shapes.check_dtype("tail", tail, (jnp.dtype(x.dtype).name,))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{activation=} must be None or 'silu'; {suggest(str(activation), ['silu'])}")
    return tail


@on_explicit_axes(
    {"x": "BTE", "weight": "EC", "bias": "E", "segment_ids": "BT", "tail": "BCE"},
    main=("x",), along="BE", results=("BTE", "BCE"),
)  # fmt: skip
def short_convolution(
    x: Float[Array, "B T E"],
    weight: Float[Array, "E C"],
    bias: Float[Array, "E"] | None = None,
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    tail: Float[Array, "B C-1 E"] | None = None,
    activation: Literal["silu"] | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B C-1 E"]]:
    """Convolves each channel by itself, causally, as a sum of shifted inputs.

    Recurrent layers apply it to their inputs: section 3.3 of arXiv:2302.10866, arXiv:2312.00752. To decode a token,
    call it with T = 1 and the tail of the call before.

    Args:
      x: bfloat16, float16, float32 or float64; any T.
      weight: any float dtype. weight[:, C-1] multiplies the token itself, weight[:, 0] the one C - 1 before it.
      bias: added before the activation.
      segment_ids: a token whose id differs from the one before starts a segment, which sees no earlier inputs.
      tail: the last C - 1 inputs before the call, which the call's first segment continues; None is zeros.
      activation: applied to the sum, before it is rounded.

    Returns:
      y in x's dtype, and the tail for the next call in x's dtype: inputs of the last token's segment, zeros before it.

    Raises:
      ValueError: for invalid arguments, before any compute.
    """
    tail = validate_short(x, weight, bias, segment_ids=segment_ids, tail=tail, activation=activation)
    with jax.named_scope("short_convolution"):
        return _short(x, weight, bias, segment_ids, tail, activation)


def _first(bad: Array, none: int) -> Array:
    """Returns the index along the last axis of the first True, or `none`."""
    return jnp.where(bad.any(-1), jnp.argmax(bad, -1), none)


@jax.jit
@functools.partial(jax.checkpoint, prevent_cse=False)  # else the spectra of both are kept
def _long(u: Array, kernel: Array) -> Array:
    u, kernel = dispatch.vary_together((u, kernel))
    T, wide = u.shape[1], statistics_dtype(u.dtype)
    kernel = kernel[:, :T]
    # A transform carries NaN everywhere; so it is given none, and what is not finite reaches the tokens after it.
    bad_u, bad_kernel = ~jnp.isfinite(u), ~jnp.isfinite(kernel)
    first = jnp.minimum(_first(jnp.swapaxes(bad_u, 1, 2), T), _first(bad_kernel, T)[None])  # [B E]
    u, kernel = jnp.where(bad_u, 0, u), jnp.where(bad_kernel, 0, kernel)
    n = 1 << max(T + kernel.shape[1] - 2, 0).bit_length()  # long enough that nothing wraps around
    spectrum = jnp.fft.rfft(jnp.swapaxes(u.astype(wide), 1, 2), n) * jnp.fft.rfft(kernel.astype(wide), n)[None]
    y = jnp.swapaxes(jnp.fft.irfft(spectrum, n)[..., :T], 1, 2).astype(u.dtype)
    reached = jnp.arange(T)[None, :, None] >= first[:, None]
    return y + jnp.where(reached, jnp.nan, 0).astype(u.dtype)  # a sum, so that gradients of NaN are not lost


@on_explicit_axes({"u": "BTE", "kernel": "EL"}, main=("u",), along="BE", results=("BTE",))
def long_convolution(
    u: Float[Array, "B T E"], kernel: Float[Array, "E L"], *, segment_ids: Int32[Array, "B T"] | None = None
) -> Float[Array, "B T E"]:
    """Convolves each channel with a kernel as long as the sequence, causally, by FFT (arXiv:2111.00396).

    The error of an FFT is relative to the largest outputs of a sequence, not to each of them.

    Args:
      u: bfloat16, float16, float32 or float64; transformed in float32, or float64.
      kernel: any float dtype, any length. Taps beyond T meet no input.
      segment_ids: must be None.

    Returns:
      y in u's dtype.

    Raises:
      ValueError: for invalid arguments, before any compute.
      NotImplementedError: for segment ids.
    """
    _, T, E = _channels("u", u)
    shapes.check_rank("kernel", kernel, "E L")
    shapes.check_dtype("kernel", kernel, shapes.FLOATS)
    shapes.check_shape("kernel", kernel, (E, kernel.shape[1]), "E L")
    if kernel.shape[1] == 0:
        raise ValueError(f"kernel.shape={tuple(kernel.shape)} must have at least one tap: [E L]")
    if segment_ids is not None:
        raise NotImplementedError(
            "segment_ids: one transform of the whole sequence lets every document reach the next; convolve each "
            "document by itself, or take a mixer whose state is reset (linear_attention)"
        )
    if T == 0:
        return jnp.asarray(u)
    with jax.named_scope("long_convolution"):
        return _long(u, kernel)


def _discrete(A: Array, B: Array, step: Array) -> tuple[Array, Array]:
    """Returns step A, whose exponential is Ā, and B̄ = (Ā - 1) / A B: the input is held over a step (ZOH)."""
    return step * A, jnp.expm1(step * A) / A * B


def _check_state_space(A: Given, B: Given, C: Given, step: Given) -> tuple[Array, Array, Array, Array]:
    """Returns A, B, C [E D] and step [E 1] in one complex dtype. Raises ValueError for other shapes and dtypes."""
    for name, x in (("A", A), ("B", B), ("C", C)):
        shapes.check_rank(name, x, "E D")
        shapes.check_shape(name, x, tuple(A.shape), "E D")
        shapes.check_dtype(name, x, ("complex64", "complex128"))
        if x.dtype != A.dtype:
            raise ValueError(f"{name}.dtype={x.dtype} must be {A.dtype}, that of A; cast it with .astype")
    shapes.check_shape("step", step, (A.shape[0],), "E")
    shapes.check_dtype("step", step, (jnp.finfo(A.dtype).dtype.name,))
    return jnp.asarray(A), jnp.asarray(B), jnp.asarray(C), jnp.asarray(step)[:, None].astype(A.dtype)


def diagonal_kernel(
    A: Complex[Array, "E D"],
    B: Complex[Array, "E D"],
    C: Complex[Array, "E D"],
    step: Float[Array, "E"],
    L: int,
) -> Float[Array, "E L"]:
    """Returns the kernel of the state space x' = A x + B u, y = 2 Re C x with diagonal A, sampled each `step`.

    kernel_l = 2 Re sum_n C_n B̄_n Ā_n**l with Ā = exp(step A), B̄ = (Ā - 1) / A B: section 3 of arXiv:2206.11893 (S4D),
    where D conjugate pairs stand for a state of 2 D. A power l is the product of the powers l - l % R and l % R, with R
    near the root of L, so no array [E D L] exists.

    Args:
      A: complex64 or complex128, with negative real part; S4D-Lin starts from -1/2 + i pi n.
      B, C: A's dtype.
      step: positive, one per channel; float32 or float64.
      L: number of taps.

    Returns:
      [E L], float32 or float64. Angles of L steps are exact to L * step * |A| roundings.

    Raises:
      ValueError: for invalid arguments, before any compute.
    """
    if L < 1:
        raise ValueError(f"{L=} must be at least 1")
    A, B, C, step = _check_state_space(A, B, C, step)
    exponent, discrete = _discrete(A, B, step)
    R = max(1, round(L**0.5))
    J = -(-L // R)
    power = lambda n, by: jnp.exp(exponent[..., None] * (by * jnp.arange(n)).astype(A.dtype)[None, None])
    with jax.named_scope("diagonal_kernel"):
        heads = (C * discrete)[..., None] * power(J, R)  # [E D J]
        kernel = 2 * jnp.einsum("EDJ,EDR->EJR", heads, power(R, 1), precision=Precision.HIGHEST).real
    return kernel.reshape(-1, J * R)[:, :L]


def diagonal_step(
    u: Float[Array, "B E"],
    state: Complex[Array, "B E D"],
    A: Complex[Array, "E D"],
    B: Complex[Array, "E D"],
    C: Complex[Array, "E D"],
    step: Float[Array, "E"],
) -> tuple[Float[Array, "B E"], Complex[Array, "B E D"]]:
    """Computes one token of the recurrence that `diagonal_kernel` unrolls: x = Ā x + B̄ u, y = 2 Re C x.

    Args:
      u: the input, in step's dtype.
      state: A's dtype; zeros before the first token.
      A, B, C, step: as for `diagonal_kernel`.

    Returns:
      y, and the state after the token.

    Raises:
      ValueError: for invalid arguments, before any compute.
    """
    A, B, C, wide = _check_state_space(A, B, C, step)
    shapes.check_rank("u", u, "B E")
    shapes.check_shape("u", u, (u.shape[0], A.shape[0]), "B E")
    shapes.check_dtype("u", u, (jnp.dtype(step.dtype).name,))
    shapes.check_shape("state", state, (u.shape[0], *A.shape), "B E D")
    shapes.check_dtype("state", state, (jnp.dtype(A.dtype).name,))
    exponent, discrete = _discrete(A, B, wide)
    state = jnp.exp(exponent)[None] * state + discrete[None] * u[..., None].astype(A.dtype)
    return 2 * jnp.sum(C[None] * state, -1).real, state
