"""How long cases will take: what earlier records tell, and what is made of it."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import pytest

from refgrid.dataset.case import Case
from refgrid.environments.measured import Environment
from refgrid.records.ledger import Ledger
from refgrid.records.record import Header, Outcome, RecordError, Verdict
from refgrid.running.durations import estimates, known_seconds


def case(definition: str, workload: str = "b1", op: str = "gemm") -> Case:
    return Case(definition, op, op, workload, "numerics", "one")


class TestEstimates:
    def test_are_what_was_measured_else_the_median_of_the_op_else_by_bytes(self) -> None:
        cases = [case("a", "b1"), case("a", "b2"), case("a", "b3"), case("a", "b4"), case("z", op="moe")]
        known = {cases[0].id: 1.0, cases[1].id: 3.0, cases[2].id: 8.0}

        found = estimates(cases, known, lambda each: 30.0 if each.op == "moe" else 6.0)

        assert [found[each.id] for each in cases] == [1.0, 3.0, 8.0, 3.0, pytest.approx(30.0 * 12.0 / 18.0)]

    def test_without_any_measurement_go_by_bytes(self) -> None:
        cases = [case("a"), case("b"), case("c")]
        found = estimates(cases, {}, lambda each: {"a": 1e9, "b": 3e9, "c": 0.0}[each.definition])

        assert list(found.values()) == [1.0, 3.0, 0.0]

    def test_of_cases_that_take_nothing_are_nothing(self) -> None:
        cases = [case("a"), case("z", op="moe")]

        assert estimates(cases, {cases[0].id: 1.0}, lambda _: 0.0)[cases[1].id] == 0.0


class TestKnownSeconds:
    def record(self, folder: Path, seconds: float, **about: Any) -> None:
        where: dict[str, Any] = {"name": "here", "device": "cpu", "started": "2026-01-01", **about}
        environment = Environment(where["name"], where["device"], "3.11", "linux", None, None, None, None, None, 0, {})
        of = where.get("case", case("a"))
        run = Header(f"{folder.name}-{where['started']}", where["started"], "0", environment, (of,))
        ledger = Ledger(folder / f"{run.run}.jsonl", run)
        ledger.close_case(Outcome(of, where.get("verdict", Verdict.MATCH), seconds={"truth": seconds, "x": 1}))
        ledger.finish("")

    def test_are_those_of_the_latest_run_of_the_environment(self, tmp_path: Path) -> None:
        self.record(tmp_path / "a", 2.0, started="2026-01-03")
        self.record(tmp_path / "b", 7.0, started="2026-01-02")
        self.record(tmp_path / "c", 8.0, started="2026-01-04", name="elsewhere")
        self.record(tmp_path / "d", 9.0, started="2026-01-05", device="cuda")
        self.record(tmp_path / "e", 0.0, started="2026-01-06", verdict=Verdict.CACHED)

        found = known_seconds([tmp_path], "here", "cpu")

        assert found == {case("a").id: 3.0}

    def test_are_those_of_another_environment_where_this_one_has_none(self, tmp_path: Path) -> None:
        self.record(tmp_path / "a", 4.0, started="2026-01-03", name="elsewhere")
        self.record(tmp_path / "b", 9.0, started="2026-01-04", name="elsewhere", device="cuda")

        assert known_seconds([tmp_path], "here", "cpu") == {case("a").id: 5.0}

    def test_are_read_from_packed_files_as_well_and_from_every_folder(self, tmp_path: Path) -> None:
        self.record(tmp_path / "a", 2.0)
        self.record(tmp_path / "b", 4.0, started="2026-01-02", name="elsewhere", case=case("b"))
        (plain,) = (tmp_path / "b").iterdir()
        (tmp_path / "b" / "packed.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

        found = known_seconds([tmp_path / "a", tmp_path / "b", tmp_path / "nowhere"], "here", "cpu")

        assert found == {case("a").id: 3.0, case("b").id: 5.0}

    @pytest.mark.parametrize(("there", "wanted"), [("cuda", "cpu"), ("cpu", "cuda")])
    def test_of_a_file_of_another_device_are_not_looked_for(self, tmp_path: Path, there: str, wanted: str) -> None:
        """Every environment has a field cuda, which is no device."""
        self.record(tmp_path / "a", 2.0, device=there)
        (file,) = (tmp_path / "a").iterdir()
        file.write_bytes(file.read_bytes() + b"no record\n")

        assert known_seconds([tmp_path], "here", wanted) == {}
        with pytest.raises(RecordError):
            known_seconds([tmp_path], "here", there)

    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param(b"no record\n", id="a line that is none"),
            pytest.param(b'{"type": "outcome", "seconds": {"truth": 1.0}}\n', id="an outcome of no case"),
            pytest.param(b'{"type": "run", "started": "2026"}\n', id="a run of no environment"),
        ],
    )
    def test_that_cannot_be_read_are_an_error_that_names_the_line(self, tmp_path: Path, damage: bytes) -> None:
        self.record(tmp_path, 2.0)
        (file,) = tmp_path.iterdir()
        lines = len(file.read_bytes().splitlines())
        file.write_bytes(file.read_bytes() + damage)

        with pytest.raises(RecordError, match=rf"{re.escape(str(file))}:{lines + 1}: is no record"):
            known_seconds([tmp_path], "here", "cpu")

    def test_in_a_file_that_is_no_gzip_are_an_error_that_names_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl.gz").write_bytes(b"not packed")

        with pytest.raises(RecordError, match=r"a\.jsonl\.gz: records cannot be read"):
            known_seconds([tmp_path], "here", "cpu")
