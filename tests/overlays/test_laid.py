"""A wheelhouse from end to end, over an environment that plays the vendor's container."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from containers import Container, digests, laid
from small_wheels import NOISE, PYTHON, cargo

from refgrid.overlays import overlay
from refgrid.overlays.overlay import OverlayError, Wheelhouse, lay
from refgrid.overlays.wheelhouse import build
from refgrid.overlays.wheels import read_have

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


class TestLaid:
    def test_the_interpreter_has_what_was_carried_and_is_bit_for_bit_the_same(
        self, container: Container, packed: Path, tmp_path: Path
    ) -> None:
        before = digests(container.site.parents[2])
        done = laid(container, packed, tmp_path / "site")
        code = (
            "import kernels, torch, cute, extra, tool, importlib.metadata as m, pathlib;"
            "(entry,) = m.entry_points(group='refgrid.sources');"
            "print(torch.__version__, kernels.VERSION, cute.NAME, entry.name,"
            "len(pathlib.Path(kernels.__file__).with_name('big.so').read_bytes()))"
        )
        run = container.run(
            packed / "overlay.py", "run", "--target", tmp_path / "site", "--", container.python, "-c", code
        )

        assert done.returncode == 0, done.stderr
        assert run.stdout == f"2.13.0+cpu 1 cute kernels {len(NOISE)}\n", run.stderr
        assert container.run("-c", "import kernels").returncode != 0
        assert digests(container.site.parents[2]) == before

    def test_nobody_compiles_the_modules_again(self, container: Container, packed: Path, tmp_path: Path) -> None:
        """The bytecode of the wheels and of the machine's own packages is in the overlay's cache, not beside them."""
        laid(container, packed, tmp_path / "site")
        code = (
            "import importlib.util, pathlib, kernels, torch;"
            "print(*(pathlib.Path(importlib.util.cache_from_source(m.__file__)).is_file() for m in (kernels, torch)))"
        )

        run = container.run(  # the interpreter writes no bytecode itself: -B
            packed / "overlay.py", "run", "--target", tmp_path / "site", "--", container.python, "-B", "-c", code
        )

        assert run.stdout == "True True\n", run.stderr
        assert list((tmp_path / "kernels" / "mine" / "bytecode").rglob("kernels/__init__.*.pyc"))

    def test_a_shell_gets_the_same(self, container: Container, packed: Path, tmp_path: Path) -> None:
        laid(container, packed, tmp_path / "with a blank")
        script = (
            f". '{tmp_path / 'with a blank'}/env.sh'; echo $REFGRID_ENVIRONMENT; {container.python} -c 'import cute'"
        )
        done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=False)

        assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr

    def test_scripts_can_be_run(self, container: Container, packed: Path, tmp_path: Path) -> None:
        laid(container, packed, tmp_path / "site")

        assert subprocess.run([tmp_path / "site" / "bin" / "tool"], capture_output=True, check=True).stdout == b"tool\n"

    def test_the_status_of_what_is_run_is_told(self, container: Container, packed: Path, tmp_path: Path) -> None:
        laid(container, packed, tmp_path / "site")
        status = container.run(
            packed / "overlay.py",
            "run",
            "--target",
            tmp_path / "site",
            "--",
            container.python,
            "-c",
            "raise SystemExit(7)",
        )

        assert status.returncode == 7

    def test_a_checkout_comes_before_the_wheels(self, container: Container, packed: Path, tmp_path: Path) -> None:
        laid(container, packed, tmp_path / "site")
        (own := tmp_path / "checkout" / "src" / "kernels").mkdir(parents=True)
        (own / "__init__.py").write_text("VERSION = 2\n")
        at = ["--target", tmp_path / "site", "--checkout", tmp_path / "checkout"]
        run = container.run(
            packed / "overlay.py", "run", *at, "--", container.python, "-Bc", "import kernels; print(kernels.VERSION)"
        )

        assert run.stdout == "2\n", run.stderr

    def test_laid_again_it_is_replaced_as_a_whole(
        self, container: Container, packed: Path, index: Path, tmp_path: Path
    ) -> None:
        laid(container, packed, tmp_path / "site")
        (index / "tool-1.0-py3-none-any.whl").unlink()
        build([cargo(index)], packed, 80_000)
        done = laid(container, packed, tmp_path / "site")

        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "site" / "tool.py").exists()

    def test_what_a_machine_has_is_told_as_pip_tells_it(
        self, container: Container, packed: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "have.json").write_text(container.run(packed / "overlay.py", "have").stdout)

        assert read_have(tmp_path / "have.json") == {"torch": "2.13.0+cpu"}

    def test_each_environment_has_caches_of_its_own(self, container: Container, packed: Path, tmp_path: Path) -> None:
        laid(container, packed, tmp_path / "site")
        told = overlay.variables(tmp_path / "site")

        assert {Path(told[name]).parent for name in overlay.CACHES} == {tmp_path / "kernels" / "mine"}
        assert told["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] == "1"

    def test_the_caches_are_those_of_the_other_environments(
        self, container: Container, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        laid(container, packed, tmp_path / "site")
        (nox := MagicMock()).project.load_toml = lambda file: tomllib.loads(Path(file).read_text())
        monkeypatch.setitem(sys.modules, "nox", nox)
        steps = runpy.run_path(str(ROOT / "noxfile.py"))
        session = steps["_caches"](SimpleNamespace(cache_dir=tmp_path), "mine")
        own = {
            "PYTHONPATH",
            "PYTHONPYCACHEPREFIX",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD",
            "FLASHINFER_DISABLE_VERSION_CHECK",
        }

        assert session == {name: told for name, told in overlay.variables(tmp_path / "site").items() if name not in own}
        assert overlay.CACHES.keys() == session.keys() - {"REFGRID_ENVIRONMENT"}


class TestLaidBefore:
    """What was laid to its end is not laid again; whatever else is there is replaced."""

    @pytest.fixture
    def once(self, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder that was laid, from a wheelhouse of two environments, and a mark in it."""
        monkeypatch.setattr(overlay, "_compile_modules", lambda _: None)  # of all that this interpreter has
        self.house, self.index = tmp_path / "wheelhouse", index
        self.pack()
        lay(Wheelhouse(self.house), "mine", site := tmp_path / "site")
        (site / "mark").touch()
        return site

    def pack(self) -> None:
        build([cargo(self.index, name, machine=()) for name in ("mine", "yours")], self.house, 80_000)

    def again(self, site: Path, name: str = "mine") -> bool:
        """Whether the wheels were laid again."""
        assert lay(Wheelhouse(self.house), name, site) == site / overlay.VARIABLES
        return not (site / "mark").exists()

    def test_the_same_is_left_as_it_is_and_no_part_is_read(self, once: Path) -> None:
        for part in self.house.glob("part-*"):
            part.unlink()

        assert not self.again(once)

    def test_another_manifest_is_laid_in_its_place(self, once: Path) -> None:
        (self.index / "tool-1.0-py3-none-any.whl").unlink()
        self.pack()

        assert self.again(once)
        assert not (once / "tool.py").exists()

    def test_another_environment_is_laid_in_its_place(self, once: Path) -> None:
        assert self.again(once, "yours")
        assert overlay.variables(once)["REFGRID_ENVIRONMENT"] == "yours"

    def test_what_was_cut_before_its_end_is_laid_again(self, once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def cut(_: Path) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(overlay, "_compile_modules", cut)
            with pytest.raises(KeyboardInterrupt):
                lay(Wheelhouse(self.house), "yours", once)
        (once / "mark").touch()

        assert self.again(once, "yours")
        (once / "mark").touch()
        assert not self.again(once, "yours")

    def test_a_folder_that_was_moved_is_laid_again(self, once: Path) -> None:
        moved = once.rename(once.with_name("moved"))

        assert self.again(moved)
        assert str(moved) in overlay.variables(moved)["PYTHONPATH"]

    @pytest.mark.parametrize(
        ("module", "name"),
        [pytest.param(sys, "version", id="interpreter"), pytest.param(overlay, "__file__", id="program")],
    )
    def test_another_interpreter_or_program_lays_again(
        self, once: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
    ) -> None:
        monkeypatch.setattr(module, name, __file__)

        assert self.again(once)

    def test_another_machine_is_refused_all_the_same(self, once: Path) -> None:
        manifest = (self.house / overlay.MANIFEST).read_text()
        (self.house / overlay.MANIFEST).write_text(manifest.replace(f'"{PYTHON}"', '"3.9"'))

        with pytest.raises(OverlayError, match=r"but the wheels are for 3\.9"):
            self.again(once)
