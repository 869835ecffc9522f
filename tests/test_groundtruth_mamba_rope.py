"""Adapters and oracle of selective state updates and rotary embeddings: against loops, the kernels' on doubles."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import naive_mamba
import naive_rope
import pytest
import torch
from adapters import unchanged
from torch import Tensor

import refgrid_groundtruth as groundtruth
from refgrid_groundtruth import SOURCES, Unavailable, broadcast, selftest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAMBA, ROPE = "mamba_ssu_decode", "rope_with_cos_sin_cache_neox_style"
NAIVE: dict[str, Callable[..., dict[str, Tensor]]] = {
    MAMBA: naive_mamba.mamba_ssu_decode,
    ROPE: naive_rope.rope_with_cos_sin_cache_neox_style,
}
KERNELS = ("flashinfer", "sglang")
SIZES: dict[str, Any] = {"heads": (8, 1), "d": (64, 128)}


def agree(adapter: Callable[..., dict[str, Tensor]], op: str, inputs: dict[str, Any], *lacks: str) -> dict[str, Tensor]:
    """The adapter gives what the loops give, but for what it lacks, and leaves its inputs as they are, bit for bit."""
    given, expected = unchanged(adapter, **inputs), NAIVE[op](**inputs)
    assert set(given) == set(expected) - set(lacks)
    for name, tensor in given.items():
        assert tensor.dtype == inputs["x" if op == MAMBA else "q"].dtype
        bound = 1e-2 if tensor.dtype == torch.bfloat16 else 5e-6
        torch.testing.assert_close(tensor.double(), expected[name], rtol=bound, atol=bound, equal_nan=True)
    return given


# ---- the oracle and transformers, as they are


@pytest.mark.parametrize("source", ["oracle", "transformers"])
@pytest.mark.parametrize("op", NAIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_they_agree_with_the_definition(source: str, op: str, dtype: torch.dtype) -> None:
    adapter = groundtruth.adapter(source, op, "cpu")
    if op == ROPE:
        agree(adapter, op, naive_rope.drawn([8, 0, 3, 3, 8], 9, dtype=dtype))
        return
    for heads in ((1, 1), (4, 2), (3, 3), (6, 2)):
        agree(adapter, op, naive_mamba.drawn([3, 0, 4], 6, heads, dtype=dtype, channels=heads == (6, 2)))


def test_the_oracle_takes_padding_no_sequence_and_no_token() -> None:
    agree(groundtruth.adapter("oracle", MAMBA, "cpu"), MAMBA, naive_mamba.drawn([-1, 2, -1, 0], 4))
    agree(groundtruth.adapter("oracle", MAMBA, "cpu"), MAMBA, naive_mamba.drawn([], 2))
    agree(groundtruth.adapter("oracle", ROPE, "cpu"), ROPE, naive_rope.drawn([], 2))


@pytest.mark.parametrize("dt", [-1e4, -40.0, 40.0, 1e4])
def test_the_oracle_at_the_ends_of_the_steps(dt: float) -> None:
    inputs = naive_mamba.drawn([1, 0], 2, dtype=torch.float32)
    inputs["dt"][:] = dt
    inputs["x"] /= max(1.0, dt)
    agree(groundtruth.adapter("oracle", MAMBA, "cpu"), MAMBA, inputs)


def test_transformers_is_asked_for_its_own_function_and_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("refgrid_groundtruth.transformers.mamba")

    def kernel(*_: Any, **__: Any) -> None:
        raise AssertionError("another library's kernel was called")

    own = module.inspect.unwrap(module.modeling_mamba2.mamba2_selective_state_update)
    monkeypatch.setattr(kernel, "__wrapped__", own, raising=False)
    monkeypatch.setattr(module.modeling_mamba2, "mamba2_selective_state_update", kernel)
    agree(module.mamba_ssu_decode, MAMBA, naive_mamba.drawn([1, 0], 3))


# ---- what adapters share


def test_one_number_a_head_is_a_view_of_strides_0() -> None:
    for lead, own in ((1, (8, 1)), (1, (8, 1, 1)), (2, (1, 8, 1)), (2, (5, 8, 1))):
        value = torch.randn(own).expand(*own[:lead], *[64] * (len(own) - lead)).contiguous()
        view = broadcast.per_head("D", value, lead)
        assert torch.equal(view, value)
        assert (view.stride(lead - 1), view.stride()[lead:]) == (1, (0,) * (len(own) - lead))


@pytest.mark.parametrize("at", [(0, 1), (7, 63)])
def test_numbers_that_differ_within_a_head_are_refused(at: tuple[int, int]) -> None:
    value = torch.ones(8, 64).index_put([torch.tensor(i) for i in at], torch.tensor(2.0))
    with pytest.raises(Unavailable, match="unsupported: dt_bias differs within a head"):
        broadcast.per_head("dt_bias", value, 1)


def test_padding_is_told_and_its_output_left_out() -> None:
    output, state, padded, full = torch.ones(2), torch.zeros(3), torch.tensor([0, -1]), torch.tensor([0, 1])
    assert broadcast.given(output, state, padded) == {"new_state": state}
    assert broadcast.given(output, state, full) == {"output": output, "new_state": state}
    broadcast.demand_no_padding(full)
    with pytest.raises(Unavailable, match="unsupported: 1 of 2 sequences are padding"):
        broadcast.demand_no_padding(padded)
    with pytest.raises(Unavailable, match="unsupported: 2 of 3 sequences are padding"):
        groundtruth.adapter("transformers", MAMBA, "cpu")(**naive_mamba.drawn([-1, 1, -1], 3))


# ---- FlashInfer and SGLang, on doubles of the functions of FlashInfer 0.6.12 and SGLang 0.5.15


def _moved(got: dict[str, Any], out: Tensor) -> None:
    """Updates states in place; for padding it writes what a state of zeros gives, and no state."""
    options = [got[name] for name in ("z", "dt_softplus", "pad_slot_id", "disable_state_update")]
    assert options == [None, True, -1, False]
    assert all(got[name].dtype == got["x"].dtype for name in ("B", "C"))
    state, slots = got["state"], got["state_batch_indices"]
    assert (state.is_contiguous(), slots.dtype, slots.shape) == (True, torch.int32, got["x"].shape[:1])
    group = state.shape[1] // got["B"].shape[1]
    for row, slot in enumerate(slots.tolist()):
        padding = slot == got["pad_slot_id"]
        assert padding or slot >= 0, "the kernel would write before the cache"
        x, dt = got["x"][row].float(), got["dt"][row].float() + got["dt_bias"].float()
        dt = torch.where(dt <= 20, torch.log1p(torch.exp(dt)), dt)
        b, c = (got[name][row].float().repeat_interleave(group, 0)[:, None] for name in ("B", "C"))
        s = torch.zeros(state.shape[1:]) if padding else state[slot].float()
        s = s * torch.exp(got["A"] * dt[..., None]) + b * (dt * x)[..., None]
        out[row] = ((s * c).sum(2) + got["D"].float() * x).to(out.dtype)
        if not padding:
            state[slot] = s.to(state.dtype)


LEAD = "state x dt A B C D z dt_bias dt_softplus state_batch_indices pad_slot_id"  # in both libraries' order
DEFAULTS = {"dt_softplus": False, "pad_slot_id": -1, "disable_state_update": False}


def _bound(names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as Python binds them to parameters of these names in this order."""
    order = names.split()
    assert set(kwargs) <= set(order[len(args) :]), "an argument that the function does not have, or has twice"
    return dict.fromkeys(order) | DEFAULTS | dict(zip(order, args, strict=False)) | kwargs


