"""Grouped attention at the sizes of long training sequences, on a real GPU; run as test_grouped_attention_gpu.py says.

Rows and keys are sampled, those at the ends of slices among them, and computed anew in float64 from the definition.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grouped_checks import check_visible_counts_of_rows
from grouped_gpu import BACKENDS, subject_of
from grouped_layouts import Layout, drawn, planned, run_both, zigzag
from grouped_memory import check_memory
from grouped_samples import hold_keys, hold_rows, hold_same_bits

from refgrid_solutions.grouped_attention import backends, grouped_flash_attn_func

K = 1024
LARGE = [name for name in BACKENDS if name != "reference"]
LLAMA = {"heads": (32, 8), "head_dim": 128}


def prefixes(count: int, rows: int) -> Layout:
    """Groups of rows that each see all keys up to their own last, as chunks of one long sequence."""
    return Layout([(i * rows, (i + 1) * rows, 0, (i + 1) * rows, 1) for i in range(count)], count * rows, count * rows)


LAYOUTS = {
    "64K, first of eight ranks": zigzag([64 * K], 0, 8),
    "64K, last of eight ranks": zigzag([64 * K], 7, 8),
    "64K, one rank": zigzag([64 * K], 0, 1),
    "128K, fourth of eight ranks": zigzag([128 * K], 3, 8),
    "8 groups, 64K": prefixes(8, 8 * K),
    "16 groups, 64K": prefixes(16, 4 * K),
    "16 groups on the same 64K keys": Layout(
        [(i * K, (i + 1) * K, 0, 64 * K, i % 2) for i in range(16)], 16 * K, 64 * K
    ),
    "32 sequences": zigzag([128 * (1 + i % 16) for i in range(32)], 3, 8),
    "100 beside 9900": Layout([(0, 100, 0, 100, 1), (100, 10000, 0, 10000, 1)], 10000, 10000),
    "100 rows of 64K keys beside 9900 of few": Layout([(0, 100, 0, 64 * K, 0), (100, 10000, 0, 128, 0)], 10000, 64 * K),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", LARGE)
def test_sampled_rows_and_keys(backend: str, layout: str) -> None:
    found = run_both(LAYOUTS[layout], subject_of(backend, **LLAMA))

    hold_rows(found, count=48)
    hold_keys(found, count=16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", LARGE)
def test_how_many_keys_every_row_sees(backend: str, layout: str) -> None:
    check_visible_counts_of_rows(LAYOUTS[layout], subject_of(backend, **LLAMA))


@pytest.mark.parametrize("spread", [1, 10])
@pytest.mark.parametrize(
    ("backend", "dtype"), [(backend, dtype) for backend in LARGE for dtype in backends.TABLE[backend].dtypes]
)
def test_every_dtype_at_16k_and_inputs_ten_times_as_large(backend: str, dtype: torch.dtype, spread: float) -> None:
    found = run_both(zigzag([16 * K], 0, 1), subject_of(backend, dtype=dtype, **LLAMA), spread=spread)

    hold_rows(found, large=spread > 1)
    hold_keys(found, large=spread > 1)


@pytest.mark.parametrize("backend", LARGE)
def test_gradients_at_32k(backend: str) -> None:
    found, again = (
        run_both(zigzag([32 * K], 0, 1), subject_of(backend, **LLAMA), deterministic=True) for _ in range(2)
    )

    hold_same_bits(found, again)
    hold_rows(found)
    hold_keys(found, count=64)
    assert all(gradient.isfinite().all() for gradient in (found.dq, found.dk, found.dv))


@pytest.mark.parametrize("backend", LARGE)
def test_128k_is_the_same_bits_as_a_call_for_each_group(backend: str) -> None:
    subject, layout = subject_of(backend, **LLAMA), zigzag([128 * K], 0, 8)
    q, k, v = drawn(layout, subject)
    out, lse = grouped_flash_attn_func(q, k, v, planned(layout, subject, max_splits=1), backend=backend)
    for q_start, q_end, _, k_end, mask_type in layout.entries:
        alone = Layout([(0, q_end - q_start, 0, k_end, mask_type)], q_end - q_start, k_end)
        told = q[q_start:q_end], k[:k_end], v[:k_end]
        found = grouped_flash_attn_func(*told, planned(alone, subject, max_splits=1), backend=backend)

        assert torch.equal(out[q_start:q_end], found[0])
        assert torch.equal(lse[:, q_start:q_end], found[1])


@pytest.mark.parametrize("planning", [False, True], ids=["one plan", "a plan a call"])
@pytest.mark.parametrize("backend", LARGE)
def test_memory_after_100_calls_is_that_after_3(backend: str, planning: bool) -> None:
    check_memory(prefixes(8, 512), subject_of(backend, **LLAMA), planning=planning)


@pytest.mark.parametrize("backend", LARGE)
def test_a_call_that_keeps_one_byte_is_seen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, kept = subject_of(backend, **LLAMA), list[torch.Tensor]()
    module: Any = backends.load(backend)
    true = module.forward

    def leaking(*told: Any) -> Any:
        kept.append(torch.empty(1, dtype=torch.uint8, device="cuda"))
        return true(*told)

    monkeypatch.setattr(module, "forward", leaking)

    with pytest.raises(AssertionError, match="bytes after 100 calls"):
        check_memory(prefixes(8, 512), subject, planning=False)
