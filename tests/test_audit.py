"""The audit: every error and finding it can have, on distributions, a toolkit and a driver made for the purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pynvml
import pytest
from click.testing import CliRunner
from packaging.version import Version

from refgrid.cli import main
from refgrid.environments import kernel_cache
from refgrid.environments.audit import AuditFinding, audit, audit_named, same_version
from refgrid.environments.declared import EnvironmentsError, EnvironmentSpec
from refgrid.environments.driver import DRIVER_FLOOR, driver_cuda, driver_fault
from refgrid.environments.measured import Environment, measure
from refgrid.records.record import read_runs

SPEC = EnvironmentSpec.model_validate(
    {
        "name": "cu130-mine",
        "kind": "venv",
        "python": "3.12",
        "pins": ("torch==2.11.0", "flashinfer-python==0.6.12"),
        "cuda": "13.0",
        "origin": "nobody",
        "exclude-newer": "2026-07-15",
    }
)
CPU_SPEC = SPEC.model_copy(update={"name": "cpu", "cuda": None, "pins": ("torch==2.13.0",)})
OVERLAY = SPEC.model_copy(
    update={"kind": "overlay", "pins": ("flashinfer-python==0.6.12",), "machine": ("torch==2.11.0+cu130",)}
)
LOCK = """# nox -s lock
requests==2.32.5 \\
    --hash=sha256:00
    # uploaded 2026-07-01
tomli==2.2.1 ; python_version < '3.9' \\
    --hash=sha256:00
"""
H200 = Environment(
    *("cu130-mine", "cuda", "3.12.3", "linux x86_64", "2.11.0", "13.0", "13.0.88", "580.159.04", "NVIDIA H200", 1), {}
)
SOUND = {"torch": "2.11.0", "flashinfer-python": "0.6.12", "requests": "2.32.5", "nvidia-cublas": "13.1.0.3"}


class Site:
    """A folder of distributions, which alone are installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, *files: str, **versions: str) -> None:
        for key, release in versions.items():
            name = key.replace("_", "-")
            info = self.folder / f"{name.replace('-', '_')}-{release}.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
            (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """An interpreter with a sound environment, tools to compile, a cache of its own and a driver."""
    made = Site(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(made.folder)])
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("c++", "ninja"):
        (tools / tool).write_text("#!/bin/sh\n")
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "kernels"))
    driver_with(monkeypatch, "580.159.04", 13000)
    return made


def driver_with(monkeypatch: pytest.MonkeyPatch, version: str, cuda: int) -> None:
    """The NVML of a machine with one H200."""
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda _: "NVIDIA H200")
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: version)
    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion_v2", lambda: cuda)


Changed = Mapping[str, str | None]


def found(
    site: Site, changed: Changed | None = None, *, spec: EnvironmentSpec = SPEC, environment: Environment = H200
) -> list[str]:
    """What the audit says of the sound environment with some distributions changed; None removes one."""
    wanted = {**SOUND, **{name.replace("_", "-"): version for name, version in (changed or {}).items()}}
    site.install(**{name: version for name, version in wanted.items() if version})
    return [str(each) for each in audit(spec, LOCK, environment)]


def test_what_is_as_asked_for_has_no_finding(site: Site) -> None:
    assert found(site) == []


