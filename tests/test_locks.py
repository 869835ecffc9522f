"""The locks of the environments: current, of their date, and naming no machine; each check fires."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from refgrid.cli import main
from refgrid.environments.declared import EnvironmentSpec, load_table
from refgrid.environments.locks import faults_of, lock_faults, locked, strange_lines, words_faults

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TABLE = load_table(ROOT / "ci" / "environments.toml")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CUDA, OVERLAY, GONE = "cu130-sglang0.5.15", "cu130-overlay", "cu128-sglang0.5.4"


def spec_of(name: str) -> EnvironmentSpec:
    return TABLE.by_name[name]


def lock_of(name: str) -> str:
    return (ROOT / "ci" / "locks" / spec_of(name).lock).read_text()


def words_of(name: str) -> str:
    return (ROOT / "ci" / "locks" / spec_of(name).unresolvable).read_text()


def faults(name: str, text: str) -> list[str]:
    return list(faults_of(spec_of(name), text, PROJECT, TABLE.instrument))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The table, its locks and the instrument's needs, to be damaged."""
    shutil.copytree(ROOT / "ci", tmp_path / "ci")
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def check(checkout: Path) -> list[str]:
    return lock_faults(checkout / "ci" / "environments.toml", checkout / "pyproject.toml")


def test_the_locks_of_this_project_are_current(checkout: Path) -> None:
    assert check(checkout) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        pytest.param("torch==2.11.0", "torch==2.10.0", "torch==2.11.0 is not met by ['2.10.0']", id="other pin"),
        pytest.param("torch==2.11.0", "", "torch==2.11.0 is not met by nothing", id="pin gone"),
        pytest.param("hypothesis==6", "hypothesis==5", "hypothesis>=6.130 is not met", id="test group"),
        pytest.param("pydantic==2", "pydantic==1", "pydantic>=2.10 is not met", id="own requirement"),
        pytest.param("as of 2026", "as of 2025", "is not of: nox -s lock", id="other date"),
        pytest.param("Python 3.12", "Python 3.11", "is not of: nox -s lock", id="other Python"),
    ],
)
def test_a_stale_lock_is_noticed(old: str, new: str, fault: str) -> None:
    assert old in lock_of(CUDA)

    assert [each for each in faults(CUDA, lock_of(CUDA).replace(old, new)) if each.startswith(fault)]


@pytest.mark.parametrize(
    ("name", "field", "changed"),
    [
        pytest.param(CUDA, "pins", spec_of(CUDA).pins[1:], id="one that is asked for no more"),
        pytest.param(
            "cu124-sglang0.4.6",
            "pins",
            tuple(pin.replace("[srt]", "") for pin in spec_of("cu124-sglang0.4.6").pins),
            id="less of one",
        ),
        pytest.param("cpu", "without", (), id="nothing left out"),
        pytest.param(OVERLAY, "pins", spec_of(OVERLAY).pins[:-1], id="a wheel that is carried no more"),
    ],
)
def test_a_lock_that_was_made_of_more_or_other_pins_is_stale(name: str, field: str, changed: tuple[str, ...]) -> None:
    spec = spec_of(name).model_copy(update={field: changed})

    (told,) = faults_of(spec, lock_of(name), PROJECT, TABLE.instrument)

    assert told.startswith(f"is not of: nox -s lock -- {name} (as of ")


@pytest.mark.parametrize("name", ["torch", "cuda-toolkit", "nvidia-nccl-cu13"])
def test_torch_and_its_cuda_libraries_are_noticed_in_the_cpu_lock(name: str) -> None:
    assert f"{name} does not belong there" in faults("cpu", f"{lock_of('cpu')}{name}==1.0 \\\n")


def test_the_cpu_lock_holds_no_cuda_library() -> None:
    held = {pin.name for pin in locked(lock_of("cpu"))}

    assert {name for name in held if name.startswith(("nvidia-", "cuda-"))} == {"nvidia-ml-py"}


def with_pin(name: str, day: str) -> str:
    return lock_of(CUDA) + f"{name}==1.0 \\\n    --hash=sha256:{'0' * 64}\n{day}"


def test_a_pin_without_hash_is_noticed() -> None:
    assert faults(CUDA, lock_of(CUDA) + "a==1.0 \\\n    # uploaded 2020-01-01\n") == ["a==1.0 has no hash"]


def test_a_library_newer_than_its_set_is_noticed() -> None:
    found = faults(CUDA, with_pin("a", "    # uploaded 2026-07-16\n"))

    assert found == ["a==1.0 is of 2026-07-16, newer than 2026-07-15"]
    assert faults(CUDA, with_pin("a", "    # uploaded 2026-07-15\n")) == []


def test_a_pin_that_tells_no_day_is_noticed() -> None:
    assert faults(CUDA, with_pin("a", "")) == ["a==1.0 does not say when it was uploaded"]


