"""What references cost beside a plain loop: `nox -s bench-references`.

Both run on equal inputs in one process, in turns. The loops are tests/loops.py. The mean is over families that loop: a
family of several rows counts once, by their geometric mean; norms and products need no loop, and are left out of it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import loops
import torch
from rich.console import Console
from rich.table import Table

from refgrid.dataset.definition import InputSpec, Workload, load_dataset
from refgrid.dataset.reference import compile_reference
from refgrid.proving.inputs import make_inputs

ROOT = Path(__file__).parents[1]
Run = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """One definition at one size. `loop` takes its inputs in order and gives its outputs, or the first of them."""

    definition: str
    loop: Run
    axes: dict[str, int]
    scalars: dict[str, float]
    looping: bool = True

    @property
    def inputs(self) -> dict[str, Any]:
        """The definition's inputs at this size, as the instrument draws them, but with sequences of one length."""
        definition = DATASET.definitions[self.definition]
        specs = {name: InputSpec("random") for name in definition.inputs}
        specs |= {name: InputSpec("scalar", value) for name, value in self.scalars.items()}
        inputs: dict[str, Any] = dict(
            make_inputs(definition, Workload("bench", self.axes, specs), 0, "cpu", ROOT).tensors
        )
        for name in {"qo_indptr", "kv_indptr", "cu_seqlens"} & set(inputs):
            starts = inputs[name]
            inputs[name] = torch.linspace(0, int(starts[-1]), len(starts)).to(starts.dtype)
        return inputs


DATASET = load_dataset(ROOT)
_GQA, _MLA = {"sm_scale": 128**-0.5}, {"sm_scale": 192**-0.5}


def _paged(batch: int, length: int, **more: int) -> dict[str, int]:
    count = batch * length
    return {"len_indptr": batch + 1, "num_kv_indices": count, "num_pages": count, **more}


ROWS = (
    Row("rmsnorm_h4096", loops.rmsnorm, {"batch_size": 512}, {}, looping=False),
    Row("gemm_n4096_k4096", loops.gemm, {"M": 256}, {}, looping=False),
    Row("gqa_paged_decode_h32_kv8_d128_ps1", loops.gqa_paged_decode, _paged(64, 1024, batch_size=64), _GQA),
    Row(
        "gqa_paged_prefill_causal_h32_kv8_d128_ps1", loops.gqa_paged_prefill_causal, _paged(8, 512, total_q=4096), _GQA
    ),
    Row(
        "gqa_ragged_prefill_causal_h32_kv8_d128",
        loops.ragged_prefill_causal,
        {"len_indptr": 9, "total_q": 1024, "total_kv": 1024},
        _GQA,
    ),
    Row("mla_paged_decode_h16_ckv512_kpe64_ps1", loops.mla_paged_decode, _paged(64, 1024, batch_size=64), _MLA),
    Row(
        "mla_paged_prefill_causal_h16_ckv512_kpe64_ps1",
        loops.mla_paged_prefill_causal,
        _paged(8, 128, total_q=1024),
        _MLA,
    ),
    Row(
        "mla_ragged_prefill_causal_h16_qk192_vo128",
        loops.ragged_prefill_causal,
        {"len_indptr": 9, "total_q": 1024, "total_kv": 1024},
        _MLA,
    ),
    Row(
        "dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps64",
        loops.dsa_sparse_attention,
        {"num_tokens": 32, "num_pages": 256},
        _MLA,
    ),
    Row(
        "dsa_topk_indexer_fp8_h64_d128_topk2048_ps64",
        loops.dsa_topk_indexer_fp8,
        {"batch_size": 16, "max_num_pages": 64, "num_pages": 1100},
        {},
    ),
    Row("gdn_decode_qk16_v32_d128_k_last", loops.gdn_decode, {"batch_size": 16}, {"scale": 128**-0.5}),
    Row(
        "gdn_mtp_qk16_v32_d128_k_last",
        loops.gdn_mtp,
        {"batch_size": 8, "seq_len": 4, "pool_size": 12},
        {"scale": 128**-0.5},
    ),
    Row(
        "gdn_prefill_qk16_v32_d128_k_last",
        loops.gdn_prefill,
        {"total_seq_len": 1024, "num_seqs": 4, "len_cu_seqlens": 5},
        {"scale": 128**-0.5},
    ),
    Row(
        "mamba_ssu_decode_h128_d64_s128_ng8",
        loops.mamba_ssu_decode,
        {"batch_size": 16, "state_cache_size": 24},
        {},
    ),
    Row(
        "moe_fp8_block_scale_renorm_topk10_e128_h2048_i512",
        partial(loops.moe_fp8_block_scale_renorm, top_k=10),
        {"seq_len": 64},
        {},
    ),
    Row(
        "rope_with_cos_sin_cache_neox_style_d128_rd64",
        loops.rope_with_cos_sin_cache_neox_style,
        {"num_tokens": 256, "num_qo_heads": 32, "num_kv_heads": 8, "max_seq_len": 4096},
        {},
    ),
    Row("top_k_top_p_sampling_from_probs_v128256", loops.top_k_top_p_sampling_from_probs, {"batch_size": 64}, {}),
)

