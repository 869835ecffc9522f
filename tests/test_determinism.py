"""Determinism: what gives other bits for equal inputs is named, by side and by how much, and never becomes green."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peak_memory import peak_bytes

from refgrid.dataset.case import Case
from refgrid.dataset.definition import load_dataset
from refgrid.proving import outputs
from refgrid.proving.determinism import BATCHED
from refgrid.proving.finding import Finding
from refgrid.proving.outputs import same_bits
from refgrid.proving.proof import Prover
from refgrid.proving.settings import read_settings
from refgrid.proving.unwritten import Unwritten, holds_filling
from refgrid.proving.workbench import Workbench, _clone_beside
from refgrid.records.record import Verdict
from refgrid.sources import Sources

Truth = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
SINCE_2_9 = pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
COUNT = "run.calls = getattr(run, 'calls', 0) + 1"
WRITTEN = "lambda x: torch.empty_like(x).copy_(x * 2)"


def twice(x: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {"y": x * 2}


@pytest.fixture
def finds(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> Callable[..., Finding]:
    """The finding of one check of a reference, given as the body of `run(x)`, of three rows and four columns."""

    def prove(body: str, check: Any = "determinism", truth: Truth = twice, op: str = "double") -> None:
        text = "import torch\n\ndef run(x):\n    " + body.replace("\n", "\n    ") + "\n"
        write_definition({**double, "reference": text}, 3)
        table = (SimpleNamespace(name="kernel", ops=(op,)),)
        sources = Sources((SimpleNamespace(SOURCES=table, adapter=lambda *_: truth),))
        source = "kernel" if check == "numerics" else None
        Prover(load_dataset(tmp_path), sources, "cpu").prove(Case("double_n4", "double", op, "b3", check, source))

    def find(*arguments: Any, **named: Any) -> Finding:
        with pytest.raises(Finding) as caught:
            prove(*arguments, **named)
        return caught.value

    find.prove = prove  # type: ignore[attr-defined]
    return find


@pytest.fixture
def write_once(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> Callable[[Any], object]:
    """Proves one check after the other in one process, of a reference that changes a setting as it is read."""
    text = "import torch\n\ntorch.set_default_dtype(torch.float64)\n\ndef run(x):\n    return x * 2\n"
    write_definition({**double, "reference": text}, 3)
    prover = Prover(load_dataset(tmp_path), Sources(()), "cpu")
    return lambda check: prover.prove(Case("double_n4", "double", "double", "b3", check, None))


class TestOfTheReference:
    def test_a_counter_is_found_and_told_by_how_much(self, finds: Any) -> None:
        found = finds(f"{COUNT}\nreturn x * 2 + (run.calls - 1) * 0.5")

        assert found.verdict is Verdict.NONDETERMINISTIC
        told = "y differs between two runs of the reference on equal inputs in 12 of 12 elements, by up to 0.5"
        assert found.reason == told

    def test_another_sign_of_zero_is_another_bit(self, finds: Any) -> None:
        found = finds(f"{COUNT}\nreturn torch.zeros_like(x) * (1 if run.calls > 1 else -1)")

        assert "in 12 of 12 elements, by up to 0" in found.reason

    def test_another_shape_is_no_crash_of_the_check(self, finds: Any) -> None:
        found = finds(f"{COUNT}\nreturn x * 2 if run.calls == 1 else x[:1] * 2")

        assert "in 12 of 12 elements, by up to inf" in found.reason

    def test_inputs_lie_at_other_addresses_the_second_time(self, finds: Any) -> None:
        body = "run.at = getattr(run, 'at', 0) or x.data_ptr()\nreturn x * 2 + (x.data_ptr() != run.at)"

        assert finds(body).verdict is Verdict.NONDETERMINISTIC

    @pytest.mark.parametrize(
        "made",
        [
            "torch.empty(x.shape)",
            "torch.empty_like(x)",
            "x.new_empty(x.shape)",
            "torch.empty_strided((3, 4), (1, 3))",
            "x.new_empty_strided((3, 4), (4, 1))",
            "torch.empty_permuted((3, 4), (1, 0))",
            "torch.ops.aten.empty_like(x)",
            "torch.ops.aten.empty.memory_format([3, 4])",
        ],
    )
    def test_memory_that_is_read_before_it_is_written_is_found(self, finds: Any, made: str) -> None:
        """What it holds otherwise is that of the call before, or zeros: `run` makes it zeros, to pass without help."""
        body = f"y = {made}\nif not y.isnan().all(): y.zero_()\ny[1:] = x[1:] * 2\nreturn y"

        found = finds(body)

        assert found.verdict is Verdict.NONDETERMINISTIC
        told = "y differs between two runs of the reference on equal inputs, as it reads memory of torch.empty"
        assert found.reason == f"{told} that it has not written, in 4 of 12 elements, by up to inf"

    @pytest.mark.parametrize("made", ["torch.empty_like(x)", "torch.vmap(torch.empty_like)(x)"])
    def test_memory_that_a_case_before_left_as_it_was_filled_is_found(
        self, finds: Any, made: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first run then finds in it what the second does: their results have the same bits."""
        monkeypatch.setattr(Workbench, "reference", lambda bench, laid: bench.call_reference(laid, memory=Unwritten()))

        found = finds(f"y = {made}\ny[1:] = x[1:] * 2\nreturn y")

        assert found.verdict is Verdict.NONDETERMINISTIC
        assert found.reason.startswith("y differs between two runs of the reference on equal inputs")
        assert found.reason.endswith("in 4 of 12 elements, by up to inf")

    def test_what_equals_that_filling_by_itself_is_a_proof(self, finds: Any) -> None:
        finds.prove("y = x * 2\ny[0].view(torch.int32).fill_(-1)\nreturn y")

    @pytest.mark.parametrize(
        "body",
        [
            "y = torch.empty_like(x)\ny.copy_(x * 2)\nreturn y",
            "return torch.vmap(lambda row: torch.empty_like(row).copy_(row * 2))(x)",
            "return torch.func.grad(lambda x: torch.empty_like(x).fill_(2).mul(x).sum())(x) * x",
            "torch.empty_like(x.to_sparse())\nreturn x * 2",
            f"return torch.func.functionalize({WRITTEN})(x)",
            f"return torch.compile({WRITTEN}, backend='eager', fullgraph=True)(x)",
            f"from torch.fx.experimental.proxy_tensor import make_fx\nreturn make_fx({WRITTEN})(x)(x)",
            "return torch.cond(torch.tensor(True), lambda x: x * 2, lambda x: x * 3, (x,))",
        ],
    )
    def test_memory_that_is_written_first_is_a_proof(self, finds: Any, body: str) -> None:
        finds.prove(body)

    def test_a_failure_for_what_fresh_memory_holds_is_told_as_one(self, finds: Any) -> None:
        """`run` makes it zeros where nobody helps, as a process's first memory is."""
        at = "at = torch.empty(1, dtype=torch.int64)\nif run.calls != 2: at.zero_()\nassert at >= 0, 'a page below 0'"
        found = finds(f"{COUNT}\n{at}\nreturn x * 2")

        assert found.verdict is Verdict.NONDETERMINISTIC
        told = "the reference fails where memory of torch.empty holds nan and -1"
        assert found.reason == f"{told}: AssertionError: a page below 0"

    def test_a_failure_for_zeros_in_fresh_memory_is_told_as_one(self, finds: Any) -> None:
        """A result that holds nan is computed in memory of zeros, too: the third run."""
        fails = "assert run.calls != 3 or torch.empty(1) != 0, 'a norm of 0'"

        found = finds(f"{COUNT}\n{fails}\ny = x * 2\ny[0] = torch.nan\nreturn y")

        assert found.verdict is Verdict.NONDETERMINISTIC
        assert (
            found.reason == "the reference fails where memory of torch.empty holds zeros: AssertionError: a norm of 0"
        )

    def test_a_failure_of_the_second_run_for_any_other_reason_stays_one(self, finds: Any) -> None:
        body = f"{COUNT}\nif run.calls > 1: raise KeyError('k')\nreturn x * 2"

        with pytest.raises(KeyError, match="k"):
            finds.prove(body)

    def test_a_result_in_memory_of_an_earlier_one_is_found(self, finds: Any) -> None:
        """Its bits equal those of the earlier result whatever it writes: they are the same."""
        static = "run.kept = getattr(run, 'kept', None)\nif run.kept is None: run.kept = torch.zeros_like(x)\n"
        found = finds(f"{static}{COUNT}\nrun.kept.copy_(x * 2 + run.calls)\nreturn run.kept[:]")

        assert found.verdict is Verdict.ERROR
        told = "reference: y lies in memory that reference gave before, whose result is overwritten by it"
        assert found.reason == f"{told}; each call must give memory of its own"

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ("torch.set_default_dtype(torch.float64)", "torch.get_default_dtype() from torch.float32 to torch.float64"),
            ("torch.set_grad_enabled(False)", "torch.is_grad_enabled() from True to False"),
            ("torch.set_num_threads(torch.get_num_threads() + 1)", "torch.get_num_threads() from "),
            (
                "torch.use_deterministic_algorithms(True)",
                "torch.are_deterministic_algorithms_enabled() from False to True",
            ),
            ("torch.set_float32_matmul_precision('medium')", "precision"),
            ("torch.backends.cuda.matmul.allow_tf32 = True", "precision"),
            pytest.param(
                "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
                "torch.backends.mkldnn.matmul.fp32_precision from none to bf16",
                marks=SINCE_2_9,
            ),
            pytest.param(
                "torch.backends.fp32_precision = 'tf32'",
                "torch.backends.fp32_precision from none to tf32",
                marks=SINCE_2_9,
            ),
            (
                "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False",
                "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction from True to False",
            ),
            (
                "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False",
                "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction from True to False",
            ),
            ("torch.backends.cudnn.allow_tf32 = False", "torch.backends.cudnn.allow_tf32 from True to False"),
        ],
    )
    def test_a_setting_of_torch_that_is_changed_for_all_is_an_error_and_put_back(
        self, finds: Any, change: str, told: str
    ) -> None:
        """Later cases of the process would be computed otherwise, and so would the truths of this one."""
        before = read_settings()

        found = finds(f"{change}\nreturn x * 2")

        assert found.verdict is Verdict.ERROR
        assert found.reason.startswith("reference changed torch.")
        assert told in found.reason
        assert read_settings() == before

        with pytest.raises(KeyError, match="k"):
            finds.prove(f"{change}\nraise KeyError('k')")
        assert read_settings() == before

    def test_a_setting_that_is_changed_where_the_reference_is_read_makes_every_case_one(self, write_once: Any) -> None:
        for check in ("shape", "dtype", "determinism"):
            with pytest.raises(Finding, match=r"reference changed torch\.get_default_dtype\(\)"):
                write_once(check)

    def test_a_setting_that_is_changed_for_a_while_is_the_references_own(self, finds: Any) -> None:
        finds.prove("with torch.no_grad():\n    return x * 2")

    def test_equal_bits_each_time_are_a_proof(self, finds: Any) -> None:
        finds.prove("return x * 2")
        finds.prove("return x * float('nan')")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_nan_is_left_where_an_input_of_the_same_shape_holds_it(dtype: torch.dtype) -> None:
    """As the pool of states, whose slots that no sequence names stay as they are."""
    pool = torch.arange(6.0).reshape(2, 3).to(dtype)
    if dtype.is_floating_point:
        pool[1, 2] = torch.nan
    inputs = {"scale": 1.0, "pool": pool, "row": pool[1]}

    assert outputs.nan_alike("pool", pool, pool, inputs) == ""
    assert outputs.nan_alike("pool", pool.float(), pool.float() + 1, inputs) == ""
    other = torch.tensor([[torch.nan, 1, 2], [3, 4, torch.nan]])
    places = 1 if dtype.is_floating_point else 2
    told = outputs.nan_alike("pool", other, other, inputs)
    assert told == f"pool is nan on both sides at [0, 0] and {places} places in all"
    assert outputs.nan_alike("pool", other, torch.zeros(2, 3), inputs) == "", "which is a mismatch by itself"


