"""Registers that are written while a product still reads them, of which neither interpreter nor assembler says a word.

A product of the tensor cores (wgmma.mma_async) goes on while the instructions behind it run. If its first operand lies
in registers, PTX leaves undefined what comes of writing to those before the product has been waited for. Triton 3.6.0
and 3.7.1 do so where that operand is carried from the step before, and the softmax of this step gives the next: on an
H200 sums were NaN. Triton 3.9.0 copies what is carried before it multiplies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# The accumulators, then the first operand, if it lies in registers.
_PRODUCT = re.compile(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*\{([^}]*)\}")
_ALL_DONE = re.compile(r"wgmma\.wait_group\S*\s+0;")
_LABEL = re.compile(r"(\$\w+):")
_JUMP = re.compile(r"(@\S+\s+)?bra(?:\.uni)?\s+(\$\w+);")
# What an instruction writes comes first; an address in brackets is only read.
_WRITTEN = re.compile(r"(?:@\S+\s+)?[a-z]\S*\s+(\{[^}]*\}|%[^,;]+)")
_REGISTER = re.compile(r"%\w+")


def from_registers(ptx: str) -> int:
    """How many products take their first operand from registers."""
    return len(_PRODUCT.findall(ptx))


def overwritten(ptx: str) -> list[str]:
    """The instructions that write to a product's first operand on some way from the product to the wait for it."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {label[1]: at for at, line in enumerate(lines) if (label := _LABEL.match(line))}
    found = []
    for at, line in enumerate(lines):
        if product := _PRODUCT.match(line):
            operand = _registers(product[1])
            found += [lines[one] for one in _meanwhile(lines, labels, at) if operand & _written(lines[one])]
    return list(dict.fromkeys(found))


def _meanwhile(lines: Sequence[str], labels: Mapping[str, int], product: int) -> list[int]:
    """Which lines may run before the product has been waited for; only a wait for all products counts as one."""
    seen, ahead = set[int](), [product + 1]
    while ahead:
        at = ahead.pop()
        if at not in seen and at < len(lines) and not _ALL_DONE.match(lines[at]):
            seen.add(at)
            ahead += _following(lines[at], labels, at)
    return sorted(seen)


def _following(line: str, labels: Mapping[str, int], at: int) -> list[int]:
    """Which lines may run next. Loops inside of one assembler statement, which wait for a load, need no second look."""
    if jump := _JUMP.match(line):
        return [labels[jump[2]], at + 1] if jump[1] else [labels[jump[2]]]
    return [] if line.startswith("ret;") else [at + 1]


def _written(line: str) -> set[str]:
    written = _WRITTEN.match(line)
    return _registers(written[1]) if written else set()


def _registers(text: str) -> set[str]:
    return {*_REGISTER.findall(text)}
