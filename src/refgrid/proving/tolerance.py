"""Tolerances: what `match` means, one table by op, dtype and output; the most specific row wins.

`|actual - expected| <= atol + rtol * |expected|`, elementwise, for at least `required_matched_ratio` of the elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Tolerance:
    """atol in the output's unit, rtol relative to the ground truth, and the share of elements that must be within."""

    atol: float
    rtol: float
    required_matched_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} = {value}, but should be finite and at least 0")
        if not 0 < self.required_matched_ratio <= 1:
            raise ValueError(f"required_matched_ratio = {self.required_matched_ratio}, but should be in (0, 1]")


EXACT = Tolerance(0.0, 0.0)

# The published guideline of the reference-test documents: the starting point, and the ceiling of every later row.
_GUIDELINE = "tolerance guideline of flashinfer-bench's add-reference-tests document"

# (op, dtype, output) -> tolerance and where it comes from; "*" stands for any.
TABLE: dict[tuple[str, str, str], tuple[Tolerance, str]] = {
    ("*", "float64", "*"): (Tolerance(1e-7, 1e-7), "FlashInfer's default check for float64"),
    ("*", "float32", "*"): (Tolerance(1e-5, 1e-5), _GUIDELINE),
    ("*", "float16", "*"): (Tolerance(1e-3, 1e-3), _GUIDELINE),
    ("*", "bfloat16", "*"): (Tolerance(8e-3, 1e-2), _GUIDELINE),
    ("*", "float8_e4m3fn", "*"): (Tolerance(1e-1, 2e-1, 0.85), _GUIDELINE),
    ("*", "float8_e5m2", "*"): (Tolerance(1e-1, 2e-1, 0.85), "as float8_e4m3fn; the guideline names no e5m2"),
    ("*", "float4_e2m1", "*"): (Tolerance(1e-1, 2e-1, 0.85), f"{_GUIDELINE}, where it is called nvfp4"),
    **{
        ("*", dtype, "*"): (EXACT, "whole numbers are right or wrong")
        for dtype in ("int64", "int32", "int16", "int8", "uint8", "bool")
    },
}


@dataclass(frozen=True)
class TruthLimit:
    """Where a truth is itself less precise than the table asks; patterns, and the measurement behind the bound."""

    truth: str  # a source and its device, "torch on cpu"
    op: str
    dtype: str  # of the output
    output: str
    tolerance: Tolerance
    measured: str


# Errors of mixtures of experts grow with a token's output, so each op has the bound of its largest tokens.
_REQUANTISED = (
    "the kernel quantises its input again and GEMM2's input, to e4m3 with a scale for 128: up to 0.23 of the root mean "
    "square of a token's output in a float32 formula that rounds as it does (0.12 without the first rounding); "
    "0.10 to 0.12 at outputs up to 3 on an H200, SGLang 0.5.15"
)
_QUANTISED = (
    "the kernel rounds GEMM2's input to e4m3 with a scale for all: up to 0.13 of the root mean square of a token's "
    "output in a float32 formula that rounds as it does"
)
_ROUNDED = (
    "the kernel rounds GEMM1's halves, their product and each expert's output to bfloat16: up to 0.033 of the root "
    "mean square of a token's output in a float32 formula that does; 4e-3 to 1.3e-2 at outputs of 0.8 to 2.5 on an "
    "H200, SGLang 0.5.15"
)
_MOE_KERNELS = (
    (
        "moe_fp8_block_scale_ds_routing",
        Tolerance(1.5, 1e-2),
        _REQUANTISED,
        "tokens of 3.5, 1.21 beyond rtol in 29 million numbers of 4,096 tokens, SGLang 0.5.15 on an H200",
    ),
    ("moe_fp8_block_scale_renorm", Tolerance(0.6, 1e-2), _REQUANTISED, "tokens of 2, 0.35 beyond rtol with 16 tokens"),
    ("trtllm_fp8_per_tensor_scale_moe", Tolerance(0.3, 1e-2), _QUANTISED, "tokens of 1.6, 0.15 beyond rtol with 64"),
    (
        "trtllm_fp8_per_tensor_scale_moe_topk1",
        Tolerance(2.0, 1e-2),
        _QUANTISED,
        "tokens of 6, 1.52 beyond rtol in 21 million numbers of 4,096 tokens, SGLang 0.5.15 on an H200",
    ),
    ("trtllm_fp4_block_scale_moe", Tolerance(5e-2, 1e-2), _ROUNDED, "tokens of 2, 2.7e-2 beyond rtol with 16"),
    ("trtllm_fp4_block_scale_moe_topk1", Tolerance(8e-2, 1e-2), _ROUNDED, "tokens of 3.5, 4.6e-2 beyond rtol with 16"),
    (
        "trtllm_fp4_block_scale_routed_moe",
        Tolerance(8e-2, 1e-2),
        _ROUNDED,
        "tokens of 2, 5.9e-2 beyond rtol with 4,096 tokens, SGLang 0.5.15 on an H200",
    ),
)