def test_nan_on_both_sides_is_told_in_little_memory() -> None:
    """Its places, each of as many numbers as there are axes, takes sixteen times the output."""
    one = torch.full((2, 64, 8, 128), torch.nan, dtype=torch.bfloat16)
    other = one.clone()

    assert peak_bytes(lambda: outputs.nan_alike("y", one, other, {})) < 2 * one.nbytes


def test_a_view_of_an_input_that_all_calls_share_is_nobodys() -> None:
    weight, buffer = torch.zeros(3, 4), torch.zeros(3)
    held = {"reference": {"wt": weight.t(), "y": buffer}}

    outputs.demand_own_memory("kernel", {"wt": weight[1:]}, held, [weight])
    with pytest.raises(Finding, match="kernel: y lies in memory that reference gave before"):
        outputs.demand_own_memory("kernel", {"y": buffer}, held, [weight])


def test_memory_of_empty_results_and_of_nobody_is_nobodys() -> None:
    none, some = torch.empty(0), torch.zeros(3)
    outputs.demand_own_memory("kernel", {"a": none, "b": some}, {"reference": {"a": none}, "other": {}})
    with pytest.raises(Finding, match="kernel: b lies in memory that other gave before"):
        outputs.demand_own_memory("kernel", {"b": some[1:]}, {"other": {"y": some[:1]}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.int32, torch.bool])
