"""Imports of what an environment pins, tried in processes of their own: by stand-ins that raise, hang and kill."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest

from refgrid.environments import imports
from refgrid.environments.audit import audit
from refgrid.environments.declared import EnvironmentSpec
from refgrid.environments.imports import Imports, import_faults, modules_of
from refgrid.environments.measured import Environment, measure

NO_DRIVER = "libcuda.so.1: cannot open shared object file: No such file or directory"
# As sgl_kernel says it: the first line is its own, what is missing stands below.
KERNELS = f"raise ImportError('\\n[kernels] CRITICAL: no common_ops!\\n\\nError details:\\n- ImportError: {NO_DRIVER}')"
BEHIND = f"""
try:
    raise OSError('/opt/any/{NO_DRIVER}')
except OSError as error:
    raise RuntimeError('no kernels') from error
"""
STARTS_ANOTHER_AND_HANGS = """
import subprocess, time
open({!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid))
time.sleep(600)
"""
SPEC = EnvironmentSpec.model_validate(
    {
        "name": "mine",
        "kind": "venv",
        "python": ">=3.10,<3.99",
        "pins": ("torch==1.0", "kernels-python==2.0"),
        "origin": "nobody",
        "exclude-newer": "2026-07-15",
    }
)
HERE = measure("mine", "cpu", ())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is installed there comes before all else, here and in processes that are started."""
    (folder := tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return folder


def install(site: Path, module: str, text: str, distribution: str = "", version: str = "1.0") -> Distribution:
    (site / f"{module}.py").write_text(text)
    info = site / f"{(distribution or module).replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution or module}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{module}.py,,\n")
    return PathDistribution(info)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("x = 1", "", id="sound"),
        pytest.param("import nowhere", "raises ModuleNotFoundError: No module named 'nowhere'", id="raises"),
        pytest.param("raise ValueError('\\none\\ntwo')", "raises ValueError: one", id="the first line of several"),
        pytest.param("raise SystemExit", "raises SystemExit: without a word", id="exits"),
        pytest.param(f"raise ImportError('{NO_DRIVER}')", f"{NO_DRIVER}; it needs a GPU's driver", id="no driver"),
        pytest.param(
            KERNELS,
            "raises ImportError: [kernels] CRITICAL: no common_ops!; it needs a GPU's driver: ImportError: "
            + NO_DRIVER,
            id="no driver, said below",
        ),
        pytest.param(BEHIND, "no kernels; it needs a GPU's driver: OSError: " + NO_DRIVER, id="no driver, its cause"),
        pytest.param("import os; os.kill(os.getpid(), 11)", "ends its interpreter with SIGSEGV", id="killed"),
        pytest.param("import os; os._exit(7)", "ends its interpreter with status 7", id="leaves"),
        pytest.param("print('word'); import sys; sys.stdin.read()", "", id="reads and writes"),
    ],
)
def test_how_an_import_fails_is_told(site: Path, text: str, told: str) -> None:
    install(site, "kernels", text)
    found = import_faults(["kernels"])

    assert list(found) == (["kernels"] if told else [])
    assert found.get("kernels", "").endswith(told)


def test_one_that_hangs_is_ended_with_all_that_it_started(site: Path, tmp_path: Path) -> None:
    install(site, "kernels", STARTS_ANOTHER_AND_HANGS.format(str(tmp_path / "pid")))
    install(site, "sound", "x = 1")
    found = import_faults(["kernels", "sound"], seconds=10)

    assert found == {"kernels": "is not done after 10 s"}
    child = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    while child.exists() and child.read_text().split()[2] != "Z":
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "files", "modules"),
    [
        ("torch", ["torch/__init__.py", "torchgen/__init__.py", "torch/nn/__init__.py"], ["torch"]),
        ("flashinfer-python", ["build_utils.py", "flashinfer/__init__.py"], ["flashinfer"]),
        ("sglang-kernel", ["sgl_kernel/__init__.py", "deep_gemm/__init__.py", "_x.py"], ["sgl_kernel", "deep_gemm"]),
        ("pyzmq", ["zmq/__init__.py", "../../bin/tool", "pyzmq.libs/a.so"], ["zmq"]),
        ("fast", ["fast.cpython-311-x86_64-linux-gnu.so"], ["fast"]),
        ("cuda-python", ["cuda_python-1.0.dist-info/METADATA", "nvidia/cu13/lib.so", "a.pth"], []),
    ],
)
def test_what_is_imported_of_a_distribution(
    tmp_path: Path, name: str, files: Sequence[str], modules: list[str]
) -> None:
    found = install(tmp_path, "any", "", name)
    (tmp_path / f"{name.replace('-', '_')}-1.0.dist-info" / "RECORD").write_text(
        "".join(f"{file},,\n" for file in files)
    )

    assert modules_of(found) == modules


class TestAudit:
    @pytest.fixture(autouse=True)
    def installed(self, site: Path) -> None:
        install(site, "torch", "x = 1")
        install(site, "kernels", KERNELS, "kernels-python", "2.0")

    def found(
        self, imports: Imports | None, environment: Environment = HERE, spec: EnvironmentSpec = SPEC
    ) -> list[str]:
        told = [str(each) for each in audit(spec, "", environment, imports)]
        return [each for each in told if "CUDA" not in each]  # of the machine that the tests run on

    def test_a_broken_library_of_the_right_version_is_a_finding(self, tmp_path: Path) -> None:
        assert self.found(Imports(tmp_path)) == [
            "finding: kernels-python 2.0: import of kernels raises ImportError: [kernels] CRITICAL: no common_ops!; "
            f"it needs a GPU's driver: ImportError: {NO_DRIVER}"
        ]

    def test_where_an_error_stops_the_run_nothing_is_imported(self, tmp_path: Path) -> None:
        told = self.found(
            Imports(tmp_path), spec=SPEC.model_copy(update={"pins": ("torch==2.0", "kernels-python==2.0")})
        )

        assert told == ["error: torch 1.0 is here, but 2.0 is asked for"]

    def test_who_asks_for_no_imports_gets_none(self) -> None:
        assert self.found(None) == []

    def test_what_came_of_them_is_kept_until_something_is_installed(self, tmp_path: Path, site: Path) -> None:
        before = self.found(Imports(tmp_path))
        (site / "kernels.py").write_text("x = 1")

        assert self.found(Imports(tmp_path)) == before
        install(site, "another", "")
        assert self.found(Imports(tmp_path)) == []

    def test_after_an_install_all_are_tried_anew(self, tmp_path: Path, site: Path) -> None:
        before = self.found(Imports(tmp_path))
        (site / "kernels.py").write_text("x = 1")

        assert before
        assert self.found(Imports(tmp_path, anew=True)) == []
        assert self.found(Imports(tmp_path)) == []

    @pytest.mark.parametrize("name", ["LD_LIBRARY_PATH", "CUDA_HOME"])
    def test_another_path_is_another_import(
        self, tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        before = self.found(Imports(tmp_path))
        (site / "kernels.py").write_text("x = 1")
        monkeypatch.setenv(name, str(tmp_path))

        assert before
        assert self.found(Imports(tmp_path)) == []

    def test_what_hangs_is_not_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(imports, "import_faults", lambda _: {"kernels": "is not done after 600 s"})
        before = self.found(Imports(tmp_path))
        monkeypatch.undo()

        assert before == ["finding: kernels-python 2.0: import of kernels is not done after 600 s"]
        assert not list(tmp_path.glob("*.imports"))
