"""What a failure looks like: each transform is told where it was planted, and none where there is only noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refgrid.proving import diagnosis as module
from refgrid.proving.compare import compare
from refgrid.proving.diagnosis import Diagnosis, diagnose, told_of
from refgrid.proving.explanations import LEAST
from refgrid.proving.forms import compare_in_form
from refgrid.proving.tolerance import EXACT, Tolerance, tolerance_for
from refgrid.proving.workbench import Laid

AXES = ("num_tokens", "num_qo_heads", "head_dim")
SHAPE = (12, 8, 16)
Change = Callable[[torch.Tensor], torch.Tensor]


def drawn(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(
    change: Change,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = SHAPE,
    axes: tuple[str, ...] = AXES,
    tolerance: Tolerance | None = None,
) -> Diagnosis:
    """The diagnosis of a fault planted into what should be; both sides are rounded as a reference and a kernel do."""
    right = drawn(shape)
    jitter = drawn(shape, 1) * torch.finfo(torch.float32).eps * right.abs() / 4
    expected, actual = right.to(dtype), change(right + jitter).to(dtype)
    bound = tolerance or tolerance_for("", str(dtype).removeprefix("torch."), "")
    found = compare("output", actual, expected, bound)
    assert not found.matches, "the fault changes nothing"
    return diagnose(found, actual, expected, axes)


def only(place: Any, change: Change) -> Change:
    """The change at some place, all else as it was."""

    def changed(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[place] = change(x[place])
        return y

    return changed


def truncated(x: torch.Tensor) -> torch.Tensor:
    return (x.float().view(torch.int32) & -0x10000).view(torch.float32).double()


def order(*places: int) -> Change:
    return lambda x: x[:, list(places)]


PLANTED = [
    pytest.param(lambda x: x * 1.01, "a factor of 1.01", id="factor"),
    pytest.param(lambda x: x * math.log(2), "a factor of 0.6931, ln 2: base e where base 2 should be", id="base e"),
    pytest.param(lambda x: x / math.log(2), "a factor of 1.443, log2(e): base 2 where base e should be", id="base 2"),
    pytest.param(lambda x: -x, "a flipped sign", id="sign"),
    pytest.param(lambda x: x + 0.5, "a shift of 0.5", id="shift"),
    pytest.param(only((slice(None), 7), lambda x: x * 2), "a factor of 2", id="factor of a head"),
    pytest.param(only((slice(None), slice(None), slice(8, 16)), lambda x: -x), "a flipped sign", id="sign of a half"),
    pytest.param(only(3, torch.zeros_like), "zeros, as where nothing was written", id="unwritten"),
    pytest.param(only(3, lambda x: x * math.nan), "nan at every place", id="nan"),
    pytest.param(only(3, lambda x: torch.full_like(x, -1.5)), "one value at every place, -1.5", id="one value"),
    pytest.param(only(3, lambda x: x / 0), "", id="infinities of both signs"),
    pytest.param(truncated, "truncation to bfloat16", id="truncation"),
    pytest.param(lambda x: x.bfloat16(), "rounding to bfloat16", id="rounding"),
    pytest.param(lambda x: x.half(), "rounding to float16", id="rounding to float16"),
    pytest.param(lambda x: x.roll(1, 0), "num_tokens rotated by +1", id="rotated rows"),
    pytest.param(lambda x: x.roll(-2, 1), "num_qo_heads rotated by -2", id="rotated heads"),
    pytest.param(lambda x: x.flip(1), "num_qo_heads in reverse order", id="reversed"),
    pytest.param(order(0, 1, 5, 3, 4, 2, 6, 7), "num_qo_heads 2 and 5 exchanged", id="exchanged"),
    pytest.param(
        order(0, 2, 4, 6, 1, 3, 5, 7),
        "another order of num_qo_heads: 1 holds what 2 should, 2 holds what 4 should, 3 holds what 6 should, ...",
        id="interleaved",
    ),
    pytest.param(
        order(0, 0, 0, 0, 4, 4, 4, 4), "values of another num_qo_heads: 1 holds what 0 should, 2 holds what 0 should,"
        " 3 holds what 0 should, ...", id="group",
    ),
    pytest.param(lambda x: x[[0, *range(11)]], "num_tokens moved by +1", id="moved"),
    pytest.param(
        lambda x: x.transpose(0, 1).reshape(x.shape), "a transposition of num_tokens and num_qo_heads", id="layout"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), PLANTED)
def test_a_planted_transform_is_told(change: Change, told: str) -> None:
    assert seen(change).explanation == told


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(lambda x: x * 1.25, "a factor of 1.25", id="factor"),
        pytest.param(lambda x: x + 1, "a shift of 1", id="shift"),
        pytest.param(lambda x: x.flip(0), "num_tokens in reverse order", id="order"),
    ],
)
def test_the_rounding_of_a_narrow_dtype_hides_nothing(dtype: torch.dtype, change: Change, told: str) -> None:
    assert seen(change, dtype).explanation.startswith(told)


def test_what_only_whole_rows_show_is_explained_too() -> None:
    found = seen(lambda x: x * 1.008, torch.bfloat16, tolerance=Tolerance(8e-3, 1e-2, row_norm=4e-3))

    assert found.wrong < LEAST
    assert found.explanation.startswith("a factor of 1.0")
    assert "as a whole is off by" in "\n".join(found.lines())


def test_the_order_of_single_numbers_is_told_too() -> None:
    assert seen(lambda x: x.flip(0), shape=(32,), axes=("num_tokens",)).explanation == "num_tokens in reverse order"


def test_an_equal_pair_of_axes_can_be_transposed() -> None:
    found = seen(lambda x: x.mT, shape=(3, 16, 16))

    assert found.explanation == "a transposition of num_qo_heads and head_dim"


def test_rounding_toward_zero_is_told_of_the_dtype_itself() -> None:
    found = seen(truncated, torch.bfloat16, tolerance=EXACT)

    assert found.explanation == "truncation to bfloat16"


def test_infinities_that_agree_do_not_stand_in_the_way() -> None:
    found = seen(lambda x: only(0, lambda row: row * 0 - math.inf)(x.flip(1)), shape=(4, 8), axes=("a", "b"))
    assert found.explanation == ""  # here they do not agree

    right = only(0, lambda row: row * 0 - math.inf)(drawn((4, 8)))
    wrong = right * math.log(2)
    assert diagnose(compare("lse", wrong, right, Tolerance(1e-5, 1e-5)), wrong, right).explanation.endswith(
        "base e where base 2 should be"
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(12, 8, 16), (1, 1, 9), (64, 1, 1), (2, 2, 5), (1, 40, 1)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.03, 0.3, 3.0]),
)
def test_nothing_is_said_of_noise(seed: int, shape: tuple[int, ...], dtype: torch.dtype, size: float) -> None:
    expected = drawn(shape, seed).to(dtype)
    actual = expected + (size * drawn(shape, seed + 1)).to(dtype)
    found = compare("output", actual, expected, tolerance_for("", str(dtype).removeprefix("torch."), ""))
    if found.matches:
        return

    assert diagnose(found, actual, expected, AXES).explanation == ""
    assert diagnose(found, actual, expected, AXES).in_short() == ""


def test_a_transform_of_most_but_not_all_is_not_told() -> None:
    assert seen(only((0, 0, 0), lambda x: x * 7 + 9), shape=SHAPE).explanation == ""
    assert seen(lambda x: only((0, 0, 0), lambda y: y * 7 + 9)(x * 1.5)).explanation == ""


def test_so_few_elements_explain_nothing() -> None:
    assert seen(lambda x: x * 2, shape=(1, 1, 7)).explanation == ""
    assert seen(lambda x: x * 2, shape=(1, 1, 8)).explanation == "a factor of 2"


@pytest.mark.parametrize(
    ("place", "told"),
    [
        pytest.param((slice(None), 7), "all 192 are in num_qo_heads = 7", id="head"),
        pytest.param((5, 7), "all 16 are in num_tokens = 5 and num_qo_heads = 7", id="head of a token"),
        pytest.param((..., slice(8, 16)), "all 768 are in head_dim = 8..15", id="half"),
        pytest.param((..., slice(1, None, 2)), "all 768 are in head_dim = 1, 3, 5 to 15", id="odd"),
        pytest.param((slice(None), [0, 5, 6]), "all 576 are in num_qo_heads = 0, 5, 6", id="some"),
        pytest.param((slice(None), [0, 1, 3, 4, 7]), "", id="many without an order"),
        pytest.param((...,), "", id="all"),
    ],
)
def test_clusters_are_told_by_the_names_of_the_axes(place: Any, told: str) -> None:
    assert seen(only(place, lambda x: x + 1 + x.abs())).clusters == told


def test_a_cluster_with_a_few_strays_is_told_as_such() -> None:
    change = only((0, 0, 0), lambda x: x + 5)
    assert seen(lambda x: change(only((slice(None), 7), lambda y: y * 3)(x))).clusters == (
        "192 of 193 are in num_qo_heads = 7"
    )


def test_the_report_has_counts_places_values_and_what_explains_them() -> None:
    found = seen(only((slice(None), 7), lambda x: x * 2))
    first, clusters, explained, largest, *worst = found.lines()

    assert first == "output: 192 of 1536 elements are outside the tolerance"
    assert clusters == "  all 192 are in num_qo_heads = 7"
    assert explained == "  explained by a factor of 2"
    assert largest.startswith("  largest error ")
    assert len(worst) == 5
    assert worst[0].startswith("    [num_tokens=")
    assert ", num_qo_heads=7, head_dim=" in worst[0]
    assert found.in_short() == "; all of it explained by a factor of 2"


def test_what_is_equal_is_not_among_the_worst() -> None:
    right = drawn((4, 8)).float()
    wrong = only((1, 2), lambda x: x + 1)(only((3, 0), lambda x: x * math.nan)(right))

    lines = diagnose(compare("output", wrong, right, EXACT), wrong, right, ("M", "N")).lines()
    first, second = lines[lines.index(next(line for line in lines if line.endswith("the worst:"))) + 1 :]

    assert first.startswith("    [M=3, N=0] is nan but should be ")
    assert second.startswith("    [M=1, N=2] is ")


def test_the_report_counts_what_is_not_finite() -> None:
    found = seen(only(3, lambda x: x * math.nan))

    assert found.lines()[1] == "  128 of 1536 are nan or infinite on one side alone"
    assert "is nan but should be " in found.lines()[-1]


def test_of_a_large_tensor_a_window_around_the_worst_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 256)
    place = (slice(8, 12), 7)
    found = seen(lambda x: only((9, 7, 3), lambda y: y * 2 + 30)(only(place, lambda x: x * 2)(x)))

    assert (found.looked_at, found.comparison.worst[0].index) == (256, (9, 7, 3))
    assert found.clusters == "all 32 are in num_qo_heads = 7"
    assert found.lines()[0] == "output: 32 of 256 elements around the worst, of 1536 are outside the tolerance"

    found = seen(only(place, lambda x: x * 2))
    assert found.in_short() == "; all of it among 256 elements explained by a factor of 2"


@pytest.mark.parametrize(
    ("shape", "worst", "window"),
    [
        ((4, 5), (3, 4), [(0, 4), (0, 5)]),
        ((100, 16), (99, 0), [(84, 100), (0, 16)]),
        ((100, 16), (0, 15), [(0, 16), (0, 16)]),
        ((2, 1000), (1, 500), [(1, 2), (372, 628)]),
        ((), (), []),
    ],
)
def test_the_window_is_bounded_and_holds_the_worst(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], worst: tuple[int, ...], window: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(module, "_MOST", 256)

    assert [(part.start, part.stop) for part in module._window(shape, worst)] == window


def test_whole_numbers_are_looked_at_too() -> None:
    right = torch.arange(64).reshape(8, 8)
    wrong = right.flip(0)

    assert diagnose(compare("ids", wrong, right, EXACT), wrong, right).explanation == "dim 0 in reverse order"


def _laid(op: str, *axes: str) -> Laid:
    outputs = {"output": SimpleNamespace(shape=axes), "samples": SimpleNamespace(shape=())}
    definition = SimpleNamespace(outputs=outputs, reference="")
    return cast(Laid, SimpleNamespace(op=op, definition=definition))


def test_the_reason_stays_one_line() -> None:
    right, wrong = drawn((4, 8)), drawn((4, 8)) * 3
    found = compare("output", wrong, right, Tolerance(1e-3, 1e-3))

    reason, report = told_of([found], _laid("gemm", "M", "N"), {"output": wrong}, {"output": right})

    assert reason == f"{found.describe()}; all of it explained by a factor of 3"
    assert "\n" not in reason
    assert report.splitlines()[0] == f"output: {report.split()[1]} of 32 elements are outside the tolerance"


def test_what_befalls_those_who_look_closer_does_not_hide_the_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("4 GiB")

    monkeypatch.setattr(module, "diagnose", fails)
    right, wrong = drawn((4, 8)), drawn((4, 8)) * 3
    found = compare("output", wrong, right, EXACT)

    reason, report = told_of([found], _laid("gemm", "M", "N"), {"output": wrong}, {"output": right})

    assert reason == found.describe()
    assert report == "output: could not be looked at: 4 GiB"


def test_draws_that_do_not_follow_their_law_are_told_by_row_and_token() -> None:
    law = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    right, wrong = torch.tensor([0, 1, 2, 0, 0]), torch.tensor([2, 1, 2, 2, 2])
    actual = torch.stack([right, right], dim=1).repeat(100, 1)
    actual[:, 0] = wrong.repeat(100)
    law[1] = torch.tensor([0.6, 0.2, 0.2])
    found = compare_in_form("top_k_sampling_from_probs", "samples", actual, law, EXACT)

    reason, report = told_of([found], _laid("top_k_sampling_from_probs"), {"samples": actual}, {"samples": law})
    lines = report.splitlines()

    assert reason == found.describe()
    assert lines[0].startswith("samples: 500 draws of each of 2 rows, evidence ")
    assert lines[0].endswith(" nats, allowed are 15.2")
    assert lines[1:3] == ["  red by themselves are 1 of 2 rows: 0", "  the worst, of row 0:"]
    assert lines[3] == "    [row=0, token=2] is 0.8 of the draws but should be 0.2 (error 0.6)"
    assert len(lines) == 6


def test_rows_that_are_red_only_together_and_impossible_tokens_are_told() -> None:
    law = torch.tensor([[0.6, 0.4]], dtype=torch.float64).expand(200, 2)
    together = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])[:, None].expand(10, 200).repeat(4, 1)
    never = torch.zeros_like(together)
    never[0, :12] = 7
    together, never = (
        told_of(
            [compare_in_form("top_k_sampling_from_probs", "samples", each, law, EXACT)],
            _laid("top_k_sampling_from_probs"),
            {"samples": each},
            {"samples": law},
        )[1]
        for each in (together, never)
    )

    assert "no row is red by itself, all of them together are" in together
    assert "red by themselves are 12 of 200 rows: 0, 1, 2, 3, 4, 5, 6, 7 and 4 more" in never
    assert never.count("token=7] is 0.025 of the draws but should be 0 ") == 5


@pytest.mark.parametrize(
    ("actual", "lines"),
    [
        (
            [[0, 1], [2, 9]],
            [
                "topk_indices: 1 of 4 places are wrong",
                "  red are 1 of 2 rows: 1",
                "  the worst:",
                "    [row=1, place=1] is 9 but should be in [0, 4), or -1 for none",
            ],
        ),
        (
            [[0, 1], [3, 0]],
            [
                "topk_indices: 1 of 4 ranks are wrong",
                "  red are 1 of 2 rows: 1",
                "  the worst:",
                "    [row=1, rank=1] is of score 1 but should be of 3 (error 2)",
            ],
        ),
    ],
)
def test_choices_are_told_by_row_and_place(actual: list[list[int]], lines: list[str]) -> None:
    chosen, scores = torch.tensor(actual), torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    found = compare_in_form("dsa_topk_indexer_fp8", "topk_indices", chosen, scores, EXACT)

    both = {"topk_indices": chosen}, {"topk_indices": scores}
    assert told_of([found], _laid("dsa_topk_indexer_fp8"), *both)[1].splitlines() == lines
    assert "report" not in found.to_dict()


def test_another_set_of_choices_and_another_law_are_told() -> None:
    one, other = torch.tensor([[0, 1]]), torch.tensor([[0, 5]])
    sets = compare_in_form("dsa_topk_indexer_fp8", "topk_indices", other, one, EXACT)
    laws = compare_in_form("dice_sampling_from_probs", "samples", torch.tensor([[0.5, 0.5]]), torch.ones(1, 2), EXACT)

    assert sets.lines()[-1] == "    [row=0, place=1] is 5 but should be one of those that the other chose for row 0"
    assert laws.lines()[0] == "samples: largest error inf of what is allowed there; the worst:"
    assert laws.lines()[1] == "  [row=0, token=0] is 0.5 but should be 1 (error 0.5)"
