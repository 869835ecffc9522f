"""Triton's interpreter, from this import on: kernels run on a CPU, block by block, in NumPy.

Triton's own functions are made for the one or the other when they are read, so conftest.py imports this before anything
else imports Triton. What the interpreter lacks is added while `completed` lasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

with patch.dict("os.environ", {"TRITON_INTERPRET": "1"}):
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

triton.knobs.runtime.interpret = True
assert isinstance(tl.zeros, interpreter.InterpretedFunction), (
    "Triton was imported before tests/interpreted_triton.py: its functions are compiled ones"
)


@contextmanager
def completed() -> Iterator[None]:
    """An interpreter that multiplies bfloat16, which it takes for integers, and that adds to memory by descriptors.

    It says nothing of NaN: what a block holds beyond its rows may be anything, as long as it is not used.
    """
    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def create_dot(self: Any, one: Any, other: Any, *others: Any) -> Any:
        return multiply(self, _widened(one), _widened(other), *others)

    def create_descriptor_reduce(self: Any, kind: Any, desc: Any, value: Any, indices: Any) -> None:
        assert kind.name == "ADD"
        there = self.create_descriptor_load(desc, indices, None, None)
        total = interpreter.TensorHandle(there.data + value.data, value.dtype)
        self.create_descriptor_store(desc, total, indices)

    with (
        np.errstate(invalid="ignore"),
        patch.object(builder, "create_dot", create_dot),
        patch.object(builder, "create_descriptor_reduce", create_descriptor_reduce, create=True),
    ):
        yield


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
