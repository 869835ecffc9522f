"""Inputs of norms: unit variance, and rows on both sides of the root of eps where the workload says so."""

from __future__ import annotations

import pytest
import torch

from refgrid.dataset.definition import Axis, Definition, InputSpec, TensorSpec, Workload
from refgrid.proving.inputs import make_inputs
from refgrid.proving.inputs.norm import LEVELS, LOUDEST, STEP

SPECS = {
    "hidden_states": TensorSpec(("batch_size", "n"), "bfloat16"),
    "residual": TensorSpec(("batch_size", "n"), "bfloat16"),
}
AXES = {"batch_size": Axis("var"), "n": Axis("const", 1024)}


def rows(uuid: str, op_type: str = "rmsnorm") -> dict[str, torch.Tensor]:
    of = Definition("norm_n1024", op_type, AXES, SPECS, {"y": TensorSpec((), "float32")}, "", ())
    workload = Workload(uuid, {"batch_size": 7}, dict.fromkeys(SPECS, InputSpec("random")))
    return make_inputs(of, workload, 0, "cpu", None).tensors


@pytest.mark.parametrize("name", SPECS)
def test_quiet_rows_have_falling_deviations_and_every_other_is_off_centre(name: str) -> None:
    found = rows("edge_b7_quiet")[name].double()

    for row, numbers in enumerate(found):
        level = 2.0 ** (LOUDEST + STEP * (row % LEVELS))
        assert numbers.std() == pytest.approx(level, rel=0.1)
        assert numbers.mean() == pytest.approx(row % 2 * level, abs=0.15 * level)


def test_eps_of_every_model_lies_between_the_mean_squares_of_quiet_rows() -> None:
    squares = rows("edge_b7_quiet")["hidden_states"].double().square().mean(dim=1)

    assert squares.min() < 1e-6 / 100
    assert squares.max() > 1e-5 * 10


@pytest.mark.parametrize("name", SPECS)
def test_other_workloads_are_drawn_as_ops_without_a_rule_are(name: str) -> None:
    assert torch.equal(rows("edge_b7")[name], rows("edge_b7", "made_up")[name])
