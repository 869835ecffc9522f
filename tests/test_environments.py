"""The table of environments: what is declared here is sound, and what cannot be is refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from refgrid.environments.declared import CUDA_OF_TORCH, EnvironmentsError, chosen, load_environments, load_table

TABLE = Path(__file__).resolve().parents[1] / "ci" / "environments.toml"

VENV = """
[[environment]]
name = "cu130"
kind = "venv"
python = "3.12"
pins = ["torch==2.11.0", "flashinfer-python[cu13]==0.6.12"]
cuda = "13.0"
origin = "sglang 0.5.15"
exclude-newer = 2026-07-15
"""

OVERLAY = """
[[environment]]
name = "cu130-overlay"
kind = "overlay"
python = "3.12"
pins = ["flashinfer-python==0.6.12"]
machine = ["torch==2.11.0+cu130"]
cuda = "13.0"
origin = "flashinfer 0.6.12"
exclude-newer = 2026-11-20
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "environments.toml"
    file.write_text(text)
    return file


def test_the_table_of_this_project_is_sound() -> None:
    declared = load_environments(TABLE)

    assert declared["cpu"].cuda is None
    assert {spec.group for spec in declared.values()} == {None, "cu124", "cu126", "cu128", "cu130", "cu132"}
    assert len([spec for spec in declared.values() if spec.kind == "overlay"]) == 4


def test_an_entry_is_read_whole(tmp_path: Path) -> None:
    spec = load_environments(write(tmp_path, VENV + OVERLAY))["cu130"]

    assert (spec.kind, spec.python, str(spec.torch), spec.lock) == ("venv", "3.12", "2.11.0", "cu130.txt")
    assert str(spec.exclude_newer) == "2026-07-15"


def test_the_torch_of_an_overlay_is_the_machines(tmp_path: Path) -> None:
    assert str(load_environments(write(tmp_path, OVERLAY))["cu130-overlay"].torch) == "2.11.0+cu130"


@pytest.mark.parametrize(("release", "cuda"), CUDA_OF_TORCH.items())
def test_the_cuda_that_a_torch_has_is_accepted_and_no_other(tmp_path: Path, release: str, cuda: str) -> None:
    fitting = VENV.replace("torch==2.11.0", f"torch=={release}.0").replace('cuda = "13.0"', f'cuda = "{cuda}"')
    named = fitting.replace('"cu130"', f'"cu{cuda.replace(".", "")}-made"')
    assert [spec.cuda for spec in load_environments(write(tmp_path, named)).values()] == [cuda]

    wrong = fitting.replace(f'cuda = "{cuda}"', 'cuda = "12.9"')
    with pytest.raises(EnvironmentsError, match=rf"torch {release}.0 is built for CUDA {cuda}, never for 12.9"):
        load_environments(write(tmp_path, wrong))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        pytest.param("kind", "kinds", "environment 'cu130': kinds: Extra inputs", id="unknown key"),
        pytest.param("[[environment]]", "[[environments]]", "environments: Extra inputs", id="unknown table"),
        pytest.param('"venv"', '"container"', "kind: Input should be 'venv' or 'overlay'", id="unknown kind"),
        pytest.param('origin = "sglang 0.5.15"', "", "origin: Field required", id="missing key"),
        pytest.param('"cu130"', '"../cu130"', "name: String should match", id="name leaves the folder"),
        pytest.param('"cu130"', '"cu128-made"', "a name for CUDA 13.0 begins with cu130-", id="name of another CUDA"),
        pytest.param('cuda = "13.0"\n', "", "cuda is missing: the name begins with cu130-", id="no CUDA"),
        pytest.param('"3.12"', '"312"', "python: String should match", id="no Python version"),
        pytest.param('"3.12"', '">=3.11,<3.14"', "must be one version", id="CUDA on a range of Pythons"),
        pytest.param("torch==2.11.0", "torch>=2.11", "'torch>=2.11' is no exact pin", id="loose pin"),
        pytest.param("torch==2.11.0", "torch==2.11.*", "is no exact pin", id="wildcard pin"),
        pytest.param("torch==2.11.0", "torch 2.11", "is no requirement", id="no pin at all"),
        pytest.param("torch==2.11.0", "torch==2.11.0; os_name=='nt'", "has a marker", id="conditional pin"),
        pytest.param('"torch==2.11.0", ', "", "no torch is pinned in pins", id="no torch"),
        pytest.param("torch==2.11.0", "torch==2.11.0+cu130", "is not on PyPI", id="build label"),
        pytest.param("torch==2.11.0", "torch==2.99.0", "is not known; the table", id="torch of the future"),
        pytest.param(
            '"torch==2.11.0"', '"torch==2.11.0", "Torch==2.10.0"', "'torch' is pinned twice", id="pinned twice"
        ),
        pytest.param('origin = "', 'machine = ["torch==2.11.0"]\norigin = "', "belongs to kind overlay", id="machine"),
        pytest.param("2026-07-15", '"last July"', "exclude-newer: Input should be a valid date", id="no date"),
        pytest.param('kind = "venv"', "kind = venv", "cannot be read", id="broken TOML"),
    ],
)
def test_a_table_that_cannot_be_is_refused_with_the_reason(tmp_path: Path, old: str, new: str, reason: str) -> None:
    assert old in VENV

    with pytest.raises(EnvironmentsError, match=re.escape(reason)) as refused:
        load_environments(write(tmp_path, VENV.replace(old, new)))
    assert str(tmp_path / "environments.toml") in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        pytest.param('machine = ["torch==2.11.0+cu130"]\n', "", "needs machine", id="over nothing"),
        pytest.param('"overlay"', '"venv"\nomit = ["*.so"]', "belongs to kind overlay", id="trimmed venv"),
        pytest.param("torch==2.11.0+cu130", "triton==3.6.0", "no torch is pinned in machine", id="over no torch"),
        pytest.param('cuda = "13.0"', 'cuda = "12.8"', "cuda 12.8 contradicts torch 2.11.0+cu130", id="other CUDA"),
    ],
)
def test_an_overlay_that_cannot_be_is_refused_with_the_reason(tmp_path: Path, old: str, new: str, reason: str) -> None:
    assert old in OVERLAY

    with pytest.raises(EnvironmentsError, match=re.escape(reason)):
        load_environments(write(tmp_path, OVERLAY.replace(old, new)))