# Seconds on two cores of the references of a published data set, of which a tenth is the goal.
PUBLISHED = {
    "gqa_paged_decode_h32_kv8_d128_ps1": 4.7,
    "gqa_paged_prefill_causal_h32_kv8_d128_ps1": 2.34,
    "mla_paged_decode_h16_ckv512_kpe64_ps1": 1.23,
    "top_k_top_p_sampling_from_probs_v128256": 6.7,
}


@click.command()
@click.option("--repeats", default=5, show_default=True, help="Runs of each reference; a loop over 2 s runs twice.")
@click.option("--match", default="", help="Only definitions whose name holds this.")
def main(repeats: int, match: str) -> None:
    """Time each reference and a plain loop on equal inputs, in turns."""
    table = Table("definition", "size", "loop, s", "reference, s", "ratio", "published / 10, s", "largest difference")
    ratios: list[tuple[Row, float]] = []
    for row in ROWS:
        if match in row.definition:
            slow, fast, error = _timed(row, repeats)
            ratio = statistics.median(slow) / statistics.median(fast)
            ratios.append((row, ratio))
            bound = f"{PUBLISHED[row.definition] / 10:.3f}" if row.definition in PUBLISHED else ""
            size = " ".join(f"{name}={value}" for name, value in row.axes.items())
            table.add_row(row.definition, size, _told(slow), _told(fast), f"{ratio:.1f}", bound, f"{error:.1e}")
    console = Console(width=200)
    console.print(table)
    families: dict[str, list[float]] = {}
    for row, ratio in ratios:
        if row.looping:
            families.setdefault(DATASET.definitions[row.definition].op_type, []).append(ratio)
    means = {family: statistics.geometric_mean(found) for family, found in families.items()}
    console.print("families that loop: " + ", ".join(f"{family} {mean:.1f}" for family, mean in means.items()))
    slower = [row.definition for row, ratio in ratios if ratio < 1]
    mean = statistics.geometric_mean(means.values()) if means else float("nan")
    console.print(f"geometric mean over {len(means)} of them: {mean:.1f}; slower than a loop: {slower or 'none'}")
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; median (lowest to highest)")


def _timed(row: Row, repeats: int) -> tuple[list[float], list[float], float]:
    """Seconds of the loop and of the reference, in turns after one run of each, and how far their outputs differ."""
    reference, inputs = compile_reference(DATASET.definitions[row.definition]), row.inputs
    slow: list[float] = []
    fast: list[float] = []
    with torch.no_grad():
        given, expected = reference(*inputs.values()), row.loop(*inputs.values())
        while len(fast) < repeats:
            _clock(fast, lambda: reference(*inputs.values()))
            if len(slow) < 2 or sum(slow) < 2:
                _clock(slow, lambda: row.loop(*inputs.values()))
    return slow, fast, _difference(given, expected)


def _clock(into: list[float], call: Callable[[], Any]) -> None:
    started = time.perf_counter()
    call()
    into.append(time.perf_counter() - started)


def _difference(given: Any, expected: Any) -> float:
    """The largest over outputs of floating numbers; -inf equals -inf, and random or chosen numbers do not count."""
    pairs = zip(_listed(given), _listed(expected), strict=False)
    errors = [
        (a.float() - b.float()).abs().nan_to_num(0).max().item()
        for a, b in pairs
        if a.is_floating_point() and a.numel()
    ]
    return max(errors, default=0.0)


def _listed(outputs: Any) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(itertools.chain(outputs))


def _told(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.4f} ({min(seconds):.4f} to {max(seconds):.4f})"


if __name__ == "__main__":
    main()
