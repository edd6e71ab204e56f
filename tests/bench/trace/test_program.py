"""Scopes of the instructions of programs, written by hand and compiled here."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from longattn.bench import trace
from longattn.bench.trace import Scope
from tests.bench.trace.written import instruction, module


def test_a_fusion_has_the_scope_of_its_product() -> None:
    ops = trace.program_ops(
        module(
            fused=[
                instruction(1, "p", "parameter", parameter=0),
                instruction(2, "d", "dot", "jit(f)/logits/dot_general", (1, 1)),
                instruction(3, "e", "exponential", "jit(f)/softmax/exp", (2,)),
            ],
            main=[
                instruction(4, "q", "parameter", "q", parameter=0),
                instruction(5, "fusion", "fusion", "jit(f)/softmax/exp", (4,), (1,)),
            ],
        )
    )
    assert ops["fusion"] == trace.Op("fusion", Scope(("logits",), "forward"))
    assert ops["e"].scope.path == ("softmax",)


def test_what_xla_made_has_the_scope_of_its_user_or_of_its_loop() -> None:
    ops = trace.program_ops(
        module(
            body=[
                instruction(1, "p", "parameter", parameter=0),
                instruction(2, "copy", "copy", "", (1,)),
                instruction(3, "add", "add", "jit(f)/values/add", (2,)),
                instruction(4, "lost", "copy", "", (3,)),
            ],
            main=[instruction(5, "while", "while", "jit(f)/attention/while", (), (1,))],
        )
    )
    assert ops["copy"].scope.path == ("values",)
    assert ops["lost"].scope.path == ("attention",)
    assert ops["while"].opcode == "while"


def nameless_product(slice_name: str, after: str) -> trace.Op:
    """keys -> slice (read by the product alone) -> nameless product in a fusion of its own -> user."""
    return trace.program_ops(
        module(
            fused=[
                instruction(1, "a", "parameter", parameter=0),
                instruction(2, "b", "parameter", parameter=1),
                instruction(3, "d", "dot", "", (1, 2)),
            ],
            main=[
                instruction(4, "q", "parameter", "q", parameter=0),
                instruction(5, "slice", "dynamic-slice", slice_name, (4,)),
                instruction(6, "product", "fusion", "", (5, 4), (1,)),
                instruction(7, "user", "multiply", after, (6, 4)),
            ],
        )
    )["product"]


def test_a_nameless_product_has_the_scope_of_its_own_slice_or_of_its_user() -> None:
    scope = lambda *names: "/".join(nameless_product(*names).scope.path)
    assert scope("jit(f)/logits/dynamic_slice", "jit(f)/softmax/mul") == "logits"
    assert scope("jit(f)/logits/dynamic_slice", "jit(f)/dp/dot_general") == "dp"  # a reshape of its result
    assert scope("jit(f)/other/gather/all_gather", "jit(f)/logits/add") == "logits"  # it comes from elsewhere
    assert scope("jit(f)/softmax/exp", "jit(f)/values/add") == "values"
    assert scope("", "jit(f)/values/add") == "values"


def test_products_of_a_compiled_program_are_found() -> None:
    """The field numbers are those of this jaxlib."""

    def f(q: jax.Array, k: jax.Array) -> jax.Array:
        with jax.named_scope("logits"):
            s = jnp.einsum("btd,bsd->bts", q, k)
        with jax.named_scope("softmax"):
            p = jax.nn.softmax(s)
        with jax.named_scope("values"):
            return jnp.einsum("bts,bsd->btd", p, k)

    x = jax.ShapeDtypeStruct((2, 64, 8), jnp.float32)
    compiled = jax.jit(f).lower(x, x).compile()
    ops = trace.program_ops(compiled.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto())
    products = sorted("/".join(op.scope.path) for op in ops.values() if op.opcode == "dot")
    assert products == ["logits", "values"]
    assert all(name in compiled.as_text() for name in ops)
