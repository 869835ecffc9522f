"""What a wheelhouse carries, how it is built, and the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from containers import digests
from small_wheels import PYTHON, SPEC, Uv, cargo, make_wheel

from refgrid.cli import main
from refgrid.environments.audit import Installed, audit
from refgrid.environments.measured import measure
from refgrid.overlays import overlay
from refgrid.overlays.overlay import Wheelhouse, lay
from refgrid.overlays.wheelhouse import Cargo, WheelhouseError, build
from refgrid.overlays.wheels import Source, read_have

if sys.version_info >= (3, 11):
    pass
else:
    pass

ROOT = Path(__file__).resolve().parents[2]


class TestBuilt:
    def test_no_part_is_larger_than_asked_for(self, packed: Path) -> None:
        manifest = json.loads((packed / overlay.MANIFEST).read_text())
        sizes = [file.stat().st_size for file in packed.glob("part-*.tar")]

        assert len(sizes) == len(manifest["parts"]) >= 3
        assert max(sizes) <= 80_000

    def test_it_is_the_same_every_time(self, packed: Path, index: Path, tmp_path: Path) -> None:
        build([cargo(index)], tmp_path / "again", 80_000)

        assert digests(tmp_path / "again") == digests(packed)

    def test_what_two_environments_share_is_carried_once(self, index: Path, tmp_path: Path) -> None:
        both = [cargo(index), cargo(index, "yours", wheels=tuple(index.glob("kernels*")))]
        manifest = build(both, tmp_path / "wheelhouse", 10**6)

        assert [wheel["name"] for wheel in manifest["wheels"]] == ["dsl", "kernels", "tool"]
        assert manifest["environments"]["yours"]["wheels"] == ["kernels-1.0-py3-none-any.whl"]

    def test_progress_names_each_wheel_and_each_part(self, index: Path, tmp_path: Path) -> None:
        said: list[str] = []
        build([cargo(index)], tmp_path / "wheelhouse", 10**6, said.append)

        assert [line.partition(",")[0] for line in said][1:3] == [
            "packed 2 of 3: kernels-1.0-py3-none-any.whl",
            "packed 3 of 3: tool-1.0-py3-none-any.whl",
        ]
        assert said[-1].startswith(f"written: {tmp_path / 'wheelhouse' / 'part-01.tar'}")

    def test_omitted_files_are_a_finding_there(
        self, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trimmed = cargo(index, omit=("kernels/*.so",), machine=())
        manifest = build([trimmed], tmp_path / "wheelhouse", 10**6)
        lay(Wheelhouse(tmp_path / "wheelhouse"), None, tmp_path / "site")
        monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
        spec = SPEC.model_copy(update={"pins": ("kernels==1.0",), "machine": ()})

        assert manifest["wheels"][1]["without"] == ["kernels/big.so"]
        assert not (tmp_path / "site" / "kernels" / "big.so").exists()
        told = [each.text for each in audit(spec, "", measure("mine", "cpu", ()))]
        assert told == ["kernels 1.0 is here without kernels/big.so"]
        assert Installed(measure("mine", "cpu", ())).version("kernels") == "1.0"

    @pytest.mark.parametrize(
        ("changed", "size", "reason"),
        [
            pytest.param({"omit": ("*.cubin",)}, 10**6, r"mine: omit: \*\.cubin matches no file", id="omits nothing"),
            pytest.param({"machine": ("dsl==1.0",)}, 10**6, "mine finds dsl on the machine", id="the machine's own"),
            pytest.param({}, 11_264, "parts of 11264 bytes hold nothing", id="too small a part"),
        ],
    )
    def test_what_cannot_be_packed(
        self, index: Path, tmp_path: Path, changed: dict[str, Any], size: int, reason: str
    ) -> None:
        with pytest.raises(WheelhouseError, match=reason):
            build([cargo(index, **changed)], tmp_path / "wheelhouse", size)
        assert not (tmp_path / "wheelhouse").exists()

    def test_torch_is_never_packed(self, index: Path, tmp_path: Path) -> None:
        make_wheel(index, "torch", {})

        with pytest.raises(WheelhouseError, match=r"torch-1\.0-py3-none-any\.whl: mine finds torch on the machine"):
            build([cargo(index, machine=())], tmp_path / "wheelhouse", 10**6)

    def test_environments_that_omit_different_files_of_one_wheel(self, index: Path, tmp_path: Path) -> None:
        both = [cargo(index), cargo(index, "yours", omit=("*.so",))]

        with pytest.raises(
            WheelhouseError, match=r"kernels-1\.0-py3-none-any\.whl: its environments omit different files"
        ):
            build(both, tmp_path / "wheelhouse", 10**6)

    def test_a_folder_that_is_no_wheelhouse_stays(self, index: Path) -> None:
        with pytest.raises(WheelhouseError, match="is not empty and is no wheelhouse"):
            build([cargo(index)], index, 10**6)
        assert len(list(index.iterdir())) == 3


class TestGathered:
    def names(self, found: Cargo) -> list[str]:
        return [wheel.name.partition("-")[0] for wheel in found.wheels]

    def test_the_lock_the_instrument_and_the_workspace_but_never_torch(self, uv: Uv, source: Source) -> None:
        found = source.gather(SPEC, {})

        assert sorted(self.names(found)) == ["dsl", "kernels", "refgrid", "tool"]
        assert sorted(uv.fetched) == ["dsl", "kernels", "tool"]
        assert sorted(found.demands) == ["dsl==1.0", "kernels==1.0", "tool==1.0"]

    @pytest.mark.usefixtures("uv")
    @pytest.mark.parametrize(("version", "carried"), [("1.0", False), ("0.9", True)])
    def test_what_the_machine_has_stays_at_home(self, source: Source, version: str, *, carried: bool) -> None:
        found = source.gather(SPEC, {"dsl": version})

        assert ("dsl" in self.names(found)) is carried
        assert "dsl==1.0" in found.demands

    def test_a_wheel_is_fetched_once_for_all_environments(self, uv: Uv, source: Source) -> None:
        for _ in range(2):
            source.gather(SPEC, {})

        assert len(uv.fetched) == 3

    def test_every_wheel_that_no_index_serves_is_named(self, uv: Uv, source: Source) -> None:
        for wheel in (*uv.index.glob("kernels*"), *uv.index.glob("tool*")):
            wheel.unlink()

        with pytest.raises(WheelhouseError) as refused:
            source.gather(SPEC, {})
        for name in ("kernels", "tool"):
            told = f"{name}==1.0: no index serves its wheel for Python {PYTHON} on manylinux_2_34_x86_64: ERROR: No"
            assert told in str(refused.value)

    @pytest.mark.usefixtures("uv")
    def test_the_wrong_machine(self, source: Source) -> None:
        with pytest.raises(WheelhouseError, match=r"torch 2\.12\.0 is there, but mine is for 2\.13\.0"):
            source.gather(SPEC, {"torch": "2.12.0"})

    @pytest.mark.usefixtures("uv")
    def test_a_venv_over_a_machine_without_its_torch(self, source: Source) -> None:
        spec = SPEC.model_copy(update={"kind": "venv", "machine": (), "pins": ("torch==2.13.0",)})

        with pytest.raises(WheelhouseError, match=r"torch 2\.13\.0 is not there, and no wheelhouse carries torch"):
            source.gather(spec, {})
        assert source.gather(spec, {"torch": "2.13.0+cpu"}).wheels

    @pytest.mark.usefixtures("uv")
    def test_a_missing_lock_is_named(self, source: Source, tmp_path: Path) -> None:
        (tmp_path / "ci" / "locks" / "mine.txt").unlink()

        with pytest.raises(WheelhouseError, match=r"mine\.txt is missing: nox -s lock -- mine"):
            source.gather(SPEC, {})


class TestHave:
    @pytest.mark.parametrize(
        "text",
        ['[{"name": "Typing_Extensions", "version": "4.16.0"}]', "# freeze\ntyping-extensions==4.16.0\n-e .\n"],
    )
    def test_the_ways_in_which_it_is_told(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "have").write_text(text)

        assert read_have(tmp_path / "have") == {"typing-extensions": "4.16.0"}

    @pytest.mark.parametrize("text", ["", "[1]", "[", "Package Version\n------- ----\ntorch   2.13"])
    def test_what_is_no_list_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "have").write_text(text)

        with pytest.raises(WheelhouseError, match=rf"{tmp_path}/have: (is no list of|lists no) distribution"):
            read_have(tmp_path / "have")


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["wheelhouse", "cu131-overlay"], "no environment is called 'cu131-overlay'; legal values: cpu,"),
            (["wheelhouse", "cpu", "--parts", "many"], "'many' is no amount of memory"),
            (["wheelhouse", "cpu", "--have", "nowhere"], "nowhere"),
            (["wheelhouse", "cpu"], "no wheelhouse carries torch; say what is with --have"),
        ],
    )
    def test_wrong_use_says_what_is_right(self, arguments: list[str], reason: str) -> None:
        told = CliRunner().invoke(main, [*arguments, *(["--table", str(ROOT / "ci" / "environments.toml")])])

        assert told.exit_code == 2
        assert reason in " ".join(told.output.split())

    def test_overlay_is_the_program_that_travels(self, packed: Path, tmp_path: Path) -> None:
        (packed / "part-02.tar").unlink()
        told = CliRunner().invoke(main, ["overlay", "--wheelhouse", str(packed), "--target", str(tmp_path / "site")])

        assert told.exit_code == 3
        assert not (tmp_path / "site").exists()
