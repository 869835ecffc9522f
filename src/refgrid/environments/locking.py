"""Making the locks: the resolver pins one environment as it was on its date, or says why nobody can any more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.utils import canonicalize_name

from refgrid.environments.declared import EnvironmentSpec, EnvironmentTable
from refgrid.environments.locks import head

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Settings of the machine that would otherwise decide what is in a lock; where its files lie (UV_CACHE_DIR) may stay.
MACHINE_SETTINGS = (
    *("UV_CONSTRAINT", "UV_DEFAULT_INDEX", "UV_EXCLUDE", "UV_EXCLUDE_NEWER", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS"),
    *("UV_INDEX", "UV_INDEX_STRATEGY", "UV_INDEX_URL", "UV_NO_BINARY", "UV_NO_BUILD", "UV_NO_INDEX", "UV_OVERRIDE"),
    *("UV_PRERELEASE", "UV_RESOLUTION", "UV_TORCH_BACKEND", "UV_CONFIG_FILE", "UV_CUSTOM_COMPILE_COMMAND"),
)
_UNSOLVABLE = "No solution found when resolving dependencies"
# An index that could not be asked is no evidence that a set has gone.
_NOT_ASKED = re.compile(r"network was disabled|not found in the cache|Failed to fetch")


class LockError(RuntimeError):
    """A lock could not be made, for a reason that says nothing about the environment: the resolver's own words."""


def write_lock(
    spec: EnvironmentSpec, table: EnvironmentTable, root: Path, folder: Path, index: Sequence[str] = ()
) -> Path:
    """Write the lock of one environment, or what the resolver says where there is no solution; returns the file.

    `root` holds the pyproject.toml of the instrument, `index` the resolver's options of another index than PyPI.
    Raises LockError, and leaves what is there, when the resolver could not be run or could not ask its index.
    """
    lock, words = folder / spec.lock, folder / spec.unresolvable
    with TemporaryDirectory() as scratch:
        resolver = _Resolver(spec, table, root, Path(scratch), index)
        text, why = resolver.solve()
        text = _dated(text, resolver.uploads()) if text else ""
    folder.mkdir(parents=True, exist_ok=True)
    keep, drop = (lock, words) if text else (words, lock)
    keep.write_text(text or _told(spec, why), encoding="utf-8")
    drop.unlink(missing_ok=True)
    return keep


class _Resolver:
    """uv, asked about one environment as of its date."""

    def __init__(
        self, spec: EnvironmentSpec, table: EnvironmentTable, root: Path, scratch: Path, index: Sequence[str]
    ) -> None:
        self._spec, self._root, self._scratch = spec, root, scratch
        how = ["--no-config", "--quiet", f"--python={sys.executable}"]
        self._shared = [*how, *index, *_machines(spec), *_dates(spec, table)]

    def solve(self) -> tuple[str, str]:
        """The lock and no reason, or no lock and the reason."""
        asked = self._file("asked.in", [*self._spec.pins, *self._own_needs()])
        without = self._file("without.txt", self._spec.without)
        closure = [f"--excludes={without}"] if self._spec.kind == "venv" else ["--no-deps"]
        torch = [] if self._spec.cuda else ["--no-emit-package=torch"]
        how = ["--generate-hashes", "--no-annotate", f"--custom-compile-command={head(self._spec)}"]
        output = self._scratch / "lock.txt"
        why = self._compile(asked, *closure, *torch, *how, f"--output-file={output}")
        return ("", why) if why else (output.read_text(encoding="utf-8"), "")

    def _own_needs(self) -> list[str]:
        """What the instrument and its tests need; an overlay's machine has it."""
        if self._spec.kind == "overlay":
            return []
        project = tomllib.loads((self._root / "pyproject.toml").read_text(encoding="utf-8"))
        return [*project["project"]["dependencies"], *project["dependency-groups"]["test"]]

    def _file(self, name: str, lines: Sequence[str]) -> str:
        (self._scratch / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(self._scratch / name)

    def uploads(self) -> dict[tuple[str, str], str]:
        """The day on which the newest file of each locked release was uploaded; call after `solve`."""
        output = self._scratch / "pylock.toml"
        lock = str(self._scratch / "lock.txt")
        if why := self._compile(lock, "--no-deps", "--format=pylock.toml", f"--output-file={output}"):
            raise LockError(f"{self._spec.name}: the lock cannot be read back: {why}")
        packages = tomllib.loads(output.read_text(encoding="utf-8"))["packages"]
        return {(canonicalize_name(package["name"]), package["version"]): _newest(package) for package in packages}

    def _compile(self, *arguments: str) -> str:
        """Empty, or why there is no solution."""
        from uv import find_uv_bin

        environment = {name: value for name, value in os.environ.items() if name not in MACHINE_SETTINGS}
        command = [find_uv_bin(), "pip", "compile", *self._shared, *arguments]
        told = subprocess.run(command, cwd=self._root, env=environment, capture_output=True, text=True, check=False)
        if told.returncode == 0:
            return ""
        if told.returncode == 1 and _UNSOLVABLE in told.stderr and not _NOT_ASKED.search(told.stderr):
            return told.stderr.partition(_UNSOLVABLE)[2]
        raise LockError(f"{self._spec.name}: the resolver failed with status {told.returncode}: {told.stderr.strip()}")


def _machines(spec: EnvironmentSpec) -> list[str]:
    """Whom a lock serves: CUDA one Python on Linux (glibc 2.34, as sglang asks), the CPU wherever its Pythons run."""
    lowest = spec.python.removeprefix(">=").partition(",")[0]
    return [
        f"--python-version={lowest}",
        "--python-platform=x86_64-manylinux_2_34" if spec.cuda else "--universal",
    ]


def _dates(spec: EnvironmentSpec, table: EnvironmentTable) -> list[str]:
    """What is of the set's date, and what is the instrument's own."""
    own = table.instrument
    exempt = [f"--exclude-newer-package={name}={_end_of(own.exclude_newer)}" for name in own.packages] if own else []
    return [f"--exclude-newer={_end_of(spec.exclude_newer)}", *exempt]


def _end_of(day: Any) -> str:
    """The whole day in UTC; a date alone would end with the day of the machine's time zone."""
    return f"{day}T23:59:59Z"


def _newest(package: Mapping[str, Any]) -> str:
    files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else [])]
    days = [file["upload-time"].date().isoformat() for file in files if "upload-time" in file]
    return max(days, default="")


def _dated(text: str, uploads: Mapping[tuple[str, str], str]) -> str:
    """The lock with a day below each pin's hashes."""
    lines, day = [], ""
    for line in text.splitlines():
        if pin := re.match(r"([a-z0-9-]+)==([^\s\\]+)", line):
            day = uploads.get((pin[1], pin[2]), "")
        lines.append(line)
        if line.startswith("    --hash=") and not line.endswith("\\") and day:
            lines.append(f"    # uploaded {day}")
    return "\n".join(lines) + "\n"


def _told(spec: EnvironmentSpec, why: str) -> str:
    today = datetime.now(timezone.utc).date()
    words = "\n".join(re.sub(r"^(cause:|╰─▶)\s*", "", line.strip()) for line in why.strip(": \n").splitlines())
    return f"# {head(spec)}\n# tried {today}\n{words}\n"
