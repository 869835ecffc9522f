"""No reference takes more than four times its inputs and outputs, at the sizes it is timed at."""

from __future__ import annotations

import pytest
import torch
from bench_references import DATASET, ROWS, Row
from peak_memory import peak_bytes

from refgrid.dataset.reference import compile_reference


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.definition)
def test_a_reference_takes_less_than_four_times_its_inputs_and_outputs(row: Row) -> None:
    run, inputs = compile_reference(DATASET.definitions[row.definition]), row.inputs
    result = run(*inputs.values())
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    held = sum(value.nbytes for value in (*inputs.values(), *outputs) if isinstance(value, torch.Tensor))

    assert peak_bytes(lambda: run(*inputs.values())) < 4 * held


def test_the_measure_sees_what_is_held_at_once_and_only_that() -> None:
    n, slack = 2**20, 1024  # a sum holds a few numbers of its own

    assert peak_bytes(lambda: torch.zeros(n)) == 4 * n
    assert peak_bytes(lambda: [torch.zeros(n) for _ in range(5)]) == 5 * 4 * n
    assert 4 * n <= peak_bytes(lambda: [torch.zeros(n).sum().item() for _ in range(5)]) < 4 * n + slack
