"""Ground truth: the public functions of trusted libraries behind one interface, one folder a library.

`SOURCES` says what there is; `adapter` gives one function or says why it cannot. Importing this package imports
neither torch nor any library, so the table can be read where nothing is installed.

An adapter translates layout, units and names. It never upcasts, clamps or repairs: what a library defines nothing
for is Unavailable, not computed here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import re
import warnings
from importlib import metadata
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet

from refgrid_groundtruth.table import FAMILY, REFEREE, SOURCES, Origin, Source

__all__ = ["REFEREE", "SOURCES", "Origin", "Source", "Unavailable", "adapter", "origin", "referee", "unproven"]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Adapter = Callable[..., dict[str, Any]]  # output names to tensors

# A library that declines a size or a dtype says so in words like these; any other exception is a fault.
_REFUSAL = re.compile(r"unsupported|not support|only support|not implemented for", re.IGNORECASE)
_BUILD = re.compile(r"ninja|nvcc|compilation|CUDA_HOME|cuda_home|failed to build", re.IGNORECASE)
_FAULT = re.compile(r"CUDA (driver |runtime )?error|cuda(Error|_ERROR)|CUBLAS_STATUS|CUDNN_STATUS", re.IGNORECASE)
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[\w.+-]+/)+")
_NO_COMPILER = re.compile(r"could not find nvcc|nvcc\S*: not found|no such file.*(nvcc|ninja)", re.IGNORECASE)


class Unavailable(Exception):
    """A source cannot serve here: `verdict` is the kind, `reason` the words for a reader.

    `verdict` is missing, import-fail, api-absent, unsupported, no-compiler or error.
    """

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(verdict, reason)
        self.verdict, self.reason = verdict, reason

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


def adapter(source_name: str, op: str, device: str) -> Adapter:
    """The ground-truth function of one source for one op on "cpu" or "cuda", proven by its self-test.

    It takes the definition's inputs by name, constants such as eps as keywords, and gives {output name: tensor};
    an output that the library does not give is left out. Found and proven once a process. Raises LookupError for a
    name that no table holds, and Unavailable, which the function itself raises too for a size or dtype that its
    library refuses.
    """
    source = _source(source_name, op)
    found = _outcome(source.name, op, device)
    if isinstance(found, Unavailable):
        raise Unavailable(found.verdict, found.reason) from found
    return found


def referee(op: str, device: str) -> Adapter:
    """The float64 formula that settles which of two sources is off; as `adapter`, also where it is no source itself."""
    return adapter(REFEREE, op, device)


def unproven(source_name: str, op: str) -> Adapter:
    """The same function before its self-test: for faults planted into it, which others must find as well.

    Raises as `adapter` does, but of the device and the self-test.
    """
    source = _source(source_name, op)
    _demand_library(source)
    with _warnings_are_no_errors():
        _demand_functions(source, op)
        return _bound(source, op)


def origin(source_name: str, op: str) -> Origin:
    """Where the adapter of one source for one op comes from, to tell whether it has changed; imports no library.

    The table is shared by all and told by its row. Raises LookupError as `adapter` does.
    """
    source, family = _source(source_name, op), FAMILY[op]
    modules = (f"{source.folder}.{family}", f"answers.{family}", "selftest")
    return Origin(tuple(f"{__name__}.{name}" for name in modules), (f"{__name__}.table",), source.row(op))


def _source(name: str, op: str) -> Source:
    known = {source.name: source for source in SOURCES}
    if name not in known:
        raise LookupError(f"unknown source {name!r}: should be one of {', '.join(known)}")
    if op not in (*known[name].ops, *known[name].judges):
        raise LookupError(f"{name} has no op {op!r}: should be one of {', '.join(known[name].ops)}")
    return known[name]


@functools.cache
def _outcome(name: str, op: str, device: str) -> Adapter | Unavailable:
    """A refusal is remembered too: a failed build must not be tried again for each case."""
    try:
        return _proven(name, op, device)
    except Unavailable as told:
        return told.with_traceback(None)


def _proven(name: str, op: str, device: str) -> Adapter:
    source = _source(name, op)
    family = device.partition(":")[0]
    _demand_library(source)
    if family not in source.devices:
        raise Unavailable("unsupported", f"{name} serves {', '.join(source.devices)}, not {family}")
    with _warnings_are_no_errors():
        _demand_functions(source, op)
        from refgrid_groundtruth import selftest  # imports torch

        selftest.demand_device(source, device)
        if source.compiles and family == "cuda":
            _guard_builds(source)
        function = _bound(source, op)
        _self_test(selftest.run, function, op, device)
    return function


def _guard_builds(source: Source) -> None:
    """A library's `modules` may have `guard_builds`, for what its own build lacks when many processes share it."""
    if importlib.util.find_spec(name := f"{__name__}.{source.folder}.modules"):
        getattr(importlib.import_module(name), "guard_builds", lambda: None)()


