"""Our kernels as sources of the instrument: found, refused in the words of the backend, and translated."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import naive_grouped as naive
import pytest
import torch

from refgrid.caching.modules import Modules
from refgrid.sources import Sources
from refgrid_groundtruth import SOURCES as TRUTHS
from refgrid_solutions import sources
from refgrid_solutions.grouped_attention import GroupedAttnPlan, backends
from refgrid_solutions.sources import OP, SOURCES, Unavailable

NAMED = {source.name: source for source in SOURCES}
ENTRIES = [(4, 6, 1, 7, 1), (0, 3, 2, 9, 0)]


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*size, 64, generator=generator).bfloat16() for size in ((7, 4), (9, 2), (9, 2)))
    table = torch.tensor(ENTRIES, dtype=torch.int32)
    ranges = {"q_ranges": table[:, :2], "k_ranges": table[:, 2:4], "mask_types": table[:, 4]}
    return {"q": q, "k": k, "v": v, **ranges, "sm_scale": 0.2}


def test_the_instrument_finds_them_by_their_entry_point() -> None:
    found = Sources()

    assert set(NAMED) <= set(found.serving(OP))
    assert found.kernel("grouped-fa3", OP) == "FlashAttention-3 of the fa3-fwd wheel"


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, refgrid_solutions.sources; print([each for each in ('torch', 'triton') if each in sys.modules])"
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path}; {code}"]

    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_backend_but_the_reference_and_what_is_not_written_is_a_source() -> None:
    written = {name for name, row in backends.TABLE.items() if row.module}

    assert {source.backend for source in SOURCES} == written - {"reference"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_source_is_what_the_table_of_backends_says(source: sources.Source) -> None:
    row = backends.TABLE[source.backend]

    assert sources._module(source.backend) == f"{backends.__name__}.{row.module}"
    assert row.needs in ((), (source.library,))


def test_the_kernel_of_pytorch_is_one_truth_by_whatever_name() -> None:
    truth = next(source for source in TRUTHS if source.name == "torch")

    assert NAMED["grouped-torch"].kernel(OP) == truth.kernel(OP)


@pytest.mark.parametrize(
    ("name", "op", "words"),
    [
        (
            "grouped-cuda",
            OP,
            "unknown source 'grouped-cuda': should be one of grouped-fa3, grouped-triton, grouped-t",
        ),
        ("grouped-fa3", "gemm", "grouped-fa3 has no op 'gemm': should be one of gqa_grouped"),
    ],
)
def test_an_unknown_name_lists_the_legal_ones(name: str, op: str, words: str) -> None:
    for ask in (lambda: sources.adapter(name, op, "cpu"), lambda: sources.origin(name, op)):
        with pytest.raises(LookupError, match=words):
            ask()


# ---- where a backend cannot run


def test_a_library_that_is_absent_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(Unavailable, match=r"missing: fa3_fwd is not installed \(fa3-fwd\)") as caught:
        sources.adapter("grouped-fa3", OP, "cuda")
    assert (caught.value.verdict, caught.value.reason) == ("missing", "fa3_fwd is not installed (fa3-fwd)")


def test_a_backend_that_is_absent_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_module", lambda backend: f"refgrid_solutions.grouped_attention.{backend}_nowhere")

    with pytest.raises(Unavailable, match="missing: the backend torch is not installed"):
        sources.adapter("grouped-torch", OP, "cuda")


def test_a_library_that_cannot_be_imported_is_a_broken_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "fa3_fwd.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(Unavailable, match="import-fail: import of fa3_fwd raises OSError: libcudart") as caught:
        sources.adapter("grouped-fa3", OP, "cuda")
    assert caught.value.verdict == "import-fail"


def test_what_a_backend_refuses_is_told_in_its_own_words() -> None:
    serve = sources.adapter("grouped-torch", OP, "cpu")

    with pytest.raises(Unavailable) as caught:
        serve(**inputs())

    assert (caught.value.verdict, caught.value.reason) == ("unsupported", "device = cpu, but should be on cuda")


# ---- where it runs


def test_what_a_backend_gives_is_translated_to_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the reference, which runs here: lse [heads, rows] in base e becomes [rows, heads] in base 2."""
    given = inputs()
    q, k, v = (given[name].double() for name in "qkv")
    out, lse = naive.attend(q, k, v, naive.dense_mask(ENTRIES, 7, 9), 0.2)
    asked: list[str] = []
    refusal = backends.refusal

    def noted(name: str, plan: GroupedAttnPlan) -> str:
        asked.append(name)
        return refusal(name, plan)

    monkeypatch.setattr(sources, "SOURCES", (sources.Source("own", "reference", "torch", "torch", "the formula"),))
    monkeypatch.setattr(backends, "refusal", noted)
    monkeypatch.setattr(sources, "_module", lambda _: f"{backends.__name__}.naive")

    found = sources.adapter("own", OP, "cpu")(**given)

    torch.testing.assert_close(found["output"].double(), out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found["lse"].double(), lse.T / math.log(2), rtol=1e-5, atol=1e-5)
    assert (found["output"].dtype, found["lse"].dtype) == (torch.bfloat16, torch.float32)
    assert found["lse"].is_contiguous()
    assert asked[-1] == "reference", "the backend that was asked for, not whichever can run"


@pytest.mark.parametrize("name", ["grouped-fa3", "grouped-torch"])
def test_an_edit_of_its_backend_makes_a_source_run_again(name: str) -> None:
    told = sources.origin(name, OP)

    reached = Modules.of("refgrid_solutions").reached(told.modules, told.apart)

    wanted = {"sources", "grouped_attention.interface", "grouped_attention.plan", "grouped_attention.backends.aten"}
    assert {f"refgrid_solutions.{each}" for each in wanted} <= set(reached)
    assert ("refgrid_solutions.grouped_attention.backends.fa3" in reached) == (name == "grouped-fa3")
    assert "refgrid_solutions.grouped_attention.backends.naive" not in reached
    assert name in told.row


def test_what_has_changed_is_told_without_torch() -> None:
    """`nox -s matrix` asks this of every source before it knows whether anything is to run; torch takes seconds."""
    program = f"""
import sys
from refgrid_solutions import sources
assert [sources.origin(source.name, {OP!r}).modules[-1] for source in sources.SOURCES]
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("release", "served"), [("2.6.0+cu124", False), ("2.7.1", False), ("2.8.0", True), ("2.13", True)]
)
def test_with_an_older_torch_no_backend_serves(release: str, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "version", lambda _: release)

    if served:
        sources.adapter("grouped-torch", OP, "cpu")
        return
    with pytest.raises(
        Unavailable, match=f"unsupported: torch {re.escape(release)} is here, but should be 2.8 or later"
    ):
        sources.adapter("grouped-torch", OP, "cpu")


def test_the_oldest_torch_is_that_of_the_distribution() -> None:
    project = Path(__file__).resolve().parents[2] / "solutions" / "pyproject.toml"

    assert f'"torch>={sources._told(sources.OLDEST_TORCH)}"' in project.read_text()
