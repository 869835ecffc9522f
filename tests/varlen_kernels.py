"""FlashAttention's varlen kernels for a CPU, under their own names and schemas: what the backends say to them is tried
without a GPU. They refuse what the kernels refuse, and leave NaN where those leave memory as it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from refgrid_solutions.grouped_attention import backends
from refgrid_solutions.grouped_attention.backends import aten, fa3

# As torch.ops.fa3_fwd.fwd.default._schema of fa3-fwd 0.0.3 prints it.
FA3_SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0., bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
_FA3_NAMES = re.findall(r"(\w+)(?:=[^,)]*)?[,)]", FA3_SCHEMA.split(" -> ", maxsplit=1)[0])


class Calls(list[str]):
    """Which kernels were launched, in order; a backward one says whether it was told to be deterministic."""


@contextmanager
def backends_of_a_gpu(patch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The kernels on this CPU, and a table and backends that take it for a GPU."""
    for name in ("torch", "fa3"):
        row = backends.TABLE[name]
        here = backends.Row(row.module, row.says, devices=("cpu",), head_dims=(16, 64, 128))
        patch.setitem(backends.TABLE, name, here)
    for module in (aten, fa3):
        patch.setattr(module, "refuses", lambda _: "")
    patch.setattr(fa3, "_processors", lambda _: 132)
    patch.setattr(fa3, "_KERNELS", "torch")
    with varlen_kernels() as launched:
        yield launched


@contextmanager
def varlen_kernels() -> Iterator[Calls]:
    """The kernels, for as long as this lasts."""
    calls = Calls()
    with torch.library._scoped_library("aten", "IMPL") as aten, torch.library._scoped_library("fa3_fwd", "DEF") as fa3:
        aten.impl("_flash_attention_forward", _aten_forward(calls), "CPU")
        aten.impl("_flash_attention_backward", _aten_backward(calls), "CPU")
        fa3.define(FA3_SCHEMA)
        fa3.impl("fwd", _fa3_forward(calls), "CPU")
        yield calls


def _aten_forward(calls: Calls) -> Any:
    def forward(
        q: Any, k: Any, v: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, *rest: Any, **named: Any
    ) -> Any:
        dropout, causal, debug = rest
        assert (dropout, debug) == (0.0, False)
        assert max_q > 1, "with max_q = 1 the kernel takes heads for rows"
        calls.append("aten forward")
        out, lse = _forward(q, k, v, cum_q, cum_k, named["seqused_k"], (max_q, max_k), causal, named["scale"])
        return out, lse, *(torch.empty(0) for _ in range(3))

    return forward


def _fa3_forward(calls: Calls) -> Any:
    def forward(*told: Any) -> Any:
        named = dict(zip(_FA3_NAMES, told, strict=False))
        q, k, v = told[:3]
        calls.append(f"fa3 forward, num_splits={named['num_splits']}")
        offsets = named["cu_seqlens_q"], named["cu_seqlens_k"], named["seqused_k"]
        longest = named["max_seqlen_q"], named["max_seqlen_k"]
        out, lse = _forward(q, k, v, *offsets, longest, named["is_causal"], named["softmax_scale"])
        return out, lse, torch.empty(0), torch.empty(0)

    return forward


def _aten_backward(calls: Calls) -> Any:
    def backward(
        dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cum_q: Any, cum_k: Any, *rest: Any, **named: Any
    ) -> Any:
        max_q, max_k, dropout, causal, *_ = rest
        assert dropout == 0.0
        assert cum_k[-1] == len(k), "each sequence needs keys of its own"
        assert lse.is_contiguous()
        assert lse.shape == (q.shape[1], len(q))
        told = "deterministic" if torch.are_deterministic_algorithms_enabled() else "in any order"
        calls.append(f"aten backward, {told}")
        found = [torch.full_like(tensor, math.nan) for tensor in (q, k, v)]
        for rows, keys in _sequences(q, k, cum_q, cum_k, cum_k.diff(), (max_q, max_k)):
            told_rows = dout[rows], q[rows], out[rows], lse[:, rows]
            parts = _differentiate(*told_rows, k[keys], v[keys], causal, named["scale"])
            for tensor, part, where in zip(found, parts, (rows, keys, keys), strict=True):
                tensor[where] = part.to(tensor.dtype)
        return tuple(found)

    return backward


def _sequences(
    q: Any, k: Any, cum_q: Any, starts: Any, counts: Any, longest: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    """Rows and keys of each, after the kernel's checks."""
    for tensor in (cum_q, starts):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
        assert len(tensor) == len(counts) + 1
    assert cum_q[0] == 0
    assert cum_q[-1] == len(q)
    assert q.stride(-1) == k.stride(-1) == 1
    for index, count in enumerate(counts.tolist()):
        rows = slice(int(cum_q[index]), int(cum_q[index + 1]))
        keys = slice(int(starts[index]), int(starts[index]) + count)
        assert 0 < rows.stop - rows.start <= longest[0]
        assert count <= longest[1]
        assert 0 <= keys.start <= keys.stop <= len(k)
        yield rows, keys


def _scores(q: Any, k: Any, causal: bool, scale: float) -> Any:
    """[heads, rows, keys] in float64, -inf where hidden."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k) * scale
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k) - len(q)) if causal else torch.ones(())
    return scores.masked_fill(seen == 0, -math.inf)


def _forward(
    q: Any, k: Any, v: Any, cum_q: Any, starts: Any, counts: Any, longest: tuple[int, int], causal: bool, scale: float
) -> tuple[Any, Any]:
    out, lse = torch.full_like(q, math.nan), torch.full((q.shape[1], len(q)), math.nan)
    for rows, keys in _sequences(q, k, cum_q, starts, counts, longest):
        scores = _scores(q[rows], k[keys], causal, scale)
        sums = scores.logsumexp(-1)
        weights = (scores - torch.where(sums == -math.inf, math.inf, sums)[..., None]).exp()
        values = v[keys].double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        out[rows] = torch.einsum("hnm,mhd->nhd", weights, values).to(q.dtype)
        lse[:, rows] = torch.where(sums == -math.inf, math.inf, sums).float()  # a row without keys: +inf
    return out, lse


def _differentiate(
    dout: Any, q: Any, out: Any, lse: Any, k: Any, v: Any, causal: bool, scale: float
) -> tuple[Any, Any, Any]:
    """From the log-sum-exp and out that the kernel was given, not from its own."""
    assert (lse != -math.inf).all()
    heads = k.shape[1]
    weights = (_scores(q, k, causal, scale) - lse.double()[..., None]).exp()
    d_rows, keys, values = (
        dout.double(),
        *(tensor.double().repeat_interleave(q.shape[1] // heads, 1) for tensor in (k, v)),
    )
    inner = torch.einsum("nhd,mhd->hnm", d_rows, values) - (d_rows * out.double()).sum(-1).T[..., None]
    ds = weights * inner * scale
    dk, dv = torch.einsum("hnm,nhd->mhd", ds, q.double()), torch.einsum("hnm,nhd->mhd", weights, d_rows)
    summed = (tensor.unflatten(1, (heads, -1)).sum(2) for tensor in (dk, dv))
    return torch.einsum("hnm,mhd->nhd", ds, keys), *summed
