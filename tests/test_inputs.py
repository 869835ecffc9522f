"""Inputs: the same numbers everywhere, structured as the op demands, and every way they can contradict themselves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from refgrid.dataset.definition import Axis, Definition, DefinitionError, InputSpec, TensorSpec, Workload
from refgrid.proving.inputs import Inputs, make_inputs, normal, plain
from refgrid.proving.inputs import drawing as module

RANDOM = InputSpec("random")


@pytest.fixture(autouse=True)
def _no_weights_kept() -> Iterator[None]:
    module._kept.clear()
    yield
    module._kept.clear()


def definition(
    inputs: dict[str, tuple[list[str] | None, str]],
    const: dict[str, int] | None = None,
    constraints: tuple[str, ...] = (),
    name: str = "made_up",
) -> Definition:
    """Axes in `const` are fixed, all others that a shape names are bound by the workload."""
    axes = {axis: Axis("const", value) for axis, value in (const or {}).items()}
    for shape, _ in inputs.values():
        axes |= {axis: Axis("var") for axis in shape or [] if axis not in axes}
    specs = {
        name: TensorSpec(None if shape is None else tuple(shape), cast("Any", dtype))
        for name, (shape, dtype) in inputs.items()
    }
    return Definition(name, "made_up", axes, specs, {"y": TensorSpec((), "float32")}, "", constraints)


Axes = dict[str, int]


def workload(of: Definition, axes: Axes, given: dict[str, InputSpec] | None = None, uuid: str = "w") -> Workload:
    return Workload(uuid, axes, {name: (given or {}).get(name, RANDOM) for name in of.inputs})


def make(of: Definition, axes: Axes, given: dict[str, InputSpec] | None = None, seed: int = 0) -> Inputs:
    return make_inputs(of, workload(of, axes, given), seed, "cpu", None)


def tensor(made: Inputs, name: str) -> torch.Tensor:
    value = made.tensors[name]
    assert isinstance(value, torch.Tensor)
    return value


NORM = definition({"x": (["batch", "n"], "bfloat16"), "weight": (["n"], "bfloat16")}, {"n": 8})


def attention(page_size: int = 4, *, prefill: bool = True, dtype: str = "bfloat16") -> Definition:
    """Paged attention with one kv head of width 3, which divides no block."""
    cache = (["num_pages", "page_size", "num_kv_heads", "head_dim"], dtype)
    inputs: dict[str, tuple[list[str] | None, str]] = {
        "q": (["total_q" if prefill else "batch_size", "num_kv_heads", "head_dim"], dtype),
        "k_cache": cache,
        "v_cache": cache,
        "qo_indptr": (["len_indptr"], "int32"),
        "kv_indptr": (["len_indptr"], "int32"),
        "kv_indices": (["num_kv_indices"], "int32"),
        "kv_last_page_len": (["batch_size"], "int32"),
        "sm_scale": (None, "float32"),
    }
    constraints = ["len_indptr == batch_size + 1", "num_kv_indices == kv_indptr[-1].item()"]
    if prefill:
        constraints.append("total_q == qo_indptr[-1].item()")
    else:
        del inputs["qo_indptr"]
    return definition(inputs, {"page_size": page_size, "num_kv_heads": 1, "head_dim": 3}, tuple(constraints))


SCALE = {"sm_scale": InputSpec("scalar", 0.125)}


def paged(page_size: int, axes: Axes, uuid: str = "w", dtype: str = "bfloat16") -> Inputs:
    of = attention(page_size, prefill="total_q" in axes, dtype=dtype)
    axes = {"len_indptr": axes["batch_size"] + 1, **axes}
    return make_inputs(of, workload(of, axes, SCALE, uuid), 0, "cpu", None)


def kv_lengths(made: Inputs, page_size: int) -> list[int]:
    lengths = []
    for sequence, (start, end) in enumerate(pairwise(tensor(made, "kv_indptr").tolist())):
        last = int(tensor(made, "kv_last_page_len")[sequence])
        lengths.append((end - start - 1) * page_size + last if end > start else 0)
    return lengths


def used_by_hand(made: Inputs, page_size: int) -> set[tuple[int, int]]:
    """Page and place of every token of every sequence, one after the other."""
    used = set()
    for start, length in zip(tensor(made, "kv_indptr").tolist(), kv_lengths(made, page_size), strict=False):
        for token in range(length):
            page = int(tensor(made, "kv_indices")[start + token // page_size])
            used.add((page, token % page_size))
    return used


class TestTheSameEverywhere:
    def test_in_another_process(self) -> None:
        script = (
            "import sys, json; sys.path[:0] = json.loads(sys.argv[1]); import torch; torch.manual_seed(99)\n"
            "from refgrid.dataset.definition import *; from refgrid.proving.inputs import make_inputs\n"
            "d = Definition('made_up', 'made_up', {'batch': Axis('var'), 'n': Axis('const', 8)},"
            "{'x': TensorSpec(('batch', 'n'), 'bfloat16'), 'weight': TensorSpec(('n',), 'bfloat16')},"
            "{'y': TensorSpec((), 'float32')}, '')\n"
            "w = Workload('w', {'batch': 3}, {'x': InputSpec('random'), 'weight': InputSpec('random')})\n"
            "made = make_inputs(d, w, 0, 'cpu', None)\n"
            "print(json.dumps([made.hash, made.tensors['x'].tolist()]))"
        )
        made = make(NORM, {"batch": 3})

        told = subprocess.run(
            [sys.executable, "-c", script, json.dumps(sys.path)], capture_output=True, text=True, check=True
        ).stdout

        assert json.loads(told) == [made.hash, tensor(made, "x").tolist()]

    def test_numbers_that_were_once_drawn(self) -> None:
        made = make(NORM, {"batch": 2})

        assert made.hash == "343c553cc6caa63f8b589f59f7dfc1f7"
        assert tensor(made, "x")[0, :4].tolist() == [0.28125, 1.3125, 0.8828125, -1.8828125]

    def test_whatever_was_drawn_before_and_beside(self) -> None:
        alone = definition({"x": (["batch", "n"], "bfloat16")}, {"n": 8})
        make(NORM, {"batch": 5})

        assert torch.equal(tensor(make(alone, {"batch": 3}), "x"), tensor(make(NORM, {"batch": 3}), "x"))

    def test_but_not_for_another_uuid_seed_name_or_definition(self) -> None:
        other = definition({"x": (["batch", "n"], "bfloat16"), "z": (["batch", "n"], "bfloat16")}, {"n": 8}, name="b")
        made = [make(NORM, {"batch": 4}), make(NORM, {"batch": 4}, seed=1), make(other, {"batch": 4})]
        made.append(make_inputs(NORM, workload(NORM, {"batch": 4}, uuid="v"), 0, "cpu", None))
        drawn = [tensor(each, "x") for each in made] + [tensor(made[2], "z")]

        assert len({str(each.tolist()) for each in drawn}) == 5
        assert len({each.hash for each in made}) == 4

    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
    def test_in_blocks_of_any_size(self, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
        of = definition({"x": (["batch", "n"], dtype)}, {"n": 7})
        whole = make(of, {"batch": 9})

        monkeypatch.setattr(normal, "BLOCK", 8)
        parts = make(of, {"batch": 9})

        assert torch.equal(tensor(parts, "x").double(), tensor(whole, "x").double())
        assert parts.hash == whole.hash

    def test_a_cache_in_blocks_of_any_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        axes = {"batch_size": 3, "num_kv_indices": 9, "num_pages": 12}
        whole = paged(4, axes)

        monkeypatch.setattr(normal, "BLOCK", 16)
        parts = paged(4, axes)

        assert parts.hash == whole.hash
        torch.testing.assert_close(tensor(parts, "k_cache"), tensor(whole, "k_cache"), rtol=0, atol=0, equal_nan=True)


class TestNumbers:
    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn"])
    def test_floats_are_standard_normal(self, dtype: str) -> None:
        x = tensor(make(definition({"x": (["batch", "n"], dtype)}, {"n": 64}), {"batch": 1000}), "x")

        assert x.dtype == getattr(torch, dtype)
        values = x.double()
        assert values.mean().abs() < 0.02
        assert abs(values.std() - 1) < 0.02
        assert (values < -1).double().mean() == pytest.approx(0.1587, abs=0.02)  # half of an 8-bit float's step

    def test_a_gemm_weight_gives_outputs_of_order_one(self) -> None:
        of = definition({"A": (["M", "K"], "float16"), "B": (["N", "K"], "float16")}, {"N": 64, "K": 1024})
        made = make(of, {"M": 32})

        c = tensor(made, "A").double() @ tensor(made, "B").double().T

        assert 0.9 < c.std() < 1.1

    def test_a_b_of_another_rank_is_no_gemm_weight(self) -> None:
        of = definition({"B": (["batch", "n", "k"], "float32")}, {"n": 8, "k": 64})

        assert 0.9 < tensor(make(of, {"batch": 4}), "B").std() < 1.1

    def test_a_scalar_is_the_workloads(self) -> None:
        made = paged(4, {"batch_size": 1, "num_kv_indices": 1, "num_pages": 1})

        assert made.tensors["sm_scale"] == 0.125
        assert list(made.tensors) == list(attention(prefill=False).inputs)

    @pytest.mark.parametrize("shape", [[], ["zero"], ["zero", "n"]])
    def test_a_tensor_may_hold_one_number_or_none(self, shape: list[str]) -> None:
        of = definition({"x": (shape, "float32")}, {"n": 8})

        made = make(of, {"zero": 0} if "zero" in shape else {})

        assert tensor(made, "x").numel() == (0 if shape else 1)


class TestWeights:
    def test_are_drawn_once_for_all_sizes(self) -> None:
        first, second = make(NORM, {"batch": 2}), make(NORM, {"batch": 3})

        assert first.tensors["weight"] is second.tensors["weight"]

    def test_kept_or_drawn_they_are_the_same(self) -> None:
        make(NORM, {"batch": 5})
        kept = make(NORM, {"batch": 2})
        module._kept.clear()
        fresh = make(NORM, {"batch": 2})

        assert kept.tensors["weight"] is not fresh.tensors["weight"]
        assert torch.equal(tensor(kept, "weight"), tensor(fresh, "weight"))
        assert kept.hash == fresh.hash

    def test_go_when_another_definition_comes_even_one_without(self) -> None:
        make(NORM, {"batch": 2})

        make(definition({"x": (["batch"], "float32")}, name="other"), {"batch": 2})

        assert not module._kept

    def test_go_when_another_seed_comes(self) -> None:
        for seed in range(3):
            make(NORM, {"batch": 2}, seed=seed)

        assert len(module._kept) == 1

    def test_can_be_of_another_seed_than_the_rest(self) -> None:
        made = [make_inputs(NORM, workload(NORM, {"batch": 2}), seed, "cpu", None, 40) for seed in (41, 42)]

        assert made[0].tensors["weight"] is made[1].tensors["weight"]
        assert not torch.equal(*(tensor(each, "x") for each in made))
        assert torch.equal(tensor(made[0], "weight"), tensor(make(NORM, {"batch": 2}, seed=40), "weight"))

    def test_another_definition_of_the_same_name_has_its_own(self) -> None:
        wider = definition({"x": (["batch", "n"], "bfloat16"), "weight": (["n"], "bfloat16")}, {"n": 16})
        make(NORM, {"batch": 2})

        assert tensor(make(wider, {"batch": 2}), "weight").shape == (16,)

    def test_another_seed_has_its_own(self) -> None:
        assert not torch.equal(
            tensor(make(NORM, {"batch": 2}), "weight"), tensor(make(NORM, {"batch": 2}, seed=1), "weight")
        )


class TestLargeWeights:
    LARGE = definition({"x": (["m", "k"], "float16"), "w": (["n", "k"], "float16")}, {"n": 40, "k": 8})

    @pytest.fixture(autouse=True)
    def _period(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plain, "PERIOD", 97)

    def test_repeat_their_first_numbers_and_no_row(self) -> None:
        w = tensor(make(self.LARGE, {"m": 1}), "w")

        assert torch.equal(w.flatten()[97 : 2 * 97], w.flatten()[:97])
        assert torch.equal(w.flatten()[3 * 97 :], w.flatten()[: 320 - 3 * 97])
        assert len({tuple(row.tolist()) for row in w}) == 40

    def test_are_hashed_with_their_shape(self) -> None:
        wider = definition({"x": (["m", "k"], "float16"), "w": (["n", "k"], "float16")}, {"n": 80, "k": 8})

        assert make(self.LARGE, {"m": 1}).hash != make(wider, {"m": 1}).hash

    def test_what_grows_with_the_workload_is_drawn_whole(self) -> None:
        x = tensor(make(self.LARGE, {"m": 40}), "x").flatten()

        assert not torch.equal(x[97 : 2 * 97], x[:97])


@st.composite
def paged_axes(draw: st.DrawFn, *, prefill: bool) -> dict[str, int]:
    batch_size = draw(st.integers(1, 6))
    axes = {"batch_size": batch_size, "num_kv_indices": draw(st.integers(0, 20))}
    axes["num_pages"] = draw(st.integers(1, 25))
    return axes | ({"total_q": draw(st.integers(0, 40))} if prefill else {})


class TestPages:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(paged_axes(prefill=True), st.sampled_from([1, 3, 4]), st.uuids())
    def test_every_invariant_at_any_size(self, axes: dict[str, int], page_size: int, uuid: Any) -> None:
        made = paged(page_size, axes, str(uuid))
        qo_indptr, kv_indptr = tensor(made, "qo_indptr"), tensor(made, "kv_indptr")
        indices, last = tensor(made, "kv_indices"), tensor(made, "kv_last_page_len")

        for indptr, total in ((qo_indptr, axes["total_q"]), (kv_indptr, axes["num_kv_indices"])):
            assert (indptr.dtype, len(indptr)) == (torch.int32, axes["batch_size"] + 1)
            assert (int(indptr[0]), int(indptr[-1])) == (0, total)
            assert (indptr.diff() >= 0).all()
        assert ((indices >= 0) & (indices < axes["num_pages"])).all()
        if axes["num_kv_indices"] <= axes["num_pages"]:
            assert len(set(indices.tolist())) == len(indices)
        assert torch.equal(last == 0, kv_indptr.diff() == 0)
        assert (last <= page_size).all()
        wanted = (qo_indptr.diff() + page_size - 1) // page_size
        if wanted.sum() <= axes["num_kv_indices"]:
            lengths = torch.tensor(kv_lengths(made, page_size))
            assert (lengths >= qo_indptr.diff()).all(), "the normal case is normal: no query without its own key"
        check_slots(made, page_size)

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(paged_axes(prefill=False), st.sampled_from([1, 4]))
    def test_decode(self, axes: dict[str, int], page_size: int) -> None:
        made = paged(page_size, axes)

        check_slots(made, page_size)

    def test_chance_gives_every_kind_of_batch(self) -> None:
        axes = {"batch_size": 3, "num_kv_indices": 6, "num_pages": 9, "total_q": 5}
        made = [paged(4, axes, f"w{i}") for i in range(60)]
        pages = [tensor(each, "kv_indptr").diff().tolist() for each in made]
        last = [length for each in made for length in tensor(each, "kv_last_page_len").tolist()]

        assert {0, 1, 2, 3, 4} <= {count for counts in pages for count in counts}
        assert set(last) == {0, 1, 2, 3, 4}
        assert any(tensor(each, "kv_indices").tolist() != sorted(tensor(each, "kv_indices").tolist()) for each in made)

    def test_queries_beyond_the_keys_appear_where_pages_are_too_few(self) -> None:
        made = paged(4, {"batch_size": 2, "num_kv_indices": 2, "num_pages": 2, "total_q": 100})

        assert sum(kv_lengths(made, 4)) < 100

    def test_pages_are_shared_where_there_are_too_few_of_them(self) -> None:
        shared_tails = 0
        for i in range(30):
            made = paged(4, {"batch_size": 4, "num_kv_indices": 12, "num_pages": 3}, f"w{i}")
            check_slots(made, 4)
            ends = tensor(made, "kv_indptr")[1:].tolist()
            tails = {end - 1 for end, last in zip(ends, tensor(made, "kv_last_page_len").tolist(), strict=True) if last}
            pages = tensor(made, "kv_indices").tolist()
            shared_tails += any(pages[tail] == pages[i] for tail in tails for i in range(12) if i not in tails)

        assert shared_tails, "no last page was an inner page of another sequence: the case was not tried"

    @pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3fn", "float8_e5m2"])
    def test_in_any_float(self, dtype: str) -> None:
        made = paged(4, {"batch_size": 3, "num_kv_indices": 5, "num_pages": 8}, dtype=dtype)

        assert tensor(made, "k_cache").dtype == getattr(torch, dtype)
        check_slots(made, 4)

    def test_keys_and_values_differ(self) -> None:
        made = paged(1, {"batch_size": 1, "num_kv_indices": 4, "num_pages": 4})

        assert not torch.equal(tensor(made, "k_cache"), tensor(made, "v_cache"))

    def test_the_nan_in_between_costs_neither_drawing_nor_hash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[int] = []
        draws = normal.draws

        def counted(count: int, generator: torch.Generator) -> torch.Tensor:
            drawn.append(count)
            return draws(count, generator)

        monkeypatch.setattr(normal, "draws", counted)
        made = paged(64, {"batch_size": 1, "num_kv_indices": 1, "num_pages": 50_000})

        assert tensor(made, "k_cache").numel() == 50_000 * 64 * 3
        assert max(drawn) <= 64 * 3

    def test_ragged_sequences_have_tokens_for_pages(self) -> None:
        of = definition(
            {
                "q": (["total_q", "d"], "float32"),
                "k": (["total_kv", "d"], "float32"),
                "qo_indptr": (["len_indptr"], "int32"),
                "kv_indptr": (["len_indptr"], "int32"),
            },
            {"d": 4},
            ("total_kv == kv_indptr[-1].item()",),
        )
        made = make(of, {"total_q": 20, "total_kv": 30, "len_indptr": 5})

        assert (tensor(made, "kv_indptr").diff() >= tensor(made, "qo_indptr").diff()).all()


def check_slots(made: Inputs, page_size: int) -> None:
    """Used slots are finite and all others NaN, in both caches."""
    used = used_by_hand(made, page_size)
    for name in ("k_cache", "v_cache"):
        cache = tensor(made, name).double()
        finite, nan = cache.isfinite().flatten(2), cache.isnan().flatten(2)
        assert {(page, place) for page, place in finite.all(2).nonzero().tolist()} == used
        assert int(nan.all(2).sum()) == math.prod(cache.shape[:2]) - len(used)


class TestContradictions:
    """Each names the input or the constraint, and what it found."""

    @pytest.mark.parametrize(
        ("axes", "message"),
        [
            pytest.param(
                {"batch_size": 3, "len_indptr": 3, "num_kv_indices": 5, "num_pages": 9},
                "constraints: 'len_indptr == batch_size + 1' does not hold: len_indptr = 3, batch_size = 3",
                id="axes alone",
            ),
            pytest.param(
                {"batch_size": 0, "len_indptr": 1, "num_kv_indices": 5, "num_pages": 9},
                "'num_kv_indices == kv_indptr[-1].item()' does not hold: num_kv_indices = 5, kv_indptr = [0]",
                id="an axis and a tensor",
            ),
            pytest.param(
                {"batch_size": 1, "len_indptr": 2, "num_kv_indices": 5, "num_pages": 0},
                "inputs.kv_indices: has 5 entries, but num_pages is 0",
                id="no page to name",
            ),
            pytest.param(
                {"batch_size": 1, "len_indptr": 2, "num_kv_indices": 5}, "axes.num_pages: has no value", id="open axis"
            ),
        ],
    )
    def test_of_axes(self, axes: dict[str, int], message: str) -> None:
        with pytest.raises(DefinitionError) as caught:
            make(attention(prefill=False), axes, SCALE)

        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("constraint", "message"),
        [
            pytest.param("x.shape[0] == 3", "'x.shape[0] == 3' does not hold: x = [", id="a drawn tensor"),
            pytest.param("all(s > batch for s in x.shape)", "does not hold: batch = 2, x = [", id="a comprehension"),
            pytest.param("x.size == missing", "cannot be evaluated: NameError", id="an unknown name"),
            pytest.param("open('x')", "cannot be evaluated: NameError: name 'open'", id="no builtins but a few"),
        ],
    )
    def test_of_constraints(self, constraint: str, message: str) -> None:
        of = definition({"x": (["batch"], "float32")}, constraints=("batch == 2", constraint))

        with pytest.raises(DefinitionError) as caught:
            make(of, {"batch": 2})

        assert message in str(caught.value)

    def test_constraints_that_hold_are_silent(self) -> None:
        constraints = ("batch >= 2", "x.shape[0] == batch", "len(x) == min(batch, 7)")

        make(definition({"x": (["batch"], "float32")}, constraints=constraints), {"batch": 2})

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            pytest.param({"topk_ids": (["n"], "int32")}, "inputs.topk_ids: is random torch.int32", id="an int"),
            pytest.param({"n": (None, "float32")}, "inputs.n: is a scalar that the workload does not", id="a scalar"),
            pytest.param({"x": (["n"], "float4_e2m1")}, "inputs.x: is float4_e2m1, which this torch", id="a dtype"),
            pytest.param(
                {"kv_indices": (["n"], "int32")}, "is made from the axis num_pages, which the definition", id="an axis"
            ),
            pytest.param(
                {"k_cache": (["num_pages", "page_size"], "float32")},
                "inputs.k_cache: is made from kv_indices, which the definition does not have",
                id="an input",
            ),
        ],
    )
    def test_of_what_nothing_says_how_to_draw(self, inputs: dict[str, Any], message: str) -> None:
        of = definition(inputs, {"n": 4, "page_size": 4})

        with pytest.raises(DefinitionError) as caught:
            make(of, {"num_pages": 3} if "k_cache" in inputs else {})

        assert message in str(caught.value)

    def test_a_tensor_is_no_scalar(self) -> None:
        with pytest.raises(DefinitionError, match=r"inputs.weight: is given as scalar 2"):
            make(NORM, {"batch": 1}, {"weight": InputSpec("scalar", 2)})


class TestFiles:
    def read(self, root: Path | None, path: str | None = "blob/x.safetensors", key: str | None = "k") -> torch.Tensor:
        given = {"x": InputSpec("safetensors", path=path, tensor_key=key)}
        return tensor(make_inputs(NORM, workload(NORM, {"batch": 3}, given), 0, "cpu", root), "x")

    def save(self, root: Path, x: torch.Tensor) -> None:
        (root / "blob").mkdir()
        save_file({"k": x}, root / "blob" / "x.safetensors")

    def test_hold_the_tensor_as_it_is(self, tmp_path: Path) -> None:
        x = torch.arange(24).reshape(3, 8).bfloat16()
        self.save(tmp_path, x)

        assert torch.equal(self.read(tmp_path), x)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            pytest.param(torch.zeros(3, 9).bfloat16(), "is [3, 9], but should be [3, 8]", id="shape"),
            pytest.param(torch.zeros(3, 8), "is torch.float32, but should be torch.bfloat16", id="dtype"),
        ],
    )
    def test_that_do_not_fit(self, tmp_path: Path, x: torch.Tensor, message: str) -> None:
        self.save(tmp_path, x)

        with pytest.raises(DefinitionError) as caught:
            self.read(tmp_path)

        assert f"of 'k' in {tmp_path / 'blob/x.safetensors'} {message}" in str(caught.value)
        assert caught.value.field == "inputs.x"

    def test_that_are_not_there(self, tmp_path: Path) -> None:
        self.save(tmp_path, torch.zeros(3, 8).bfloat16())

        with pytest.raises(DefinitionError, match=r"cannot be read from .*x.safetensors, key 'other'"):
            self.read(tmp_path, key="other")
        with pytest.raises(DefinitionError, match=r"cannot be read from .*y.safetensors, key 'k'"):
            self.read(tmp_path, path="y.safetensors")
        with pytest.raises(DefinitionError, match="both should be given"):
            self.read(None)

    def test_that_are_no_safetensors(self, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_text("{}")

        with pytest.raises(DefinitionError, match="cannot be read from"):
            self.read(tmp_path, path="x.safetensors")

    def paged(self, root: Path, axes: Axes, **given: list[int]) -> Inputs:
        """Decode over pages of 4 tokens, with some inputs read from a file."""
        save_file({name: torch.tensor(value, dtype=torch.int32) for name, value in given.items()}, root / "x")
        of = attention(prefill=False)
        specs = {name: InputSpec("safetensors", path="x", tensor_key=name) for name in given}
        return make_inputs(of, workload(of, axes, {**SCALE, **specs}), 0, "cpu", root)

    def test_that_name_a_page_that_is_not_there(self, tmp_path: Path) -> None:
        axes = {"batch_size": 1, "len_indptr": 2, "num_kv_indices": 2, "num_pages": 9}

        with pytest.raises(DefinitionError, match=r"inputs.kv_indices: names a page outside \[0, 9\)"):
            self.paged(tmp_path, axes, kv_indices=[1, 9])

    def test_that_break_a_constraint_are_told_before_a_builder_stumbles(self, tmp_path: Path) -> None:
        axes = {"batch_size": 1, "len_indptr": 2, "num_kv_indices": 2, "num_pages": 9}

        with pytest.raises(DefinitionError, match=r"does not hold: num_kv_indices = 2, kv_indptr = \[0, 7\]"):
            self.paged(tmp_path, axes, kv_indptr=[0, 7])

    def test_a_cache_is_hashed_with_its_shape_and_numbers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        axes = {"batch_size": 1, "len_indptr": 2, "num_kv_indices": 2, "num_pages": 9}
        numbers = module.Drawing.numbers

        def zeroed(drawing: module.Drawing, name: str, *args: Any, **options: Any) -> Iterator[torch.Tensor]:
            for part in numbers(drawing, name, *args, **options):
                yield part * (name != "k_cache")

        hashes = [self.paged(tmp_path, {**axes, "num_pages": n}, kv_indices=[1, 3]).hash for n in (9, 10)]
        monkeypatch.setattr(module.Drawing, "numbers", zeroed)
        hashes.append(self.paged(tmp_path, axes, kv_indices=[1, 3]).hash)

        assert len(set(hashes)) == 3
