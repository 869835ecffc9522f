"""The key of a case: one hash over all that its verdict depends on, in named parts, so that a change can be named.

Parts of the run are the same for all of its cases: the instrument, the environment and the machine. Parts of a case are
its definition, its reference, the adapters that it calls, its workload, its tolerance and what is expected of it.

Of the instrument, what draws, runs, compares and judges counts; what plans, schedules, records and shows does not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash
from pydantic import TypeAdapter

from refgrid.caching.adapters import Adapters
from refgrid.caching.modules import Modules
from refgrid.dataset.case import Case
from refgrid.dataset.definition import DataSet, Definition, Workload
from refgrid.dataset.reference import text_hash
from refgrid.environments.measured import Environment
from refgrid.proving.expected import ExpectedFailures
from refgrid.records.record import Verdict
from refgrid.sources import Sources

# What a part is called, in the order in which a difference is told.
RUN_PARTS = (
    *("instrument", "tolerances", "lock", "python", "platform", "torch", "cuda", "toolkit", "driver", "libraries"),
    *("device", "memory", "settings"),
)
CASE_PARTS = ("definition", "reference", "adapter", "workload", "expected", "tolerance")

# From proof.py on, all that is imported; of these two, which import the rest of the instrument, their own text.
_ROOTS = ("refgrid.proving.proof", "refgrid.proving.expected")
_ALONE = ("refgrid.plugin", "refgrid.contract")
_TOLERANCES = "refgrid.proving.tolerance"

# NVIDIA_TF32_OVERRIDE=1 makes every float32 product another one, and there are many of the kind.
_READERS = (
    *("NVIDIA_TF32", "ATEN_CPU", "CUBLAS", "CUDNN", "TORCH", "PYTORCH", "TRITON", "FLASHINFER", "SGL", "MKL", "DNNL"),
)
_PLACES = ("_DIR", "_BASE", "_PATH", "_HOME", "LOGLEVEL", "_LOGS")

TABLE = "table"  # the tolerance of a case that nobody set by hand
NONE = "none"

_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"))  # one for the many thousand parts of keys
_DEFINITION, _WORKLOAD = TypeAdapter(Definition), TypeAdapter(Workload)


@dataclass(frozen=True)
class Machine:
    """Where cases run: the environment as measured, its lock, which need not exist, and the bytes a worker may take."""

    environment: Environment
    lock: Path
    memory: float = math.inf


class Keys:
    """The keys of the cases of one data set on one machine; `run_parts` are the parts that all have in common.

    Files are read when they are first needed and count as they were then.
    """

    def __init__(self, dataset: DataSet, sources: Sources, expected: ExpectedFailures, machine: Machine) -> None:
        self._dataset, self._sources, self._expected = dataset, sources, expected
        self._kept: dict[tuple[str, ...], str] = {}
        self._adapter_texts, self._own = Adapters(sources), Modules.of("refgrid")
        self._instrument = instrument_modules(self._own)
        self.run_parts = {**instrument_parts(self._own), **_run_parts(machine)}

    def key(self, case: Case, tolerance: str = TABLE) -> str:
        """The whole, as 16 hexadecimal digits."""
        return self._once("key", case.id, tolerance, of=lambda: self._whole(case, tolerance))

    def _whole(self, case: Case, tolerance: str) -> str:
        return short([self._once("run", of=lambda: short(self.run_parts)), self.parts(case, tolerance)], 16)

    def parts(self, case: Case, tolerance: str = TABLE) -> dict[str, str]:
        """The parts of one case. A case without a usable definition has a key that no other case has."""
        definition = self._dataset.definitions.get(case.definition)
        if definition is None:
            return {"definition": "broken", "workload": short(asdict(case))}
        return {
            "definition": self._once("definition", case.definition, of=lambda: definition_hash(definition)),
            "reference": self._once("reference", case.definition, of=lambda: text_hash(definition.reference)),
            "adapter": self._adapters(case),
            "workload": self._workload(case),
            "expected": self._expectation(case),
            "tolerance": tolerance,
        }

    def edited(self, case: Case) -> bool:
        """Whether a file of the instrument or of the case's adapters was edited since its key was first asked for."""
        called = (self._adapter_texts.made_of(name, case.op) for name in self._called(case))
        made_of = ((self._own, self._instrument), *called)
        return any(package.edited(names) for package, names in made_of if package)

    def failures_known(self, case: Case) -> set[Verdict]:
        """The verdicts that are expected of a case, which its key has."""
        return {entry.verdict for entry in self._expected.entries if entry.covers(case.name, case.seed)}

    def _once(self, *name: str, of: Callable[[], str]) -> str:
        if name not in self._kept:
            self._kept[name] = of()
        return self._kept[name]

    def _adapters(self, case: Case) -> str:
        """All that serve the op, and its referee, where sources are held against each other, else the case's own."""
        called = self._called(case)
        hashes = {name: self._adapter(name, case.op) for name in called}
        return self._once("adapters", case.op, *called, of=lambda: adapters_part(hashes))

    def _called(self, case: Case) -> tuple[str, ...]:
        if case.check == "agreement":
            return tuple(dict.fromkeys((*self._sources.serving(case.op), *self._sources.exact(case.op))))
        return (case.source,) if case.source else ()

    def _adapter(self, name: str, op: str) -> str:
        return self._once("adapter", name, op, of=lambda: self._adapter_hash(name, op))

    def _adapter_hash(self, name: str, op: str) -> str:
        """Equal to no other where nothing tells, so that nothing is taken for unchanged."""
        return self._adapter_texts.hash(name, op) or f"unknown {uuid.uuid4().hex[:12]}"

    def _workload(self, case: Case) -> str:
        """A twin's constants are part of it, and so is what it reads from files."""
        row = self._once("workload", case.definition, case.workload, of=lambda: self._row(case))
        return short([row, case.check, case.source, case.size, case.seed, case.twin])

    def _row(self, case: Case) -> str:
        workload = next((w for w in self._dataset.workloads[case.definition] if w.uuid == case.workload), None)
        if workload is None:
            return NONE
        return workload_row(workload, self._dataset.root)

    def _expectation(self, case: Case) -> str:
        covering = [
            entry.model_dump(mode="json") for entry in self._expected.entries if entry.covers(case.name, case.seed)
        ]
        return short(covering) if covering else NONE


