"""Attention masks as values over positions: which query may attend to which key.

A mask is a rule on the positions of a query and a key, never an array over T x S. It answers three questions:

    mask(q_pos, k_pos)                    is this pair visible?
    mask.kind(q_lo, q_hi, k_lo, k_hi)     does a block of positions hold no visible pair, some, or only visible ones?
    mask.is_relative                      does the mask read q - k only?

With `kind` a kernel skips empty blocks and drops the mask in full ones.

    Causal() & Window(512)          # at most 512 tokens back
    Causal() | Prefix(64)           # a prefix that every query sees (prefix-LM)
    Window(256) | Global(4)         # Longformer, arXiv:2004.05150
    Causal() & Chunked(8192)        # Llama 4's local layers

Masks are frozen, registered pytrees: integers are static, arrays are leaves. Without arrays a mask is hashable. Two
leaves exist: `Prefix(n [B])` and `BlockSparse(block_size, visible [B|1 H|1 Jq Jk])`. Their axes align with the first
two of a rank-4 shape [B H . .]: arguments of lower rank are taken as [1 1 . .], and the answer has rank 4.

NumPy arguments (and leaves) give NumPy answers without touching a device, for schedules that are made at trace time.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from longattn.shapes import suggest

EMPTY, PARTIAL, FULL = 0, 1, 2
_INT32 = 2**31 - 1


def _xp(*xs: Any) -> Any:
    """Returns jax.numpy if any argument is a JAX array or tracer, else numpy."""
    return jnp if any(isinstance(x, jax.Array) for x in xs) else np


def _shape(*xs: Any) -> tuple[int, ...]:
    return np.broadcast_shapes(*(np.shape(x) for x in xs))


def _lift(x: Any, rank: int) -> Any:
    """Returns x with leading axes of size 1 up to `rank`, explicit for jax_numpy_rank_promotion='raise'."""
    return _xp(x).reshape(x, (1,) * (rank - np.ndim(x)) + tuple(np.shape(x)))


def _kind(empty: Any, full: Any, *bounds: Any) -> Any:
    """Returns int8 in the shape of all arguments: FULL where `full`, else EMPTY where `empty`, else PARTIAL."""
    xp = _xp(empty, full, *bounds)
    kind = xp.where(full, np.int8(FULL), xp.where(empty, np.int8(EMPTY), np.int8(PARTIAL)))
    return xp.broadcast_to(kind, _shape(kind, *bounds))


def _moved(pos: Any, by: int) -> Any:
    """Returns pos + by; for int32 arrays held within int32."""
    if isinstance(pos, int):
        return pos + by
    if by >= 0:
        return _xp(pos).minimum(pos, _INT32 - by) + by
    return _xp(pos).maximum(pos, -_INT32 - 1 - by) + by


def _distance(q_pos: Any, k_pos: Any) -> Any:
    """Returns q - k; for int32 arrays held within int32."""
    distance = q_pos - k_pos
    if isinstance(distance, int):
        return distance
    xp, later = _xp(distance), q_pos >= k_pos
    return xp.where(later == (distance >= 0), distance, xp.where(later, _INT32, -_INT32 - 1).astype(distance.dtype))


def _not(x: Any) -> Any:
    return _xp(x).logical_not(x)


def _integer(mask: Mask, name: str, low: int) -> None:
    """Makes the field `name` a Python int; raises ValueError unless it lies in [low, 2**31)."""
    value = getattr(mask, name)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= _INT32:
        raise ValueError(f"{type(mask).__name__}.{name}={value!r} must be an integer of at least {low}, below 2**31")
    object.__setattr__(mask, name, int(value))


@dataclass(frozen=True, repr=False)
class Mask:
    """The base class of masks. They combine with `&`, `|` and `~`; `parse` reads `str(mask)` back."""

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_pytree_with_keys(cls, _flatten, lambda aux, leaves: _unflatten(cls, aux, leaves))

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        """Returns which pairs are visible: bool in the broadcast shape of two int32 arrays of positions."""
        raise NotImplementedError

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        """Returns EMPTY, PARTIAL or FULL (int8) for queries in [q_lo, q_hi] and keys in [k_lo, k_hi], inclusive.

        The bounds are ints or int32 arrays that broadcast, with lo <= hi. EMPTY and FULL hold for every pair of
        positions in the block. PARTIAL promises nothing.
        """
        raise NotImplementedError

    @property
    def is_relative(self) -> bool:
        """Whether the mask reads positions through q - k only."""
        return False

    def dense(self, T: int, S: int) -> Any:
        """Returns the pattern [T S] at positions arange(T), arange(S), or [B H T S] with array leaves. For tests."""
        return self(np.arange(T, dtype=np.int32)[:, None], np.arange(S, dtype=np.int32)[None, :])

    def __and__(self, other: Mask) -> Mask:
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(_text(getattr(self, f.name)) for f in dataclasses.fields(self))})"

    def __repr__(self) -> str:
        return str(self)


def _text(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    if hasattr(value, "shape"):
        return f"{value.dtype}[{' '.join(map(str, value.shape))}]"
    return getattr(value, "__qualname__", repr(value))


def _flatten(mask: Mask) -> tuple[list[tuple[Any, Any]], Any]:
    """Returns the leaves and static fields: integers and functions are static, everything else is a leaf or a mask."""
    leaves, static = [], []
    for field in dataclasses.fields(mask):
        value = getattr(mask, field.name)
        if isinstance(value, int) or isinstance(mask, Fn):
            static.append((field.name, value))
        else:
            leaves.append((jax.tree_util.GetAttrKey(field.name), value))
    return leaves, (tuple(key.name for key, _ in leaves), tuple(static))


def _unflatten(cls: type[Mask], aux: Any, leaves: Any) -> Mask:
    names, static = aux
    mask = object.__new__(cls)  # not __init__: JAX also unflattens with objects that no check would pass
    for name, value in (*zip(names, leaves, strict=True), *static):
        object.__setattr__(mask, name, value)
    return mask


@dataclass(frozen=True, repr=False)
class Full(Mask):
    """Every pair is visible."""

    @property
    def is_relative(self) -> bool:
        return True

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        return _xp(q_pos, k_pos).ones(_shape(q_pos, k_pos), bool)

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        return _kind(False, True, q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True, repr=False)
class Causal(Mask):
    """k <= q."""

    @property
    def is_relative(self) -> bool:
        return True

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        return k_pos <= q_pos

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        return _kind(k_lo > q_hi, k_hi <= q_lo, q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True, repr=False)
class Window(Mask):
    """-right <= q - k <= left. right=0 makes it causal; Window(0) sees itself only; right=-1 hides itself."""

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        _integer(self, "left", -_INT32)
        _integer(self, "right", -_INT32)
        if self.left < -self.right:
            raise ValueError(f"{self} must have left >= -right: no distance q - k lies in [-right, left]")

    @property
    def is_relative(self) -> bool:
        return True

    # Distances of int32 positions may exceed int32, so each side compares positions. Where a bound would leave int32,
    # `_moved` holds it at the end, and the comparison is the one whose answer is then right.
    def _after(self, q_pos: Any, k_pos: Any) -> Any:
        """Returns whether q - k <= left."""
        return k_pos >= _moved(q_pos, -self.left) if self.left >= 0 else k_pos > _moved(q_pos, -self.left - 1)

    def _before(self, q_pos: Any, k_pos: Any) -> Any:
        """Returns whether q - k >= -right."""
        return k_pos <= _moved(q_pos, self.right) if self.right >= 0 else k_pos < _moved(q_pos, self.right + 1)

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        return self._after(q_pos, k_pos) & self._before(q_pos, k_pos)

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        seen = self._after(q_lo, k_hi) & self._before(q_hi, k_lo)
        full = self._after(q_hi, k_lo) & self._before(q_lo, k_hi)
        return _kind(_not(seen), full, q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True, repr=False)
class Chunked(Mask):
    """q // n == k // n."""

    n: int

    def __post_init__(self) -> None:
        _integer(self, "n", 1)

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        return q_pos // self.n == k_pos // self.n

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        a, b, c, d = q_lo // self.n, q_hi // self.n, k_lo // self.n, k_hi // self.n
        return _kind((b < c) | (d < a), (a == b) & (c == d) & (a == c), q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True, repr=False)
