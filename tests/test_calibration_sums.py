"""Rows over the length of sums in the calibration: as committed, what contradicts them, and how sums are taken."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibrated import besides, dataset, measured
from click.testing import CliRunner

from refgrid.calibration import sums
from refgrid.calibration.growth import AS_HERE, CUT_OFF, ONE_BY_ONE, SUMS, exponent, section, unsound
from refgrid.calibration.rounding import REFERENCE, UNIT
from refgrid.cli import main
from refgrid.environments.measured import measure
from refgrid.sources import Sources

LENGTHS = (256, 1024, 4096)
SIZES: dict[str, Callable[[int], float]] = {
    REFERENCE: lambda _: 0.5 * UNIT["bfloat16"],
    AS_HERE: lambda k: 0.5 * math.sqrt(k) * 2**-24,
    ONE_BY_ONE: lambda k: 0.9 * math.sqrt(k) * 2**-24,
    CUT_OFF: lambda k: 0.01 * k * 2**-24,
}


def record(**changed: Callable[[int], float]) -> dict[str, Any]:
    """A sound record of one op, but for what is changed: how far rows are off at each length."""
    rows = [
        {"op": "some_op", "dtype": "bfloat16", "K": k, "what": what, "draws": 20, "row": [size(k)] * 4}
        for what, size in {**SIZES, **changed}.items()
        for k in LENGTHS
    ]
    environment = {"name": "here", "torch": "2.13.0"}
    return {"environment": environment, "date": "2026-01-02T03:04", "seeds": 20, "measured": rows}


def test_the_committed_rows_need_one_bound_for_all_lengths() -> None:
    (found,) = besides("sums")

    assert unsound(found) == []
    assert {row["op"] for row in found["measured"]} == set(sums.ops(dataset())) == set(sums.GROWN)
    assert all(row["draws"] >= 20 for row in found["measured"])
    for dtype in ("float16", "bfloat16"):
        mine = [row for row in found["measured"] if (row["op"], row["dtype"]) == ("gemm", dtype)]
        assert {row["what"] for row in mine} == {REFERENCE, "torch", "oracle", *SUMS}
        assert {row["K"] for row in mine} == {2**i for i in range(8, 15)}


def test_sound_rows_are_not_told() -> None:
    assert unsound(record()) == []


@pytest.mark.parametrize(
    ("what", "size", "told"),
    [
        pytest.param(
            REFERENCE,
            lambda k: 1e-6 * math.sqrt(k),
            "grows as K^0.50, but should not grow: as K^0.05 at most",
            id="grows",
        ),
        pytest.param(
            "lib", lambda _: 4e-3, "a row is off by 0.004 at K = 256, but should be by 0.00391 at most", id="too far"
        ),
        pytest.param("lib", lambda _: math.nan, "a row is off by nan at K = 256", id="no number"),
        pytest.param(
            ONE_BY_ONE, lambda k: 1.1 * math.sqrt(k) * 2**-24, "a row is off by 1.05e-06 at K = 256", id="beyond sqrt"
        ),
        pytest.param(CUT_OFF, lambda _: 6e-4, "a row is off by 0.0006 at K = 256", id="beside the rounding"),
    ],
)
def test_what_contradicts_one_bound_is_told(what: str, size: Callable[[int], float], told: str) -> None:
    assert unsound(record(**{what: size}))[0].startswith(f"some_op, bfloat16, {what}: {told}")


def test_committed_outputs_that_grew_would_be_seen() -> None:
    (found,) = besides("sums")
    for what in (REFERENCE, "torch", "oracle"):
        changed = copy.deepcopy(found)
        for row in changed["measured"]:
            if (row["op"], row["what"]) == ("gemm", what):
                row["row"] = [value * math.sqrt(row["K"] / 256) for value in row["row"]]

        assert any("grows as K^0.5" in line and what in line for line in unsound(changed))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_power_that_fits(power: float) -> None:
    assert exponent({k: [3 * k**power, 9.0] for k in LENGTHS}) == pytest.approx(power, abs=1e-9)


def test_the_report_has_errors_and_what_is_left_of_sqrt_k() -> None:
    told = section([record()])

    assert "\n| some_op (bfloat16) | reference | 0.002 0.002 | 0.002 0.002 | 0.002 0.002 | K^0.00 |\n" in told
    assert f"\n| some_op (bfloat16) | {ONE_BY_ONE} | 0.9 0.9 | 0.9 0.9 | 0.9 0.9 | K^0.50 |\n" in told
    assert "0.00125 (bfloat16) at the largest K, and as much as rounding\n  at K = 3,280,000 (bfloat16)." in told
    assert section([]) == ""


# ---- how sums are taken

A, B = (torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).half() for rows in (3, 5))


def test_products_one_after_the_other_are_added_in_float32() -> None:
    wanted = torch.zeros(3, 5)
    for k in range(64):
        wanted = wanted + A[:, k, None].float() * B[:, k].float()

    assert torch.equal(sums.one_by_one(A, B), wanted)


def test_what_is_cut_off_is_beyond_24_bits_and_never_rounded_up() -> None:
    one, rest = torch.ones(1, 32).half(), torch.zeros(1, 32).half()
    rest[0, 0], rest[0, 16:] = 1.0, 2.0**-24  # sixteen of the latter are half a unit more than 2**-21
    rest[0, 16] += 2.0**-24

    assert sums.cut_off(one, rest).item() == 1 + 2**-20
    assert sums.cut_off(one, -rest).item() == -1 - 2**-20
    assert (sums.cut_off(A, B) - A.double() @ B.double().T).abs().max() < 1e-5


def test_a_length_is_that_of_the_definition_drawn_and_of_its_dtype() -> None:
    (held,) = sums._at(dataset(), sums.GROWN["gemm"], "bfloat16", 512).definitions.values()

    assert (held.constant("N"), held.constant("K")) == (64, 512)
    assert {spec.dtype for spec in (*held.inputs.values(), *held.outputs.values())} == {"bfloat16"}


def test_each_op_is_measured_at_its_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "SEEDS", 2)
    short = {op: grown._replace(lengths=(256,)) for op, grown in sums.GROWN.items()}
    monkeypatch.setattr(sums, "GROWN", short)
    found = sums.measured(dataset(), measure("here", "cpu", Sources().distributions))

    by = {(row["op"], row["dtype"], row["what"]): row["row"][0] for row in found["measured"]}
    assert {key[:2] for key in by} == {(op, dtype) for op, grown in short.items() for dtype in grown.dtypes}
    assert all(row["draws"] == 2 for row in found["measured"])
    assert 1e-8 < by["gemm", "float16", AS_HERE] < 1e-6 < by["gemm", "float16", REFERENCE] < UNIT["float16"]
    assert 1e-8 < by["moe_fp8_block_scale_renorm", "bfloat16", AS_HERE] < 1e-6


def test_the_command_measures_them_with_any_of_their_ops(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {**measured(reference=(0, 0)), "absent": {}}
    monkeypatch.setattr("refgrid.calibration.run.measured", lambda *_: iter([("gemm", errors)]))
    monkeypatch.setattr("refgrid.calibration.sums.measured", lambda *_: record())
    options = ["--op=gemm", "--seeds=1", "-n", "1", f"--results={tmp_path}"]

    done = CliRunner().invoke(main, ["calibrate", *options])

    assert done.exit_code == 0, done.output
    assert done.output.endswith("measured: rows over the length of sums\n")
    assert [file.name for file in (tmp_path / "calibration").iterdir() if file.is_dir()] == ["sums"]
