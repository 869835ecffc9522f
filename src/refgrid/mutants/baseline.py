"""The checks of the documents that this suite began with, on the same outputs: the baseline of fault injection.

They hold all ops to fixed tolerances. Each is as its document's test template has it, with the tests for shape, dtype
and determinism that all of them ask for. None has a check for random samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from refgrid.dataset.definition import Definition
from refgrid.proving.workbench import Tensors

Passes = Callable[[Tensors, Tensors, Definition], bool]

# "Tolerance Guidelines" of documents 2 and 3, (atol, rtol), and the share of elements for quantised kernels.
GUIDELINE: Mapping[str, tuple[float, float]] = {
    "float32": (1e-5, 1e-5),
    "float16": (1e-3, 1e-3),
    "bfloat16": (8e-3, 1e-2),
}
QUANTISED, HIT_RATIO = (1e-1, 2e-1), 0.85


def first_document(reference: Tensors, truth: Tensors, _: Definition) -> bool:
    """Document 1, and document 5 for attention: assert_close of every output, rtol = atol = 1e-3."""
    try:
        for name in _shared(reference, truth):
            torch.testing.assert_close(reference[name], truth[name], rtol=1e-3, atol=1e-3)
    except AssertionError:
        return False
    return True


def test_template(reference: Tensors, truth: Tensors, definition: Definition) -> bool:
    """Documents 2 and 3, test_correctness: the first output alone, atol 1e-2 and rtol 5e-2, or the hit ratio."""
    name = next(iter(definition.outputs))
    return name not in truth or _within(reference[name], truth[name], definition, (1e-2, 5e-2))


def guideline(reference: Tensors, truth: Tensors, definition: Definition) -> bool:
    """Documents 2 and 3, their table by the kernel's dtype, for every output: the most that can be read into them."""
    bounds = GUIDELINE.get(next(iter(definition.outputs.values())).dtype, GUIDELINE["float32"])
    return all(_within(reference[name], truth[name], definition, bounds) for name in _shared(reference, truth))


BASELINES: Mapping[str, Passes] = {
    "document 1": first_document,
    "documents 2 and 3": test_template,
    "their guideline": guideline,
}


def red(reference: Tensors, again: Tensors, truth: Tensors, definition: Definition) -> dict[str, bool]:
    """Which of the documents' checks are red; `again` is a second run of the reference.

    A law that the truth gives in place of indices is made into the indices of its largest numbers.
    """
    truth = {name: _indices(tensor, reference[name]) for name, tensor in truth.items() if name in reference}
    unsteady = any(not torch.equal(tensor, again[name]) for name, tensor in reference.items())
    return {name: unsteady or _fails(passes, reference, truth, definition) for name, passes in BASELINES.items()}


def _fails(passes: Passes, reference: Tensors, truth: Tensors, definition: Definition) -> bool:
    """An exception fails a test too."""
    for name, tensor in reference.items():
        if str(tensor.dtype) != f"torch.{definition.outputs[name].dtype}":
            return True
        if name in truth and tensor.shape != truth[name].shape:
            return True
    return not passes(reference, truth, definition)


def _shared(reference: Tensors, truth: Tensors) -> list[str]:
    return [name for name in reference if name in truth]


def _within(actual: torch.Tensor, expected: torch.Tensor, definition: Definition, bounds: tuple[float, float]) -> bool:
    actual, expected = actual.float(), expected.float()
    if not _quantised(definition):
        return torch.allclose(actual, expected, atol=bounds[0], rtol=bounds[1])
    atol, rtol = QUANTISED
    ok = (actual - expected).abs() <= atol + rtol * expected.abs()
    return ok.float().mean().item() >= HIT_RATIO


def _quantised(definition: Definition) -> bool:
    held = any(spec.dtype.startswith(("float8", "float4")) for spec in definition.inputs.values())
    return held or "_fp4_" in definition.name  # whose weights stand there as the numbers that they mean


def _indices(truth: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    if reference.is_floating_point() or not truth.is_floating_point() or truth.ndim != 2:
        return truth
    held = torch.nn.functional.pad(truth, (0, max(0, reference.shape[1] - truth.shape[1])), value=-torch.inf)
    best, at = held.topk(reference.shape[1], dim=1)
    return torch.where(best == -torch.inf, -1, at).to(reference.dtype)
