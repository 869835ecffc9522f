"""What computes each op for each source, as PyTorch's profiler sees it, held against what tables declare.

    python tests/observed_kernels.py --environment NAME --device cuda results/independence/NAME.json

ends 1 where two sources that are declared two truths ran one kernel. No case of a run is profiled: the names are
observed once for each environment and committed, and a test holds today's tables against them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from refgrid.calibration.chosen import choose, lightened
from refgrid.dataset.case import Case
from refgrid.dataset.definition import load_dataset
from refgrid.environments.measured import measure
from refgrid.proving.finding import forget_locals, judge
from refgrid.proving.workbench import Workbench
from refgrid.records.record import now
from refgrid.sources import Sources

# What sources that have nothing to do with each other share: PyTorch's operators and its kernels for them (the last
# four are repeat_interleave, arange, softmax and the scaling of a product), BLAS, CUB. And our operator that hands on
# to whichever backend was asked for.
_ELEMENTARY = re.compile(
    r"(aten|prims?|c10|at|at_cuda_detail|cub|thrust|cublas\w*|internal::gemvx)::|cutlass::Kernel2?<cutlass_\d+_"
    r"|nvjet_|cutlass_\d+_|sm\d+_xmma_|(volta|turing|ampere|hopper)_\w*gemm|gem[mv]|splitK|dot_kernel|reduce_1Block"
    r"|(compute_cuda_kernel|elementwise_kernel_with_index|softmax_warp_forward|scal_kernel)$"
    r"|refgrid::grouped_attn_(forward|backward)$"
)
# A kernel that ends what others began, which two truths may have in common: told, and no finding.
_PARTS = {"flashinfer::PersistentVariableLengthMergeStatesKernel": "merges what blocks of keys came to"}
# Operators that are an op of ours, or most of one: whoever shares one of these shares the kernel.
_WHOLE = re.compile(r"aten::_?\w*(rms_norm|layer_norm|attention)\w*")
_LAUNCHERS = ("cutlass::device_kernel", "cutlass::Kernel", "cutlass::Kernel2")  # named by their first argument

Ran = Mapping[tuple[str, str], Collection[str]]  # what was seen of (op, source)


def observed(call: Callable[[], Any]) -> set[str]:
    """Names of all operators and kernels of a call; none where the profiler saw none."""
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as seen:
        call()
        if cuda:
            torch.cuda.synchronize()
    return {
        shortened(event.name)
        for event in seen.events() or ()
        if (event.device_type == DeviceType.CUDA or "::" in event.name) and not event.name.startswith("Mem")
    }


def shortened(name: str) -> str:
    """A kernel's namespace and function: no return type, template or parameters, but what a launcher launches."""
    plain = name.replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    inner = re.search(r"<(?:\w+ )?([\w:]+)", plain)
    for _ in range(plain.count("<")):
        plain = re.sub(r"<[^<>]*>", "", plain)
    words = plain.partition("(")[0].split()
    plain = words[-1] if words else name
    return f"{plain}<{inner[1]}>" if plain in _LAUNCHERS and inner else plain


def telling(names: Collection[str]) -> set[str]:
    """Those that no two independent sources share."""
    return {name for name in names if _WHOLE.match(name) or not (_ELEMENTARY.match(name) or name in _PARTS)}


def parts(ran: Ran) -> list[str]:
    """What two sources have in common though each computes the op by a kernel of its own, and what that does."""
    pairs = [(op, one, other) for (op, one), (its, other) in combinations(sorted(ran), 2) if op == its]
    return [
        f"{op}: {one} and {other} both ran {name}, which {does}"
        for op, one, other in pairs
        for name, does in _PARTS.items()
        if name in ran[op, one] and name in ran[op, other]
    ]


def findings(ran: Ran, declared: Callable[[str, str], str]) -> Iterator[str]:
    """Pairs of sources that are declared two truths of an op, `declared(source, op)`, and ran one kernel."""
    for (op, one), (other_op, other) in combinations(sorted(ran), 2):
        shared = telling(ran[op, one]) & telling(ran[other_op, other]) if op == other_op else set()
        if shared and (first := declared(one, op)) != (second := declared(other, op)):
            told = f"{one} and {other} both ran {', '.join(sorted(shared))}"
            yield f"{op}: {told}, but are declared two truths: {first}, and {second}"


def observe(root: Path, device: str) -> tuple[dict[tuple[str, str], set[str]], dict[str, str]]:
    """What each source ran for each op at a few small workloads, and why nothing is known of the others."""
    dataset, sources = lightened(load_dataset(root)), Sources()
    bench = Workbench(dataset, sources, device)
    ran: dict[tuple[str, str], set[str]] = {}
    unknown: dict[str, str] = {}
    for case in choose(dataset, {op: sources.serving(op) for op in sources.ops}):
        for source in sources.serving(case.op):
            try:
                names = _names(bench, case, source)
                ran[case.op, source] = ran.get((case.op, source), set()) | names
            except Exception as error:  # noqa: BLE001 - judged and told; others are still to be observed
                forget_locals(error)
                verdict, reason = judge(error)
                unknown[f"{source}, {case.definition}"] = f"{verdict.value}: {reason}"
    for op, source in [key for key, names in ran.items() if not names]:
        unknown.setdefault(f"{source}, {op}", "the profiler saw nothing")
        del ran[op, source]
    return ran, unknown


def _names(bench: Workbench, case: Case, source: str) -> set[str]:
    laid = bench.lay(case)
    bench.truth(laid, case, source)  # compiles, and raises what the source raises
    return observed(lambda: bench.call_truth(laid, case, source))


@click.command()
@click.option("--environment", required=True, help="The name of this one.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), required=True)
@click.option("--dataset", type=click.Path(path_type=Path), default=Path())
@click.argument("file", type=click.Path(path_type=Path))
def main(environment: str, device: str, dataset: Path, file: Path) -> None:
    """Observe all sources that are here, and write what they ran."""
    sources = Sources()
    ran, unknown = observe(dataset, device)
    found = list(findings(ran, sources.kernel))
    rows = [
        {"op": op, "source": name, "declared": sources.kernel(name, op), "ran": " ".join(sorted(ran[op, name]))}
        for op, name in sorted(ran)
    ]
    here = asdict(measure(environment, device, sources.distributions))
    seen = {"findings": found, "parts": parts(ran), "unknown": unknown, "observed": rows}
    told = {"environment": here, "date": now(), **seen}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    click.echo("\n".join([*found, f"{len(rows)} of an op and a source observed, {len(found)} findings: {file}"]))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
