"""Ground-truth sources, found through the entry point group `refgrid.sources`; the instrument names no library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Protocol

GROUP = "refgrid.sources"

Adapter = Callable[..., Mapping[str, Any]]


class Source(Protocol):
    """One trusted origin of results: a library, or one backend of it."""

    @property
    def name(self) -> str: ...
    @property
    def library(self) -> str: ...
    @property
    def distribution(self) -> str: ...
    @property
    def ops(self) -> tuple[str, ...]: ...


class Provider(Protocol):
    """What an entry point of the group names: a module with a table and a way to an adapter."""

    SOURCES: tuple[Source, ...]

    def adapter(self, source_name: str, op: str, device: str) -> Adapter:
        """The ground-truth function; raises an exception with `verdict` and `reason` when it cannot serve here."""


class Sources:
    """All sources of all providers, in the providers' order."""

    def __init__(self, providers: tuple[Provider, ...] | None = None) -> None:
        loaded = tuple(_installed()) if providers is None else providers
        self._provider = {source.name: provider for provider in loaded for source in provider.SOURCES}
        self.table: tuple[Source, ...] = tuple(source for provider in loaded for source in provider.SOURCES)

    @property
    def ops(self) -> tuple[str, ...]:
        """Every op that some source serves."""
        return tuple(dict.fromkeys(op for source in self.table for op in source.ops))

    @property
    def distributions(self) -> tuple[str, ...]:
        """The distributions whose versions belong into a record."""
        return tuple(dict.fromkeys(source.distribution for source in self.table))

    def serving(self, op: str) -> tuple[str, ...]:
        """Names of the sources of one op."""
        return tuple(source.name for source in self.table if op in source.ops)

    def adapter(self, name: str, op: str, device: str) -> Adapter:
        """The ground-truth function of one source; see Provider.adapter for what it raises."""
        return self._provider[name].adapter(name, op, device)


def _installed() -> Iterator[Provider]:
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        yield entry.load()
