"""The checks of the documents that this suite began with, on the same outputs: the baseline of fault injection.

They hold all ops to fixed tolerances. Each is as its document's test template has it, with the tests for shape, dtype
and determinism that all of them ask for. None has a check for random samples. And their inputs are plain: pages in
order, sequences of one length, every page full, nothing poisoned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from refgrid.dataset.definition import Definition
from refgrid.proving.outputs import Tensors

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
# test_correctness once more, as it stands: on the documents' own inputs.
OWN_INPUTS = "documents 2 and 3, their inputs"
CHECKS = (*BASELINES, OWN_INPUTS)
# By the inputs that they run on: those that are laid, or such as the documents' generators make.
BY_INPUTS: Mapping[str, Mapping[str, Passes]] = {"laid": BASELINES, "plain": {OWN_INPUTS: test_template}}


def plain_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same sizes as the documents' generators fill them: arange for indices, equal lengths, normal numbers."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return {**inputs, **{name: _plain(name, value, inputs) for name, value in tensors.items()}}


def _plain(name: str, value: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    if name.endswith("indptr") or name == "cu_seqlens":
        return torch.linspace(0, int(value[-1]), len(value), device=value.device).floor().to(value.dtype)
    if name == "kv_last_page_len":
        return torch.full_like(value, inputs["k_cache" if "k_cache" in inputs else "ckv_cache"].shape[1])
    if name.endswith("indices") or name in ("block_table", "positions"):
        most = _indexed(name, inputs)
        return (torch.arange(value.shape[-1], device=value.device) % most).expand_as(value).to(value.dtype).contiguous()
    if value.dtype in (torch.float32, torch.float16, torch.bfloat16):
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
        return torch.where(value.isfinite(), value, noise)
    return value.clone()


def _indexed(name: str, inputs: Mapping[str, Any]) -> int:
    """How many of what an index input counts there are."""
    caches = ("k_cache", "ckv_cache", "k_index_cache_fp8", "cos_sin_cache", "initial_state", "state")
    cache = next(inputs[each] for each in caches if each in inputs)
    return int(cache.shape[0] * cache.shape[1]) if name == "sparse_indices" else int(cache.shape[0])


def red(
    reference: Tensors, again: Tensors, truth: Tensors, definition: Definition, checks: Mapping[str, Passes]
) -> dict[str, bool]:
    """Which of the checks are red; `again` is a second run of the reference.

    A law that the truth gives in place of indices is made into the indices of its largest numbers.
    """
    truth = {name: _indices(tensor, reference[name]) for name, tensor in truth.items() if name in reference}
    unsteady = any(not torch.equal(tensor, again[name]) for name, tensor in reference.items())
    return {name: unsteady or _fails(passes, reference, truth, definition) for name, passes in checks.items()}


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
        return bool(torch.allclose(actual, expected, atol=bounds[0], rtol=bounds[1]))
    atol, rtol = QUANTISED
    ok = (actual - expected).abs() <= atol + rtol * expected.abs()
    return float(ok.float().mean()) >= HIT_RATIO


def _quantised(definition: Definition) -> bool:
    held = any(spec.dtype.startswith(("float8", "float4")) for spec in definition.inputs.values())
    return held or "_fp4_" in definition.name  # whose weights stand there as the numbers that they mean


def _indices(truth: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    if reference.is_floating_point() or not truth.is_floating_point() or truth.ndim != 2:
        return truth
    held = torch.nn.functional.pad(truth, (0, max(0, reference.shape[1] - truth.shape[1])), value=-torch.inf)
    best, at = held.topk(reference.shape[1], dim=1)
    return torch.where(best == -torch.inf, -1, at).to(reference.dtype)