def test_a_name_is_declared_once(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentsError, match="'cu130' is declared twice"):
        load_environments(write(tmp_path, VENV + VENV))


def test_the_name_of_a_cuda_means_all_of_it(tmp_path: Path) -> None:
    """`tests-cu130` would be one environment's session, and that of all."""
    with pytest.raises(EnvironmentsError, match=r"'cu130' means all environments of CUDA 13\.0: add whose set it is"):
        load_environments(write(tmp_path, VENV + VENV.replace('"cu130"', '"cu130-made"')))


def test_environments_are_chosen_by_name_or_cuda_in_the_tables_order(tmp_path: Path) -> None:
    cpu = VENV.replace('"cu130"', '"cpu"').replace('cuda = "13.0"\n', "")
    declared = load_environments(write(tmp_path, VENV.replace('"cu130"', '"cu130-made"') + cpu + OVERLAY))

    def names(*wanted: str) -> list[str]:
        return [spec.name for spec in chosen(wanted, declared)]

    assert names("cpu", "cu130-made") == ["cu130-made", "cpu"]
    assert names("cu130") == ["cu130-made", "cu130-overlay"]
    assert names() == []


def test_an_unknown_name_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    declared = load_environments(write(tmp_path, VENV.replace('"cu130"', '"cu130-made"') + OVERLAY))

    reason = "no environment is called 'cu128', 'cu999'; legal values: cu130-made, cu130-overlay, cu130"
    with pytest.raises(EnvironmentsError, match=f"^{reason}$"):
        chosen(["cu999", "cu130", "cu128"], declared)


def test_the_instruments_own_packages_are_named_as_distributions(tmp_path: Path) -> None:
    head = '[instrument]\nexclude-newer = 2026-11-15\npackages = ["Pytest_XDist"]\n'
    instrument = load_table(write(tmp_path, head + VENV)).instrument

    assert instrument is not None
    assert instrument.packages == ("pytest-xdist",)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    broken = VENV.replace('"venv"', '"container"') + OVERLAY.replace('"3.12"', '"312"')

    with pytest.raises(EnvironmentsError) as refused:
        load_environments(write(tmp_path, broken))
    assert len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "reason"), [("", "environment: Field required"), ("environment = []", "none is declared")]
)
def test_an_empty_table_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(EnvironmentsError, match=reason):
        load_environments(write(tmp_path, text))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        EnvironmentsError,
        match=r"nowhere\.toml: no such table of environments: a checkout of refgrid has one; this folder is /",
    ):
        load_environments(tmp_path / "nowhere.toml")
