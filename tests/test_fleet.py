"""Real runs on several fake GPUs: each is used, none by two at once, and large cases run alone on theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fleet import CRASH_SAFE, Fleet, overlapping

from refgrid.records.record import read_runs


@pytest.mark.parametrize(("gpus", "workloads"), [(4, 16), (16, 32)])
def test_each_of_many_gpus_is_used_and_none_by_two_at_once(
    double: dict[str, Any], write_definition: Any, tmp_path: Path, gpus: int, workloads: int
) -> None:
    fleet = Fleet(tmp_path, double, write_definition, str(gpus))
    fleet.reference(f"import planted\nplanted.meet({gpus})\nreturn planted.used(x)", *range(1, workloads + 1))

    done = fleet.run("-n", "auto", *CRASH_SAFE)

    assert done.returncode == 0, done.stdout
    assert f"{gpus} workers" in done.stdout
    told = f"planned {6 * workloads} = accounted {6 * workloads}: {2 * workloads} missing, {4 * workloads} match"
    assert told in done.stdout
    assert {use.device for use in fleet.uses} == {f"FAKE-{i}" for i in range(gpus)}
    assert len({use.pid for use in fleet.uses}) == gpus
    assert overlapping(fleet.uses) == []
    devices = {outcome.device for outcome in fleet.records().outcomes.values()}
    assert devices == {f"fake GPU FAKE-{i}" for i in range(gpus)}


@pytest.mark.parametrize(
    ("gpus", "slots", "workers"),
    [
        pytest.param("16", (), 16, id="all"),
        pytest.param("16", ("--workers-per-gpu", "2"), 32, id="two on each"),
        pytest.param(",".join(f"A-{number}:1GiB" for number in range(15)), (), 15, id="named"),
    ],
)
def test_auto_is_a_worker_for_each_of_up_to_sixteen_gpus(
    double: dict[str, Any], write_definition: Any, tmp_path: Path, gpus: str, slots: tuple[str, ...], workers: int
) -> None:
    fleet = Fleet(tmp_path, double, write_definition, gpus)
    stop = "def pytest_xdist_setupnodes(config, specs):\n    pytest.exit(f'{len(specs)} would start', 0)\n"
    (fleet.root / "conftest.py").write_text(f"import pytest\n\n{stop}")

    done = fleet.run("-n", "auto", *slots, *CRASH_SAFE)

    assert f"{workers} would start" in done.stdout


def test_a_case_that_needs_more_than_a_share_runs_alone_on_its_gpu(
    double: dict[str, Any], write_definition: Any, tmp_path: Path
) -> None:
    large, small = 4096, range(1, 9)  # 16 bytes a row: 64 KiB, held several times
    fleet = Fleet(tmp_path, double, write_definition, "FAKE-0:1MiB")
    # Both begin together, with their leases: in a small case one would wait for one that waits to run the large alone.
    come = "import os\nimport planted\n\ndef pytest_collection_finish():\n    if {} in os.environ: planted.meet(1, 2)\n"
    (fleet.root / "conftest.py").write_text(come.format("'PYTEST_XDIST_WORKER'"))
    fleet.reference("import planted\nreturn planted.used(x, 0.4)", large, *small)

    done = fleet.run("-n", "auto", "--workers-per-gpu", "2", *CRASH_SAFE)

    shared = overlapping(fleet.uses)
    assert done.returncode == 0, done.stdout
    assert "2 workers" in done.stdout
    assert shared
    assert [pair for pair in shared if large in {use.batch for use in pair}] == []
    assert {use.batch for use in fleet.uses} == {large, *small}


def test_the_longest_of_an_earlier_run_comes_first(
    double: dict[str, Any], write_definition: Any, tmp_path: Path
) -> None:
    fleet = Fleet(tmp_path, double, write_definition, "1")
    fleet.reference("import planted\nreturn planted.used(x, 1 if x.shape[0] == 1 else 0)", 1, 2, 3)
    run = ("-n", "1", *CRASH_SAFE, "--results")
    fleet.run(*run, "results/first")
    (fleet.root / "used.log").unlink()
    fleet.reference("import planted\nreturn planted.used(x)", 1, 2, 3)  # another text, so that nothing is settled

    fleet.run(*run, "results/second")

    first, second = read_runs(fleet.root / "results")
    assert fleet.uses[0].batch == 1
    assert next(iter(first.outcomes.values())).case.workload == "b3"  # by bytes, since nothing was known
    assert next(iter(second.outcomes.values())).case.workload == "b1"


def test_records_of_runs_that_cannot_be_read_leave_the_order_to_the_sizes(
    double: dict[str, Any], write_definition: Any, tmp_path: Path
) -> None:
    fleet = Fleet(tmp_path, double, write_definition, "1")
    fleet.reference("return x * 2", 1)
    (fleet.root / "results").mkdir()
    (fleet.root / "results" / "old.jsonl.gz").write_bytes(b"not packed")

    done = fleet.run("-n", "1", *CRASH_SAFE, "--results", "elsewhere", "--op-type", "double")

    assert "earlier durations are not used: " in done.stdout
    assert "old.jsonl" in done.stdout
    assert "planned 6 = accounted 6" in done.stdout


def test_a_gpu_that_nobody_uses_any_more_is_noticed(
    double: dict[str, Any], write_definition: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path, double, write_definition)
    planned: dict[str, Any] = {"__file__": str(tmp_path / "planted.py")}
    exec((tmp_path / "planted.py").read_text(), planned)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "FAKE-0")

    for seconds in (0, 300):  # who comes next does not wait once more
        with pytest.raises(TimeoutError, match=r"not all came: \{\('FAKE-0', "):
            planned["meet"](2, seconds=seconds)

    assert set(fleet.met) == {"FAKE-0"}


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_slots_are_counted_from_one(double: dict[str, Any], write_definition: Any, tmp_path: Path, count: str) -> None:
    fleet = Fleet(tmp_path, double, write_definition)

    done = fleet.run("--workers-per-gpu", count)

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"--workers-per-gpu '{count}' should be a whole number from 1" in done.stderr + done.stdout
