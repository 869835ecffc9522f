"""Random outputs: impossible draws, false alarms, power as stated, and the words of a verdict."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest
import torch

from refgrid.proving import likelihood
from refgrid.proving.compare import Comparison, ComparisonError, EmptyComparison
from refgrid.proving.draws import DrawsComparison, compare_draws, draws_for
from refgrid.proving.tolerance import EXACT, Tolerance

Tensor: TypeAlias = torch.Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(law: Tensor, n: int, seed: int = 0) -> Tensor:
    """n draws of each row, [n, rows]."""
    return torch.multinomial(law.double(), n, replacement=True, generator=generator(seed)).t()


def held(actual: Tensor, expected: Tensor) -> Comparison:
    return compare_draws("samples", actual, expected, EXACT)


def law_of(*rows: list[float]) -> Tensor:
    weights = torch.tensor(rows, dtype=torch.float64)
    return weights / weights.sum(dim=1, keepdim=True)


STEPS = law_of([150.0 - i for i in range(50)] + [0.0] * 50)
MIXED = law_of([3, 2, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [0, 30, 10, 5, 2, 1])


# ---- what is impossible, and what is certain


def test_one_draw_outside_the_support_is_a_mismatch_that_names_it() -> None:
    actual = drawn(MIXED, 100)
    actual[17, 0] = 4

    found = held(actual, MIXED)

    assert not found.matches
    assert (found.worst[0].index, found.worst[0].actual, found.worst[0].expected) == ((0, 4), 0.01, 0)
    assert (found.headroom, found.count) == (math.inf, 400)
    assert found.describe().startswith(
        "samples is token 4 in 0.01 of the draws of row 0 but should be in 0 (100 draws of 4 rows, evidence inf of"
    )


@pytest.mark.parametrize("token", [-1, 6, 2**62, -(2**62)])
def test_a_token_out_of_range_is_a_mismatch(token: int) -> None:
    actual = drawn(MIXED, 100)
    actual[3, 1] = token

    found = held(actual, MIXED)

    assert not found.matches
    assert found.worst[0].index == (1, token)


def test_a_negative_token_is_a_mismatch_against_draws_too() -> None:
    actual, expected = drawn(MIXED, 100), drawn(MIXED, 100, seed=1)
    actual[3, 1] = -1

    assert held(actual, expected).worst[0].index == (1, -1)
    assert not held(actual, expected).matches


def test_a_row_of_one_outcome_is_exact() -> None:
    certain = law_of([0, 1, 0], [0, 0, 1])

    assert held(torch.tensor([[1, 2]]), certain).matches
    assert not held(torch.tensor([[1, 2], [1, 2], [1, 1]]), certain).matches


# ---- false alarms


def nats(draws: Tensor, law: Tensor) -> float:
    return likelihood.mixed(likelihood.evidence_of_law(likelihood.tally(draws), likelihood.right_law(law)))


def every_draw(law: Tensor, n: int) -> list[tuple[Tensor, float]]:
    """All outcomes [n, rows] of n draws of each row, and their probabilities."""
    rows, outcomes = law.shape
    found = []
    for tokens in itertools.product(range(outcomes), repeat=n * rows):
        actual = torch.tensor(tokens).view(n, rows)
        found.append((actual, float(law.gather(1, actual.t()).prod())))
    return [(actual, p) for actual, p in found if p > 0]


@pytest.mark.parametrize(("law", "n"), [(law_of([3, 2, 1]), 5), (law_of([1, 1], [9, 1]), 3), (law_of([5, 1, 0]), 6)])
def test_the_evidence_against_a_law_is_1_on_average_exactly(law: Tensor, n: int) -> None:
    mean = 0.0
    for actual, p in every_draw(law, n):
        mean += p * math.exp(nats(actual, law))

    assert mean == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("law", "n"), [(law_of([3, 2, 1]), 6), (law_of([1, 1], [9, 1]), 5), (law_of([5, 3, 1, 1]), 5)])
@pytest.mark.parametrize("mine", [1, 2, 3])
def test_the_evidence_against_draws_is_at_most_1_on_average(law: Tensor, n: int, mine: int) -> None:
    mean = 0.0
    for both, p in every_draw(law, n):
        mean += p * math.exp(likelihood.mixed(likelihood.evidence_of_draws(likelihood.tally(both[:mine], both[mine:]))))

    assert 0.5 < mean <= 1 + 1e-9


ZIPF = law_of([1 / r for r in range(1, 201)])
FLAT = law_of([1.0] * 50)
NULLS = 10_000


def evidence_of_cases(law: Tensor, draws: Tensor, others: Tensor | None = None) -> Tensor:
    """The evidence, in nats, of as many cases of one row as there are columns: law [1, outcomes], draws [n, cases]."""
    if others is None:
        one, cases = likelihood.right_law(law), draws.shape[1]
        of_row = (one.top.expand(cases), one.likeliest.expand(cases))
        right = likelihood.Right(law.expand(cases, -1), one.tempered.expand(-1, -1, cases), *of_row)
        found = likelihood.evidence_of_law(likelihood.tally(draws), right)
    else:
        found = likelihood.evidence_of_draws(likelihood.tally(draws, others))
    return found.logsumexp(dim=0) - math.log(len(found))


@pytest.mark.parametrize("against", ["law", "draws"])
@pytest.mark.parametrize("n", [16, 65, 400])
@pytest.mark.parametrize("law", [STEPS, ZIPF, FLAT, law_of([2, 1]), law_of([1000, 1])], ids=lambda law: str(law.shape))
def test_no_right_sampler_is_red_in_10000_cases(law: Tensor, n: int, against: str) -> None:
    """And 1 / evidence is a p-value: below a in a share a of all cases at most, five standard errors allowed."""
    right = law.expand(NULLS, -1)
    evidence = evidence_of_cases(law, drawn(right, n), drawn(right, 100, seed=1) if against == "draws" else None)

    assert float(evidence.max()) < likelihood.BOUND
    for a in (0.5, 0.2, 0.05, 0.01, 0.001):
        share = float((evidence >= math.log(1 / a)).double().mean())
        assert share <= a + 5 * math.sqrt(a / NULLS)


def wrong_laws(law: Tensor, times: int) -> Iterator[Tensor]:
    """Each kind of wrong law of the mixture, [times, outcomes]: the same one, or one that is drawn anew."""
    many, favourite = law.expand(times, -1), torch.zeros_like(law).scatter(1, law.argmax(dim=1, keepdim=True), 1)
    yield from (many.pow(exponent) for exponent in likelihood._TEMPERED)
    yield from (many * (1 + (factor - 1) * favourite) for factor in likelihood._FAVOURED)
    for pseudo in likelihood._DIRICHLET:
        yield torch._sample_dirichlet((many * pseudo).contiguous(), generator()).clamp(min=1e-300)


def test_the_rate_of_false_alarms_is_that_of_importance_sampling() -> None:
    """The evidence is a ratio of densities: cases drawn from the wrong laws, weighed by 1 / evidence, give the rate of
    false alarms at any bound, however rare. Where it can be counted the two agree, and it is below every bound.
    """
    law, n, times = law_of([4, 3, 2, 1]), 40, 2000
    wrong = torch.cat([evidence_of_cases(law, drawn(each, n, i)) for i, each in enumerate(wrong_laws(law, times))])
    right = evidence_of_cases(law, drawn(law.expand(100_000, -1), n))

    for bound in (math.log(2), math.log(20), math.log(1000), likelihood.BOUND):
        weights = torch.where(wrong >= bound, (-wrong).exp(), 0.0)
        rate, error = float(weights.mean()), float(weights.std()) / math.sqrt(len(weights))
        counted = float((right >= bound).double().mean())
        assert 0 < rate <= math.exp(-bound)
        assert counted == pytest.approx(rate, abs=5 * (error + math.sqrt(rate / len(right))))


@pytest.mark.parametrize("against", ["law", "draws"])
def test_no_false_alarm_in_500_cases_of_three_rows(against: str) -> None:
    zipf = law_of([1 / r for r in range(1, 201)], [1.0] * 200, [50.0 - i for i in range(50)] + [0.0] * 150)
    for seed in range(500):
        n = (16, 65, 250)[seed % 3]
        found = held(drawn(zipf, n, seed), zipf if against == "law" else drawn(zipf, 100, seed=10_000 + seed))
        assert found.matches, f"seed {seed}: {found.describe()}"


def test_the_rate_is_what_the_bound_means() -> None:
    assert (likelihood.RATE, likelihood.COMPARISONS) == (1e-6, 4)
    draws, law = torch.zeros(200, 1, dtype=torch.int64), law_of([9, 1])

    assert held(draws, law).headroom == pytest.approx(nats(draws, law) / math.log(4e6))


# ---- power


def moved(outcomes: int, distance: float) -> Tensor:
    """Equal weights, a share `distance` of the mass moved from the last half to the first."""
    half = outcomes // 2
    law = torch.full((1, outcomes), 1 / outcomes, dtype=torch.float64)
    law[:, :half] += distance / half
    law[:, outcomes - half :] -= distance / half
    return law


def share_found(actual: Callable[[int], Tensor], expected: Callable[[int], Tensor], times: int = 40) -> float:
    return sum(not held(actual(seed), expected(1000 + seed)).matches for seed in range(times)) / times


@pytest.mark.parametrize(
    ("n", "outcomes"), [(100, 2), (16384, 2), (256, 10), (256, 50), (4096, 50), (1024, 1000), (16384, 20000)]
)
def test_the_stated_distance_from_a_law_is_found(n: int, outcomes: int) -> None:
    distance = math.sqrt((17 + 3 * math.sqrt(outcomes)) / n)
    wrong, right = moved(outcomes, distance), moved(outcomes, 0)

    assert share_found(lambda seed: drawn(wrong, n, seed), lambda _: right) >= 0.9


@pytest.mark.parametrize(("n", "outcomes"), [(160, 2), (16384, 2), (256, 10), (4096, 50), (2048, 1000), (20000, 20000)])
def test_the_stated_distance_from_the_law_of_draws_is_found(n: int, outcomes: int) -> None:
    distance = math.sqrt((27 + 7.5 * math.sqrt(outcomes)) / n)
    wrong, right = moved(outcomes, distance), moved(outcomes, 0)

    assert share_found(lambda seed: drawn(wrong, n, seed), lambda seed: drawn(right, n, seed)) >= 0.9


@pytest.mark.parametrize(("q", "rows"), [(0.33, 1), (0.1, 1), (0.33, 4), (0.05, 4), (0.02, 8)])
def test_an_outcome_that_is_never_drawn_is_found(q: float, rows: int) -> None:
    right = law_of([1 - q, q]).expand(rows, 2)
    n = math.ceil(27 / q / rows)

    assert not held(torch.zeros(n, rows, dtype=torch.int64), right).matches


def test_a_temperature_of_nine_tenths_is_found_and_pooled_over_rows() -> None:
    right = law_of([2.0**-i for i in range(20)]).expand(8, 20)
    wrong = right.pow(1 / 0.9)

    assert share_found(lambda seed: drawn(wrong, 750, seed), lambda _: right) >= 0.9


# ---- power as each comparison tells it


def evidence_in(found: Comparison) -> likelihood.Evidence:
    assert isinstance(found, DrawsComparison)
    return found.evidence


def at_temperature(law: Tensor, temperature: float) -> Tensor:
    weights = law.pow(1 / temperature)
    return weights / weights.sum(dim=1, keepdim=True)


def favoured(law: Tensor, factor: float) -> Tensor:
    """The likeliest token of each row so much likelier, and all scaled to 1."""
    weights = law.scatter(1, law.argmax(dim=1, keepdim=True), law.amax(dim=1, keepdim=True) * factor)
    return weights / weights.sum(dim=1, keepdim=True)


ALTERNATIVES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "temperature_above": at_temperature,
    "temperature_below": at_temperature,
    "likeliest_times": favoured,
}


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize(
    ("law", "n"),
    [(ZIPF, 400), (ZIPF, 4000), (MIXED, 2000), (law_of([2.0**-i for i in range(20)]), 1000), (law_of([9, 1]), 3000)],
    ids=["zipf 400", "zipf 4000", "mixed 2000", "halves 1000", "two 3000"],
)
def test_what_a_comparison_says_it_finds_is_found(law: Tensor, n: int, alternative: str) -> None:
    told = evidence_in(held(drawn(law, n), law))
    wrong = ALTERNATIVES[alternative](law, told.found[alternative])

    assert told.power == 0.9
    assert share_found(lambda seed: drawn(wrong, n, seed), lambda _: law) >= told.power


def test_few_draws_say_that_they_find_nothing() -> None:
    for law, n in ((STEPS, 100), (FLAT, 30), (law_of([0, 1, 0]), 10_000)):
        assert evidence_in(held(drawn(law, n), law)).found == {}


def test_more_draws_find_what_is_nearer() -> None:
    few, many = (evidence_in(held(drawn(ZIPF, n), ZIPF)).found for n in (400, 20_000))

    assert many["temperature_above"] < few["temperature_above"]
    assert many["temperature_below"] > few["temperature_below"]
    assert many["likeliest_times"] < few["likeliest_times"]


def test_draws_of_a_kernel_say_which_distance_they_find() -> None:
    told = evidence_in(held(drawn(FLAT, 4096), drawn(FLAT, 5000, seed=1)))

    assert told.draws == (4096, 5000)
    assert told.found == {"distance": pytest.approx(math.sqrt((27 + 7.5 * math.sqrt(50)) / 4096), abs=1e-4)}
    assert evidence_in(held(drawn(FLAT, 100), drawn(FLAT, 100, seed=1))).found == {}


@pytest.mark.parametrize("percent", [5, 10, 25])
def test_a_sampler_biased_by_a_few_percent_is_caught_by_so_many_draws(percent: int) -> None:
    law, factor = law_of([2, 1, 1]), 1 + percent / 100
    told = ((2**i, likelihood.found_against_law(likelihood.right_law(law), 2**i)) for i in range(6, 22))
    n = next(n for n, found in told if found.get("likeliest_times") == factor)

    assert share_found(lambda seed: drawn(favoured(law, factor), n, seed), lambda _: law) >= 0.9


def test_the_record_carries_what_the_verdict_rests_on() -> None:
    told = json.loads(json.dumps(held(drawn(ZIPF, 4000), ZIPF).to_dict(), allow_nan=False))["evidence"]

    assert (told["draws"], told["rows"], told["rate"], told["power"]) == ([4000], 1, 1e-6, 0.9)
    assert told["nats"] < told["bound"] == pytest.approx(math.log(4e6))
    assert set(told["found"]) == set(ALTERNATIVES)


# ---- faults of samplers, at the sizes at which cases are proven


def broken_law(name: str) -> Tensor:
    """The law that a faulty filter or draw gives, of rows of 2, 4 and 50 tokens."""
    law = law_of([2.0, 1.0] + [0.0] * 98, [8.0, 4.0, 2.0, 1.0] + [0.0] * 96, STEPS[0].tolist())
    least = torch.where(law > 0, law, 2).argmin(dim=1, keepdim=True)
    following = least + 1
    return {
        "crossing token dropped": law.scatter(1, least, 0),
        "one token more": law.scatter(1, following, law.gather(1, least)),
        "temperature of one half": law.square(),
        "not renormalised: the rest goes to the last token": law * 0.7 + 0.3 * (law == law.gather(1, least)),
        "constant": (law == law.amax(dim=1, keepdim=True)).double(),
        "uniform": (law > 0).double(),
        "sound": law,
    }[name]


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("crossing token dropped", 65),
        ("one token more", 65),
        ("temperature of one half", 250),
        ("not renormalised: the rest goes to the last token", 65),
        ("constant", 65),
        ("uniform", 250),
    ],
)
@pytest.mark.parametrize("against", ["law", "draws"])
def test_a_faulty_sampler_is_found(name: str, n: int, against: str) -> None:
    n = n if against == "law" else 500
    sound = broken_law("sound")

    found = share_found(
        lambda seed: drawn(broken_law(name), n, seed),
        lambda seed: sound if against == "law" else drawn(sound, n, seed),
    )

    assert found >= 0.9


def test_a_few_tokens_drawn_too_often_among_many_are_found() -> None:
    right = law_of([1.0] * 1000)
    wrong = law_of([1.5 if i % 2 else 0.5 for i in range(1000)])

    assert share_found(lambda seed: drawn(wrong, 2000, seed), lambda _: right) >= 0.9


def test_one_faulty_row_among_many_is_found_and_named() -> None:
    law = law_of([2.0**-i for i in range(20)]).repeat(64, 1)
    wrong = law.clone()
    wrong[41] = law[41].sqrt() / law[41].sqrt().sum()

    found = held(drawn(wrong, 200), law)

    assert not found.matches
    assert found.worst[0].index[0] == 41
    assert 0 < found.matched_ratio < 1


# ---- numbers and words


def test_the_dropped_token_is_the_one_that_is_named() -> None:
    law = law_of([1, 1, 1], [6, 3, 1])
    wrong = law.clone()
    wrong[1, 1] = 0

    for expected in (law, drawn(law, 300, seed=1)):
        found = held(drawn(wrong, 300), expected)

        assert found.worst[0].index == (1, 1)
        assert found.worst[0].actual == 0
        assert found.worst[0].expected == pytest.approx(0.3, abs=0.1)
        assert "is token 1 in 0 of the draws of row 1 but should be in 0." in found.describe()


def test_a_match_says_what_it_rests_on() -> None:
    told = held(drawn(STEPS, 100), STEPS).describe()

    assert told.startswith("samples match their law (100 draws of 1 rows, evidence -0.")
    assert told.endswith(" of 15.2 nats, false alarms below 1e-06 a case)")


def test_it_survives_a_record() -> None:
    for actual in (drawn(STEPS, 100), drawn(STEPS.square(), 5000), drawn(STEPS, 100) + 90):
        found = held(actual, STEPS)
        told = Comparison.from_dict(found.to_dict())

        assert told.matches is found.matches
        assert told.worst[0].index == found.worst[0].index


def test_tolerances_do_not_apply() -> None:
    wrong = drawn(STEPS.square(), 5000)

    assert not compare_draws("samples", wrong, STEPS, Tolerance(10, 10, 0.01)).matches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_law_may_be_rounded(dtype: torch.dtype) -> None:
    law = law_of([4, 2, 1, 1], [1, 1, 1, 1]).to(dtype)

    assert held(drawn(law, 1000), law).matches


def test_the_dtype_of_draws_does_not_matter() -> None:
    actual = drawn(MIXED, 200)

    assert held(actual.int(), MIXED).headroom == held(actual, MIXED).headroom
    assert held(actual.int(), drawn(MIXED, 100, seed=1)).matches


@pytest.mark.parametrize(
    ("actual", "expected", "words"),
    [
        (drawn(STEPS, 5).float(), STEPS, r"samples is float32 \[5, 1\], but should be whole numbers \[draws, rows\]"),
        (drawn(STEPS, 5)[:, 0], STEPS, r"samples is int64 \[5\], but should be whole numbers"),
        (drawn(STEPS, 5), STEPS[0], r"law of samples is \[100\], but should be \[1, outcomes\]"),
        (drawn(STEPS, 5), STEPS.repeat(2, 1), r"law of samples is \[2, 100\], but should be \[1, outcomes\]"),
        (drawn(STEPS, 5), STEPS * 2, "law of samples in row 0 sums to 2 and holds 0, but should sum to 1"),
        (drawn(STEPS, 5), STEPS * math.nan, "law of samples in row 0 sums to nan"),
        (
            drawn(MIXED, 5),
            MIXED - torch.eye(4, 6).roll(1, 0) * 1e-6,
            "law of samples in row 0 sums to .* and holds -1e-06",
        ),
        (drawn(STEPS, 5), drawn(MIXED, 5), "samples has 1 rows, but should have 4"),
        (drawn(STEPS, 5), drawn(STEPS, 5) - 1000, "law of samples was drawn as -"),
    ],
)
def test_what_cannot_be_compared_is_told(actual: Tensor, expected: Tensor, words: str) -> None:
    with pytest.raises(ComparisonError, match=words):
        held(actual, expected)


def test_no_draw_is_no_match() -> None:
    with pytest.raises(EmptyComparison, match=r"samples has no draw \(shape \[0, 1\]\)"):
        held(drawn(STEPS, 5)[:0], STEPS)


@pytest.mark.parametrize(
    ("rows", "outcomes", "device", "times"),
    [
        (1, 128256, "cpu", 65),
        (8, 262208, "cpu", 16),
        (64, 128256, "cuda", 16),
        (64, 128256, "cuda:3", 16),
        (1, 2, "cpu", 2**22),
        (4, 2, "cuda", 2**20),
        (0, 5, "cpu", 2**23 // 5),
    ],
)
def test_work_is_bounded(rows: int, outcomes: int, device: str, times: int) -> None:
    assert draws_for(rows, outcomes, device) == times
