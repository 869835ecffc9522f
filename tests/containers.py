"""A machine whose torch is its own, as in a vendor's container, and overlays laid over it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

if sys.version_info >= (3, 11):
    pass
else:
    pass


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


def laid(container: Container, packed: Path, target: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return container.run(packed / "overlay.py", "lay", "--target", target, *more)