class TestVersions:
    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"torch": "2.10.0"}, "error: torch 2.10.0 is here, but 2.11.0 is asked for"),
            ({"torch": None}, "error: torch 2.11.0 is asked for and missing"),
            ({"flashinfer_python": "0.6.3"}, "error: flashinfer-python 0.6.3 is here, but 0.6.12 is asked for"),
            ({"flashinfer_python": None}, "finding: flashinfer-python 0.6.12 is asked for and missing"),
            ({"requests": "2.31.0"}, "finding: requests 2.31.0 is here, but 2.32.5 is asked for"),
            ({"requests": None}, "finding: requests 2.32.5 is asked for and missing"),
        ],
    )
    def test_other_than_asked_for(self, site: Site, changed: Changed, told: str) -> None:
        assert found(site, changed) == [told]

    def test_an_error_comes_before_a_finding(self, site: Site) -> None:
        told = found(site, {"requests": None, "torch": "2.10.0"})

        assert [line.partition(":")[0] for line in told] == ["error", "finding"]

    def test_the_torch_of_an_overlay_is_the_machines(self, site: Site) -> None:
        assert found(site, {"torch": "2.12.0"}, spec=OVERLAY) == [
            "error: torch 2.12.0 is here, but 2.11.0+cu130 is asked for"
        ]

    @pytest.mark.parametrize(
        ("asked", "got", "same"),
        [
            ("2.11.0", "2.11.0", True),
            ("2.11.0", "2.11.0+cu130", True),
            ("2.11.0+cu130", "2.11.0", True),  # PyPI's metadata leave the label out
            ("2.11.0+cu130", "2.11.0+cu128", False),
            ("2.11.0", "2.11.1", False),
        ],
    )
    def test_a_build_label_counts_where_both_have_one(self, asked: str, got: str, same: bool) -> None:
        assert same_version(asked, got) is same

    @pytest.mark.parametrize(
        ("asked", "fits"), [("3.12", True), ("3.11", False), (">=3.11,<3.14", True), (">=3.13,<3.14", False)]
    )
    def test_another_python_is_an_error(self, site: Site, asked: str, *, fits: bool) -> None:
        told = found(site, spec=SPEC.model_copy(update={"python": asked}))

        assert told == ([] if fits else [f"error: this is Python 3.12.3, but {asked} is asked for"])

    def test_of_two_the_first_on_the_path_counts(self, site: Site, tmp_path: Path) -> None:
        over = Site(tmp_path / "over")
        over.install(requests="2.32.5")
        sys.path.insert(0, str(over.folder))

        assert found(site, {"requests": "2.31.0"}) == []

    def test_files_that_are_gone_are_named(self, site: Site) -> None:
        site.install("flashinfer/ops.so", "flashinfer/a.pyc", "../bin/tool", flashinfer_python="0.6.12")

        told = found(site, {"flashinfer_python": None})
        assert told == ["finding: flashinfer-python 0.6.12 is here without flashinfer/ops.so"]


class TestCuda:
    @pytest.mark.parametrize(("cuda", "built"), [("12.8", "for CUDA 12.8"), (None, "without CUDA")])
    def test_torch_of_another_cuda_is_an_error(self, site: Site, cuda: str | None, built: str) -> None:
        told = found(site, environment=replace(H200, cuda=cuda, toolkit=None, driver=None))

        assert told[0] == f"error: torch 2.11.0 is built {built}, but cu130-mine asks for CUDA 13.0"

    def test_a_cuda_build_where_a_cpu_build_is_asked_for(self, site: Site) -> None:
        told = found(site, {"torch": "2.13.0"}, spec=CPU_SPEC, environment=replace(H200, torch="2.13.0"))

        assert told == ["finding: torch 2.13.0 is a build for CUDA 13.0, but cpu asks for a CPU build"]

    def test_mixed_majors_are_told_by_who_brings_them(self, site: Site) -> None:
        told = found(
            site,
            {
                "nvidia-cudnn-cu13": "9.19.0.56",
                "nvidia-cuda-runtime-cu12": "12.8.90",
                "nvidia-cutlass-dsl-libs-cu12": "4.8.1",
                "cuda-toolkit": "13.0.2",
            },
        )
        assert told == [
            "finding: CUDA majors are mixed: nvidia-cuda-runtime-cu12 12.8.90, nvidia-cutlass-dsl-libs-cu12 4.8.1 of "
            "CUDA 12; cuda-toolkit 13.0.2, nvidia-cudnn-cu13 9.19.0.56 of CUDA 13"
        ]

    def test_many_of_one_major_are_counted(self, site: Site) -> None:
        twelve = {f"nvidia_{name}_cu12": "12.0" for name in "abcde"}

        assert "nvidia-c-cu12 12.0 and 2 more of CUDA 12" in found(site, {"cuda_python": "13.0.1", **twelve})[0]

    def test_libraries_with_versions_of_their_own_are_no_major(self, site: Site) -> None:
        assert found(site, {"nvidia_cufft": "12.0.0.61", "nvidia_cusolver": "12.0.4", "nvidia_cudnn_cu13": "9.1"}) == []