def test_what_only_the_instrument_uses_has_a_date_of_its_own() -> None:
    assert TABLE.instrument is not None
    assert faults(CUDA, with_pin("execnet", f"    # uploaded {TABLE.instrument.exclude_newer}\n")) == []

    late = faults(CUDA, with_pin("execnet", "    # uploaded 2027-01-01\n"))
    assert late == [f"execnet==1.0 is of 2027-01-01, newer than {TABLE.instrument.exclude_newer}"]


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://pypi.org/simple",
        "--find-links wheels",
        "#    uv pip compile /home/me/pins.in",
        "-e .",
        "torch @ file:///home/me/torch.whl",
        "torch>=2.5 \\",
        "    --hash=md5:0123",
        "    # via torch",
    ],
)
def test_a_line_that_names_a_machine_or_pins_nothing_is_noticed(line: str) -> None:
    text = lock_of("cpu") + line + "\n"

    assert strange_lines(text) == [line]
    assert f"is no pin, hash or comment: {line!r}" in faults("cpu", text)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        pytest.param("as of 2025", "as of 2024", "is not of: nox -s lock -- cu128", id="other date"),
        pytest.param("# tried 2026", "# 2026", "does not say when it was tried", id="when"),
        pytest.param("apache", "https://index/apache", "names a machine or an address", id="address"),
    ],
)
def test_stale_words_of_the_resolver_are_noticed(old: str, new: str, fault: str) -> None:
    assert old in words_of(GONE)
    assert list(words_faults(spec_of(GONE), words_of(GONE))) == []

    found = list(words_faults(spec_of(GONE), words_of(GONE).replace(old, new)))
    assert [each for each in found if each.startswith(fault)]


def test_words_of_the_resolver_about_other_pins_are_stale() -> None:
    spec = spec_of(GONE).model_copy(update={"pins": spec_of(GONE).pins[:-1]})

    (told,) = words_faults(spec, words_of(GONE))
    assert told.startswith("is not of: ")


def test_missing_words_of_the_resolver_are_noticed() -> None:
    head = "".join(line for line in words_of(GONE).splitlines(keepends=True) if line.startswith("#"))

    assert list(words_faults(spec_of(GONE), head)) == ["does not say why: the resolver's words are missing"]


def test_an_environment_has_a_lock_or_cannot_have_one(checkout: Path) -> None:
    locks = checkout / "ci" / "locks"
    shutil.copyfile(locks / f"{OVERLAY}.txt", locks / f"{GONE}.txt")
    (locks / "cpu.txt").unlink()
    (locks / "cu999.txt").write_text("")

    found = check(checkout)

    assert [each for each in found if f"{GONE}.unresolvable.txt: stands beside {GONE}.txt" in each]
    assert [each for each in found if each.endswith("cpu.txt: is missing; nox -s lock -- cpu")]
    assert [each for each in found if "cu999.txt: belongs to no environment of" in each]
    assert len(found) == 3


def run(checkout: Path, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, [*arguments, "--table", str(checkout / "ci" / "environments.toml")])
    return done.exit_code, done.output


def test_the_command_says_what_is_stale_and_how_to_mend_it(checkout: Path) -> None:
    assert run(checkout, "check-environments") == (0, "")

    table = checkout / "ci" / "environments.toml"
    table.write_text(table.read_text().replace('"flashinfer-python==0.6.6"', '"flashinfer-python==0.6.7"'))
    status, told = run(checkout, "check-environments")

    assert status == 1
    assert told.strip().endswith("flashinfer-python==0.6.7 is not met by ['0.6.6']; nox -s lock -- cu128-vllm0.19.0")


def test_a_table_that_cannot_be_read_is_told(checkout: Path) -> None:
    (checkout / "ci" / "environments.toml").write_text("environment = []")

    status, told = run(checkout, "check-environments")
    assert (status, "none is declared" in told) == (2, True)


@pytest.mark.parametrize("command", ["lock"])
def test_an_unknown_environment_is_refused_with_those_that_exist(checkout: Path, command: str) -> None:
    status, told = run(checkout, command, "cu999", "cpu")

    assert status == 2
    assert "no environment is called 'cu999'; legal values: cpu, " in told
    assert all(name in told for name in (*TABLE.by_name, "cu124", "cu132"))


def test_overlays_of_one_machine_differ_in_flashinfer_alone() -> None:
    """Then what differs between their columns is FlashInfer's doing."""
    overlays = [spec for spec in TABLE.environment if spec.kind == "overlay"]
    beside = {
        spec.name: {pin for pin in spec.pins if not pin.startswith(("flashinfer-", "nccl-extensions"))}
        for spec in overlays
    }
    without_sglang = beside.pop("cu130-overlay-0.5.3")  # which cannot be imported beside that FlashInfer
    (with_sglang,) = {frozenset(pins) for pins in beside.values()}

    assert len({spec.pins for spec in overlays}) == len(overlays) == 4
    assert without_sglang < with_sglang
    assert {pin.partition("==")[0] for pin in without_sglang} >= {"transformers", "apache-tvm-ffi"}
    assert not any(pin.startswith("sglang") for pin in without_sglang)
    assert len({(spec.machine, spec.exclude_newer, spec.python) for spec in overlays}) == 1
