"""The kernels' own source run in NumPy, with copies that take as long as they may and memory that watches them.

JAX's interpreter carries a copy out before anything can go wrong: without a wait it computes the same. Here a copy is
on its way from its start to its wait, and meanwhile nobody may read where it goes or write to either of its ends.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from jax import lax

from longattn.ops.attention.pallas_tpu import backward, fetch, forward, row, tiles


class Hazard(Exception):
    """What on a TPU would be a wrong sum or a core that waits for ever."""


@dataclass
class Memory:
    """All copies on their way."""

    flying: list[Copy] = field(default_factory=list)

    def read(self, x: np.ndarray) -> None:
        self._meets(x, [copy.target for copy in self.flying], "read while a copy arrives there")

    def write(self, x: np.ndarray) -> None:
        ends = [end for copy in self.flying for end in (copy.source, copy.target)]
        self._meets(x, ends, "written while a copy arrives or leaves there")

    @staticmethod
    def _meets(x: np.ndarray, others: list[np.ndarray], what: str) -> None:
        if any(np.shares_memory(x, other) for other in others):
            raise Hazard(what)


@dataclass(eq=False)
class Copy:
    memory: Memory
    source: np.ndarray
    target: np.ndarray
    semaphore: np.ndarray

    def start(self) -> None:
        if self._started():
            raise Hazard("two copies on one semaphore")
        self.memory.read(self.source)
        self.memory.write(self.target)
        self.memory.flying.append(self)

    def wait(self) -> None:
        """Waits, as a TPU does, for as many bytes as this copy has on its semaphore, whichever copy they come from."""
        started = self._started()
        if started is None:
            raise Hazard("a wait for a copy that was not started")
        if started.target.nbytes != self.target.nbytes:
            raise Hazard("a wait for another number of bytes")
        started.target[...] = started.source
        self.memory.flying.remove(started)

    def _started(self) -> Copy | None:
        return next((x for x in self.memory.flying if np.shares_memory(x.semaphore, self.semaphore)), None)


def _index(index: Any) -> Any:
    """Arrays of rank 0, which would copy, as integers."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return index if isinstance(index, slice) or index is Ellipsis else int(index)


class Ref:
    """A watched array, with what kernels do to refs."""

    def __init__(self, memory: Memory, x: np.ndarray):
        self.memory, self.x = memory, x
        self.shape, self.dtype = x.shape, x.dtype

    @property
    def at(self) -> Any:
        view = lambda index: Ref(self.memory, self.x[(*_pad(_index(index)), ...)])
        return type("At", (), {"__getitem__": lambda _, index: view(index)})()

    def __getitem__(self, index: Any) -> np.ndarray:
        found = self.x[(*_pad(_index(index)), ...)]
        self.memory.read(found)
        return found.copy() if found.ndim else found[()]

    def __setitem__(self, index: Any, value: Any) -> None:
        place = self.x[(*_pad(_index(index)), ...)]
        self.memory.write(place)
        place[...] = value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[...], dtype)


def _pad(index: Any) -> tuple[Any, ...]:
    """An index as a tuple without an ellipsis, which the caller adds: a view even where it names one number."""
    index = index if isinstance(index, tuple) else (index,)
    return tuple(i for i in index if i is not Ellipsis)


def _dot(a: np.ndarray, b: np.ndarray, form: str, precision: Any) -> np.ndarray:
    return (a.T if form[0] == "T" else a) @ (b.T if form[1] == "T" else b)


def _loop(low: Any, high: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    for i in range(int(low), int(high)):
        carry = body(np.int32(i), carry)
    return carry


def _iota(dtype: Any, shape: tuple[int, ...], axis: int) -> np.ndarray:
    return np.indices(shape, dtype)[axis]


class _WithoutCall(ast.NodeTransformer):
    """Makes nothing of the n-th call of the method `name`."""

    def __init__(self, name: str, n: int):
        self.name, self.left = name, n

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == self.name:
            self.left -= 1
            if self.left == -1:
                return ast.copy_location(ast.Constant(None), node)
        return node


def calls(module: ModuleType, name: str) -> int:
    """How often a module calls a method of this name."""
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    return sum(isinstance(x, ast.Call) and isinstance(x.func, ast.Attribute) and x.func.attr == name for x in nodes)


def _source(module: ModuleType, without: tuple[str, int] | None, **names: Any) -> SimpleNamespace:
    """A module's source executed once more, with other things under some of its names."""
    tree = ast.parse(inspect.getsource(module))
    if without is not None:
        tree = ast.fix_missing_locations(_WithoutCall(*without).visit(tree))
    scope: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(tree, inspect.getsourcefile(module) or "", "exec"), scope)
    scope.update(names)
    return SimpleNamespace(**scope)


