"""What the compiler makes of the kernels for an H200, where there is none: registers, spills, memory, instructions.

    $ python -m refgrid_solutions.grouped_attention.backends.triton.resources --kernel=forward --tiles=128,64,8,3

prints a line of JSON for each kernel asked for, by default all of the table of configurations. Assembler and
disassembler are those of Triton's wheel.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from refgrid_solutions.grouped_attention.backends.triton.attention import attend
from refgrid_solutions.grouped_attention.backends.triton.configurations import TABLE, Tiles
from refgrid_solutions.grouped_attention.backends.triton.gradients import of_keys, of_rows
from refgrid_solutions.grouped_attention.backends.triton.in_flight import from_registers, overwritten

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_HOPPER = GPUTarget("cuda", 90, 32)
# By the name that its tiles have in a configuration.
KERNELS = {"forward": attend, "of_rows": of_rows, "of_keys": of_keys}
_POINTERS = {"lse": "fp32", "stats": "fp32", "work": "i32", "runs": "i32", "pieces": "i32"}
_HALVES = ("out", "dq", "dk", "dv")


class Resources(NamedTuple):
    """One kernel, compiled: spills and shared memory in bytes; in_loops: accesses to local memory in innermost loops.

    products: instructions of a warp group's tensor cores; from_registers: those whose first operand lies in registers;
    overwritten: what writes to such an operand before the product has been waited for; loads: of the copy engine.
    """

    kernel: str
    head_dim: int
    dtype: str
    tiles: Tiles
    registers: int
    spills: int
    in_loops: int
    shared_memory: int
    products: int
    from_registers: int
    overwritten: str
    loads: int
    warnings: str


def resources(name: str, head_dim: int, dtype: str, tiles: Tiles) -> Resources:
    """Compile a kernel of KERNELS for tiles of this size, in fp16 or bf16, and look at what came of it."""
    compiled, told = _compiled(name, head_dim, dtype, tiles)
    code = list(_instructions(_disassembled(compiled.asm["cubin"])))
    registers, spills = (_number(pattern, told) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    products, loads = (sum(word in text for _, text in code) for word in ("HGMMA", "UTMALDG"))
    warnings = "; ".join(line for line in told.splitlines() if re.search(r"warning|Performance Loss", line))
    memory = _local_in_loops(code), int(compiled.metadata.shared)
    in_flight = from_registers(compiled.asm["ptx"]), "; ".join(overwritten(compiled.asm["ptx"]))
    return Resources(name, head_dim, dtype, tiles, registers, spills, *memory, products, *in_flight, loads, warnings)


def _compiled(name: str, head_dim: int, dtype: str, tiles: Tiles) -> tuple[Any, str]:
    """The kernel, and what the assembler says of it."""
    kernel = KERNELS[name]
    constants: dict[str, Any] = {"ROWS": tiles.rows, "KEYS": tiles.keys, "WIDTH": head_dim, "STAGES": tiles.stages}
    types = {argument: _type(argument, head_dim, dtype, tiles) for argument in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [at for at, argument in enumerate(kernel.arg_names) if types[argument].startswith("*")]
    attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(StringIO()) as told:
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # of a kernel in its cache there is nothing to hear
        return triton.compile(source, target=_HOPPER, options=options), told.getvalue()


def _type(argument: str, head_dim: int, dtype: str, tiles: Tiles) -> str:
    """As Triton writes the type of an argument of any of the kernels."""
    rows, keys = f"[1, {tiles.rows}, {head_dim}]", f"[1, {tiles.keys}, {head_dim}]"
    described = {
        **dict.fromkeys(("q_desc", "dout_desc"), f"{dtype}{rows}"),
        **dict.fromkeys(("k_desc", "v_desc"), f"{dtype}{keys}"),
        **dict.fromkeys(("lse_desc", "delta_desc"), f"fp32[1, {tiles.rows}]"),
    }
    if argument in described:
        return f"tensordesc<{described[argument]}>"
    if argument in _HALVES:
        return f"*{dtype}"
    return f"*{_POINTERS[argument]}" if argument in _POINTERS else "fp32" if argument.startswith("scale") else "i32"


def _disassembled(cubin: bytes) -> str:
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, told: str) -> int:
    match = re.search(pattern, told)
    if match is None:
        raise ValueError(f"the assembler does not say {pattern!r}: {told}")
    return int(match[1])


def _instructions(disassembly: str) -> Iterator[tuple[int, str]]:
    """Each with its address."""
    for match in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", disassembly, re.MULTILINE):
        yield int(match[1], 16), match[2]


def _local_in_loops(code: list[tuple[int, str]]) -> int:
    """Loads and stores of local memory in loops that hold products and no other such loop."""
    # A jump back without a condition comes from where a wait is repeated, outside of the loop.
    jumps = ((address, re.match(r"@\S+ BRA.* 0x([0-9a-f]+)", text)) for address, text in code)
    loops = {(int(jump[1], 16), address) for address, jump in jumps if jump and int(jump[1], 16) < address}
    working = [loop for loop in loops if _count(code, loop, "HGMMA")]
    inner = [one for one in working if not any(one[0] < other[0] and other[1] < one[1] for other in working)]
    return sum(_count(code, loop, r"\b(LDL|STL)\b") for loop in inner)


def _count(code: list[tuple[int, str]], loop: tuple[int, int], pattern: str) -> int:
    return sum(loop[0] <= address <= loop[1] and bool(re.search(pattern, text)) for address, text in code)


def main(arguments: Sequence[str]) -> None:
    """Print the resources of the table's kernels, or of those that the arguments name."""
    parser = argparse.ArgumentParser(prog="resources", description=main.__doc__)
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    parser.add_argument("--head-dim", type=int, choices=TABLE, action="append")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--tiles", help="rows,keys,warps,stages, in place of the table's")
    told = parser.parse_args(arguments)
    for head_dim in told.head_dim or TABLE:
        for name in told.kernel or KERNELS:
            own = getattr(TABLE[head_dim], name)
            tiles = Tiles(*map(int, told.tiles.split(","))) if told.tiles else own
            found = resources(name, head_dim, told.dtype, tiles)
            sys.stdout.write(json.dumps(found._asdict() | {"tiles": tiles._asdict()}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