class TestDriver:
    def test_too_old_a_driver_says_which_is_needed_and_which_is_there(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver_with(monkeypatch, "535.104", 12020)
        told = found(site, environment=replace(H200, driver="535.104"))

        assert told[0] == "error: driver 535.104 is too old for CUDA 13.0, which needs 580.65.06"

    def test_on_the_cpu_it_stops_nobody(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        driver_with(monkeypatch, "535.104", 12020)
        told = found(site, environment=replace(H200, driver="535.104", device="cpu"))

        assert told[0] == "finding: driver 535.104 is too old for CUDA 13.0, which needs 580.65.06"

    def test_a_compatibility_package_serves_an_old_driver(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        driver_with(monkeypatch, "535.104", 13000)
        told = found(site, environment=replace(H200, driver="535.104"))

        assert told == [
            "finding: driver 535.104 is too old for CUDA 13.0, which needs 580.65.06; "
            "a compatibility package with CUDA 13.0 stands in for it"
        ]

    @pytest.mark.parametrize("floor", DRIVER_FLOOR.values())
    @pytest.mark.parametrize("major", DRIVER_FLOOR)
    def test_the_floor_holds_for_every_minor_release(self, major: int, floor: str) -> None:
        fault = driver_fault(f"{major}.4", floor)

        assert bool(fault) is (floor < DRIVER_FLOOR[major])

    def test_a_driver_that_is_no_version_is_told(self) -> None:
        assert "driver 'N/A' is no version" in driver_fault("13.0", "N/A")

    def test_without_a_driver_there_is_no_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

        monkeypatch.setattr(pynvml, "nvmlInit", fail)

        assert driver_cuda() is None
        assert driver_fault("13.0", None) == ""


class TestToolkit:
    def test_of_another_cuda_than_torchs(self, site: Site) -> None:
        told = found(site, environment=replace(H200, toolkit="12.8.93"))

        assert told == ["finding: nvcc is of CUDA 12.8.93, but torch's runtime is of CUDA 13.0"]

    def test_newer_than_the_driver(self, site: Site) -> None:
        told = found(site, environment=replace(H200, toolkit="13.2.10"))

        assert told[1] == "finding: nvcc is of CUDA 13.2.10: the driver's CUDA 13.0 refuses PTX of it"

    @pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "PATH"])
    def test_it_is_found_where_a_build_would_find_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
    ) -> None:
        nvcc = tmp_path / "cuda" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.80'\n")
        nvcc.chmod(0o755)
        for each in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(each, raising=False)
        monkeypatch.setenv(variable, str(nvcc.parent if variable == "PATH" else nvcc.parents[1]))

        assert measure("local", "cpu", ()).toolkit == "13.1.80"

    @pytest.mark.parametrize("lacking", ["nvcc", "c++", "ninja"])
    def test_no_compiler(self, site: Site, tmp_path: Path, lacking: str) -> None:
        if lacking != "nvcc":
            (tmp_path / "bin" / lacking).unlink()
        told = found(site, environment=replace(H200, toolkit=None if lacking == "nvcc" else "13.0.88"))

        assert told[0].startswith(f"finding: no {lacking}")
        assert told[0].endswith("FlashInfer cannot compile its kernels here")

    def test_no_compiler_is_no_finding_where_all_came_compiled(self, site: Site) -> None:
        assert found(site, {"flashinfer_jit_cache": "0.6.12+cu130"}, environment=replace(H200, toolkit=None)) == []