class Prefix(Mask):
    """k < n, for an integer or an int32 [B] (one length per sequence)."""

    n: Any

    def __post_init__(self) -> None:
        if not hasattr(self.n, "shape") or isinstance(self.n, np.integer):
            _integer(self, "n", 0)
        elif len(self.n.shape) != 1 or np.dtype(self.n.dtype) != np.int32:
            raise ValueError(f"Prefix.n={_text(self.n)} must be an integer or an int32 array [B]")

    def _limit(self, *xs: Any) -> tuple[Any, ...]:
        """Returns (n, *xs) with shapes that broadcast."""
        if isinstance(self.n, int) or self.n.ndim == 0:  # one sequence, as a kernel sees it
            return (self.n, *xs)
        return (self.n.reshape(-1, 1, 1, 1), *(_lift(x, 4) for x in xs))

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        n, q_pos, k_pos = self._limit(q_pos, k_pos)
        return _xp(n, q_pos, k_pos).broadcast_to(k_pos < n, _shape(n, q_pos, k_pos))

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        n, q_lo, q_hi, k_lo, k_hi = self._limit(q_lo, q_hi, k_lo, k_hi)
        return _kind(k_lo >= n, k_hi < n, q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True, repr=False)
class Global(Mask):
    """q < n or k < n: the first n positions see everything and are seen by everything."""

    n: int

    def __post_init__(self) -> None:
        _integer(self, "n", 0)

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        return (q_pos < self.n) | (k_pos < self.n)

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        empty = (q_lo >= self.n) & (k_lo >= self.n)
        return _kind(empty, (q_hi < self.n) | (k_hi < self.n), q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True, repr=False)
