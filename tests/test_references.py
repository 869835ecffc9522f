"""References against their definition in float64, written out with loops, and against answers known beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refgrid_references import attention, fused_add_rmsnorm, gemm, gqa_paged_decode, gqa_paged_prefill_causal, rmsnorm
from refgrid_references.blocks import block_elements

Tensor: TypeAlias = torch.Tensor
BFLOAT16 = {"atol": 1e-2, "rtol": 8e-3}  # one rounding, 2^-8 relative, and a margin near zero
FLOAT32 = {"atol": 2e-5, "rtol": 2e-5}


# --- norm and gemm ----------------------------------------------------------------------------------------------


def naive_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [batch_size, hidden_size] and weight float64, row by row."""
    rows = [row / math.sqrt(sum(float(a) ** 2 for a in row) / len(row) + eps) * weight for row in x]
    return torch.stack(rows)


@pytest.mark.parametrize(("batch_size", "hidden_size"), [(1, 1), (13, 7), (3, 129), (2, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rmsnorm_is_the_formula(batch_size: int, hidden_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(batch_size)
    x, w = torch.randn(batch_size, hidden_size).to(dtype), torch.randn(hidden_size).to(dtype)
    expected = naive_rmsnorm(x.double(), w.double(), 1e-5)
    output = rmsnorm(x, w, eps=1e-5)
    assert output.dtype == dtype
    assert_near(output, expected, BFLOAT16 if dtype == torch.bfloat16 else FLOAT32)


def test_rmsnorm_of_one_value_is_the_weight_and_eps_is_inside_the_root() -> None:
    w = torch.tensor([1.0, -2.0, 3.0])
    assert_near(rmsnorm(torch.full((2, 3), -5.0), w, eps=0.0), -w.expand(2, 3).double(), FLOAT32)
    assert_near(rmsnorm(torch.zeros(1, 3), w, eps=1e-6), torch.zeros(1, 3).double(), FLOAT32)
    assert_near(rmsnorm(torch.full((1, 3), 1e-3), w, eps=1e-6), w.double()[None] / math.sqrt(2), FLOAT32)


@pytest.mark.parametrize(("batch_size", "hidden_size"), [(1, 5), (13, 129)])
def test_fused_add_rmsnorm_norms_the_unrounded_sum(batch_size: int, hidden_size: int) -> None:
    torch.manual_seed(0)
    x, r = (torch.randn(batch_size, hidden_size).bfloat16() for _ in range(2))
    w = torch.randn(hidden_size).bfloat16()
    before = x.clone(), r.clone()
    output, residual_out = fused_add_rmsnorm(x, r, w, eps=1e-6)
    exact = x.double() + r.double()
    assert_near(output, naive_rmsnorm(exact, w.double(), 1e-6), BFLOAT16)
    assert torch.equal(residual_out, (x.float() + r.float()).bfloat16())
    assert torch.equal(x, before[0]), "the reference works in place"
    assert torch.equal(r, before[1]), "the reference works in place"


def test_fused_add_rmsnorm_keeps_what_rounding_the_sum_would_lose() -> None:
    # 256 + 1 is 256 in bfloat16, 257 in float32: the norm sees 257, residual_out says 256.
    x, r = torch.tensor([[256.0, 1.0]]).bfloat16(), torch.tensor([[1.0, 0.0]]).bfloat16()
    wide = torch.ones(2)  # float32 weight and input keep the difference visible in the output
    output, _ = fused_add_rmsnorm(x.float(), r, wide, eps=0.0)
    assert_near(output, naive_rmsnorm(torch.tensor([[257.0, 1.0]]).double(), wide.double(), 0.0), FLOAT32)
    assert fused_add_rmsnorm(x, r, wide.bfloat16(), eps=0.0)[1].tolist() == [[256.0, 1.0]]


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (13, 7, 17), (129, 5, 33)])
def test_gemm_is_a_dot_product_per_entry(m: int, n: int, k: int) -> None:
    torch.manual_seed(m)
    a, b = torch.randn(m, k).half(), torch.randn(n, k).half()
    c = gemm(a, b)
    expected = [[sum(float(x) * float(y) for x, y in zip(r, s, strict=True)) for s in b] for r in a]
    assert c.dtype == torch.float16
    assert_near(c, torch.tensor(expected, dtype=torch.float64), {"atol": 2e-3, "rtol": 1e-3})


def test_gemm_in_blocks_of_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 16).half(), torch.randn(29, 16).half()
    whole = gemm(a, b)
    monkeypatch.setitem(gemm.__globals__, "block_elements", lambda _: 50)
    with LargestAllocation() as seen:
        assert_near(gemm(a, b), whole.double(), {"atol": 1e-3, "rtol": 1e-3})
    assert seen.elements < b.numel()


def test_gemm_accumulates_in_float32() -> None:
    # Partial sums reach 2^16 and 4096 + 1 is not a float16: a float16 accumulator gives inf or loses the ones.
    a = torch.tensor([[256.0, 256.0] + [1.0] * 8]).half()
    b = torch.tensor([[256.0, -256.0] + [1.0] * 8]).half()
    assert gemm(a, b).item() == 8.0


# --- paged attention --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """Lengths of the sequences of one call."""

    qo: tuple[int, ...]
    kv: tuple[int, ...]
    page_size: int = 1
    heads: tuple[int, int] = (4, 2)
    d: int = 8

    @property
    def pages(self) -> list[int]:
        return [-(-n // self.page_size) for n in self.kv]

    def draw(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16, spare: int = 3) -> dict[str, Any]:
        """Inputs with shuffled pages; slots of the cache that no sequence uses hold NaN."""
        torch.manual_seed(seed)
        total = sum(self.pages)
        shape = (total + spare, self.page_size, self.heads[1], self.d)
        indices = torch.randperm(total + spare)[:total]
        last = [n - (p - 1) * self.page_size if p else 1 for n, p in zip(self.kv, self.pages, strict=True)]
        indptr = cumulated(self.pages)
        inputs = {
            "q": torch.randn(sum(self.qo), self.heads[0], self.d).to(dtype),
            "k_cache": torch.full(shape, math.nan).to(dtype),
            "v_cache": torch.full(shape, math.nan).to(dtype),
            "qo_indptr": cumulated(self.qo),
            "kv_indptr": indptr,
            "kv_indices": indices.int(),
            "kv_last_page_len": torch.tensor(last, dtype=torch.int32),
        }
        for name in ("k_cache", "v_cache"):
            for sequence, n in enumerate(self.kv):
                for j in range(n):
                    page = indices[int(indptr[sequence]) + j // self.page_size]
                    inputs[name][page, j % self.page_size] = torch.randn(shape[2:]).to(dtype)
        return inputs


def cumulated(lengths: Any) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def naive_attention(inputs: dict[str, Any], sizes: Sequences, sm_scale: float) -> tuple[Tensor, Tensor]:
    """Every query, head and key by itself, in float64: output and base-2 lse."""
    q = inputs["q"].double()
    output = torch.zeros(*q.shape[:2], sizes.d, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    group = sizes.heads[0] // sizes.heads[1]
    row = 0
    for sequence, (qo_len, kv_len) in enumerate(zip(sizes.qo, sizes.kv, strict=True)):
        first = int(inputs["kv_indptr"][sequence])
        slots = [(inputs["kv_indices"][first + j // sizes.page_size], j % sizes.page_size) for j in range(kv_len)]
        for i in range(qo_len):
            seen = slots[: max(0, kv_len - qo_len + i + 1)]
            for head in range(sizes.heads[0] if seen else 0):
                keys = [inputs["k_cache"][page, slot, head // group].double() for page, slot in seen]
                values = [inputs["v_cache"][page, slot, head // group].double() for page, slot in seen]
                scores = [float(q[row, head] @ key) * sm_scale for key in keys]
                weights = [math.exp(score) for score in scores]
                total = sum(weights)
                output[row, head] = sum(w / total * v for w, v in zip(weights, values, strict=True))
                lse[row, head] = math.log2(total)
            row += 1
    return output, lse


def attend(inputs: dict[str, Any], sizes: Sequences, sm_scale: float) -> tuple[Tensor, Tensor]:
    given = dict(inputs) if sizes.page_size > 1 else {k: v for k, v in inputs.items() if k != "kv_last_page_len"}
    if set(sizes.qo) != {1}:
        return gqa_paged_prefill_causal(**given, sm_scale=sm_scale)
    del given["qo_indptr"]
    return gqa_paged_decode(**given, sm_scale=sm_scale)


SIZES = {
    "decode-one-key": Sequences((1,), (1,)),
    "decode-no-key": Sequences((1,), (0,)),
    "decode-empty-sequence": Sequences((1, 1, 1), (2, 0, 1)),
    "decode-prime": Sequences((1,) * 5, (7, 1, 0, 3, 13)),
    "decode-one-kv-head": Sequences((1, 1), (3, 17), heads=(5, 1)),
    "decode-no-groups": Sequences((1, 1), (3, 17), heads=(3, 3)),
    "decode-blocks": Sequences((1, 1, 1), (257, 5, 130), d=4, heads=(2, 1)),
    "decode-pages": Sequences((1,) * 4, (64, 65, 0, 3), page_size=64),
    "decode-last-pages": Sequences((1,) * 4, (4, 5, 8, 3), page_size=4, heads=(6, 2)),
    "prefill-one": Sequences((2, 1), (2, 1)),
    "prefill-q-longer": Sequences((5,), (3,)),
    "prefill-q-longer-pages": Sequences((130,), (1,), page_size=64, heads=(2, 1)),
    "prefill-empty-query": Sequences((2, 0, 1), (4, 3, 1)),
    "prefill-no-keys": Sequences((2, 1), (0, 0)),
    "prefill-kv-longer": Sequences((2, 3), (97, 40), heads=(2, 2)),
    "prefill-129": Sequences((129, 3), (129, 7), d=4, heads=(2, 1)),
    "prefill-pages": Sequences((7, 1, 0, 5), (70, 3, 64, 2), page_size=64, heads=(2, 1)),
    "prefill-blocks": Sequences((2,), (300,), d=4, heads=(2, 1)),
}


@pytest.fixture(params=["as-is", "small-tiles"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's tile, block and chunk sizes, and ones so small that every size above has several of each."""
    if request.param == "small-tiles":
        monkeypatch.setattr(attention, "TILE_ROWS", 3)
        monkeypatch.setattr(attention, "BLOCK_KEYS", 5)
        monkeypatch.setattr(attention, "block_elements", lambda _: 200)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_attention_is_the_formula(sizes: Sequences) -> None:
    inputs = sizes.draw()
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    output, lse = attend(inputs, sizes, 0.3)
    expected = naive_attention(inputs, sizes, 0.3)
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert_near(output, expected[0], BFLOAT16)
    assert_near(lse, expected[1], FLOAT32)
    for name, tensor in inputs.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["decode-last-pages", "prefill-pages"])
def test_attention_in_float32_agrees_with_float64_closely(name: str) -> None:
    inputs = SIZES[name].draw(dtype=torch.float32)
    output, lse = attend(inputs, SIZES[name], 1.7)
    expected = naive_attention(inputs, SIZES[name], 1.7)
    assert_near(output, expected[0], FLOAT32)
    assert_near(lse, expected[1], FLOAT32)


@pytest.mark.parametrize("n", [1, 3, 129, 1031])
def test_equal_scores_average_the_values(n: int) -> None:
    sizes = Sequences((1,), (n,))
    inputs = sizes.draw(dtype=torch.float32)
    inputs["q"].zero_()
    output, lse = attend(inputs, sizes, 1.0)
    mean = inputs["v_cache"][inputs["kv_indices"].long(), 0].double().mean(0).repeat_interleave(2, 0)
    assert_near(output[0], mean, FLOAT32)
    assert_near(lse, torch.full((1, 4), math.log2(n), dtype=torch.float64), FLOAT32)


def test_one_key_returns_its_value() -> None:
    sizes = Sequences((1, 1), (1, 1))
    inputs = sizes.draw()
    output, _ = attend(inputs, sizes, 0.5)
    values = inputs["v_cache"][inputs["kv_indices"].long(), 0].repeat_interleave(2, 1)
    assert torch.equal(output, values)


@pytest.mark.parametrize("sizes", [Sequences((1, 1), (0, 0)), Sequences((3, 2), (0, 0), page_size=4)])
def test_no_key_gives_zero_and_minus_infinity(sizes: Sequences) -> None:
    output, lse = attend(sizes.draw(), sizes, 0.5)
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


def test_no_sequence_at_all_gives_empty_outputs() -> None:
    sizes = Sequences((), ())
    output, lse = attend(sizes.draw(), sizes, 0.5)
    assert (output.shape, lse.shape) == ((0, 4, 8), (0, 4))


def test_large_scores_do_not_overflow() -> None:
    sizes = Sequences((1,), (2,), heads=(1, 1), d=1)
    inputs = sizes.draw(dtype=torch.float32)
    inputs["q"][:] = 1.0
    inputs["k_cache"][inputs["kv_indices"].long(), 0, 0, 0] = torch.tensor([1e4, 1e4 - 1])
    _, lse = attend(inputs, sizes, 1.0)
    assert lse.item() == pytest.approx((1e4 + math.log1p(math.exp(-1))) / math.log(2), rel=1e-6)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_reaches_just_the_queries_that_see_it(value: float) -> None:
    sizes = Sequences((6, 4), (6, 4), heads=(2, 2))
    inputs = sizes.draw()
    clean = attend(inputs, sizes, 0.5)
    inputs["v_cache"][inputs["kv_indices"][3].long(), 0, 1, 2] = value  # key 3 of the first sequence, kv head 1
    output, lse = attend(inputs, sizes, 0.5)
    expected = clean[0].clone()
    expected[3:6, 1, 2] = value
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-2, equal_nan=True)
    torch.testing.assert_close(lse, clean[1])


@pytest.mark.usefixtures("cut")
def test_a_key_that_is_nan_reaches_just_the_queries_that_see_it() -> None:
    sizes = Sequences((6, 4), (6, 4), heads=(2, 2))
    inputs = sizes.draw()
    clean = attend(inputs, sizes, 0.5)
    inputs["k_cache"][inputs["kv_indices"][3].long(), 0, 1, 2] = math.nan
    output, lse = attend(inputs, sizes, 0.5)
    for given, expected in zip((output, lse), (clean[0].clone(), clean[1].clone()), strict=True):
        expected[3:6, 1] = math.nan
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-2, equal_nan=True)


def test_a_page_may_stand_twice() -> None:
    sizes = Sequences((1, 1), (3, 3))
    inputs = sizes.draw()
    inputs["kv_indices"][3:] = inputs["kv_indices"][:3]
    inputs["q"][1] = inputs["q"][0]
    output, lse = attend(inputs, sizes, 0.5)
    assert torch.equal(output[0], output[1])
    assert torch.equal(lse[0], lse[1])


# --- memory -----------------------------------------------------------------------------------------------------


class LargestAllocation(TorchDispatchMode):  # type: ignore[no-untyped-call, misc, unused-ignore]
    """Records the largest float tensor, in elements, that an operation returns in memory of its own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, misc, unused-ignore]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, result.numel())
        return result


def test_the_recorder_sees_a_cast_and_ignores_a_view() -> None:
    x = torch.zeros(1000, dtype=torch.bfloat16)
    with LargestAllocation() as seen:
        x.view(10, 100).flatten()
    assert seen.elements == 0
    with LargestAllocation() as seen:
        x.float()
    assert seen.elements == 1000


@pytest.mark.parametrize("qo_len", [1, 3])
def test_a_large_cache_is_not_cast_whole(qo_len: int) -> None:
    sizes = Sequences((qo_len,), (5,))
    inputs = sizes.draw(spare=2**20)
    with LargestAllocation() as seen:
        output, _ = attend(inputs, sizes, 0.5)
    assert torch.isfinite(output).all()
    assert seen.elements < 10_000 < inputs["k_cache"].numel()


@pytest.mark.parametrize(("qo_len", "kv_len"), [(1, 400_000), (700, 20_000)])
def test_a_long_sequence_is_read_in_blocks(qo_len: int, kv_len: int) -> None:
    cache = torch.randn(kv_len, 1, 1, 16)
    indptr = torch.tensor([0, kv_len], dtype=torch.int32)
    qo_indptr, indices = torch.tensor([0, qo_len]), torch.arange(kv_len, dtype=torch.int32)
    q = torch.zeros(qo_len, 8, 16)
    with LargestAllocation() as seen:
        output, lse = gqa_paged_prefill_causal(q, cache, cache, qo_indptr, indptr, indices, sm_scale=1.0)
    assert seen.elements <= block_elements(cache.device)
    assert_near(lse[-1], torch.full((8,), math.log2(kv_len), dtype=torch.float64), FLOAT32)
    assert_near(output[-1], cache.double().mean(0).squeeze(0).expand(8, 16), FLOAT32)


def assert_near(given: Tensor, expected: Tensor, tolerance: dict[str, float]) -> None:
    """Both finite and near, or the same non-finite value, position by position."""
    assert expected.dtype == torch.float64
    torch.testing.assert_close(given.double(), expected, equal_nan=True, atol=tolerance["atol"], rtol=tolerance["rtol"])
