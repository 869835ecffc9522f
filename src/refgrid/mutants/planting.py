"""Makes a faulty reference or a faulty adapter from a sound one: a text changed, or a function wrapped."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from refgrid.dataset.definition import Definition
from refgrid.mutants.table import Mutant
from refgrid.sources import Adapter


def planted_reference(definition: Definition, mutant: Mutant) -> str:
    """The text of the definition's reference with the fault in it.

    Raises MutantError where the text that should be replaced is not there, or nothing comes of it.
    """
    if mutant.adapter:
        return definition.reference
    if mutant.sound:
        return _replaced(definition.reference, mutant, f"the reference of {definition.name}")
    inputs, outputs = ", ".join(definition.inputs), ", ".join(definition.outputs)
    lines = [f"{outputs} = sound_run({inputs})", *_lines(mutant.after), f"return {outputs}"]
    return _with_function(definition.reference, "run", inputs, [*_lines(mutant.before), *lines])


def planted_adapters(definition: Definition, op: str, mutant: Mutant) -> Mapping[str, Adapter]:
    """The faulty adapter by its source; none for a fault of the reference.

    It has not passed the self-test of its provider. Raises MutantError as `planted_reference` does.
    """
    if not mutant.adapter:
        return {}
    source = mutant.where.source
    with _provider(definition, op, mutant) as provider:
        return {source: provider.unproven(source, op)}


def self_test(definition: Definition, op: str, mutant: Mutant) -> str:
    """What the provider's own self-test says of the faulty adapter on this machine; "" when it passes."""
    with _provider(definition, op, mutant) as provider:
        try:
            provider.adapter(mutant.where.source, op, mutant.device)
        except Exception as error:  # noqa: BLE001 - whatever keeps a faulty adapter from being used
            return str(error)
    return ""


def module_text(mutant: Mutant) -> str:
    """The text of the module that holds the adapter. Raises MutantError where there is none."""
    try:
        found = importlib.util.find_spec(mutant.adapter)
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        raise mutant.error(f"adapter = {mutant.adapter!r}, but there is no such module")
    return Path(found.origin).read_text(encoding="utf-8")


def planted_module(definition: Definition, op: str, mutant: Mutant) -> str:
    """The text of the adapter's module with the fault in it; raises MutantError as `planted_reference` does."""
    text = module_text(mutant)
    if mutant.sound:
        return _replaced(text, mutant, mutant.adapter)
    if f"\ndef {op}(" not in text:
        raise mutant.error(f"{mutant.adapter} has no function {op}, which before and after could wrap")
    names = list(definition.inputs)
    taken = [f"{name} = given[{name!r}]" for name in names]
    given = [f"given[{name!r}] = {name}" for name in names]
    outputs = [f"{name} = found.get({name!r})" for name in definition.outputs]
    held = ", ".join(f"{name!r}: {name}" for name in definition.outputs)
    lines = [*taken, *_lines(mutant.before), *given, f"found = sound_{op}(**given)", *outputs, *_lines(mutant.after)]
    wrapped = _with_function(
        text, op, "**given", [*lines, f"return {{n: t for n, t in {{{held}}}.items() if n in found}}"]
    )
    return f"{wrapped}\nimport functools\n{op} = functools.wraps(sound_{op})({op})\n"


def _replaced(text: str, mutant: Mutant, of: str) -> str:
    if mutant.sound not in text:
        raise mutant.error(f"{mutant.sound!r} is not in {of}: it would plant nothing")
    return text.replace(mutant.sound, mutant.broken)


def _with_function(text: str, name: str, parameters: str, lines: list[str]) -> str:
    body = "".join(f"    {line}\n" for line in lines)
    return f"{text}\n\nimport math\n\nimport torch\n\nsound_{name} = {name}\n\n\ndef {name}({parameters}):\n{body}"


def _lines(statements: str) -> list[str]:
    return statements.strip().splitlines()


@contextmanager
def _provider(definition: Definition, op: str, mutant: Mutant) -> Iterator[ModuleType]:
    """The provider's package imported anew, with the fault in one of its modules; the sound one comes back after."""
    package, text = mutant.adapter.partition(".")[0], planted_module(definition, op, mutant)
    sound = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == package}
    finder = _Finder(mutant.adapter, text)
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module(package)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(sound)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, with another text than its file has."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname != self.name:
            return None
        return importlib.util.spec_from_loader(fullname, _Loader(self.text))


class _Loader(importlib.abc.SourceLoader):
    """Source that is in no file; no bytecode of it is kept, as it has no date."""

    def __init__(self, text: str) -> None:
        self.text = text

    def get_filename(self, fullname: str) -> str:
        """What tracebacks show."""
        return f"<mutant of {fullname}>"

    def get_data(self, path: str) -> bytes:  # noqa: ARG002 - the loader's interface
        """The text itself."""
        return self.text.encode()
