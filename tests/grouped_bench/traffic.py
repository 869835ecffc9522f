"""Bytes that one call reads from the GPU's memory, counted by its hardware: `ncu` runs this module for each way.

    python -m grouped_bench.traffic zigzag-8B-64K-w8-r7 'fa3: grouped'

makes the call once warm, and once between the profiler's start and stop.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grouped_bench.report import BYTES, Row, read

if TYPE_CHECKING:
    from grouped_bench.shapes import Shape

_COUNTER = "dram__bytes_read.sum"
# Clocks and caches are left as they are in a run: the second of two launches may find what the first has read.
_NCU = (
    *("ncu", "--metrics", _COUNTER, "--print-units", "base", "--csv", "--profile-from-start", "off"),
    *("--clock-control", "none", "--cache-control", "none"),
)


def count(chosen: Sequence[Shape], backends: Sequence[str], file: Path, say: Callable[[str], None]) -> list[str]:
    """Append a row for each shape and way, one launch and several; -> what could not be counted."""
    done = {(row["shape"], row["way"]) for row in read(file) if row["mode"] == BYTES} if file.exists() else set()
    ways = [f"{name}: {what}" for name in backends for what in ("grouped", "launches in order")]
    failed = []
    for shape, way in ((shape, way) for shape in chosen for way in ways if (shape.name, way) not in done):
        try:
            row = _row(shape, way, bytes_read(shape.name, way))
        except (RuntimeError, OSError) as error:  # the others are still to be counted, and the command ends 1
            failed.append(f"{shape.name}, {way}")
            say(f"{shape.name}, {way}: {error}")
            continue
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row) + "\n")
        say(f"{shape.name}, {way}: {row['read_bytes'] / 1e6:.1f} MB read")
    return failed


def _row(shape: Shape, way: str, read_bytes: int) -> Row:
    union, reads = shape.key_bytes
    return {
        "shape": shape.name,
        "kind": shape.kind,
        "pass": "forward",
        "mode": BYTES,
        "way": way,
        "key_bytes": union,
        "key_reads": reads,
        "read_bytes": read_bytes,
    }


def bytes_read(shape: str, way: str, program: Sequence[str] = _NCU) -> int:
    """By all kernels of a forward call of that way; raises RuntimeError with what ncu says when it counts nothing."""
    command = [*program, sys.executable, "-m", "grouped_bench.traffic", shape, way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    counts = list(_counts(done.stdout))
    if done.returncode or not counts:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise RuntimeError(f"{program[0]} ended with {done.returncode} and {len(counts)} kernels: {said[-1]}")
    return sum(counts)


def _counts(printed: str) -> Iterator[int]:
    """One a kernel. Lines of ncu's own begin with ==; the table's head is the first that names its columns."""
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    for row in csv.DictReader(lines):
        if row.get("Metric Name") == _COUNTER:
            yield int(float(row["Metric Value"].replace(",", "")))


def main(name: str, way: str) -> None:
    """Make the call, the second time with the profiler on."""
    import torch

    from grouped_bench.shapes import shapes
    from grouped_bench.ways import forward_ways, problem

    (shape,) = (shape for shape in shapes() if shape.name == name)
    ways, _ = forward_ways(problem(shape, torch.device("cuda")), [way.partition(":")[0]])
    ways[way]()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    ways[way]()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
