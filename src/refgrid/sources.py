"""Ground-truth sources, found through the entry point group `refgrid.sources`; the instrument names no library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from refgrid.caching.modules import Modules

GROUP = "refgrid.sources"

Adapter = Callable[..., Mapping[str, Any]]


class NoReferee(Exception):
    """Nothing in float64 can judge a case here: no provider has a formula for the op, or no memory is left for it."""


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


class Origin(Protocol):
    """What makes an adapter what it is: modules with all that they import of their package but `apart`, and its row.

    The row is what a table says of it, as text.
    """

    @property
    def modules(self) -> tuple[str, ...]: ...
    @property
    def apart(self) -> tuple[str, ...]: ...
    @property
    def row(self) -> str: ...


class KernelModule(Protocol):
    """A module that can be compiled ahead of a run: the file it becomes, where no two may be built at once, its size.

    `compile` leaves the file there, up to date, and raises an exception with the compiler's words.
    """

    @property
    def name(self) -> str: ...
    @property
    def library(self) -> Path: ...
    @property
    def folder(self) -> Path: ...
    @property
    def sources(self) -> int: ...
    @property
    def compile(self) -> Callable[[], None]: ...


class Kernels(Protocol):
    """What a source needs for an op: modules to compile ahead, and the name of what compiles at the first call."""

    @property
    def ahead(self) -> Sequence[KernelModule]: ...
    @property
    def at_first_call(self) -> str: ...


class Provider(Protocol):
    """What an entry point of the group names: a module with a table and a way to an adapter.

    It may have `origin(source_name, op)`, which gives the Origin of an adapter; without it all of it counts as one.
    It may have `referee(op, device)`, a ground-truth function in float64 that raises LookupError for an op that it
    does not have; REFEREE then names the source whose it is, which tells in `judges` for which further ops. And its
    sources may have `kernel(op)`, which declares what computes an op: sources of one kernel are one truth.
    A module `kernels` in its package may have `kernels(source_name, op, inputs)`, which gives Kernels.
    """

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

    def referee(self, op: str, device: str) -> Adapter:
        """The float64 formula that judges the sources of one op; raises NoReferee when no provider has one."""
        for provider in {id(each): each for each in self._provider.values()}.values():
            told = getattr(provider, "referee", None)
            if told is None:
                continue
            try:
                return cast(Adapter, told(op, device))
            except (KeyError, IndexError):
                raise  # a fault of its own, not an op that it has no formula of
            except LookupError:
                continue
        raise NoReferee(f"no float64 formula of {op}")

    def exact(self, op: str) -> tuple[str, ...]:
        """The sources that are referees of an op, whether or not they serve it too."""
        named = {getattr(provider, "REFEREE", None) for provider in self._provider.values()}
        return tuple(
            source.name
            for source in self.table
            if source.name in named and op in (*source.ops, *getattr(source, "judges", ()))
        )

    def kernel(self, name: str, op: str) -> str:
        """What computes one op for one source, as its provider declares; its own name where that does not say."""
        told = getattr(self._source(name), "kernel", None)
        return cast(str, told(op)) if told else name

    def origin(self, name: str, op: str) -> Origin:
        """Where the ground-truth function of one source comes from, to tell whether it has changed."""
        provider = self._provider[name]
        told = getattr(provider, "origin", None)
        return cast(Origin, told(name, op)) if told else _whole(provider, self._source(name))

    def kernels(self, name: str, op: str, inputs: Mapping[str, tuple[tuple[int | None, ...], str]]) -> Kernels:
        """What one source compiles for an op and a definition with these shapes and dtypes; imports its library.

        Raises what `adapter` does where the source cannot serve.
        """
        provider = self._provider[name]
        place = f"{getattr(provider, '__name__', '')}.kernels"
        if not hasattr(provider, "__path__") or find_spec(place) is None:
            return _Nothing()
        return cast(Kernels, import_module(place).kernels(name, op, inputs))

    def _source(self, name: str) -> Source:
        return next(source for source in self.table if source.name == name)


@dataclass(frozen=True)
class _Nothing:
    """The kernels of a source that tells of none."""

    ahead: tuple[KernelModule, ...] = ()
    at_first_call: str = ""


@dataclass(frozen=True)
class _Whole:
    """An origin of which nothing is known but the provider."""

    modules: tuple[str, ...]
    row: str
    apart: tuple[str, ...] = ()


def _whole(provider: Provider, source: Source) -> _Whole:
    """All of the provider's package, since an adapter may be found at run time."""
    package = getattr(provider, "__name__", type(provider).__module__).partition(".")[0]
    return _Whole(tuple(Modules.of(package).all), repr(source))


def _installed() -> Iterator[Provider]:
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        yield entry.load()