def _run_parts(machine: Machine) -> dict[str, str]:
    """The parts that all cases of a run have in common, in words where that is short."""
    environment, lock = machine.environment, machine.lock
    return {
        "lock": short(lock.read_text(encoding="utf-8")) if lock.is_file() else NONE,
        "python": environment.python,
        "platform": environment.platform,
        "torch": environment.torch or NONE,
        "cuda": environment.cuda or NONE,
        "toolkit": environment.toolkit or NONE,
        "driver": (environment.driver or NONE).partition(".")[0],  # of its branch, the fixes do not count
        "libraries": ", ".join(f"{name} {version}" for name, version in sorted(installed().items())),
        "device": machine_kind(environment),
        "settings": _settings() or NONE,
        "memory": "all" if math.isinf(machine.memory) else f"{machine.memory:.0f} B",
    }


def _settings() -> str:
    """The variables by which torch and the kernel libraries are told to compute otherwise, but for where they write."""
    names = (name for name in os.environ if name.startswith(_READERS) and not name.endswith(_PLACES))
    return ", ".join(f"{name}={os.environ[name]}" for name in sorted(names))


def instrument_modules(package: Modules) -> list[str]:
    """The modules of the instrument that can change a verdict."""
    return sorted({*package.reached(_ROOTS), *_ALONE})


def instrument_parts(package: Modules) -> dict[str, str]:
    """The instrument, and its tolerances by themselves: code and numbers are changed for different reasons."""
    modules = instrument_modules(package)
    code = package.hash(name for name in modules if name != _TOLERANCES)
    return {"instrument": code[:12], "tolerances": package.hash([_TOLERANCES])[:12]}


def adapters_part(hashes: Mapping[str, str]) -> str:
    """What a case calls, given as the hash of each source's adapter."""
    return short([f"{name} {text}" for name, text in hashes.items()]) if hashes else NONE


def installed() -> dict[str, str]:
    """Every distribution of this interpreter with its version, by the names of their folders: that costs no reading.

    A lock does not say all of an overlay, and a hand-made environment has none.
    """
    found: dict[str, str] = {}
    for place in sys.path:
        for folder in sorted(Path(place).glob("*.dist-info")):
            name, _, version = folder.name.removesuffix(".dist-info").partition("-")
            found.setdefault(name.lower().replace("_", "-").replace(".", "-"), version)
    return found


def machine_kind(environment: Environment) -> str:
    """The GPU's name, or what the CPU's kernels are chosen by: its model and its instruction sets."""
    if environment.device == "cuda":
        return environment.gpu or NONE
    model, flags = _cpu()
    return f"{model} ({', '.join(flags) or platform.machine()})"


def differing(
    before: Mapping[str, str], now: Mapping[str, str], names: tuple[str, ...] = (*RUN_PARTS, *CASE_PARTS)
) -> list[str]:
    """What has changed, one part each, in words: "torch 2.11.0 -> 2.12.0"."""
    changed = [name for name in names if before.get(name) != now.get(name)]
    return [_change(name, before.get(name, NONE), now.get(name, NONE)) for name in changed]


def _change(name: str, before: str, now: str) -> str:
    if name == "libraries":
        left, right = set(before.split(", ")), set(now.split(", "))
        gone, new = ", ".join(sorted(left - right)), ", ".join(sorted(right - left))
        return f"libraries {gone or 'nothing'} -> {new or 'nothing'}"
    return f"{name} {before[:16] if name == 'reference' else before} -> {now[:16] if name == 'reference' else now}"


def definition_hash(definition: Definition) -> str:
    """Of all but the reference, which is a part of its own, and the file's place."""
    told = _DEFINITION.dump_python(definition, mode="json", exclude={"reference", "path"})
    return short(told)


def workload_row(workload: Workload, root: Path) -> str:
    """Hash of a workload with the files of tensors that it names."""
    paths = sorted({spec.path for spec in workload.inputs.values() if spec.path})
    return short([_WORKLOAD.dump_python(workload, mode="json"), [_content(root / path) for path in paths]])


def _cpu() -> tuple[str, list[str]]:
    """Linux tells both; elsewhere the name alone."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8", errors="replace").splitlines() if told.is_file() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    flags = facts.get("flags", facts.get("Features", "")).split()
    chosen = [flag for flag in flags if flag.startswith(("avx", "amx", "fma", "sve", "asimd", "bf16", "i8mm"))]
    return facts.get("model name") or platform.processor() or platform.machine(), sorted(chosen)


def _content(file: Path) -> str:
    """Hash of a file of tensors; a missing one is an error of its case, not of the key."""
    if not file.is_file():
        return NONE
    told = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while block := opened.read(2**22):
            told.update(block)
    return told.hexdigest()


def short(value: object, digits: int = 12) -> str:
    """Hash of a text, or of plain data, as so many hexadecimal digits."""
    text = value if isinstance(value, str) else _JSON.encode(value)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
