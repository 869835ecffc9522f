"""A wheelhouse from end to end, over an environment that plays the vendor's container, and each of its guards."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import runpy
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from click.testing import CliRunner
from small_wheels import make_wheel

from refgrid.cli import main
from refgrid.environments.audit import Installed, audit
from refgrid.environments.declared import EnvironmentSpec
from refgrid.environments.measured import measure
from refgrid.overlays import overlay, wheels
from refgrid.overlays.overlay import OverlayError, Wheelhouse, lay
from refgrid.overlays.wheelhouse import Cargo, WheelhouseError, build
from refgrid.overlays.wheels import Source, read_have

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ".".join(map(str, sys.version_info[:2]))
NOISE = random.Random(0).randbytes(200_000)  # what no compressor makes smaller
ENTRY = {"kernels-1.0.dist-info/entry_points.txt": b"[refgrid.sources]\nkernels = kernels\n"}


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder and what is in it."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Container:
    """An interpreter with a torch of its own, which nobody may touch."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = str(folder / "bin" / "python3")
        (self.site,) = folder.glob("lib/python*/site-packages")
        info = self.site / "torch-2.13.0+cpu.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cpu\n")
        (self.site / "torch.py").write_text("__version__ = '2.13.0+cpu'\n")

    def run(self, *arguments: object, at: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [self.python, "-B", *map(str, arguments)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(command, cwd=at, env=kept, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Container:
    return Container(tmp_path_factory.mktemp("vendor"))


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder with one wheel of every kind."""
    (folder := tmp_path / "index").mkdir()
    make_wheel(folder, "kernels", {"kernels/__init__.py": b"VERSION = 1\n", "kernels/big.so": NOISE, **ENTRY})
    by_program = b"import sys, os, dsl; sys.path.insert(0, os.path.join(os.path.dirname(dsl.__file__), 'packages'))\n"
    parts = {"dsl/__init__.py": b"", "dsl/packages/cute.py": b"NAME = 'cute'\n", "dsl.pth": by_program}
    make_wheel(folder, "dsl", {**parts, "plain.pth": b"dsl/more\n", "dsl/more/extra.py": b""})
    data = {"tool-1.0.data/scripts/tool": b"#!/bin/sh\necho tool\n", "tool-1.0.data/purelib/tool.py": b""}
    make_wheel(folder, "tool", {**data, "tool-1.0.data/headers/tool.h": b""})
    return folder


def cargo(folder: Path, name: str = "mine", *, omit: tuple[str, ...] = (), **changed: Any) -> Cargo:
    told = {"python": PYTHON, "machine": ("torch==2.13.0",), "wheels": tuple(sorted(folder.glob("*.whl")))}
    wheels = {**told, **changed}["wheels"]
    demands = tuple(f"{wheel.name.partition('-')[0]}==1.0" for wheel in wheels)
    return Cargo(**{"name": name, "omit": omit, "demands": demands, **told, **changed})


@pytest.fixture
def packed(index: Path, tmp_path: Path) -> Path:
    """A wheelhouse of it all, in parts that the largest wheel does not fit into."""
    build([cargo(index)], tmp_path / "wheelhouse", 80_000)
    return tmp_path / "wheelhouse"


def laid(container: Container, packed: Path, target: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return container.run(packed / "overlay.py", "lay", "--target", target, *more)


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


SPEC = EnvironmentSpec.model_validate(
    {
        "name": "mine",
        "kind": "overlay",
        "python": PYTHON,
        "pins": ("kernels==1.0",),
        "machine": ("torch==2.13.0",),
        "origin": "nobody",
        "exclude-newer": "2026-07-15",
    }
)
LOCK = """kernels==1.0 \\
    --hash=sha256:aa
dsl==1.0 ; sys_platform == 'linux' \\
    --hash=sha256:bb
windows-only==1.0 ; sys_platform == 'win32' \\
    --hash=sha256:cc
torch==2.13.0 \\
    --hash=sha256:dd
"""
INSTRUMENT = "tool==1.0 \\\n    --hash=sha256:ee\ndsl==1.0 \\\n    --hash=sha256:bb\n"


class Uv:
    """Stands in for uv: an index that serves the wheels of a folder."""

    def __init__(self, index: Path) -> None:
        self.index, self.fetched = index, list[str]()

    def __call__(self, _: Path, *arguments: str) -> None:
        option = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        if arguments[0] == "build":
            make_wheel(Path(option["--out-dir"]), "refgrid", {})
        elif arguments[:2] == ("pip", "compile"):
            Path(option["--output-file"]).write_text(INSTRUMENT)
        else:
            name = Path(option["--requirement"]).read_text().partition("==")[0]
            self.fetched.append(name)
            found = list(self.index.glob(f"{name}-*.whl"))
            if not found:
                raise WheelhouseError(f"uv tool run failed: WARNING\nERROR: No matching distribution found for {name}")
            (Path(option["--dest"]) / found[0].name).write_bytes(found[0].read_bytes())


@pytest.fixture
def uv(index: Path, monkeypatch: pytest.MonkeyPatch) -> Uv:
    monkeypatch.setattr(wheels, "_uv", made := Uv(index))
    return made


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (locks := tmp_path / "ci" / "locks").mkdir(parents=True)
    (locks / "mine.txt").write_text(LOCK)
    (folder := tmp_path / "fetched").mkdir()
    return Source(tmp_path, folder)


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