def flashinfer_selective_state_update(*args: Any, **kwargs: Any) -> Tensor:
    got = _bound(f"{LEAD} state_scale out disable_state_update", args, kwargs)
    x, dt = got["x"], got["dt"]
    assert got["state_scale"] is got["out"] is None
    assert len(got["state"]) >= len(x)
    assert x.shape[1] // got["B"].shape[1] in (1, 2, 4, 8, 16, 32, 64), "no kernel for this many heads a group"
    assert dt.dtype == got["D"].dtype == got["dt_bias"].dtype
    for name, each in (("A", got["A"]), ("D", got["D"]), ("dt_bias", got["dt_bias"]), ("dt", dt[0])):
        assert each.stride() == (1, 0, 0)[: each.ndim], f"{name} must be broadcast"
    assert all(each.stride()[1:] == (each.shape[2], 1) for each in (x, got["B"], got["C"]))
    out = torch.empty_like(x)
    _moved(got, out)
    return out


def sglang_selective_state_update(*args: Any, **kwargs: Any) -> None:
    got = _bound(f"{LEAD} out disable_state_update", args, kwargs)
    assert got["out"].shape == got["dt"].shape == got["x"].shape
    assert got["D"].shape == got["dt_bias"].shape == got["x"].shape[1:]
    assert (got["A"].shape, got["C"].shape) == (got["state"].shape[1:], got["B"].shape)
    _moved(got, got["out"])


