"""Holds the definitions of a checkout against its references: what runs is the text that was rendered."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from refgrid.dataset.render import RenderError, stale

PACKAGE = "refgrid_references"


def demand_rendered(root: Path) -> None:
    """Raises UsageError where references beside the definitions were edited, not rendered: a run would be of the old.

    Of another data set, or of references that are installed from elsewhere, nothing is known.
    """
    spec = importlib.util.find_spec(PACKAGE)
    own = (root / "references" / "src" / PACKAGE).resolve()
    if spec is None or own not in map(_resolved, spec.submodule_search_locations or ()):
        return
    try:
        late = stale(PACKAGE, root)
    except RenderError as error:
        raise pytest.UsageError(str(error)) from error
    if late:
        more = f", and {len(late) - 1} more" if len(late) > 1 else ""
        raise pytest.UsageError(
            f"{late[0]} from what references/ says{more}; a run proves the text in definitions/: "
            "`nox -s render` writes it anew"
        )


def _resolved(folder: str) -> Path:
    return Path(folder).resolve()
