"""A run proves definitions: where a reference beside them was edited and not rendered, it refuses to begin."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from refgrid.running.fresh import PACKAGE, demand_rendered

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Definitions and the references that they were rendered from, which this process finds there."""
    for folder in ("definitions", f"references/src/{PACKAGE}"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.syspath_prepend(tmp_path / "references/src")
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    return tmp_path


def test_definitions_that_say_what_their_references_say_are_run(checkout: Path) -> None:
    demand_rendered(checkout)


def test_a_reference_that_was_edited_and_not_rendered_ends_the_run(checkout: Path) -> None:
    file = checkout / "references/src" / PACKAGE / "norm.py"
    file.write_text(file.read_text().replace("torch.rsqrt(", "1.05 * torch.rsqrt("))

    with pytest.raises(pytest.UsageError, match=r"norm_h\d+.json: differs from .* and \d+ more; .*nox -s render"):
        demand_rendered(checkout)


def test_a_reference_that_cannot_be_rendered_is_named(checkout: Path) -> None:
    (checkout / "references/src" / PACKAGE / "norm.py").write_text("def (")

    with pytest.raises(pytest.UsageError, match=r"norm.toml: module: "):
        demand_rendered(checkout)


def test_nothing_is_known_of_a_data_set_without_references(tmp_path: Path) -> None:
    demand_rendered(tmp_path)
