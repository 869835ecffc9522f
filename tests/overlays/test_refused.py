"""What is wrong with a wheelhouse or a machine: it is named, and nothing is laid."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from containers import Container, digests, laid
from small_wheels import PYTHON, SPEC, cargo, make_wheel

from refgrid.overlays import overlay
from refgrid.overlays.overlay import OverlayError, Wheelhouse, lay
from refgrid.overlays.wheelhouse import build
from refgrid.overlays.wheels import Source, read_have

if sys.version_info >= (3, 11):
    pass
else:
    pass


class TestRefused:
    """Nothing is laid, whatever is wrong, and what is wrong is named."""

    def refused(self, container: Container, packed: Path, site: Path, *more: object) -> str:
        done = laid(container, packed, site, *more)
        assert done.returncode == 3, done.stderr
        assert not site.exists() or not (site / overlay.VARIABLES).exists()
        assert not list(site.parent.glob(f".{site.name}-*"))
        return done.stderr

    def test_a_part_that_is_missing(self, container: Container, packed: Path, tmp_path: Path) -> None:
        (packed / "part-01.tar").unlink()
        told = self.refused(container, packed, tmp_path / "site")

        assert f"error: {packed / 'part-01.tar'} is missing, and with it kernels-1.0-py3-none-any.whl" in told

    def test_every_part_that_is_damaged(self, container: Container, packed: Path, tmp_path: Path) -> None:
        for name in ("part-01.tar", "part-02.tar"):
            data = bytearray((packed / name).read_bytes())
            data[5000] ^= 1
            (packed / name).write_bytes(data)
        told = self.refused(container, packed, tmp_path / "site")

        assert (
            len(re.findall(r"part-0[12]\.tar is damaged: sha256 \w{64} should be \w{64}; it holds kernels", told)) == 2
        )

    def test_a_wheel_that_is_not_what_was_packed(self, container: Container, packed: Path, tmp_path: Path) -> None:
        self.change(packed, lambda told: told["wheels"][0].update(sha256="00"))

        assert "dsl-1.0-py3-none-any.whl: sha256" in self.refused(container, packed, tmp_path / "site")

    def test_a_wheel_with_a_piece_too_few(self, container: Container, packed: Path, tmp_path: Path) -> None:
        self.change(packed, lambda told: told["wheels"][1]["pieces"].pop())

        assert "kernels-1.0-py3-none-any.whl: sha256" in self.refused(container, packed, tmp_path / "site")

    def test_a_piece_that_its_part_has_not(self, container: Container, packed: Path, tmp_path: Path) -> None:
        self.change(packed, lambda told: told["wheels"][0]["pieces"][0].update(member="other"))

        told = self.refused(container, packed, tmp_path / "site")
        assert "dsl-1.0-py3-none-any.whl: cannot be put together" in told

    def test_a_wheel_that_nobody_packed(self, container: Container, packed: Path, tmp_path: Path) -> None:
        self.change(packed, lambda told: told["environments"]["mine"]["wheels"].append("other.whl"))

        assert "other.whl: is not in the manifest" in self.refused(container, packed, tmp_path / "site")

    @pytest.mark.parametrize("change", [{"name": "Torch"}, {"packages": ["kernels", "torch"]}])
    def test_torch(self, container: Container, packed: Path, tmp_path: Path, change: dict[str, Any]) -> None:
        self.change(packed, lambda told: told["wheels"][1].update(change))

        told = self.refused(container, packed, tmp_path / "site")
        assert "kernels-1.0-py3-none-any.whl: would replace the machine's own" in told

    def test_another_torch_than_it_is_for(self, container: Container, packed: Path, tmp_path: Path) -> None:
        self.change(packed, lambda told: told["environments"]["mine"].update(machine=["torch==2.11.0+cu130"]))

        told = self.refused(container, packed, tmp_path / "site")
        assert "torch 2.13.0+cpu is installed here, but the wheels are for 2.11.0+cu130" in told

    def test_another_python(self, container: Container, packed: Path, tmp_path: Path) -> None:
        self.change(packed, lambda told: told["environments"]["mine"].update(python="3.9"))

        assert f"is Python {PYTHON}, but the wheels are for 3.9" in self.refused(container, packed, tmp_path / "site")

    def test_a_wheel_that_was_left_out(self, container: Container, index: Path, packed: Path, tmp_path: Path) -> None:
        whole = cargo(index)
        build([cargo(index, wheels=whole.wheels[1:], demands=whole.demands)], packed, 80_000)

        told = self.refused(container, packed, tmp_path / "site")
        assert told == (
            "error: dsl==1.0 is demanded, but no wheel of it is carried, and installed here is no release of it\n"
        )

    @pytest.mark.usefixtures("uv")
    def test_what_another_machine_had(self, source: Source, packed: Path, tmp_path: Path) -> None:
        """Its have.json said that dsl 1.0 and tool 1.0 are there; here the one is missing, and the other is older."""
        (tmp_path / "have.json").write_text('[{"name": "dsl", "version": "1.0"}, {"name": "Tool", "version": "1.0"}]')
        container = Container(tmp_path / "vendor")
        info = container.site / "tool-0.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tool\nVersion: 0.9\n")
        build([source.gather(SPEC, read_have(tmp_path / "have.json"))], packed, 80_000)

        told = self.refused(container, packed, tmp_path / "site")
        assert "dsl==1.0 is demanded, but no wheel of it is carried, and installed here is no release of it" in told
        assert "tool==1.0 is demanded, but no wheel of it is carried, and installed here is 0.9" in told
        assert "kernels" not in told

    @pytest.mark.parametrize("damage", [{"format": 1}, {"format": 1, "wheels": None}, {"format": 3}])
    def test_a_manifest_of_another_format(
        self, container: Container, packed: Path, tmp_path: Path, damage: dict[str, Any]
    ) -> None:
        """Format 1 did not say what is demanded; of others nobody knows what they say, and where."""
        self.change(packed, lambda told: told.update(damage))

        told = self.refused(container, packed, tmp_path / "site")
        anew = "collect the wheels anew, where there is an index: nox -s wheelhouse -- mine"
        assert f"manifest.json: format {damage['format']} should be 2; {anew}" in told

    def test_a_check_says_so_too(self, container: Container, packed: Path) -> None:
        done = container.run(packed / "overlay.py", "check")
        assert (done.returncode, done.stdout) == (0, "mine: whole, and for this machine\n"), done.stderr

        self.change(packed, lambda told: told["environments"]["mine"].update(python="3.9", demands=["other==1.0"]))
        done = container.run(packed / "overlay.py", "check")
        assert done.returncode == 3
        assert f"is Python {PYTHON}, but the wheels are for 3.9" in done.stderr
        assert "other==1.0 is demanded, but no wheel of it is carried" in done.stderr

    @pytest.mark.parametrize(
        ("asked", "there", "same"),
        [
            ("2024.7.4", "2024.07.04", True),
            ("1.0rc1", "1.0.RC1", True),
            ("2.11.0", "2.11.0+cu130", True),
            ("1.0", "1.0.post1", False),
            ("1.10", "1.1", False),
            ("0", "none", False),
        ],
    )
    def test_a_release_is_the_same_however_it_is_written(self, asked: str, there: str, *, same: bool) -> None:
        assert (overlay._release(asked) == overlay._release(there)) is same

    def test_a_folder_of_the_interpreter(self, container: Container, packed: Path) -> None:
        before = digests(container.site)

        told = self.refused(container, packed, container.site / "over")
        assert "which belongs to the interpreter" in told
        assert digests(container.site) == before

    def test_a_folder_of_somebody_else(self, container: Container, packed: Path, tmp_path: Path) -> None:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "thesis.txt").write_text("")

        told = self.refused(container, packed, tmp_path / "site")
        assert "is not empty and was not laid by this program" in told

    def test_an_environment_that_was_not_packed(self, container: Container, packed: Path, tmp_path: Path) -> None:
        told = self.refused(container, packed, tmp_path / "site", "--environment", "yours")

        assert f"'yours' is no environment of {packed}; legal values: mine" in told

    @pytest.mark.parametrize("text", ["", "{}", "[]"])
    def test_no_manifest(self, container: Container, packed: Path, tmp_path: Path, text: str) -> None:
        (packed / overlay.MANIFEST).write_text(text)

        assert "manifest.json: is no manifest of a wheelhouse" in self.refused(container, packed, tmp_path / "site")

    @pytest.mark.parametrize("member", ["../outside.py", "/outside.py"])
    def test_a_file_that_leaves_its_wheel(self, index: Path, tmp_path: Path, member: str) -> None:
        make_wheel(index, "evil", {member: b""})
        build([cargo(index, machine=())], tmp_path / "wheelhouse", 80_000)

        with pytest.raises(OverlayError, match=r"outside\.py: leaves the folder of its wheel"):
            lay(Wheelhouse(tmp_path / "wheelhouse"), None, tmp_path / "site")
        assert not (tmp_path / "site").exists()

    def test_running_where_nothing_was_laid(self, container: Container, packed: Path, tmp_path: Path) -> None:
        done = container.run(packed / "overlay.py", "run", "--target", tmp_path, "--", "true")

        assert (done.returncode, "nothing was laid there" in done.stderr) == (3, True)

    def change(self, packed: Path, how: Any) -> None:
        manifest = json.loads((packed / overlay.MANIFEST).read_text())
        how(manifest)
        (packed / overlay.MANIFEST).write_text(json.dumps(manifest))