class TestKernels:
    @pytest.mark.parametrize("name", ["flashinfer_cubin", "flashinfer_jit_cache"])
    def test_of_another_flashinfer(self, site: Site, name: str) -> None:
        told = found(site, {name: "0.6.11"})

        package = name.replace("_", "-")
        assert told == [f"finding: {package} 0.6.11 holds kernels of another FlashInfer than 0.6.12"]

    def test_of_another_cuda(self, site: Site) -> None:
        told = found(site, {"flashinfer_jit_cache": "0.6.12+cu129"})

        assert told == ["finding: flashinfer-jit-cache 0.6.12+cu129 holds kernels of another CUDA than 13.0"]

    @pytest.fixture
    def cached(self, tmp_path: Path) -> Iterator[Path]:
        """A cache that this environment claimed before it compiled one kernel."""
        kernel_cache.claim(tmp_path / "kernels", H200)
        kernel = tmp_path / "kernels/.cache/flashinfer/0.6.12/90a/cached_ops/norm/norm.so"
        kernel.parent.mkdir(parents=True)
        kernel.write_bytes(b"")
        return tmp_path / "kernels"  # type: ignore[return-value]

    @pytest.mark.usefixtures("cached")
    def test_cached_for_this_environment(self, site: Site) -> None:
        assert found(site) == []

    def test_cached_for_another_torch_and_cuda(self, site: Site, cached: Path) -> None:
        (cached / kernel_cache.STAMP).unlink()
        folder = cached / ".cache" / "flashinfer"
        told = {"torch": "2.9.1", "CUDA": "12.8", "nvcc": "13.0.88", "Python": "3.12"}
        (cached / kernel_cache.STAMP).write_text(json.dumps(told))

        assert found(site) == [
            f"error: {folder} holds kernels compiled for torch 2.9.1, CUDA 12.8, but here is torch 2.11.0, CUDA 13.0: "
            "delete it"
        ]

    @pytest.mark.parametrize("text", ["", "{", "[]"])
    def test_cached_for_nobody_knows_whom(self, site: Site, cached: Path, text: str) -> None:
        (cached / kernel_cache.STAMP).write_text(text)

        assert found(site)[0].endswith("a torch and a CUDA that nobody wrote down")

    def test_a_folder_with_kernels_is_not_claimed_by_a_later_set(self, cached: Path) -> None:
        before = (cached / kernel_cache.STAMP).read_text()
        kernel_cache.claim(cached, replace(H200, torch="2.9.1"))

        assert (cached / kernel_cache.STAMP).read_text() == before

    def test_an_empty_folder_goes_to_whoever_comes(self, tmp_path: Path) -> None:
        for torch in ("2.9.1", "2.11.0"):
            kernel_cache.claim(tmp_path, replace(H200, torch=torch))

        assert json.loads((tmp_path / kernel_cache.STAMP).read_text())["torch"] == "2.11.0"

    def test_the_folder_that_all_share(self, site: Site, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FLASHINFER_WORKSPACE_BASE")
        monkeypatch.setenv("HOME", str(cached))

        assert found(site)[0].endswith("that every torch and CUDA share; FLASHINFER_WORKSPACE_BASE parts them")


TABLE = """
[[environment]]
name = "cu130-mine"
kind = "venv"
python = "3.12"
pins = ["torch==2.11.0"]
cuda = "13.0"
origin = "nobody"
exclude-newer = 2026-07-15

[[environment]]
name = "cu130-yours"
kind = "venv"
python = "3.12"
pins = ["torch==2.12.0"]
cuda = "13.0"
origin = "nobody"
exclude-newer = 2026-07-15
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "environments.toml"
    file.write_text(TABLE)
    return file


class TestCommand:
    def run(self, table: Path, *arguments: str) -> Any:
        return CliRunner().invoke(main, ["audit", "--table", str(table), "--device", "cpu", *arguments])

    def test_an_error_ends_it_with_status_3(self, site: Site, table: Path) -> None:
        site.install(torch="2.10.0")
        told = self.run(table, "--environment", "cu130-mine")

        assert told.exit_code == 3
        assert "error: torch 2.10.0 is here, but 2.11.0 is asked for" in told.output

    def test_json(self, site: Site, table: Path) -> None:
        site.install(torch="2.10.0")
        told = json.loads(self.run(table, "--environment", "cu130-mine", "--json").output)

        assert AuditFinding(**told[0]) == AuditFinding("error", "torch 2.10.0 is here, but 2.11.0 is asked for")

    def test_a_name_that_does_not_exist_lists_those_that_do(self, table: Path) -> None:
        told = self.run(table, "--environment", "cu13-mine")

        assert told.exit_code == 2
        assert " ".join(told.output.split()).endswith("'cu13-mine'; legal values: cu130-mine, cu130-yours")

    def test_a_cuda_is_no_environment(self, table: Path) -> None:
        told = self.run(table, "--environment", "cu130")

        assert told.exit_code == 2
        assert "'cu130' is a CUDA and no environment; give one of cu130-mine, cu130-yours" in told.output

    def test_who_claims_to_be_none_has_nothing_to_be_held_against(self, table: Path, tmp_path: Path) -> None:
        local = replace(H200, name="local")

        assert audit_named(table, local) == []
        assert audit_named(tmp_path / "nowhere.toml", local) == []

    def test_a_name_that_is_not_declared_is_refused_or_where_there_is_no_table_a_finding(
        self, table: Path, tmp_path: Path
    ) -> None:
        other = replace(H200, name="cu130-overlay")

        with pytest.raises(EnvironmentsError, match=r"'cu130-overlay'; legal values: cu130-mine, cu130-yours$"):
            audit_named(table, other)
        (told,) = audit_named(tmp_path / "ci" / "environments.toml", other)
        assert str(told) == "finding: not audited: there is no ci/environments.toml to declare it"

    def test_imports_are_part_of_it_and_kept_for_the_runs(
        self, site: Site, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site.install("torch/__init__.py", torch="2.11.0")
        (site.folder / "torch").mkdir()
        (site.folder / "torch" / "version.py").write_text("cuda: str = '13.0'\n")
        (site.folder / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: file too short')\n")
        monkeypatch.setenv("PYTHONPATH", str(site.folder))
        here = TABLE.replace('"3.12"', '">=3.10,<3.99"').replace('cuda = "13.0"\n', "").replace("cu130-", "here-")
        table.write_text(here)
        told = self.run(table, "--environment", "here-mine", "--results", str(tmp_path / "results"))

        assert "finding: torch 2.11.0: import of torch raises OSError: libcudart.so.13: file too short" in told.output
        assert list((tmp_path / "results" / ".digests").glob("*.imports"))

    def test_it_imports_no_torch(self) -> None:
        code = "import sys, refgrid.environments.audit, refgrid.cli; assert 'torch' not in sys.modules"
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

        assert told.returncode == 0, told.stderr


class TestRun:
    """pytest under a declared name audits before its first case."""

    @pytest.fixture
    def checkout(self, tmp_path: Path, table: Path) -> Path:
        (tmp_path / "ci").mkdir()
        table.rename(tmp_path / "ci" / "environments.toml")
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        (tmp_path / "test_any.py").write_text("def test_any(): print('a test ran')\n")
        return tmp_path

    def start(self, checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device", "cpu", "-s", *arguments]
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, timeout=120)

    @pytest.mark.parametrize("workers", ["-n0", "-n1"])
    def test_a_run_that_is_not_its_environment_ends_with_status_3(self, checkout: Path, workers: str) -> None:
        told = self.start(checkout, "--environment", "cu130-mine", workers)

        assert told.returncode == 3
        assert "this is not environment 'cu130-mine'" in told.stdout + told.stderr
        assert "but 2.11.0 is asked for" in told.stdout + told.stderr
        assert "a test ran" not in told.stdout

    @pytest.mark.parametrize("arguments", [["--environment", "cu130-mine", "--no-audit"], [], ["--collect-only"]])
    def test_a_run_under_no_declared_name_goes_on(self, checkout: Path, arguments: list[str]) -> None:
        assert self.start(checkout, *arguments).returncode == 0

    @pytest.mark.parametrize("more", [[], ["--collect-only"], ["--no-audit"], ["-n1"]], ids=str)
    def test_a_column_that_nobody_declared_is_refused(self, checkout: Path, more: list[str]) -> None:
        told = self.start(checkout, "--environment", "cu13-mine", *more)

        assert told.returncode == 4
        legal = "no environment is called 'cu13-mine'; legal values: cu130-mine, cu130-yours, local"
        assert f"--environment (or REFGRID_ENVIRONMENT): {legal}" in told.stdout + told.stderr
        assert "a test ran" not in told.stdout

    def test_so_is_one_of_the_variable(self, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("REFGRID_ENVIRONMENT", "cu130")

        told = self.start(checkout)
        assert told.returncode == 4
        assert "'cu130' is a CUDA and no environment; give one of cu130-mine" in told.stdout + told.stderr

    def test_and_what_is_due_of_it_is_not_told(self, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(checkout)
        told = CliRunner().invoke(main, ["due", "test_any.py", "--environment", "cu13-mine"])

        assert told.exit_code == 2
        assert "legal values: cu130-mine, cu130-yours, local" in " ".join(told.output.split())

    def test_what_is_odd_is_told_and_in_the_records(
        self, checkout: Path, double: dict[str, Any], write_definition: Any
    ) -> None:
        write_definition(double, 1)
        (checkout / "test_any.py").write_text("from refgrid.contract import ReferenceContract as TestAll\n")
        (checkout / "ci" / "environments.toml").write_text(
            TABLE.partition('[[environment]]\nname = "cu130-yours"')[0]
            .replace("cu130-mine", "here")
            .replace('"3.12"', '">=3.10,<3.99"')
            .replace('cuda = "13.0"\n', "")
            .replace("2.11.0", Version(version("torch")).public)
        )
        (checkout / "ci" / "locks").mkdir()
        (checkout / "ci" / "locks" / "here.txt").write_text("of-nobody==1.0 \\\n")
        told = self.start(checkout, "--environment", "here", "--dataset", ".", "--results", "results")

        (run,) = read_runs(checkout / "results")
        assert run.header.findings == ("of-nobody 1.0 is asked for and missing",)
        assert "finding: of-nobody 1.0 is asked for and missing" in told.stdout

    def test_without_an_audit_the_records_say_so(
        self, checkout: Path, double: dict[str, Any], write_definition: Any
    ) -> None:
        write_definition(double, 1)
        (checkout / "test_any.py").write_text("from refgrid.contract import ReferenceContract as TestAll\n")
        self.start(checkout, "--environment", "cu130-mine", "--no-audit", "--dataset", ".", "--results", "results")

        (run,) = read_runs(checkout / "results")
        assert run.findings == ("not audited: --no-audit",)

    def test_a_table_that_cannot_be_read_ends_it(self, checkout: Path) -> None:
        (checkout / "ci" / "environments.toml").write_text("[")

        told = self.start(checkout)
        assert told.returncode == 4
        assert "cannot be read" in told.stdout + told.stderr