TRUTH_LIMITS: tuple[TruthLimit, ...] = (
    TruthLimit(
        "transformers on *",
        "gdn_prefill",
        "float32",
        "new_state",
        Tolerance(3e-4, 1e-5),
        "sums the log gates of a chunk in float32, to minus thousands, so that their differences are off by 1e-4: "
        "largest error against float64 1.0e-4 over 180 draws of 1 to 1021 tokens, transformers 5.23.0 on a CPU",
    ),
    TruthLimit(
        "flashinfer on cuda",
        "gdn_prefill",
        "float32",
        "new_state",
        Tolerance(2e-2, 1e-2),
        "multiplies states, corrections and decayed values as bfloat16: 2.0e-3 seen on an H200 with 0.6.12 and 0.7.2 "
        "on other draws; on these, its products with operands rounded alike on a CPU are up to 1.3e-2 from float32, "
        "1.1e-2 beyond rtol, over 27 draws of 1 to 4096 tokens",
    ),
    TruthLimit(
        "flashinfer on cuda",
        "gdn_prefill",
        "bfloat16",
        "output",
        Tolerance(2e-2, 1e-2),
        "multiplies states, corrections and scores as bfloat16: its products with operands rounded alike on a CPU are "
        "up to 1.3e-2 beyond rtol from float32, over 27 draws of 1 to 4096 tokens",
    ),
    TruthLimit(
        "sglang on cuda",
        "gdn_prefill",
        "float32",
        "new_state",
        Tolerance(2e-2, 1e-2),
        "stores the states between chunks and the corrections as bfloat16: 2.0e-3 seen on an H200 with 0.5.15 on "
        "other draws; on these, its products with operands rounded alike on a CPU are up to 1.0e-2 from float32, "
        "9.0e-3 beyond rtol, over 27 draws of 1 to 4096 tokens",
    ),
    TruthLimit(
        "sglang on cuda",
        "gdn_prefill",
        "bfloat16",
        "output",
        Tolerance(2e-2, 1e-2),
        "stores the states between chunks and the corrections as bfloat16: its products with operands rounded alike "
        "on a CPU are up to 1.0e-2 beyond rtol from float32, over 27 draws of 1 to 4096 tokens",
    ),
    TruthLimit(
        "torch on cpu",
        "gqa_*",
        "float32",
        "lse",
        Tolerance(2e-4, 1e-5),
        "the CPU flash kernel's exponential is good to one unit of a 16-bit float only (pytorch/pytorch#151441): "
        "largest error against float64 8.4e-5 (base 2) over 300 draws of bfloat16 with 1 to 129 keys, torch 2.13.0",
    ),
    TruthLimit(
        "torch on cpu",
        "gqa_*",
        "bfloat16",
        "output",
        Tolerance(5e-3, 7.9e-3),
        "the CPU flash kernel multiplies probabilities rounded to the dtype: 2.9e-3 beyond one unit of the last place, "
        "2**-7 of the number, over 242 small workloads, torch 2.13.0; the guideline's 8e-3 hid an output scaled by 1 %",
    ),
    *(
        TruthLimit(
            "oracle on cpu",
            op,
            "bfloat16",
            output,
            Tolerance(1e-5, 7.9e-3),
            "float32 and float64 sums, both rounded once, differ by one unit of the last place at most, 2**-7 of the "
            "number: 7.3e-7 beyond that over 416 draws of small workloads; the guideline's hid an output scaled by 1 %",
        )
        for op, output in (("mla_paged_*", "output"), ("dsa_sparse_attention", "output"), ("rope_*", "*_out"))
    ),
    TruthLimit(
        "flashinfer-fa2 on cuda",
        "gqa_*",
        "float32",
        "lse",
        Tolerance(3e-3, 1e-5),
        "fa2 sums probabilities already rounded to the dtype (m16k16_rowsum_f16f16f32 in prefill.cuh), which moves the "
        "lse of bfloat16 by up to 2**-9 * log2(e) = 2.8e-3; largest seen 2.5e-3 over 479 workloads, 0.6.12 on an H200; "
        "the other FlashInfer kernels stay below 4e-6 there",
    ),
    TruthLimit(
        "flashinfer-fa2 on cuda",
        "mla_*",
        "float32",
        "lse",
        Tolerance(3e-3, 1e-5),
        "as for gqa_*: fa2 sums probabilities already rounded to the dtype (m16k16_rowsum_f16f16f32 in mla.cuh also), "
        "its lse of bfloat16 moves by up to 2**-9 * log2(e) = 2.8e-3; 1.1e-3 seen with absorbed decode, 0.5.3, 0.6.7 "
        "and 0.6.12 on an H200, where fa3 was 4e-6 off",
    ),
    TruthLimit(
        "transformers on *",
        "gqa_*",
        "bfloat16",
        "output",
        Tolerance(4e-2, 1e-2),
        "eager attention rounds scores and weights to the dtype: largest error against float64 2.7e-2, 2.5e-2 beyond "
        "rtol, over 400 draws of bfloat16 with 1 to 129 keys, transformers 5.23.0 on a CPU",
    ),
    TruthLimit(
        "transformers on *",
        "mla_paged_*",
        "bfloat16",
        "output",
        Tolerance(8e-2, 1e-2),
        "as for gqa_*, and scores of 576 components at 192**-0.5 are larger, so their rounding is too: largest error "
        "against float64 5.9e-2, 5.2e-2 beyond rtol, over 400 draws of bfloat16 with 1 to 129 keys, transformers "
        "5.23.0 on a CPU",
    ),
    TruthLimit(
        "transformers on *",
        "mla_ragged_*",
        "bfloat16",
        "output",
        Tolerance(4e-2, 1e-2),
        "as for gqa_*: largest error against float64 2.2e-2, 1.7e-2 beyond rtol, over 400 draws of bfloat16 with 1 to "
        "129 keys, transformers 5.23.0 on a CPU",
    ),
    TruthLimit(
        "transformers on *",
        "mamba_ssu_decode",
        "bfloat16",
        "output",
        Tolerance(1.6e-1, 2e-2),
        "its PyTorch function rounds step, inflow and the state that is read out to the dtype: largest error against "
        "float64 0.25, 1.0e-1 beyond rtol, at outputs up to 39 over 304 draws of 1 to 256 sequences, transformers "
        "5.23.0 on a CPU",
    ),
    TruthLimit(
        "transformers on *",
        "mamba_ssu_decode",
        "bfloat16",
        "new_state",
        Tolerance(4e-2, 2e-2),
        "its PyTorch function rounds step and inflow to the dtype: largest error against float64 0.5, 2.6e-2 beyond "
        "rtol, at states up to 59 over 304 draws of 1 to 256 sequences, transformers 5.23.0 on a CPU",
    ),
    TruthLimit(
        "transformers on cpu",
        "*_sampling_from_probs",
        "float32",  # of the law that it gives
        "samples",
        Tolerance(1e-5, 1e-3),
        "PyTorch's softmax on a CPU sums exponentials in float32, whose total is off by up to 3.8e-4 where many of "
        "262,208 tokens are rare: largest relative error of a probability over 126 workloads, torch 2.13.0; the "
        "tokens that are kept were the same in all",
    ),
    *(
        TruthLimit(truth, op, "bfloat16", "output", tolerance, f"{why}; {seen}")
        for truth in ("sglang* on cuda", "flashinfer* on cuda")
        for op, tolerance, why, seen in _MOE_KERNELS
    ),
)


