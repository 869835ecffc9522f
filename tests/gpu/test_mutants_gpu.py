"""A mutant that loses the CUDA context of a real GPU: `pytest tests/gpu` on a machine that has one."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from guards import write_products

from refgrid.commands.mutants import mutants as main


def test_an_index_out_of_range_is_that_mutants_crash_and_no_others(tmp_path: Path) -> None:
    index = "A = A[torch.full((1,), 10**6, device=A.device)]"
    write_products(tmp_path, {"read": index, "read, not waited for": f"unused = {index.removeprefix('A = ')}"})

    done = CliRunner().invoke(main, [f"--dataset={tmp_path}", f"--output={tmp_path}", "--device=cuda"])

    assert done.exit_code == 1, done.output  # of the mutant that changes nothing
    data = json.loads((tmp_path / "mutants.json").read_text())
    told = [next(iter(one["verdicts"][0]["workloads"].values())) for one in data["mutants"]]
    assert [one.get("verdict") or one["fate"] for one in told] == ["crash", "crash", "mismatch", "same"]
    assert told[0]["reason"].startswith("the CUDA context is lost after it: CUDA error: device-side assert triggered")
    assert all(data["mutants"][0]["verdicts"][0]["fixed"].values())
    assert data["runs"][0]["device"] == "cuda"
    assert data["runs"][0]["environment"]["gpu"]
