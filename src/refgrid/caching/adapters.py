"""What the adapters of ground truth are made of: modules as hashes of their text, and the row of their table."""

from __future__ import annotations

import hashlib
import json

from refgrid.caching.modules import Modules
from refgrid.sources import Sources


class Adapters:
    """The adapters of some sources; files are read when they are first needed and count as they were then."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._packages: dict[str, Modules] = {}
        self._modules: dict[tuple[str, str], tuple[Modules | None, list[str]]] = {}

    def hash(self, name: str, op: str) -> str | None:
        """One hash over all that makes the adapter of a source and an op; None where nothing tells."""
        package, modules = self.made_of(name, op)
        if package is None:
            return None
        told = json.dumps([self._sources.origin(name, op).row, package.hash(modules)], separators=(",", ":"))
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def made_of(self, name: str, op: str) -> tuple[Modules | None, list[str]]:
        """The package and those of its modules that count; no package where it has no Python file."""
        if (name, op) not in self._modules:
            try:
                self._modules[name, op] = self._looked_up(name, op)
            except LookupError:
                self._modules[name, op] = (None, [])
        return self._modules[name, op]

    def _looked_up(self, name: str, op: str) -> tuple[Modules, list[str]]:
        origin = self._sources.origin(name, op)
        first = origin.modules[0].partition(".")[0]
        if first not in self._packages:
            self._packages[first] = Modules.of(first)
        return self._packages[first], self._packages[first].reached(origin.modules, origin.apart)