@contextlib.contextmanager
def _warnings_are_no_errors() -> Iterator[None]:
    """A caller may turn warnings into errors for its own code; a library's warning must not make it unavailable."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def _demand_library(source: Source) -> None:
    """Installed at all, and of a release that was looked at."""
    if importlib.util.find_spec(source.library) is None:
        raise Unavailable("missing", f"{source.library} is not installed ({source.distribution})")
    try:
        version = metadata.version(source.distribution)
    except metadata.PackageNotFoundError:
        reason = f"{source.library} is importable, but no distribution {source.distribution} tells its version"
        raise Unavailable("unsupported", reason) from None
    if not SpecifierSet(source.versions).contains(version, prereleases=True):
        raise Unavailable("unsupported", f"{source.distribution} {version} but should be {source.versions}")


def _demand_functions(source: Source, op: str) -> None:
    """The library imports and has what the adapter calls; presence is looked up, never guessed from a version."""
    for path in (source.library, *source.needs.get(op, ())):
        try:
            _resolve(path)
        except Unavailable:
            raise
        except Exception as error:
            raise _import_failure(source, path, error) from error


def _resolve(path: str) -> Any:
    """The object at a dotted path: modules are imported as far as they go, the rest are attributes.

    Raises Unavailable("api-absent") for an attribute that is not there, and whatever a module raises on import.
    """
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for done, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part) and hasattr(found, "__path__"):
            importlib.import_module(".".join(parts[:done]))
        if not hasattr(found, part):
            raise Unavailable("api-absent", f"{parts[0]} has no {'.'.join(parts[:done])}")
        found = getattr(found, part)
    return found


def _import_failure(source: Source, path: str, error: Exception) -> Unavailable:
    """A submodule that the release does not have is an absent function; anything else is a broken installation."""
    lacking = getattr(error, "name", None) or ""
    if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{lacking}."):
        return Unavailable("api-absent", f"{source.library} has no module {lacking}")
    return Unavailable("import-fail", f"import of {path} raises {type(error).__name__}: {_last_words(error)}")


def _bound(source: Source, op: str) -> Adapter:
    """The adapter with the source's options; what the library refuses in words becomes Unavailable."""
    module = importlib.import_module(f"refgrid_groundtruth.{source.folder}.{FAMILY[op]}")
    function: Adapter = functools.partial(getattr(module, op), **source.options.get(op, {}))

    @functools.wraps(function)  # the signature too: callers read the constants from it
    def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            with _warnings_are_no_errors():
                return function(*args, **kwargs)
        except (RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
            if _is_refusal(error):
                raise Unavailable("unsupported", _last_words(error)) from error
            raise

    return call


def _is_refusal(error: Exception) -> bool:
    if _BUILD.search(str(error)) or _FAULT.search(str(error)):  # compilers and drivers call things unsupported too
        return False
    return isinstance(error, NotImplementedError) or bool(_REFUSAL.search(str(error)))


def _self_test(run: Callable[[Adapter, str, str], None], function: Adapter, op: str, device: str) -> None:
    try:
        run(function, op, device)
    except Unavailable:
        raise
    except Exception as error:
        verdict = "no-compiler" if _NO_COMPILER.search(str(error)) else "error"
        what = "build failed" if _BUILD.search(str(error)) else f"self-test raised {type(error).__name__}"
        raise Unavailable(verdict, f"{what}: {_last_words(error)}") from error


def _last_words(error: BaseException, lines: int = 3) -> str:
    """The end of a message: where compilers and tracebacks of native code say what is wrong.

    A path is cut to the file's name: the rest differs from machine to machine, and equal refusals should read alike.
    """
    words = [_FOLDERS.sub("", line.strip()) for line in str(error).splitlines() if line.strip()]
    return " | ".join(words[-lines:])[-600:] or repr(error)
