"""Outputs that are right in another way than element by element: random samples, and choices whose order is free.

For such an output a truth may give, instead of what the definition says, the law behind it as floating numbers: the
probability of each outcome, or the score of each candidate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import torch

from refgrid.dataset.definition import Definition
from refgrid.proving.chosen import compare_chosen
from refgrid.proving.compare import Comparison, compare
from refgrid.proving.draws import LAW_ERROR, compare_draws, draws_for
from refgrid.proving.finding import Finding
from refgrid.proving.tolerance import Tolerance
from refgrid.records.record import Verdict

Compare: TypeAlias = Callable[[str, torch.Tensor, torch.Tensor, Tolerance], Comparison]

# Calls that draw at the workload's own size, before those that draw for many rows at once: a kernel may choose its way
# by their number.
OWN = 8
_UNLIKELY = 1e-9
# Elements of the inputs of one call that draws many times: 64 MiB of float32 on a CPU, 1 GiB on a GPU.
_ELEMENTS_A_CALL = {"cpu": 2**24, "cuda": 2**28}


class Form(NamedTuple):
    """How outputs whose op and name fit both globs are compared; `drawn` ones are random and are drawn many times."""

    op: str
    output: str
    compare: Compare
    drawn: bool


FORMS: tuple[Form, ...] = (
    Form("*_sampling_from_probs", "samples", compare_draws, drawn=True),
    Form("dsa_topk_indexer*", "topk_indices", compare_chosen, drawn=False),
)


def form_of(op: str, output: str) -> Form | None:
    """The form of an output that is not compared element by element."""
    fits = (form for form in FORMS if fnmatchcase(op, form.op) and fnmatchcase(output, form.output))
    return next(fits, None)


def is_law(op: str, output: str, tensor: torch.Tensor) -> bool:
    """Whether a truth gave the law behind an output in place of the output."""
    return form_of(op, output) is not None and tensor.is_floating_point()


def compare_in_form(
    op: str, output: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance
) -> Comparison:
    """Compare by the output's form; two laws are numbers, and a law is always what the other side is held against.

    Two laws must allow the same outcomes, however rare: a table's atol is more than most of them weigh.
    """
    form = form_of(op, output)
    if form is None:
        return compare(output, actual, expected, tolerance)
    if actual.is_floating_point() and expected.is_floating_point():
        return _compare_laws(output, actual.float(), expected.float(), tolerance)
    if actual.is_floating_point():
        actual, expected = expected, actual
    return form.compare(output, actual, expected, tolerance)


def _compare_laws(output: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Comparison:
    """By the tolerance and, relative to each number, as sharply as a law can be computed; the worse of the two."""
    found = [compare(output, actual, expected, bound) for bound in (tolerance, Tolerance(0.0, LAW_ERROR))]
    return max(found, key=lambda each: (not each.matches, each.headroom))


def drawn_outputs(op: str, definition: Definition) -> list[str]:
    """The outputs that are random."""
    return [name for name in definition.outputs if (form := form_of(op, name)) is not None and form.drawn]


def draw(
    call: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]],
    inputs: Mapping[str, Any],
    definition: Definition,
    output: str,
    name: str,
) -> torch.Tensor:
    """Many draws of a random output, [draws, rows]: rows are independent, so most calls get every row many times.

    `name` seeds torch's generators: another name draws other numbers, the same name the same ones.
    """
    axis = (definition.outputs[output].shape or ("",))[0]
    repeated = [key for key in inputs if (definition.inputs[key].shape or ("",))[0] == axis]
    rows, device = len(inputs[repeated[0]]), inputs[repeated[0]].device.type
    widest = max(inputs[key].numel() for key in repeated) // rows
    parts = []
    for number, times in enumerate(_portions(draws_for(rows, widest, device), rows * widest, device)):
        seed_draws(f"{name}/{number}")
        many = {key: torch.cat([value] * times) if key in repeated else value for key, value in inputs.items()}
        parts.append(call(many)[output].reshape(times, rows))
    return torch.cat(parts)


def demand_seeded(who: str, output: str, draws: torch.Tensor) -> None:
    """Raise Finding for a sampler that draws the same, in all rows or in some, whatever torch's generators start from.

    The first OWN of the draws, [draws, rows], were calls of their own, each under another seed. That a right sampler
    gives the same in all of them must be less likely than one in 1e9, whatever its law.
    """
    own = draws[:OWN]
    alike = (own == own[0]).all(0)
    if len(draws) <= OWN or not alike.any():
        return
    alone = [_chance_alike(row) for row in draws[:, alike].unbind(1)]
    chance = _chance_of_rows(alone, len(alike))
    if chance < _UNLIKELY:
        told = f"{output} of {len(alone)} of {len(alike)} rows are the same under {OWN} seeds"
        raise Finding(
            Verdict.ERROR, f"{who}: {told}, which a sampler that obeys them gives with probability {chance:.2g}"
        )


def _chance_alike(row: torch.Tensor) -> float:
    """How likely the first OWN of a row's draws are all the same when all came in any order: so it is of a right one.

    What the others tell of its law would be a guess, and take a likely token that they happen to lack for a rare one.
    """
    counts = row.unique(return_counts=True)[1].double()
    return float(torch.stack([(counts - i) / (len(row) - i) for i in range(OWN)]).prod(0).sum())


def _chance_of_rows(alone: Sequence[float], rows: int) -> float:
    """At most how likely just these of so many rows are alike, each by a chance of its own.

    One over the mean likelihood ratio of samplers that are deaf in one row, in half of them, and in all; that of a
    right sampler is 1 on average, and so above 1e9 in less than one case in 1e9.
    """
    deaf = torch.tensor([1 / rows, 0.5, 1.0], dtype=torch.float64)
    found = (1 - deaf + deaf / torch.tensor(alone, dtype=torch.float64)[:, None]).log().sum(0)
    ratios = found + torch.xlogy(torch.tensor(rows - len(alone)), 1 - deaf)
    return math.exp(min(0.0, math.log(len(deaf)) - float(ratios.logsumexp(0))))


def seed_draws(name: str) -> None:
    """Seed torch's generators of every device by a name."""
    torch.manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1)


def _portions(times: int, elements: int, device: str) -> Iterator[int]:
    """How often each call draws, within the memory of one call."""
    most, own = max(1, _ELEMENTS_A_CALL[device] // elements), min(OWN, times)
    yield from [1] * own
    times -= own
    while times > 0:
        yield min(times, most)
        times -= most
