"""What every source that is installed runs on a GPU, as the profiler sees it: `pytest tests/gpu -k independence`.

`python tests/observed_kernels.py` writes the same, to be committed. FlashInfer compiles unless `refgrid warm` has.
"""

from __future__ import annotations

from pathlib import Path

from observed_kernels import findings, observe, telling

from refgrid.sources import Sources

ROOT = Path(__file__).parents[2]
OF_LIBRARIES = ("flashinfer", "sglang")  # whose kernels have names of their own


def test_sources_that_are_declared_two_truths_run_two_kernels() -> None:
    ran, unknown = observe(ROOT, "cuda")

    blind = [key for key, names in ran.items() if key[1].startswith(OF_LIBRARIES) and not telling(names)]
    assert ran, unknown
    assert list(findings(ran, Sources().kernel)) == []
    assert not [key for key in blind if "sampling" not in key[0]], "only PyTorch's own kernels were seen"
