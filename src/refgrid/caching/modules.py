"""The Python modules that a module is made of: itself and all that it imports of its own package, as hashes of text.

Data of the module's name beside it, as tolerance.toml beside tolerance.py, is a part of the module.
Files are read, never imported: a module of ground truth would bring its library along.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

_State = tuple[int, int] | None  # of a file: when it was changed, and its size; None where there is none


class Modules:
    """The modules of one package, or a module that stands alone, as they were when first looked at."""

    def __init__(self, origin: Path, package: str) -> None:
        """`origin` is the file of the package itself."""
        self._origin, self.package = origin, package
        self._imports: dict[str, tuple[str, ...]] = {}
        self._hashes: dict[str, str] = {}
        self._files: dict[str, Path | None] = {}
        self._states: dict[str, list[tuple[str, _State]]] = {}

    @classmethod
    def of(cls, package: str) -> Modules:
        """What is installed under a top-level name. Raises LookupError when it has no source file."""
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            raise LookupError(f"{package!r} has no Python file here, so nothing tells whether it has changed")
        return cls(Path(spec.origin), package)

    @property
    def all(self) -> list[str]:
        """Every module of the package."""
        below = self._origin.parent.rglob("*.py") if self._is_package else ()
        parts = (file.relative_to(self._origin.parent).with_suffix("").parts for file in below)
        names = (".".join(each for each in (self.package, *each) if each != "__init__") for each in parts)
        return sorted({self.package, *names})

    def reached(self, roots: Iterable[str], apart: Collection[str] = ()) -> list[str]:
        """The roots and every module of the package that they import, directly or not, sorted.

        `apart` are left out, and what only they import. Raises LookupError for a root that is no module of the package.
        """
        found: set[str] = set()
        waiting = list(roots)
        for root in waiting:
            if self._file(root) is None:
                raise LookupError(f"{root!r} is no module of {self.package} at {self._origin}")
        while waiting:
            name = waiting.pop()
            if name not in found and name not in apart:
                found.add(name)
                waiting += self._imported(name)
        return sorted(found)

    def hash(self, names: Iterable[str]) -> str:
        """One hash over the texts of these modules."""
        told = hashlib.sha256()
        for name in sorted(names):
            told.update(f"{name} {self._read(name)}\n".encode())
        return told.hexdigest()

    def edited(self, names: Iterable[str]) -> bool:
        """Whether one of these files is not as it was when it was hashed: what has run since may be another text.

        Asked after every case of a run, of some two hundred places: hence names of files, and nothing looked up anew.
        """
        return any(self._is_edited(name) for name in names if self._file(name))

    def _is_edited(self, name: str) -> bool:
        """One that was never hashed counts as edited."""
        states = self._states.get(name)
        return states is None or any(_state(place) != state for place, state in states)

    def _read(self, name: str) -> str:
        file = self._file(name)
        assert file, f"{name} was not reached"
        if name not in self._hashes:
            places = _places(file)
            self._states[name] = [(place, _state(place)) for place in map(str, places)]
            texts = (place.read_bytes() for place in places if place.is_file())
            self._hashes[name] = hashlib.sha256(b"".join(texts)).hexdigest()
        return self._hashes[name]

    def _imported(self, name: str) -> tuple[str, ...]:
        if name not in self._imports:
            file = self._file(name)
            assert file, f"{name} was not reached"
            is_package = file.name == "__init__.py"
            told = set(_imports(file, name if is_package else _parent(name)))
            with_packages = {*told, *(_parent(each) for each in told), _parent(name)}
            self._imports[name] = tuple(sorted(each for each in with_packages if each and self._file(each)))
        return self._imports[name]

    def _file(self, name: str) -> Path | None:
        if name not in self._files:
            self._files[name] = self._looked_up(name)
        return self._files[name]

    def _looked_up(self, name: str) -> Path | None:
        first, *parts = name.split(".")
        if first != self.package:
            return None
        if not parts:
            return self._origin
        base = self._origin.parent.joinpath(*parts)
        places = (base / "__init__.py", base.with_name(base.name + ".py")) if self._is_package else ()
        return next((place for place in places if place.is_file()), None)

    @property
    def _is_package(self) -> bool:
        return self._origin.name == "__init__.py"


def _imports(file: Path, package: str) -> Iterator[str]:
    """Names that may be modules; also inside functions, where what is costly or rare is imported."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError):
        return  # it cannot be imported, which is the case's own finding
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    return ".".join([*up, *([node.module] if node.module else [])])


def _places(file: Path) -> list[Path]:
    """A module's own file, and where data beside it would be."""
    return [file, file.with_suffix(".json"), file.with_suffix(".toml")]


def _state(place: str) -> _State:
    try:
        found = os.stat(place)  # noqa: PTH116 - of a name, several times as fast as of a Path
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