def _junk(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that nobody has written to."""
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 77, dtype)


@dataclass
class _Block:
    """A block of an array; the array itself without sizes."""

    sizes: tuple[int | None, ...] | None = None
    index: Callable[..., tuple[Any, ...]] | None = None
    memory_space: Any = None

    def _place(self, place: tuple[int, ...]) -> tuple[Any, ...]:
        assert self.sizes is not None and self.index is not None
        index = map(int, self.index(*place))
        return tuple(i if size is None else slice(i * size, (i + 1) * size) for i, size in zip(index, self.sizes))

    def take(self, x: np.ndarray, place: tuple[int, ...]) -> np.ndarray:
        if self.sizes is None:
            return x
        block, found = _junk(tuple(size for size in self.sizes if size is not None), x.dtype), x[self._place(place)]
        block[tuple(map(slice, found.shape))] = found
        return block

    def put(self, x: np.ndarray, place: tuple[int, ...], block: np.ndarray) -> None:
        if self.sizes is not None:
            there = x[self._place(place)]
            there[...] = block[tuple(map(slice, there.shape))]


@dataclass
class Machine:
    """One core: its memory, and the kernels' modules as they run on it.

    Attributes:
      without: (module, method, n): a module to run without its n-th call of this method.
    """

    without: tuple[ModuleType, str, int] | None = None

    def __post_init__(self) -> None:
        self.memory = Memory()
        pl = SimpleNamespace(
            ANY=None,
            BlockSpec=_Block,
            CostEstimate=dict,
            ds=lambda first, size: slice(int(first), int(first) + size),
            multiple_of=lambda x, _: x,
            num_programs=lambda axis: self.grid[axis],
            pallas_call=self._pallas_call,
            program_id=lambda axis: np.int32(self.place[axis]),
            when=lambda condition: lambda f: f() if condition else None,
        )
        pltpu = SimpleNamespace(
            CompilerParams=dict,
            HBM=None,
            SMEM=lambda shape, dtype: (shape, dtype),
            SemaphoreType=SimpleNamespace(DMA=lambda shape: (shape, np.float32)),
            VMEM=lambda shape, dtype: (shape, dtype),
            make_async_copy=lambda source, target, semaphore: Copy(self.memory, source.x, target.x, semaphore.x),
        )
        names = {
            "jnp": np,
            "pl": pl,
            "pltpu": pltpu,
            "lax": SimpleNamespace(fori_loop=_loop, Precision=lax.Precision, broadcasted_iota=_iota),
        }
        module, *call = self.without or (None,)
        run = lambda m, **more: _source(m, tuple(call) if m is module else None, **more)
        fetched = run(fetch, jnp=np, pl=pl, pltpu=pltpu)
        names |= {name: getattr(fetched, name) for name in ("Fetch", "after", "before")}
        on_tiles = _source(tiles, None, **names)
        on_tiles.dot, on_tiles.visible = _dot, lambda *a: np.ones((a[9], a[8]), bool)
        names["tiles"] = on_tiles
        names["Row"] = run(row, **names).Row
        self.forward, self.backward = run(forward, **names).forward, run(backward, **names).backward

    def _pallas_call(
        self, kernel: Any, *, grid: Any, in_specs: Any, out_specs: Any, out_shape: Any, scratch_shapes: Any, **_: Any
    ) -> Callable[..., list[np.ndarray]]:
        """Like Pallas, without its pipeline: blocks are copied in before a step, and out after it."""

        def run(*inputs: Any) -> list[np.ndarray]:
            arrays = [*map(np.array, inputs), *(_junk(x.shape, x.dtype) for x in out_shape)]
            specs, scratch = [*in_specs, *out_specs], [Ref(self.memory, _junk(*x)) for x in scratch_shapes]
            self.grid = grid
            for self.place in np.ndindex(*grid):
                refs = [Ref(self.memory, spec.take(x, self.place)) for spec, x in zip(specs, arrays, strict=True)]
                kernel(*refs, *scratch)
                for spec, x, ref in list(zip(specs, arrays, refs))[len(in_specs) :]:
                    spec.put(x, self.place, ref.x)
            if self.memory.flying:
                raise Hazard("a copy that nobody waited for")
            return arrays[len(in_specs) :]

        return run
