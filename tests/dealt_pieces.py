"""Tasks to deal to processes of their own, which import this module by its name."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from refgrid.running.devices import VISIBLE


@dataclass(frozen=True)
class Piece:
    """A task that notes who else is there while it runs."""

    name: str
    need: float
    folder: Path
    wants: int = 1  # goes on when so many have begun, or ends in an error


def noted(piece: Piece) -> tuple[str, str | None, list[str]]:
    """Its name, its process's device, and what ran when it began, by the names of files."""
    beside = sorted(path.name for path in piece.folder.iterdir())
    here = piece.folder / piece.name
    here.touch()
    (piece.folder.parent / f"{piece.name}.begun").touch()
    given_up = time.monotonic() + 60
    while len(list(piece.folder.parent.glob("*.begun"))) < piece.wants:
        if time.monotonic() > given_up:
            raise TimeoutError(f"{piece.name} waited for {piece.wants} to run at once")
        time.sleep(0.01)
    here.unlink()
    return piece.name, os.environ.get(VISIBLE), beside


def killed(piece: Piece) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return piece.name