def test_fresh_memory_is_filled_only_where_nothing_else_is(dtype: torch.dtype) -> None:
    zeros = torch.zeros(2, dtype=dtype)
    with Unwritten():
        made = torch.empty(2, dtype=dtype)
        others = [torch.zeros(2, dtype=dtype), torch.empty(0, dtype=dtype), torch.empty(2, out=zeros, dtype=dtype)]
        torch.empty(2, dtype=dtype, device="meta")

    assert (made.float().isnan() | (made.float() == -1) | (made.float() == 1)).all()
    assert not others[0].float().any()
    assert not zeros.float().any()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int32, torch.uint8, torch.bool]
)
def test_what_fresh_memory_is_filled_with_is_known_again_and_zeros_are_other_numbers(dtype: torch.dtype) -> None:
    with Unwritten():
        ones = torch.empty(2, 3, dtype=dtype)
    with Unwritten(zeros=True):
        zeros = torch.empty(2, 3, dtype=dtype)
    last = zeros.clone()
    last[1, 2] = ones[1, 2]

    assert holds_filling(ones)
    assert holds_filling(last.t())
    assert not holds_filling(zeros)
    assert not holds_filling(ones[:0])
    assert not zeros.float().any()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.int32, torch.uint8, torch.bool])
def test_fresh_memory_of_rows_of_vmap_is_filled_as_any_other(dtype: torch.dtype, zeros: bool) -> None:
    def fresh(row: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(row, dtype=dtype)

    with Unwritten(zeros):
        made, rows = fresh(torch.zeros(3, 4)), torch.vmap(fresh)(torch.zeros(3, 4))

    torch.testing.assert_close(rows, made, equal_nan=True)
    assert not rows.any() if zeros else rows.isnan().all() or (rows == torch.tensor(-1).to(dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (2000,)])
def test_a_clone_beside_has_the_same_bits_at_another_aligned_address(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    value = torch.randn(shape).mul(9).to(dtype)
    first = _clone_beside(value, 0)

    second = _clone_beside(value, first.data_ptr())

    assert same_bits(second, value)
    assert second.data_ptr() != first.data_ptr() or not value.numel()
    assert second.data_ptr() % 64 == 0 or not value.numel()


@pytest.mark.parametrize("length", [0, 1, 4, 7, 8])
def test_bits_are_compared_a_few_at_a_time(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 10 GiB would take as much again, beside other workers on the GPU."""
    seen: list[int] = []

    def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
        seen.append(len(one))
        return bool((one == other).all())

    monkeypatch.setattr(outputs, "_COMPARED", 4)
    monkeypatch.setattr(torch, "equal", equal)
    value = torch.arange(length, dtype=torch.uint8)

    assert same_bits(value, value.clone())
    assert max(seen) <= 4
    assert sum(seen) == length
    for place in range(length):
        changed = value.clone()
        changed[place] += 1
        assert not same_bits(value, changed)


class TestOfRows:
    """A row's result must not depend on its place or its neighbours, where the op promises it."""

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param("return x * 2 + torch.arange(len(x))[:, None] * 1e-6", id="place"),
            pytest.param("return x * 2 + x.mean() * 1e-6", id="neighbours"),
            pytest.param("y = x * 2\ny[-1] += 1e-6\nreturn y", id="last"),
        ],
    )
    def test_a_dependence_is_found_where_the_op_promises_none(self, finds: Any, body: str) -> None:
        found = finds(body, op="rmsnorm")

        assert found.verdict is Verdict.NONDETERMINISTIC
        assert found.reason.startswith(
            "y of a row depends on where in batch_size it stands, or beside which others, in "
        )
        finds.prove(body, op="double")  # which promises nothing

    def test_rows_by_themselves_are_a_proof(self, finds: Any) -> None:
        finds.prove("return x * 2 + x.sum(dim=1, keepdim=True)", op="rmsnorm")

    def test_every_promise_is_of_an_op_and_an_axis_that_exist(self) -> None:
        definitions = load_dataset(Path(__file__).parents[1]).definitions.values()

        for batched in BATCHED:
            of_op = [each for each in definitions if each.name.startswith(f"{batched.op}_")]
            assert of_op
            assert all(batched.axis in (spec.shape or ())[:1] for each in of_op for spec in each.outputs.values())


class TestOfAFailedComparison:
    def test_a_mismatch_that_stays_the_same_is_one(self, finds: Any) -> None:
        found = finds("return x * 3", "numerics")

        assert found.verdict is Verdict.MISMATCH
        assert "second run" not in found.reason

    def test_a_reference_that_is_right_the_next_time_is_not_green(self, finds: Any) -> None:
        found = finds(f"{COUNT}\nreturn x * 2 + (run.calls == 1)", "numerics")

        assert found.verdict is Verdict.NONDETERMINISTIC
        told = "a second run of the reference on equal inputs differs: y in 12 of 12 elements, by up to 1"
        assert "[double_n4, reference against kernel]; " in found.reason
        assert found.reason.endswith(f"; {told}")
        assert found.report.endswith(told)
        assert not found.comparisons[0].matches

    def test_nan_on_both_sides_shows_nothing(self, finds: Any) -> None:
        def half(x: torch.Tensor) -> Mapping[str, torch.Tensor]:
            return {"y": (x * 2).index_fill(1, torch.tensor([2]), torch.nan)}

        found = finds("y = x * 2\ny[:, 2] = float('nan')\nreturn y", "numerics", truth=half)

        assert found.verdict is Verdict.MISMATCH
        told = "y is nan on both sides at [0, 2] and 3 places in all [double_n4, reference against kernel]"
        assert found.reason == told

    def test_nan_on_both_sides_stays_a_mismatch_though_a_truth_changes_by_less_than_matters(self, finds: Any) -> None:
        calls = []

        def half(x: torch.Tensor) -> Mapping[str, torch.Tensor]:
            calls.append(x)
            return {"y": (x * (2 + len(calls) * 2.0**-22)).index_fill(1, torch.tensor([2]), torch.nan)}

        found = finds("y = x * 2\ny[:, 2] = float('nan')\nreturn y", "numerics", truth=half)

        assert found.verdict is Verdict.MISMATCH
        assert "; a second run of kernel on equal inputs differs: y in 9 of 12 elements, by up to " in found.reason

    def test_a_truth_that_changes_is_named(self, finds: Any) -> None:
        calls = []

        def wild(x: torch.Tensor) -> Mapping[str, torch.Tensor]:
            calls.append(x)
            return {"y": x * 2 + len(calls)}

        found = finds("return x * 2", "numerics", truth=wild)

        assert found.verdict is Verdict.NONDETERMINISTIC
        assert "a second run of kernel on equal inputs differs: y in 12 of 12 elements, by up to 1" in found.reason
        assert "a second run of the reference" not in found.reason
        assert len(calls) == 2, "once more, and not until it is right"

    def test_a_change_too_small_to_matter_leaves_a_mismatch_and_is_told(self, finds: Any) -> None:
        found = finds(f"{COUNT}\nreturn x * 3 + run.calls * 2.0**-18", "numerics")

        assert found.verdict is Verdict.MISMATCH
        assert "a second run of the reference on equal inputs differs: y in " in found.reason

    def test_a_side_that_fails_the_second_time_leaves_a_mismatch_and_is_told(self, finds: Any) -> None:
        found = finds(f"{COUNT}\nif run.calls > 1: raise KeyError('k')\nreturn x * 3", "numerics")

        assert found.verdict is Verdict.MISMATCH
        assert found.reason.endswith("; the reference could not be repeated: KeyError: 'k'")