def tolerance_for(op: str, dtype: str, output: str, truth: str = "") -> Tolerance:
    """The tolerance of one output of one op in one dtype; `truth` is a source and its device, as "torch on cpu".

    Raises ValueError for a dtype without a row, naming those that have one.
    """
    for limit in TRUTH_LIMITS:
        if all(map(fnmatchcase, (truth, op, dtype, output), (limit.truth, limit.op, limit.dtype, limit.output))):
            return limit.tolerance
    for key in ((op, dtype, output), (op, dtype, "*"), ("*", dtype, output), ("*", dtype, "*")):
        if key in TABLE:
            return TABLE[key][0]
    known = sorted({dtype for _, dtype, _ in TABLE})
    raise ValueError(f"dtype {dtype!r} has no tolerance; dtypes that have one: {', '.join(known)}")


def tolerance_of(bound: float) -> Tolerance:
    """One number for both, atol = rtol = bound, for every element: what `--tolerance` asks for in place of the table.

    Raises ValueError for a bound that is negative or not finite.
    """
    return Tolerance(bound, bound)


def looser(one: Tolerance, other: Tolerance) -> Tolerance:
    """What two truths that are compared with each other may differ by: the bound of the less precise."""
    ratio = min(one.required_matched_ratio, other.required_matched_ratio)
    return Tolerance(max(one.atol, other.atol), max(one.rtol, other.rtol), ratio)
