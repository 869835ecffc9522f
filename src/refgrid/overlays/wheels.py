"""Which wheels a machine lacks for an environment, and fetching them: pins and hashes of the lock, files of PyPI."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from refgrid.environments.audit import same_version
from refgrid.environments.declared import EnvironmentSpec
from refgrid.overlays.wheelhouse import Cargo, WheelhouseError

# Whom wheels are fetched for, as in the locks: x86-64 with glibc 2.34, and whatever is older.
GLIBC = 34
PLATFORMS = tuple(
    [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)]
    + [f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")]
    + ["linux_x86_64"]
)
AT_ONCE = 4
_DOWNLOAD = (
    *("tool", "run", "pip", "download", "--quiet", "--disable-pip-version-check"),
    *("--no-deps", "--only-binary=:all:", "--require-hashes"),
)

Have = Mapping[str, str]
Say = Callable[[str], None]


def read_have(file: Path) -> dict[str, str]:
    """What a machine has: `pip list --format json`, `pip freeze` or `python3 overlay.py have`, as a file.

    Raises WheelhouseError for a file that is none of these.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return {canonicalize_name(each["name"]): each["version"] for each in json.loads(text)}
        pins = [line for line in text.splitlines() if "==" in line and not line.startswith("#")]
        found: dict[str, str] = {canonicalize_name(pin.partition("==")[0]): pin.partition("==")[2] for pin in pins}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WheelhouseError(f"{file}: is no list of distributions: {error!r}") from error
    if not found:
        raise WheelhouseError(f"{file}: lists no distribution; write it with pip list --format json")
    return found


class Source:
    """Fetches wheels into a folder, each once for all environments, and builds those of the workspace in `root`."""

    def __init__(self, root: Path, folder: Path, say: Say = lambda _: None) -> None:
        self._root, self._folder, self._say = root, folder, say
        self._found: dict[tuple[str, str], Path | str] = {}

    @cached_property
    def _own(self) -> list[Path]:
        """The wheels of this workspace."""
        with TemporaryDirectory() as scratch:
            _uv(self._root, "build", "--quiet", "--wheel", "--all-packages", f"--out-dir={scratch}")
            built = [Path(shutil.copy(wheel, self._folder)) for wheel in sorted(Path(scratch).glob("*.whl"))]
        self._say(f"built: {', '.join(wheel.name for wheel in built)}")
        return built

    def gather(self, spec: EnvironmentSpec, have: Have) -> Cargo:
        """Every wheel of an environment that a machine lacks, this workspace's own included.

        Raises WheelhouseError naming every wheel that cannot be had, and a torch that is not there: no wheelhouse
        carries one.
        """
        lock = self._root / "ci" / "locks" / spec.lock
        if not lock.exists():
            raise WheelhouseError(f"{lock} is missing: nox -s lock -- {spec.name}")
        there = _there(spec, have)
        pins = _lines(lock.read_text(encoding="utf-8"), spec)
        pins = {**_instrument(spec, self._root, there, pins), **pins}
        lacking = [line for line in pins.values() if not _has(there, line)]
        wheels = (*self._own, *self._fetch(spec, lacking))
        demands = tuple("==".join(_pin(line)) for line in pins.values())
        return Cargo(spec.name, lowest_python(spec), spec.machine, spec.omit, wheels, demands)

    def _fetch(self, spec: EnvironmentSpec, lacking: Sequence[str]) -> Iterator[Path]:
        """Each pin for itself, so that one that cannot be had is named."""
        python = lowest_python(spec)
        new = [line for line in lacking if (python, line) not in self._found]
        with ThreadPoolExecutor(AT_ONCE) as workers:
            for line, found in zip(new, workers.map(lambda line: self._try(python, line), new), strict=True):
                self._found[python, line] = found
        tried = [self._found[python, line] for line in lacking]
        if faults := [found for found in tried if isinstance(found, str)]:
            raise WheelhouseError("\n".join(faults))
        return (found for found in tried if isinstance(found, Path))

    def _try(self, python: str, line: str) -> Path | str:
        """The wheel of one pin, or why there is none."""
        with TemporaryDirectory(dir=self._folder) as scratch:
            asked = Path(scratch, "asked.txt")
            asked.write_text(line + "\n")
            try:
                _uv(self._folder, *_DOWNLOAD, *_for(python), f"--dest={scratch}", f"--requirement={asked}")
            except WheelhouseError as error:
                pin = line.partition("--hash")[0].strip()
                last = [text for text in str(error).splitlines() if text.startswith("ERROR")][-1:] or [str(error)]
                return f"{pin}: no index serves its wheel for Python {python} on {PLATFORMS[0]}: {last[0]}"
            (wheel,) = Path(scratch).glob("*.whl")
            self._say(f"fetched: {wheel.name}")
            return wheel.replace(self._folder / wheel.name)


