"""Triton's interpreter, from this import on: kernels run on a CPU, block by block, in NumPy.

Triton's own functions are made for the one or the other when they are read, so conftest.py imports this before anything
else imports Triton. What the interpreter lacks is added while `completed` lasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

with patch.dict("os.environ", {"TRITON_INTERPRET": "1"}):
    import triton
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

triton.knobs.runtime.interpret = True
assert isinstance(tl.zeros, interpreter.InterpretedFunction), (
    "Triton was imported before tests/interpreted_triton.py: its functions are compiled ones"
)


_NARROWING = tl.float32, tl.bfloat16
_INTEGER_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@contextmanager
def completed() -> Iterator[None]:
    """An interpreter that multiplies bfloat16, which it takes for integers, and rounds to it, where it cuts bits off.

    It says nothing of NaN: what a block holds beyond its rows may be anything, as long as it is not used.
    """
    builder = interpreter.InterpreterBuilder
    multiply, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, one: Any, other: Any, *others: Any) -> Any:
        return multiply(self, _widened(one), _widened(other), *others)

    def cast_impl(self: Any, operand: Any, to: Any) -> Any:
        return _rounded(operand) if (operand.dtype.scalar, to.scalar) == _NARROWING else cast(self, operand, to)

    with (
        np.errstate(invalid="ignore"),
        patch.object(builder, "create_dot", create_dot),
        patch.object(builder, "cast_impl", cast_impl),
        patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", _overflow_is_an_error),
        _replaced_once(),
    ):
        yield


@contextmanager
def _replaced_once() -> Iterator[None]:
    """The language's functions, replaced for all that runs meanwhile: the interpreter does it anew in every call.

    That takes it half of its time, as every function of a kernel and tl.max, tl.sum or tl.zeros is such a call.
    """
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing_to_restore = SimpleNamespace(restore=lambda: None)
    try:
        with patch.object(interpreter, "_patch_lang", lambda _: nothing_to_restore):
            yield
    finally:
        scope.restore()


def _overflow_is_an_error(_: Any, one: Any, other: Any, operation: Any) -> None:
    """As the interpreter has it, without ten of its own operations for each of the kernel's: a third of its time."""
    kind = one.type.scalar
    if kind.int_bitwidth < 64:
        wide = _INTEGER_OPERATIONS[operation.__name__](*(part.handle.data.astype(np.int64) for part in (one, other)))
        within = (wide >= kind.get_int_min_value()) & (wide <= kind.get_int_max_value())
        assert within.all(), f"{kind} overflow detected for operation {operation.__name__}"


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _rounded(operand: Any) -> Any:
    """To the nearest bfloat16, as a GPU does; the interpreter holds it as an integer."""
    bits = torch.tensor(operand.data).to(torch.bfloat16).view(torch.uint16)
    return interpreter.TensorHandle(bits.numpy(), tl.bfloat16)
