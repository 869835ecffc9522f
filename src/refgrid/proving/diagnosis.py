"""What a mismatch looks like: where its wrong elements cluster, and which simple transform explains them.

Made for failures only, in float64, from at most `_MOST` elements around the worst one: bounded in time and memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from refgrid.proving.compare import Comparison, Location, told_apart
from refgrid.proving.explanations import LEAST, Piece, explain, within
from refgrid.proving.finding import Finding, forget_locals, judge
from refgrid.proving.forms import form_of
from refgrid.proving.outputs import nan_alike
from refgrid.proving.routed import chosen_experts, told_expert
from refgrid.proving.tolerance import Tolerance
from refgrid.proving.workbench import Laid
from refgrid.records.record import Verdict

_MOST = 2**21
_FEW = 4  # places of an axis that are listed one by one
_MAINLY = 0.9


@dataclass(frozen=True)
class Diagnosis:
    """What was seen of one output: `clusters` and `explanation` are empty if there is nothing to tell."""

    comparison: Comparison
    axes: tuple[str, ...]
    looked_at: int
    wrong: int
    clusters: str
    explanation: str

    def in_short(self) -> str:
        """To be appended to a reason: "; all of it explained by a factor of 1.01"."""
        if not self.explanation:
            return ""
        all_of_it = "all of it" if self._whole else f"all of it among {self.looked_at} elements"
        return f"; {all_of_it} explained by {self.explanation}"

    def lines(self) -> list[str]:
        """The report: how much is wrong and where, what explains it, and the worst elements with both values."""
        found = self.comparison
        where = "" if self._whole else f" around the worst, of {found.count}"
        told = [f"{found.output}: {self.wrong} of {self.looked_at} elements{where} are outside the tolerance"]
        if found.rows is not None and not found.rows.within:
            told += [f"  {found.rows.describe()}"]
        if found.nonfinite_mismatches:
            told += [f"  {found.nonfinite_mismatches} of {found.count} are nan or infinite on one side alone"]
        told += [f"  {self.clusters}"] if self.clusters else []
        told += [f"  explained by {self.explanation}" if self.explanation else "  no simple transform explains it"]
        told += [f"  largest error {found.headroom:.4g} of what is allowed there; the worst:"]
        return told + [f"    {self._told(worst)}" for worst in found.worst if worst.error != 0]  # fewer may differ

    @property
    def _whole(self) -> bool:
        return self.looked_at == self.comparison.count

    def _told(self, worst: Location) -> str:
        index = ", ".join(f"{axis}={i}" for axis, i in zip(self.axes, worst.index, strict=True))
        actual, expected = told_apart(worst.actual, worst.expected)
        return f"[{index}] is {actual} but should be {expected} (error {worst.error:.4g})"


def mismatch_of(
    comparisons: Sequence[Comparison],
    bench: Laid,
    actual: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    where: str,
) -> Finding | None:
    """What does not match, and where, or is nan on both sides, which shows nothing; None when all matches."""
    wrong = [comparison for comparison in comparisons if not comparison.matches]
    if not wrong:
        names, inputs = [comparison.output for comparison in comparisons], bench.inputs.tensors
        alike = "; ".join(filter(None, (nan_alike(name, actual[name], expected[name], inputs) for name in names)))
        return Finding(Verdict.MISMATCH, f"{alike} {where}", comparisons, alike) if alike else None
    told, report = told_of(wrong, bench, actual, expected)
    return Finding(Verdict.MISMATCH, f"{told} {where}", comparisons, report)


def joined(wrong: Sequence[Finding], comparisons: Sequence[Comparison], lead: str = "") -> Finding:
    """Several mismatches of one case as one."""
    reason, report = "; ".join(each.reason for each in wrong), "\n".join(each.report for each in wrong)
    return Finding(Verdict.MISMATCH, lead + reason, comparisons, report)


def told_of(
    wrong: Sequence[Comparison], bench: Laid, actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> tuple[str, str]:
    """Of comparisons that do not match, the reason in one line and the report in several."""
    reasons: list[str] = []
    lines: list[str] = []
    for comparison in wrong:
        name = comparison.output
        try:
            short, more = _looked_at(comparison, bench, actual[name], expected[name])
        except Exception as error:  # noqa: BLE001 - the verdict stands, whatever befalls those who look closer
            forget_locals(error)
            short, more = "", [f"{name}: could not be looked at: {judge(error)[1]}"]
        lines += more
        reasons.append(comparison.describe() + short)
    return "; ".join(reasons), "\n".join(lines)


def _looked_at(
    comparison: Comparison, bench: Laid, actual: torch.Tensor, expected: torch.Tensor
) -> tuple[str, list[str]]:
    """What is added to the reason, and the report; draws and choices, which have no places, tell theirs themselves."""
    if form_of(bench.op, comparison.output) is not None:
        return "", comparison.lines()
    axes = bench.definition.outputs[comparison.output].shape
    seen = diagnose(comparison, actual, expected, axes, chosen_experts(bench))
    return seen.in_short(), seen.lines()


def diagnose(
    comparison: Comparison,
    actual: torch.Tensor,
    expected: torch.Tensor,
    axes: Sequence[str] | None = None,
    experts: torch.Tensor | None = None,
) -> Diagnosis:
    """Look at the tensors of a comparison that did not match; `axes` name its dimensions.

    `experts` are those that each place of the first dimension goes through, where there are any.
    """
    names = tuple(axes or (f"dim {i}" for i in range(actual.ndim)))
    tolerance = Tolerance(comparison.atol, comparison.rtol)
    with torch.no_grad():
        window = _window(actual.shape, comparison.worst[0].index)
        a, e = (x[window].double() for x in (actual, expected))
        wrong = ~within(a, e, tolerance)
        whole_rows = comparison.rows is not None and not comparison.rows.within and int(wrong.sum()) < LEAST
        piece = Piece(a, e, a != e if whole_rows else wrong, names, tolerance, actual.dtype)
        clusters = [_clusters(wrong, names, [part.start for part in window])]
        if experts is not None:
            clusters += [told_expert(wrong.flatten(1).any(1), experts[window[0]])]
        told = "; ".join(filter(None, clusters))
        return Diagnosis(comparison, names, a.numel(), int(wrong.sum()), told, explain(piece))


def _window(shape: Sequence[int], worst: Sequence[int]) -> tuple[slice, ...]:
    """All of a small tensor; of a large one what lies around the worst element, cut along the first axes."""
    window, left = [], 1
    for size in shape:
        left *= size
    for size, index in zip(shape, worst, strict=True):
        kept = max(1, min(size, size * _MOST // left))
        left = left // size * kept
        start = min(max(0, index - kept // 2), size - kept)
        window.append(slice(start, start + kept))
    return tuple(window)


def _clusters(wrong: torch.Tensor, axes: Sequence[str], starts: Sequence[int]) -> str:
    """Where the wrong elements are, as "all 64 are in num_qo_heads = 7", by the axes that say something."""
    total = int(wrong.sum())
    along = [
        (name, start, wrong.movedim(axis, 0).reshape(wrong.shape[axis], -1).sum(1))
        for axis, (name, start) in enumerate(zip(axes, starts, strict=True))
        if wrong.shape[axis] > 1
    ]
    for find in (_in_order, _listed) if total > 1 else ():
        told = [
            f"{name} = {found}"
            for name, start, counts in along
            if not counts.all() and (found := find(counts.nonzero()[:, 0].tolist(), start))
        ]
        if told:
            return f"all {total} are in {' and '.join(told)}"
        for name, start, counts in along:
            if int(counts.max()) >= _MAINLY * total:
                return f"{int(counts.max())} of {total} are in {name} = {int(counts.argmax()) + start}"
    return ""


def _in_order(found: list[int], start: int) -> str:
    """As "7", "64..127" or "1, 3, 5 to 127"; empty for places without an order."""
    shown = [place + start for place in found]
    steps = {later - earlier for earlier, later in pairwise(found)}
    if len(found) == 1:
        return f"{shown[0]}"
    if steps == {1}:
        return f"{shown[0]}..{shown[-1]}"
    return f"{shown[0]}, {shown[1]}, {shown[2]} to {shown[-1]}" if len(steps) == 1 and len(found) > 2 else ""


def _listed(found: list[int], start: int) -> str:
    """As "3, 9"; empty for many."""
    return ", ".join(str(place + start) for place in found) if len(found) <= _FEW else ""