def apply_rope_with_cos_sin_cache(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> tuple[Tensor, Tensor]:
    assert (cos_sin_cache.dtype, query.ndim, key.ndim) == (torch.float32, 2, 2), "heads side by side"
    heads = {name: x.view(len(x), -1, head_size) for name, x in (("q", query), ("k", key))}
    given = NAIVE[ROPE](torch.float32, not is_neox, **heads, cos_sin_cache=cos_sin_cache, positions=positions)
    return given["q_out"].to(query.dtype).view_as(query), given["k_out"].to(key.dtype).view_as(key)


def apply_rope_with_cos_sin_cache_inplace(
    q: Tensor, k: Tensor, cos_sin_cache: Tensor, positions: Tensor, *, is_neox: bool, rope_dim: int = 0
) -> None:
    assert (rope_dim, cos_sin_cache.dtype) == (0, torch.float32)
    assert q.shape[2] == k.shape[2] == cos_sin_cache.shape[1], "the rotary part only"
    assert (q.stride(1), q.stride(2), k.stride(2)) == (k.stride(1), 1, 1)
    given = NAIVE[ROPE](torch.float32, not is_neox, q=q, k=k, cos_sin_cache=cos_sin_cache, positions=positions)
    q[:], k[:] = given["q_out"].to(q.dtype), given["k_out"].to(k.dtype)


DOUBLES: dict[str, tuple[str, Callable[..., Any]]] = {
    "flashinfer.mamba": ("selective_state_update", flashinfer_selective_state_update),
    "flashinfer.rope": ("apply_rope_with_cos_sin_cache", apply_rope_with_cos_sin_cache),
    "sglang.srt.layers.attention.mamba.ops.mamba_ssm": ("selective_state_update", sglang_selective_state_update),
    "sglang.jit_kernel.rope": ("apply_rope_with_cos_sin_cache_inplace", apply_rope_with_cos_sin_cache_inplace),
}


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both libraries as packages of their own, served on the CPU."""
    for path in DOUBLES:
        folder = tmp_path.joinpath(*path.split("."))
        folder.mkdir(parents=True)
        for package in (folder, *folder.parents[: path.count(".")]):
            (package / "__init__.py").touch()
    for name, version in (("flashinfer_python", "0.6.12"), ("sglang", "0.5.15")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        head = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(head)
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if _theirs(name)}
    monkeypatch.syspath_prepend(str(tmp_path))
    for path, (name, double) in DOUBLES.items():
        setattr(importlib.import_module(path), name, double)
    here = [dataclasses.replace(source, devices=("cpu",), compiles=False) for source in SOURCES]
    monkeypatch.setattr(groundtruth, "SOURCES", tuple(here))
    yield
    for name in [name for name in sys.modules if _theirs(name)]:
        del sys.modules[name]
    sys.modules.update(held)


def _theirs(name: str) -> bool:
    own = [f"refgrid_groundtruth.{source}.{family}" for source in KERNELS for family in ("mamba", "rope")]
    return name in own or name.split(".", maxsplit=1)[0] in KERNELS


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_of_state_updates_agree_with_the_definition(source: str) -> None:
    adapter = groundtruth.adapter(source, MAMBA, "cpu")
    agree(adapter, MAMBA, naive_mamba.drawn([2, 0], 4, **SIZES))
    agree(adapter, MAMBA, naive_mamba.drawn([0], 1, **SIZES))
    agree(adapter, MAMBA, naive_mamba.drawn([-1, 2, -1], 4, **SIZES), "output")  # a padded batch: states only


@pytest.mark.usefixtures("libraries")
def test_channels_that_differ_are_sglangs_and_not_flashinfers() -> None:
    inputs = naive_mamba.drawn([2, 0], 3, **SIZES, channels=True)
    agree(groundtruth.adapter("sglang", MAMBA, "cpu"), MAMBA, inputs)
    with pytest.raises(Unavailable, match=r"unsupported: dt differs within a head, and the kernel takes one number"):
        groundtruth.adapter("flashinfer", MAMBA, "cpu")(**inputs)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("source", KERNELS)
@pytest.mark.parametrize("sizes", [(16, 8), (8, 8), (128, 64)], ids=str)
def test_kernels_of_rotations_agree_with_the_definition(source: str, sizes: tuple[int, int]) -> None:
    agree(groundtruth.adapter(source, ROPE, "cpu"), ROPE, naive_rope.drawn([4, 0, 4, 2], 5, (3, 1), sizes))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("path", DOUBLES)
def test_a_release_without_the_function_lacks_it(path: str) -> None:
    delattr(sys.modules[path], DOUBLES[path][0])
    with pytest.raises(Unavailable, match=rf"api-absent: \w+ has no (module )?{path}.{DOUBLES[path][0]}"):
        groundtruth.adapter(path.split(".", maxsplit=1)[0], MAMBA if "mamba" in path else ROPE, "cpu")


# ---- the self-test notices a library that means something else by it

SIGNS = torch.tensor([1, -1]).repeat_interleave(32)  # of cosines and sines
FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "no bias": (MAMBA, lambda x: {**x, "dt_bias": 0 * x["dt_bias"]}),
    "no decay": (MAMBA, lambda x: {**x, "A": 0 * x["A"]}),
    "B and C swapped": (MAMBA, lambda x: {**x, "B": x["C"], "C": x["B"]}),
    "skips of other heads": (MAMBA, lambda x: {**x, "D": x["D"].roll(1, 0)}),
    "slots in order": (MAMBA, lambda x: {**x, "state_batch_indices": torch.arange(2)}),
    "slots swapped": (MAMBA, lambda x: {**x, "state_batch_indices": x["state_batch_indices"].flip(0)}),
    "turned backwards": (ROPE, lambda x: {**x, "cos_sin_cache": x["cos_sin_cache"] * SIGNS}),
    "positions in order": (ROPE, lambda x: {**x, "positions": torch.arange(3)}),
    "sines first": (ROPE, lambda x: {**x, "cos_sin_cache": x["cos_sin_cache"].roll(32, 1)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_test_fires(fault: str) -> None:
    op, change = FAULTS[fault]
    oracle = groundtruth.adapter("oracle", op, "cpu")
    with pytest.raises(Unavailable, match=r"self-test failed: got \w+\[.*but should be"):
        selftest.run(lambda **inputs: oracle(**change(inputs)), op, "cpu")


def test_the_self_test_notices_neighbours_for_halves() -> None:
    def neighbours(**inputs: Any) -> dict[str, Tensor]:
        return {name: y.bfloat16() for name, y in NAIVE[ROPE](interleaved=True, **inputs).items()}

    with pytest.raises(Unavailable, match="self-test failed: got q_out"):
        selftest.run(neighbours, ROPE, "cpu")