class Dilated(Mask):
    """0 <= q - k <= left * step and (q - k) % step == 0: itself and `left` earlier keys, `step` apart."""

    left: int
    step: int

    def __post_init__(self) -> None:
        _integer(self, "left", 0)
        _integer(self, "step", 1)
        if self.left * self.step > _INT32:
            raise ValueError(f"{self} must reach less than 2**31 back: left * step = {self.left * self.step}")

    @property
    def is_relative(self) -> bool:
        return True

    @property
    def _reach(self) -> Window:
        return Window(self.left * self.step)

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        return self._reach(q_pos, k_pos) & ((q_pos - k_pos) % self.step == 0)  # no distance within reach exceeds int32

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        reach = self._reach.kind(q_lo, q_hi, k_lo, k_hi)
        least, most = _distance(q_lo, k_hi), _distance(q_hi, k_lo)
        xp = _xp(least, most)
        low, high = xp.maximum(least, 0), xp.minimum(most, self.left * self.step)
        empty = (reach == EMPTY) | (high // self.step * self.step < low)
        full = (reach == FULL) & ((least == most) & (least % self.step == 0) if self.step > 1 else True)
        return _kind(empty, full, q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True, repr=False)
class BlockSparse(Mask):
    """visible[b, h, q // block_size, k // block_size]; positions outside of `visible` are hidden.

    `visible` is a bool array [B|1 H|1 Jq Jk], a leaf: it may be traced, and changes without recompilation.
    """

    block_size: int
    visible: Any

    def __post_init__(self) -> None:
        _integer(self, "block_size", 1)
        if len(getattr(self.visible, "shape", ())) != 4 or self.visible.dtype != np.bool_:
            raise ValueError(f"BlockSparse.visible={_text(self.visible)} must be a bool array [B|1 H|1 Jq Jk]")

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        xp = _xp(self.visible, q_pos, k_pos)
        if not self.visible.ndim:  # one block, as a kernel sees it: a number
            return xp.broadcast_to(self.visible, _shape(q_pos, k_pos)) != 0
        B, H, Jq, Jk = self.visible.shape
        i, j = _lift(q_pos, 4) // self.block_size, _lift(k_pos, 4) // self.block_size
        b, h = np.arange(B).reshape(-1, 1, 1, 1), np.arange(H).reshape(1, -1, 1, 1)
        inside = (i >= 0) & (i < Jq) & (j >= 0) & (j < Jk)
        return inside & xp.asarray(self.visible)[b, h, xp.clip(i, 0, Jq - 1), xp.clip(j, 0, Jk - 1)]

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        xp = _xp(self.visible, q_lo, q_hi, k_lo, k_hi)
        B, H, Jq, Jk = self.visible.shape
        b, h = np.arange(B).reshape(-1, 1, 1, 1), np.arange(H).reshape(1, -1, 1, 1)
        # A summed-area table: four reads count the visible blocks of any rectangle.
        table = xp.pad(xp.asarray(self.visible).astype(np.int32), ((0, 0), (0, 0), (1, 0), (1, 0))).cumsum(2).cumsum(3)
        i0, i1, j0, j1 = (_lift(x, 4) // self.block_size for x in (q_lo, q_hi, k_lo, k_hi))

        def count(i: Any, j: Any) -> Any:
            return table[b, h, xp.clip(i, 0, Jq), xp.clip(j, 0, Jk)]

        seen = count(i1 + 1, j1 + 1) - count(i0, j1 + 1) - count(i1 + 1, j0) + count(i0, j0)
        inside = (i0 >= 0) & (i1 < Jq) & (j0 >= 0) & (j1 < Jk)
        blocks = (i1 - i0 + 1) * (j1 - j0 + 1)
        return _kind(seen == 0, inside & (seen == blocks), i0, i1, j0, j1)


@dataclass(frozen=True, repr=False)
class Fn(Mask):
    """Any rule f(q_pos, k_pos) -> bool, elementwise on broadcasting arrays. Every block counts as PARTIAL.

    Equal and hashed by `f` itself: define it once, at module level; a fresh lambda per call compiles anew each time.
    It may read arrays from outside, traced ones too: `Fn(lambda q, k: table[q] == table[k])`.
    """

    f: Callable[[Any, Any], Any]

    def __post_init__(self) -> None:
        if not callable(self.f):
            raise ValueError(f"Fn.f={self.f!r} must be a function of (q_pos, k_pos)")

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        visible, shape = self.f(q_pos, k_pos), _shape(q_pos, k_pos)
        if getattr(visible, "dtype", type(visible)) != np.bool_ or _shape(visible, q_pos, k_pos) != shape:
            raise ValueError(f"{self} must return bool that broadcasts to {shape}; it returned {_text(visible)}")
        return _xp(visible, q_pos, k_pos).broadcast_to(visible, shape)

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        return _kind(False, False, q_lo, q_hi, k_lo, k_hi)


@dataclass(frozen=True, eq=False)
class _Open:
    """A function of one pair of positions, without the arrays that it read from outside."""

    jaxpr: Any
    first: int  # where its arrays begin among those of the whole mask
    name: str

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        raise AssertionError(f"{self.name} is asked without its arrays")  # `bound` gives them back

    def bound(self, arrays: tuple[Any, ...]) -> Fn:
        own = arrays[self.first : self.first + len(self.jaxpr.constvars)]
        f = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(self.jaxpr, own))
        return Fn(jnp.vectorize(lambda q, k: f(q, k)[0]))


def _with_functions(mask: Mask, change: Callable[[Fn], Fn]) -> Mask:
    """Returns the mask with each of its functions changed."""
    if isinstance(mask, Fn):
        return change(mask)
    parts = {f.name: getattr(mask, f.name) for f in dataclasses.fields(mask)}
    masks = {name: _with_functions(part, change) for name, part in parts.items() if isinstance(part, Mask)}
    return mask if all(masks[name] is parts[name] for name in masks) else dataclasses.replace(mask, **masks)


def opened(mask: Mask) -> tuple[Mask, tuple[Any, ...]]:
    """Takes out the traced arrays that functions read from outside: a rule for gradients may not close over them.

    Inside of `shard_map` they stay, and there is no gradient: a program that was made outside does not run there.

    Returns:
      The mask without them, and the arrays, for `bound`. A mask whose functions read none is returned as it is.

    Raises:
      NotImplementedError: an array gives a function's answer axes of its own.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return mask, ()
    arrays: list[Any] = []

    def change(fn: Fn) -> Fn:
        def traced(*shape: int) -> Any:
            position = jax.ShapeDtypeStruct(shape, np.int32)
            return jax.make_jaxpr(fn.f)(position, position)

        if not any(isinstance(x, jax.core.Tracer) for x in traced(1, 1, 1, 1).consts):
            return fn
        closed = traced()
        if closed.out_avals[0].shape:
            raise NotImplementedError(
                f"{fn} reads a traced array that gives its answer for one pair of positions the shape "
                f"{list(closed.out_avals[0].shape)}: index it by position, or use Prefix, BlockSparse or segment_ids"
            )
        arrays.extend(closed.consts)
        return Fn(_Open(closed.jaxpr, len(arrays) - len(closed.consts), str(fn)))

    return _with_functions(mask, change), tuple(arrays)


def bound(mask: Mask, arrays: tuple[Any, ...]) -> Mask:
    """Returns the mask with the arrays that `opened` took out."""
    return _with_functions(mask, lambda fn: fn.f.bound(arrays) if isinstance(fn.f, _Open) else fn) if arrays else mask


def _pair(op: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    rank = max(np.ndim(a), np.ndim(b))
    return op(_lift(a, rank), _lift(b, rank))


_DEEPEST = 100  # operators within each other: kernels, `str` and JAX walk a mask by recursion


def _insist_on_shallow(mask: Mask) -> None:
    """Raises ValueError if more than _DEEPEST operators stand within each other in a mask."""
    depth, level = 0, {id(mask): mask}
    while level := {id(part): part for m in level.values() for part in vars(m).values() if isinstance(part, Mask)}:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(
                f"a mask has more than {_DEEPEST} operators within each other: simplify it, as in ~~a = a, or write "
                "its rule as one Fn"
            )


@dataclass(frozen=True, repr=False)
class And(Mask):
    """Visible in both."""

    a: Mask
    b: Mask

    def __post_init__(self) -> None:
        _insist_on_shallow(self)

    @property
    def is_relative(self) -> bool:
        return self.a.is_relative and self.b.is_relative

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        return _pair(lambda a, b: a & b, self.a(q_pos, k_pos), self.b(q_pos, k_pos))

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        a, b = self.a.kind(q_lo, q_hi, k_lo, k_hi), self.b.kind(q_lo, q_hi, k_lo, k_hi)
        return _pair(_xp(a, b).minimum, a, b)

    def __str__(self) -> str:
        left = f"({self.a})" if isinstance(self.a, Or) else str(self.a)
        right = f"({self.b})" if isinstance(self.b, And | Or) else str(self.b)
        return f"{left} & {right}"


@dataclass(frozen=True, repr=False)
class Or(Mask):
    """Visible in one or both."""

    a: Mask
    b: Mask

    def __post_init__(self) -> None:
        _insist_on_shallow(self)

    @property
    def is_relative(self) -> bool:
        return self.a.is_relative and self.b.is_relative

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        return _pair(lambda a, b: a | b, self.a(q_pos, k_pos), self.b(q_pos, k_pos))

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        a, b = self.a.kind(q_lo, q_hi, k_lo, k_hi), self.b.kind(q_lo, q_hi, k_lo, k_hi)
        return _pair(_xp(a, b).maximum, a, b)

    def __str__(self) -> str:
        return f"{self.a} | ({self.b})" if isinstance(self.b, Or) else f"{self.a} | {self.b}"


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """Visible where `a` is not."""

    a: Mask

    def __post_init__(self) -> None:
        _insist_on_shallow(self)

    @property
    def is_relative(self) -> bool:
        return self.a.is_relative

    def __call__(self, q_pos: Any, k_pos: Any) -> Any:
        visible = self.a(q_pos, k_pos)
        return _xp(visible).logical_not(visible)

    def kind(self, q_lo: Any, q_hi: Any, k_lo: Any, k_hi: Any) -> Any:
        return np.int8(FULL) - self.a.kind(q_lo, q_hi, k_lo, k_hi)

    def __str__(self) -> str:
        return f"~({self.a})" if isinstance(self.a, And | Or) else f"~{self.a}"


_PARSABLE = {c.__name__: c for c in (Full, Causal, Window, Chunked, Prefix, Global, Dilated)}


def parse(text: str) -> Mask:
    """Returns the mask that an expression stands for. Inverts `str` for masks without arrays or functions.

    Raises ValueError for anything but the array-free masks, integers, `&`, `|`, `~` and parentheses.
    """

    shown = repr(text if len(text) <= 200 else f"{text[:150]}...")

    def wrong(node: ast.AST, why: str) -> ValueError:
        part = ast.unparse(node)
        return ValueError(f"{part if len(part) <= 200 else f'{part[:150]}...'!r} in the mask {shown} {why}")

    def integer(node: ast.expr) -> int:
        sign, constant = 1, node
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            sign, constant = -1, node.operand
        if not isinstance(constant, ast.Constant) or type(constant.value) is not int:
            raise wrong(node, "must be an integer")
        return sign * constant.value

    def build(node: ast.expr) -> Mask:
        match node:
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return And(build(left), build(right))
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return Or(build(left), build(right))
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return Not(build(operand))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                if name not in _PARSABLE:
                    raise wrong(node, f"is no mask to write down; {suggest(name, _PARSABLE)}")
                try:
                    return _PARSABLE[name](*map(integer, args), **{str(k.arg): integer(k.value) for k in keywords})
                except TypeError as error:
                    raise wrong(node, f"has wrong arguments: {error}") from None
            case ast.Name(id=name):
                raise wrong(node, f"must be called, as in {name}(); {suggest(name, _PARSABLE)}")
        raise wrong(node, "must be a mask such as Causal() & Window(512)")

    try:
        tree = ast.parse(text.strip(), mode="eval")
        return build(tree.body)
    except SyntaxError as error:
        raise ValueError(f"mask {shown} must be an expression such as Causal() & Window(512): {error.msg}") from None
    except (RecursionError, MemoryError):  # the latter is the parser's word for too many parentheses
        raise ValueError(f"mask {shown} is nested too deep: at most {_DEEPEST} operators within each other") from None