def _for(python: str) -> list[str]:
    """The wheels that a Python on Linux can load."""
    abis = [f"--abi=cp{python.replace('.', '')}", "--abi=abi3", "--abi=none"]
    return [f"--python-version={python}", "--implementation=cp", *abis, *(f"--platform={each}" for each in PLATFORMS)]


def lowest_python(spec: EnvironmentSpec) -> str:
    """X.Y of an environment, the lowest where it has several."""
    return spec.python.removeprefix(">=").partition(",")[0]


def _there(spec: EnvironmentSpec, have: Have) -> dict[str, str]:
    """What the machine has, and what the table says it has: if they differ, it is the wrong machine."""
    said: Have = {
        canonicalize_name(name): version for name, _, version in (pin.partition("==") for pin in spec.machine)
    }
    faults = [
        f"{name} {have[name]} is there, but {spec.name} is for {version}"
        for name, version in said.items()
        if name in have and not same_version(version, have[name])
    ]
    there = {**said, **have}
    if not same_version(str(spec.torch), there.get("torch", "0")):
        faults.append(f"torch {spec.torch} is not there, and no wheelhouse carries torch; say what is with --have")
    if faults:
        raise WheelhouseError("\n".join(dict.fromkeys(faults)))
    return there


def _lines(text: str, spec: EnvironmentSpec) -> dict[str, str]:
    """Each pin of a requirements file with its hashes, by name; those of other machines and torch are left out."""
    found = {}
    for block in text.replace("\\\n", " ").splitlines():
        head = block.partition("--hash")[0].strip()
        if not head or head.startswith("#"):
            continue
        requirement = Requirement(head)
        if requirement.marker is None or requirement.marker.evaluate(_target(spec)):
            found[canonicalize_name(requirement.name)] = block.replace(head, str(requirement).partition(";")[0], 1)
    return {name: line for name, line in found.items() if name != "torch"}


def _target(spec: EnvironmentSpec) -> dict[str, str]:
    python = lowest_python(spec)
    linux = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    cpython = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    versions = {"python_version": python, "python_full_version": f"{python}.0"}
    here = cast("dict[str, str]", default_environment())  # a TypedDict, all of whose values are strings
    return {**here, **linux, **cpython, **versions}


def _has(there: Have, line: str) -> bool:
    name, version = _pin(line)
    return name in there and same_version(version, there[name])


def _pin(line: str) -> tuple[str, str]:
    """Name and version of a line of a lock."""
    name, _, version = line.partition("--hash")[0].strip().partition("==")
    return canonicalize_name(name.partition("[")[0]), version.strip()


def _instrument(spec: EnvironmentSpec, root: Path, there: Have, pins: Mapping[str, str]) -> dict[str, str]:
    """What the instrument needs, in the releases that the machine has wherever they do."""
    with TemporaryDirectory() as scratch:
        output, held = Path(scratch, "instrument.txt"), Path(scratch, "held.txt")
        output.write_text("".join(f"{name}=={version}\n" for name, version in there.items()))  # uv keeps what it finds
        held.write_text("".join(f"{line.partition('--hash')[0].strip()}\n" for line in pins.values()))
        where = [f"--python-version={lowest_python(spec)}", f"--python-platform=x86_64-manylinux_2_{GLIBC}"]
        how = ["--quiet", "--no-header", "--no-annotate", "--generate-hashes", f"--constraints={held}"]
        _uv(root, "pip", "compile", "pyproject.toml", *where, *how, f"--output-file={output}")
        return _lines(output.read_text(encoding="utf-8"), spec)


def _uv(at: Path, *arguments: str) -> None:
    from uv import find_uv_bin

    done = subprocess.run([find_uv_bin(), *arguments], cwd=at, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WheelhouseError(f"uv {' '.join(arguments[:2])} failed: {done.stderr.strip()}")
